"""What run folders hold: configs, environments and the curves of `metrics.jsonl`, in groups."""

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lsdl.errors import UserError
from lsdl.files import read_json
from lsdl.metrics import read_rows
from lsdl.rundir import RunDir

MOST_POINTS = 400  # of a curve; more are averaged in groups


@dataclass(frozen=True)
class Run:
    """What one run folder holds."""

    path: Path
    fields: Mapping
    source: str
    env: Mapping
    plan: Mapping
    rows: Mapping[str, Sequence[Mapping]]  # by split

    @property
    def last_step(self) -> int:
        return max((row["step"] for rows in self.rows.values() for row in rows), default=0)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone."""

    label: str
    runs: Sequence[Run]


Table = tuple[list[float], list[float], list[float], list[float]]


def read_run(path: Path) -> Run:
    """The run in the folder `path`; `UserError` if there is none."""
    folder = RunDir(path)
    stored = folder.read_config()
    if stored is None:
        raise UserError(f"{path} holds no run: give a folder that lsdl.train has written.")
    rows = defaultdict(list)
    try:
        for row in read_rows(folder.metrics):
            rows[row["split"]].append(row)
        others = [folder.env, folder.plan]
        env, plan = (read_json(f) if f.exists() else {} for f in others)
    except UserError as error:
        raise UserError(f"{path} is not as lsdl writes it: {error}") from error
    if not (isinstance(env, dict) and isinstance(plan, dict)):
        raise UserError(f"{path} is not as lsdl writes it: env.json and plan.json hold objects.")
    source = str(stored.get("source", ""))
    return Run(Path(path), stored["config"], source, env, plan, dict(rows))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Groups of runs that differ in their seed alone, each called by what it differs in."""
    groups = defaultdict(list)
    for run in runs:
        fields = {k: v for k, v in run.fields.items() if k != "seed"}
        groups[json.dumps(fields, sort_keys=True)].append(run)
    labels = []
    for members in groups.values():
        name = members[0].fields["name"]
        different = differences([run for run in runs if run.fields["name"] == name])
        told = list(_told(members[0], different))
        named = [] if told and len({run.fields["name"] for run in runs}) == 1 else [name]
        label = " ".join(named + told)
        labels.append(label if label not in labels else f"{label} #{len(labels) + 1}")
    return [Group(label, runs) for label, runs in zip(labels, groups.values(), strict=True)]


def _told(run: Run, fields: Sequence[str]) -> Iterator[str]:
    """Up to three of the fields, with the run's values, the shortest way."""
    quiet = ("seed", "checkpoint.", "log.", "eval.")
    fields = [f for f in fields if not f.startswith(quiet) and run.fields.get(f) is not None]
    for field in fields[:3]:
        name, value = field.split(".")[-1], brief(run.fields[field], 32)
        yield value if name == "name" else f"{name}={value}"


def differences(runs: Sequence[Run]) -> list[str]:
    """The config fields in which the runs differ."""
    fields = dict.fromkeys(field for run in runs for field in run.fields)
    return [f for f in fields if len({json.dumps(run.fields.get(f)) for run in runs}) > 1]


def curve(group: Group, split: str, name: str) -> Table | None:
    """Steps, and the mean, lowest and highest over the seeds; None if there are no values."""
    columns = []
    for run in group.runs:
        found = {row["step"]: row.get(name) for row in run.rows.get(split, ())}
        columns.append({step: y for step, y in found.items() if isinstance(y, int | float)})
    columns = [column for column in columns if column]
    if not columns:
        return None
    # Where some seeds have not come yet, a mean of the others would be a jump of the curve.
    steps = sorted(set.intersection(*map(set, columns)) or set.union(*map(set, columns)))
    size = math.ceil(len(steps) / MOST_POINTS)
    table = []
    for i in range(0, len(steps), size):
        some = steps[i : i + size]
        values = [[column[step] for step in some if step in column] for column in columns]
        means = [statistics.fmean(v) for v in values if v]
        table.append((some[-1], statistics.fmean(means), min(means), max(means)))
    return tuple(map(list, zip(*table, strict=True)))


def brief(value: object, most: int = 60) -> str:
    """The value as JSON writes it, text without quotes, cut to `most` letters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
