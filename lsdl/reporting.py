"""Reports of runs: their folders as one self-contained HTML page.

Read are `config.json`, `env.json`, `metrics.jsonl` and `plan.json`; nothing of them is executed.
"""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lsdl import dynamics, foresight, page, plots
from lsdl.page import Markup, element
from lsdl.runs import Group, Run, Table, brief, curve, differences, grouped, read_run

NO_METRIC = {"step", "split", "examples_seen", "step_time_s", "examples_per_s", "learning_rate"}
NO_METRIC |= {"examples", "tokens", "pairs", *dynamics.OF_STEP}


def runs_page(folders: Sequence[Path], *, title: str = "") -> str:
    """Curves, norms, throughput, results, config differences and environments of the runs."""
    runs = [read_run(Path(folder)) for folder in folders]
    groups = grouped(runs)
    title = title or ", ".join(dict.fromkeys(run.fields["name"] for run in runs))
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    lead = f"{count} in {len(groups)} group{'s' * (len(groups) > 1)}"
    note = "A line is the mean over the seeds of a group, the band its lowest and highest."
    figures, noise = _Figures(), dynamics.noise_figures(groups)
    return page.document(
        title,
        element("p", lead, class_="lead"),
        element("p", note, class_="quiet") if len(runs) > len(groups) else "",
        page.section("Results", _results(groups)),
        page.section("Curves", figures.row(_metric_figures(groups))),
        page.section("Schedule", figures.row(_schedule_figures(groups))),
        page.section("Norms", figures.row(_norm_figures(groups))),
        page.section(
            "Layers", figures.row(dynamics.layer_figures(groups)), dynamics.extremes(groups)
        ),
        page.section("Gradient noise", figures.row(noise), dynamics.noise_text(groups)),
        page.section("Throughput", figures.row(_throughput_figures(groups))),
        page.section("Predicted and measured", foresight.section(runs)),
        page.section("Memory", *_memory(groups, figures)),
        page.section("What differs", _differences(runs)),
        page.section("Environment", _environments(runs)),
    )


class _Figures:
    """Numbers the figures of one page, so that no two share an id."""

    def __init__(self):
        self.count = 0

    def row(self, figures: Iterable[plots.Figure | None]) -> Markup:
        shown = []
        for figure in figures:
            if figure:
                self.count += 1
                shown.append(page.figure(figure.svg(prefix=f"g{self.count}", themed=True)))
        return page.row(*shown)


def _lines(groups, split: str, name: str, *, title: str, y: str, log=False) -> plots.Figure | None:
    found = {group.label: curve(group, split, name) for group in groups}
    return _drawn(found, title=title, y=y, log=log)


def _drawn(found: Mapping[str, Table | None], *, title: str, y: str, log=False):
    """A line for each that has values, without its label if it is the only one."""
    among = [*found]
    found = {label: table for label, table in found.items() if table}
    if not found:
        return None
    alone = len(found) == 1
    if alone:
        ((name, only),) = found.items()
        found, among = {"": only}, ["" if label == name else label for label in among]
    ys = [value for table in found.values() for value in table[1] if value > 0]
    log = log and max(ys, default=1) > 5 * min(ys, default=1)
    words = "" if alone else f", a line for each of {', '.join(found)}"
    alt = f"{title}: {y} by step{words}"
    return plots.lines(found, title=title, x="step", y=y, logy=log, among=among, alt=alt)


def _metric_figures(groups: Sequence[Group]) -> Iterator[plots.Figure | None]:
    rows = [row for g in groups for run in g.runs for row in run.rows.get("valid", ())]
    names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in NO_METRIC]
    for name in sorted(names or ["loss"], key=("loss", "accuracy", *names).index):
        told = name.replace("_", " ")
        if len(groups) == 1:
            found = {split: curve(groups[0], split, name) for split in ("train", "valid")}
            found = {split: table for split, table in found.items() if table}
            alt = f"{told} by step on the {' and '.join(found)} split"
            if found:
                yield plots.lines(found, title=told.capitalize(), x="step", y=told, alt=alt)
            continue
        for split, word in (("train", "Training"), ("valid", "Validation")):
            yield _lines(groups, split, name, title=f"{word} {told}", y=told)


def _schedule_figures(groups: Sequence[Group]) -> Iterator[plots.Figure | None]:
    yield _lines(groups, "train", "learning_rate", title="Learning rate", y="learning rate")
    sizes = {}
    for group in groups:
        if table := curve(group, "train", "examples_seen"):
            # Where a point is a mean of several rows, the first has none before it.
            start = [0] if len(table[0]) == 1 else []
            steps, seen = start + table[0], start + table[1]
            pairs = range(1, len(steps))
            size = [(seen[i] - seen[i - 1]) / (steps[i] - steps[i - 1]) for i in pairs]
            sizes[group.label] = (steps[1:], size)
        else:
            sizes[group.label] = None
    yield _drawn(sizes, title="Batch size", y="examples a step")


def _norm_figures(groups: Sequence[Group]) -> Iterator[plots.Figure | None]:
    titles = {"grad_norm": "Gradient", "update_norm": "Update", "param_norm": "Parameters"}
    for name, title in titles.items():
        yield _lines(groups, "train", name, title=title, y="norm", log=True)


def _throughput_figures(groups: Sequence[Group]) -> Iterator[plots.Figure | None]:
    yield _lines(groups, "train", "examples_per_s", title="Throughput", y="examples/s")
    yield _lines(groups, "train", "step_time_s", title="Step time", y="seconds", log=True)


def _memory(groups: Sequence[Group], figures: _Figures) -> Iterator[Markup]:
    found, rows = {}, []
    for group in groups:
        for run in group.runs:
            names = [n for row in run.rows.get("train", ()) for n in row if _is_memory(n)]
            for name in dict.fromkeys(names):
                found[f"{group.label} {name}"] = curve(group, "train", name)
            for holder in (run.env, run.plan):
                rows += [
                    (str(run.path), name, f"{value:,}")
                    for name, value in holder.items()
                    if _is_memory(name) and isinstance(value, int | float)
                ]
    if found:
        yield figures.row([_drawn(found, title="Memory", y="as recorded")])
    if rows:
        yield page.table(("run", "quantity", "value"), rows)
    if not found and not rows:
        told = "None of these runs recorded memory. Before a run, python -m lsdl.plan counts it."
        yield element("p", told)


def _results(groups: Sequence[Group]) -> Markup:
    """The newest row of each split, mean and spread over seeds, and the gap of test and train."""
    splits = {"train_eval": "train", "valid": "valid", "test": "test"}
    names, lines = [], []
    for group in groups:
        last = {
            split: [run.rows[split][-1] for run in group.runs if run.rows.get(split)]
            for split in splits
        }
        if not any(last.values()):
            last["train"] = [run.rows["train"][-1] for run in group.runs if run.rows.get("train")]
        for split, rows in last.items():
            values = defaultdict(list)
            for row in rows:
                for name in filter(_is_result, row):
                    values[name].append(row[name])
            names += [name for name in sorted(values) if name not in names]
            if rows:
                step = max(row["step"] for row in rows)
                told = splits.get(split, "train, last step")
                lines.append((group.label, told, f"{step:,}", len(rows), values))
        if last["train_eval"] and last["test"]:
            pairs = [r for r in group.runs if r.rows.get("train_eval") and r.rows.get("test")]
            gaps = defaultdict(list)
            for run in pairs:
                train, test = run.rows["train_eval"][-1], run.rows["test"][-1]
                for name in filter(_is_result, train.keys() & test.keys()):
                    gaps[name].append(test[name] - train[name])
            lines.append((group.label, "gap: test - train", "", len(pairs), gaps))
    names = sorted(names, key=("loss", "accuracy", *names).index)
    rows = [(*head, *(_spread(values.get(n, ())) for n in names)) for *head, values in lines]
    if not rows:
        return element("p", "Nothing is measured yet.")
    head = ("group", "split", "step", "runs", *names)
    first = 0 if len(groups) > 1 else 1  # the only group needs no name
    return page.table(head[first:], [row[first:] for row in rows])


def _is_result(name: str) -> bool:
    return name not in NO_METRIC and "/" not in name and not _is_memory(name) and "norm" not in name


def _is_memory(name: str) -> bool:
    return "bytes" in name or "gib" in name


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.4f}"
    return f"{mean} ± {statistics.stdev(values):.4f}" if len(values) > 1 else mean


def _differences(runs: Sequence[Run]) -> Markup:
    fields = differences(runs)
    if not fields:
        return element("p", "One config, printed in config.json of the run folder.")
    rows = [(str(run.path), *(brief(run.fields.get(f)) for f in fields)) for run in runs]
    return page.table(("run", *fields), rows)


def _environments(runs: Sequence[Run]) -> Markup:
    rows = []
    for run in runs:
        env, devices = run.env, run.env.get("devices", {})
        kinds = ", ".join(map(str, devices.get("kinds", ())))
        versions = ", ".join(f"{k} {v}" for k, v in env.get("versions", {}).items())
        rows.append(
            (
                str(run.path),
                f"{run.last_step:,}",
                f"{devices.get('count', '?')} x {kinds}, {devices.get('processes', '?')} process",
                f"Python {env.get('python', '?')}, {versions}",
                str(env.get("platform", "?")),
                str(env.get("commit") or "none")[:12],
                str(env.get("time", "?")),
                len(env.get("resumed", ())),
            )
        )
    head = ("run", "steps", "devices", "versions", "platform", "commit", "started", "resumed")
    commands = [" ".join(map(str, run.env.get("command", ()))) for run in runs]
    listed = [element("pre", command) for command in commands if command]
    return Markup(page.table(head, rows, cards=True) + page.details("Commands", *listed))
