"""What a run's rate and batch size are at which step: a table, a drawing in letters, a figure."""

import html
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsdl.errors import FINISHED
from lsdl.files import write_json
from lsdl.optim.conditions import lines as condition_lines

WIDE, HIGH = 64, 10


def make(experiment: Any) -> dict[str, Any]:
    """JSON values: rows at the steps where something changes and between, and SGD's conditions.

    `experiment`: what has a `schedule`, its `conditions`, a `ramp` and `total_steps`.
    """
    last, ramp = experiment.total_steps - 1, experiment.ramp
    steps = {*np.linspace(0, last, 11).astype(int).tolist(), *(p.first_step for p in ramp.phases)}
    steps = sorted(steps)
    rows = [
        {
            "step": step + 1,
            "examples": ramp.examples_before(step),
            "batch_size": ramp.batch_size_at(step),
            "learning_rate": rate,
        }
        for step, rate in zip(steps, _rates(experiment, steps), strict=True)
    ]
    return {"rows": rows, "conditions": vars(experiment.conditions)}


def _rates(experiment: Any, steps: list[int]) -> list[float]:
    rates = jax.jit(jax.vmap(lambda step: 0.0 * step + experiment.schedule(step)))
    return [float(rate) for rate in rates(np.asarray(steps, np.int32))]


def text(found: dict[str, Any], experiment: Any) -> str:
    """`found` of `make`, for people."""
    head = f"{'step':>12}{'examples before':>18}{'batch':>10}{'rate':>14}"
    rows = [
        f"{row['step']:>12,}{row['examples']:>18,}{row['batch_size']:>10,}"
        f"{row['learning_rate']:>14.4g}"
        for row in found["rows"]
    ]
    verdict = condition_lines(experiment.conditions)
    return "\n".join([head, *rows, "", *drawing(experiment), "", *verdict])


def drawing(experiment: Any) -> list[str]:
    """The rate over the steps, a column for each part of the run, highest at the top."""
    last = experiment.total_steps - 1
    steps = np.linspace(0, last, min(WIDE, last + 1)).astype(int).tolist()
    rates = _rates(experiment, steps)
    top = max(*rates, 1e-30) if len(rates) > 1 else max(rates[0], 1e-30)
    heights = [round(rate / top * HIGH) for rate in rates]
    shown = ["".join("#" if height >= level else " " for height in heights).rstrip()
             for level in range(HIGH, 0, -1)]  # fmt: skip
    marks = [f"{top:.3g}", *[""] * (HIGH - 1)]
    body = [f"{mark:>10} |{line}" for mark, line in zip(marks, shown, strict=True)]
    left = f"{0:>10} +{'-' * len(steps)}"
    return [*body, left, f"{'':12}step 1 to {last + 1:,}"]


def show(experiment: Any, *, html_file: Path | None, json_file: Path | None) -> int:
    """Print the timetable and write what is asked for."""
    found = make(experiment)
    print(text(found, experiment), *(f"note: {note}" for note in experiment.notes), sep="\n")
    if html_file:
        html_file.write_text(page(found, experiment))
    if json_file:
        write_json(json_file, {"name": experiment.name, "schedule": found})
    return FINISHED


def page(found: dict[str, Any], experiment: Any) -> str:
    """One HTML file that needs no other."""
    from lsdl import plots  # matplotlib takes a second, and only a figure needs it

    last = experiment.total_steps - 1
    steps = sorted({*np.linspace(0, last, min(400, last + 1)).astype(int).tolist()})
    series = {"rate": (np.asarray(steps) + 1, np.asarray(_rates(experiment, steps)))}
    rate = plots.lines(series, title="learning rate", x="step", y="rate")
    ends = [*(p.first_step for p in experiment.ramp.phases), last + 1]
    corners = [(step, size) for (a, b), phase in zip(
        itertools.pairwise(ends), experiment.ramp.phases, strict=True)
        for step, size in ((a + 1, phase.batch_size), (b, phase.batch_size))]  # fmt: skip
    sizes = {"batch": tuple(map(np.asarray, zip(*corners, strict=True)))}
    batch = plots.lines(sizes, title="batch size", x="step", y="examples")
    name = html.escape(experiment.name)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        f"<h1>{name}</h1>{rate.svg()}{batch.svg()}<pre>{html.escape(text(found, experiment))}"
        "</pre></html>\n"
    )
