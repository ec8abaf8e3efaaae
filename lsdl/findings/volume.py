"""How wide a run's minimum is: radii in random directions, and the logarithm of its volume.

Shape letters: K directions.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import curvature, landscape
from lsdl.analysis import volume as volumes
from lsdl.errors import UserError
from lsdl.findings.found import Findings, progress
from lsdl.specimen import Specimen

RISE = 0.1  # of the loss, at the edge of the basin, unless --cut says where that is
KEPT_BYTES = 2**29  # of directions that are kept; more are drawn anew each time
LOW, HIGH, FACTOR, TOLERANCE = 1e-3, 1e2, 1.5, 1e-3


def volume(specimen: Specimen, arguments: Any) -> Findings:
    """The distance to the edge of the basin along random directions."""
    params, count = specimen.params, arguments.directions
    draw, dims = _directions(specimen, arguments)
    grown = math.ceil(math.log(HIGH / LOW, FACTOR))
    halved = math.ceil(math.log2(math.log(FACTOR) / math.log(1 + TOLERANCE)))
    with progress("volume", count * (2 + grown + halved)) as bar:
        at = _loss(specimen)
        loss = at(params)
        cut = loss + RISE if arguments.cut is None else arguments.cut
        if not loss < cut:
            raise UserError(f"--cut={cut:g} must be above the loss at the parameters, {loss:.4g}.")

        def counted(params):
            bar.advance()
            return at(params)

        losses = volumes.drawn_losses(counted, params, draw, program=specimen.program)
        how = dict(low=LOW, high=HIGH, factor=FACTOR, tolerance=TOLERANCE)
        found = volumes.radii(losses, count, cut=cut, **how)
    return _told(specimen, arguments, found, dims=dims, loss=loss, cut=cut)


def _told(
    specimen: Specimen, arguments: Any, found: volumes.Radii, *, dims: int, loss: float, cut: float
) -> Findings:
    radius_K = np.sort(found.radius_K)
    count = len(radius_K)
    log_K = np.log10(radius_K)
    error = float(log_K.std(ddof=1) / math.sqrt(count)) if count > 1 else 0.0
    floored, still_open = int(found.floored_K.sum()), int(found.open_K.sum())
    values = {"loss": loss, "cut": cut, "dims": dims, "radii": found.radius_K.tolist()}
    values |= {"floored": floored, "open": still_open, "direction": arguments.direction}
    values |= {"log10_radius": float(log_K.mean()), "log10_radius_error": error}
    rows = [
        ("loss at the parameters", f"{loss:.6g}"),
        ("loss at the edge", f"{cut:.6g}"),
        ("radius, median", plots.word(float(np.median(radius_K)))),
        ("lowest and highest", f"{plots.word(radius_K[0])} and {plots.word(radius_K[-1])}"),
        ("parameters that move, D", f"{dims:,}"),
        ("D times log10 of the radius, mean", _with(dims * log_K.mean(), dims * error)),
    ]
    unit = "the length of the parameters' own filters"
    if arguments.direction == "random":
        unit = "1"
        basin = volumes.volume(found.radius_K, dims)
        values |= {"log10_volume": basin.typical, "log10_volume_error": error * dims}
        rows.append(("log10 of the volume", _with(basin.typical, dims * error)))
    elif arguments.direction == "tensor":
        unit = "the length of the parameters' own tensors"
    notes = [f"Directions have {unit}: compare with runs of the same model alone."]
    if floored or still_open:
        notes.append(
            f"{floored} radii are below {LOW:g} and {still_open} above {HIGH:g}: these stand at "
            "the limit."
        )
    figure = plots.lines(
        {"": (np.arange(1, count + 1), radius_K)},
        title="Distance to the edge of the basin",
        x="direction, the nearest first",
        y="radius",
        logy=True,
        alt=f"Radii in {count} directions, from {radius_K[0]:.3g} to {radius_K[-1]:.3g}",
    )
    lead = f"{count} random directions ({arguments.direction}), up to a loss of {cut:.4g}"
    return Findings(lead, ("quantity", "value"), rows, [figure], values, notes)


def _with(value: float, error: float) -> str:
    return f"{value:.5g} ± {error:.2g}"


def _directions(specimen: Specimen, arguments: Any) -> tuple[Callable[[int], Any], int]:
    """(the i-th direction, how many parameters it moves)."""
    params, key = specimen.params, jax.random.key(arguments.seed)
    size, dims = curvature.size(params), specimen.filter_dims
    if arguments.direction == "pca":
        raise UserError("volume draws its directions: --direction=random, tensor or filter.")

    def draw(i: int) -> Any:
        drawn = landscape.random(params, jax.random.fold_in(key, i))
        if arguments.direction == "filter":
            return landscape.filter_normalised(drawn, params, dims)
        if arguments.direction == "tensor":
            return landscape.tensor_normalised(drawn, params)
        return curvature.unit(drawn)

    moved = size
    if arguments.direction == "filter":
        shapes = {p.path.removeprefix("params/"): p.shape for p in specimen.experiment.placements}
        moved = sum(math.prod(shapes[name]) for name, filters in dims.items() if filters)
    kept = arguments.directions if 4 * size * arguments.directions <= KEPT_BYTES else 1
    return functools.lru_cache(maxsize=kept)(draw), moved


def _loss(specimen: Specimen) -> Callable[[Any], float]:
    """The mean loss over all batches."""
    step = specimen.program(specimen.loss)

    def at(params: Any) -> float:
        # Virtual devices of one CPU starve with several programs in flight.
        parts = [jax.block_until_ready(step(params, batch)) for batch in specimen.batches]
        loss, weight = np.sum([[float(x) for x in part] for part in parts], 0)
        return float(loss / weight)

    return at
