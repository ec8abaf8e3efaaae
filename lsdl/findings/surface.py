"""A run's loss surface: along a line, on a plane, and on the way to another run.

Shape letters: P points, T checkpoints.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import landscape
from lsdl.errors import UserError
from lsdl.findings.found import Findings, progress
from lsdl.specimen import Specimen, opened

DIRECTIONS = ("filter", "tensor", "random", "pca")


def line(specimen: Specimen, arguments: Any) -> Findings:
    """The loss along one direction."""
    (direction,), notes, _ = _directions(specimen, arguments, count=1)
    points = landscape.line(-arguments.radius, arguments.radius, arguments.resolution)
    found = _surface(specimen, arguments, [direction], points)
    x = f"distance along a direction ({arguments.direction})"
    return _of_line(specimen, points[:, 0], found, x=x, notes=notes)


def interpolate(specimen: Specimen, arguments: Any) -> Findings:
    """The loss on the straight line to another run's, or step's, parameters."""
    other, step = arguments.to or arguments.run, arguments.to_step
    if arguments.to:
        there = opened(other, step=step, split=specimen.split, examples=1, mesh=arguments.mesh)
        end, step = there.params, there.step
    else:
        end = specimen.at(step)
    shapes = [jax.tree.map(np.shape, tree) for tree in (specimen.params, end)]
    if shapes[0] != shapes[1]:
        raise UserError(f"{other} has parameters of other shapes: interpolate between like models.")
    direction = landscape.difference(specimen.params, end)
    points = landscape.line(-0.5, 1.5, arguments.resolution)
    found = _surface(specimen, arguments, [direction], points)
    barrier = landscape.barrier(points[:, 0], found["loss"])
    x = f"0: step {specimen.step}, 1: step {step} of {other}"
    findings = _of_line(specimen, points[:, 0], found, x=x, notes=[])
    findings.rows.append(("barrier", plots.word(barrier), *[""] * (len(findings.head) - 2)))
    findings.values |= {"barrier": barrier, "to": str(other), "to_step": step}
    return findings


def _of_line(specimen: Specimen, x_P, found: Mapping, *, x: str, notes: list[str]) -> Findings:
    names = ["loss", *(n for n in specimen.experiment.task.shown if n in found)]
    figures = [
        plots.lines(
            {"": (x_P, found[name])},
            title=f"{name.capitalize()} of {specimen.split}",
            x=x,
            y=name,
            alt=f"{name} at {len(x_P)} points from {x_P[0]:g} to {x_P[-1]:g}",
        )
        for name in names
    ]
    shown = sorted({0, len(x_P) // 4, len(x_P) // 2, 3 * len(x_P) // 4, len(x_P) - 1})
    rows = [(plots.word(x_P[i]), *(f"{found[name][i]:.6g}" for name in names)) for i in shown]
    values = {"x": x_P.tolist(), **{name: y_P.tolist() for name, y_P in found.items()}}
    lead = f"{len(x_P)} points of {specimen.examples:,} examples each"
    return Findings(lead, ("x", *names), rows, figures, values, notes)


def plane(specimen: Specimen, arguments: Any) -> Findings:
    """The loss on a plane of points."""
    directions, notes, path = _directions(specimen, arguments, count=2)
    number = arguments.resolution
    if path is None:
        x = y = landscape.line(-arguments.radius, arguments.radius, number)
    else:  # the plane is as large as the path in it
        x, y = (_around(c_T, number) for c_T in path.points_TQ.T)
    points = landscape.grid(x, y)
    found = _surface(specimen, arguments, directions, points)
    loss_YX = found["loss"].reshape(number, number)
    low, high = float(np.nanmin(loss_YX)), float(np.nanmax(loss_YX))
    rows = [("lowest", f"{low:.6g}"), ("highest", f"{high:.6g}")]
    if path is None and number % 2:
        rows.insert(0, ("centre", f"{loss_YX[number // 2, number // 2]:.6g}"))
    values = {"x": x[:, 0].tolist(), "y": y[:, 0].tolist()}
    values |= {name: z.reshape(number, number).tolist() for name, z in found.items()}
    drawn, title = {}, f"Loss of {specimen.split}"
    if path is not None:
        values |= {"path": path.points_TQ.tolist(), "shares": path.shares.tolist()}
        shares = f"{path.shares[0]:.1%} and {path.shares[1]:.1%}"
        rows.append(("of the path's extent", shares))
        title += f", and the path of {len(path.points_TQ)} checkpoints"
        drawn = dict(points={"checkpoints": path.points_TQ.T}, path=True)
    figure = plots.heatmap(
        loss_YX,
        title=title,
        x=f"direction 1 ({arguments.direction})",
        y="direction 2",
        columns=[float(f"{v:.3g}") for v in x[:, 0]],
        rows=[float(f"{v:.3g}") for v in y[:, 0]],
        z="loss",
        logz=low > 0 and high > 20 * low,
        alt=f"Loss on {number} x {number} points, from {low:.3g} to {high:.3g}",
        **drawn,
    )
    lead = f"{number} x {number} points of {specimen.examples:,} examples each"
    return Findings(lead, ("loss", "value"), rows, [figure], values, notes)


def _around(coordinates: np.ndarray, number: int) -> np.ndarray:
    low, high = float(coordinates.min()), float(coordinates.max())
    margin = 0.2 * max(high - low, 1e-3)
    return landscape.line(low - margin, high + margin, number)


def _directions(specimen: Specimen, arguments, *, count: int):
    """(`count` directions from the centre, notes, the path of `--direction=pca`)."""
    centre, key = specimen.params, jax.random.key(arguments.seed)
    if arguments.direction == "pca":
        steps = [step for step in specimen.steps() if step <= specimen.step]
        if len(steps) < 3:
            raise UserError(
                f"--direction=pca needs 3 checkpoints or more, and there are {len(steps)}: train "
                "with --config.checkpoint.keep_latest=100."
            )
        path = landscape.principal(map(specimen.at, steps), centre, count=count)
        return path.directions, [f"The path has {len(steps)} checkpoints."], path
    drawn = [landscape.random(centre, jax.random.fold_in(key, i)) for i in range(count)]
    if arguments.direction == "tensor":
        drawn = [landscape.tensor_normalised(d, centre) for d in drawn]
    if arguments.direction == "filter":
        dims = specimen.filter_dims
        drawn = [landscape.filter_normalised(d, centre, dims) for d in drawn]
        return drawn, ["Biases, and the scales and shifts of norms, do not move."], None
    return drawn, [], None


def _surface(specimen: Specimen, arguments, directions, points) -> dict[str, np.ndarray]:
    recalibrate = None
    if arguments.recalibrate:
        if "batch_stats" not in specimen.variables:
            raise UserError("--recalibrate needs a model with BatchNorm: this one has none.")
        recalibrate = specimen.recalibrate
    chunk = min(64, len(points))
    ticks = -(-len(points) // chunk) * len(specimen.batches)
    with progress(arguments.kind, ticks) as bar:
        return landscape.surface(
            specimen.sums,
            specimen.variables,
            directions,
            points,
            specimen.batches,
            recalibrate=recalibrate,
            program=specimen.program,
            chunk=chunk,
            tick=bar.advance,
        )
