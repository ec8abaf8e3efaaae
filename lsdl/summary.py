"""What a user reads of a run at its start and at its end."""

import math
from dataclasses import dataclass, field

from lsdl.experiment import Experiment
from lsdl.metrics import read_rows
from lsdl.rundir import RunDir
from lsdl.state import TrainState

# The last rows of a complete run: the final state on every split.
FINAL = {"train": "train_eval", "valid": "valid", "test": "test"}


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    signal: int | None = None  # that asked it to stop; None: it is complete
    state: TrainState | None = None
    results: dict[str, dict] = field(default_factory=dict)  # {split: metrics} of the final state
    examples_per_s: float | None = None  # while training; None if no step was taken
    wall_s: float = 0.0
    best_step: int | None = None
    trained: bool = True
    spike: int | None = None  # a step to rewind from


def results(folder: RunDir, experiment: Experiment) -> dict[str, dict]:
    """{split: metrics} that a complete run wrote at its end; {} if it is not complete."""
    last = experiment.total_steps
    rows = {row["split"]: row for row in read_rows(folder.metrics) if row["step"] == last}
    if any(name not in rows for name in FINAL.values()):
        return {}
    return {split: rows[name] for split, name in FINAL.items()}


def best_step(folder: RunDir) -> int | None:
    rows = read_rows(folder.metrics)
    valid = [r for r in rows if r["split"] == "valid" and math.isfinite(r["loss"])]
    return min(valid, key=lambda row: row["loss"])["step"] if valid else None


def heading(experiment: Experiment) -> str:
    """What is about to run, in a line, and what the user should know about it."""
    axes = ",".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    device = experiment.mesh.devices.flat[0].device_kind
    line = (
        f"{experiment.name}: {experiment.num_parameters:,} parameters, "
        f"{experiment.total_steps:,} steps of {experiment.batch_size:,} examples on "
        f"{experiment.mesh.size} {device} ({axes or 'one device'})"
    )
    return "\n".join([line, *(f"note: {note}" for note in experiment.notes)])


def table(outcome: Outcome, experiment: Experiment) -> str:
    """The few lines that a run ends with."""
    columns = ["loss", *experiment.task.shown]
    probes = [name for name in outcome.results["test"] if name not in columns]
    columns += [name for name in probes if name.endswith("_accuracy")]
    unit = experiment.task.unit
    width = [max(10, len(name) + 2) for name in columns]
    named = "".join(f"{name:>{w}}" for name, w in zip(columns, width, strict=True))
    lines = [f"{'split':8}{unit:>10}{named}"]
    for split, metrics in outcome.results.items():
        cells = [
            f"{metrics[n]:>{w}.4f}" if n in metrics else " " * w
            for n, w in zip(columns, width, strict=True)
        ]
        lines.append(f"{split:8}{metrics[unit]:>10,}{''.join(cells)}".rstrip())
    train, test = outcome.results["train"], outcome.results["test"]
    gaps = [
        f"{test[n] - train[n]:>+{w}.4f}" if n in train else " " * w
        for n, w in zip(columns, width, strict=True)
    ]
    lines.append(f"{'gap':8}{'':>10}{''.join(gaps)}  test - train")
    facts = [f"{outcome.step:,} steps"]
    if outcome.examples_per_s:
        facts += [f"{outcome.examples_per_s:,.0f} examples/s", f"{outcome.wall_s:.1f} s in all"]
    if outcome.best_step is not None:
        facts.append(f"lowest valid loss at step {outcome.best_step:,}")
    return "\n".join([*lines, ", ".join(facts)])
