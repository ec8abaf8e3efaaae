"""Under- or overfitting of a run, from its metrics alone."""

from typing import Any

import numpy as np

from lsdl import plots
from lsdl.analysis import fit
from lsdl.errors import UserError
from lsdl.findings.found import Findings
from lsdl.runs import Run
from lsdl.summary import FINAL


def diagnose(run: Run, arguments: Any) -> Findings:
    """The lectures' rules, on the run's curves."""
    curves = {split: _curve(run, split) for split in ("train", "valid")}
    for split, (steps, _) in curves.items():
        if not len(steps):
            raise UserError(f"{run.path} has no {split} loss in its metrics: nothing to diagnose.")
    evaluated = _curve(run, FINAL["train"])[1]
    found = fit.diagnose(
        *curves.values(),
        target=arguments.target,
        of_state=float(evaluated[-1]) if len(evaluated) else None,
    )
    large = f"{fit.LARGE:g} of the first" if arguments.target is None else "--target"
    rows = [
        ("verdict", found.verdict),
        ("first training loss", plots.word(found.first)),
        ("training loss at the end", plots.word(found.train)),
        ("large from", f"{_bound(found, arguments):.4g} on ({large})"),
        ("its last quarter", "flat" if found.stagnated else "falling"),
        ("validation loss at the end", plots.word(found.valid)),
        ("gap, validation - training", plots.word(found.gap)),
        ("risen since its lowest", plots.word(found.risen)),
        ("step of the lowest validation loss", f"{found.best_step:,}"),
        ("step of the smallest gap", f"{found.closest_step:,}"),
    ]
    title = {"under": "Underfitting", "over": "Overfitting", "ok": "Neither under nor over"}
    figure = plots.lines(
        {"training": curves["train"], "validation": curves["valid"]},
        title=title[found.verdict],
        x="step",
        y="loss",
        levels={"large": _bound(found, arguments)},
        alt=f"Training and validation loss; the verdict is {found.verdict}",
    )
    notes = []
    if not len(evaluated):
        notes.append(
            "The run is not complete: its training loss is that of its batches, with dropout and "
            "augmentation where it has these, so that the gap is of unlike losses."
        )
    lead = f"{found.verdict}: {found.advice}"
    return Findings(lead, ("quantity", "value"), rows, [figure], found._asdict(), notes)


def _bound(found: fit.Fit, arguments: Any) -> float:
    return fit.LARGE * abs(found.first) if arguments.target is None else arguments.target


def _curve(run: Run, split: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [r for r in run.rows.get(split, ()) if np.isfinite(r.get("loss", np.nan))]
    return np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows], float)
