"""A run's gradients: the noise of single examples, and each tensor's norm beside its weights'.

Shape letters: B batch, N examples.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsdl import measures, plots
from lsdl.analysis import curvature, sharpness
from lsdl.analysis import noise as noises
from lsdl.errors import UserError
from lsdl.findings.found import Findings, progress
from lsdl.sharding.mesh import batch_shards
from lsdl.specimen import Specimen

CHUNK_BYTES = 2**29  # of the gradients that are in memory together, on all devices
MOST_BARS = 40


class Gradients(NamedTuple):
    """Of the mean loss over a unit (an example, a token), example by example."""

    statistics: noises.Statistics
    square_N: np.ndarray  # each example's |g|^2
    along_N: np.ndarray  # its product with the mean gradient
    loss: float


def noise(specimen: Specimen, arguments: Any) -> Findings:
    """B_simple, and how long and how parallel the examples' gradients are."""
    specimen.apart("noise")
    if specimen.examples < 3:
        raise UserError(f"noise needs 3 examples or more, and there are {specimen.examples}.")
    found = example_gradients(specimen)
    mean_square = float(noises.square(found.statistics.gradient))
    square_N, along_N, count = found.square_N, found.along_N, specimen.examples
    # Beside the mean of the others, which an example's own gradient is no part of.
    others_N = count**2 * mean_square - 2 * count * along_N + square_N
    length_N = np.sqrt(np.maximum(square_N * others_N, 1e-60))
    angle_N = np.rad2deg(np.arccos(np.clip((count * along_N - square_N) / length_N, -1, 1)))
    square, trace = float(found.statistics.square), float(found.statistics.trace)
    values = {
        "loss": found.loss,
        "gradient_square": square,
        "trace": trace,
        "noise_scale": trace / square if square > 0 else None,
        "noise_scale_error": None,
        "cosine": float(found.statistics.cosine),
        "norms": np.sqrt(square_N).tolist(),
        "angles_deg": angle_N.tolist(),
        "population": specimen.whole,
    }
    if square > 0 and not specimen.whole:
        values["noise_scale_error"] = noises.jackknife(square_N, along_N, mean_square)
    return _of_noise(specimen, values)


def _of_noise(specimen: Specimen, values: dict[str, Any]) -> Findings:
    norm_N, angle_N = (np.sort(values[name]) for name in ("norms", "angles_deg"))
    scale, error = values["noise_scale"], values["noise_scale_error"]
    batch, notes = specimen.experiment.batch_size, []
    told = "not told from infinity" if scale is None else plots.word(scale)
    rows = [
        ("noise scale B_simple, examples", told + (f" ± {error:.2g}" if error else "")),
        ("trace of the covariance", plots.word(values["trace"])),
        ("squared gradient", plots.word(values["gradient_square"])),
        ("loss", f"{values['loss']:.6g}"),
        ("an example's gradient norm, mean", plots.word(norm_N.mean())),
        ("median", plots.word(float(np.median(norm_N)))),
        ("lowest and highest", f"{plots.word(norm_N[0])} and {plots.word(norm_N[-1])}"),
        ("cosine of two examples, mean", plots.word(values["cosine"])),
        ("within 90 degrees of the others' mean", f"{np.mean(angle_N < 90):.1%}"),
        ("the run's batch size", f"{batch:,}"),
    ]
    if scale is None:
        notes.append("The gradient is not told from zero by so few examples: give more.")
    else:
        angle = math.degrees(math.atan(math.sqrt(max(scale, 0) / batch)))
        rows.append(("a batch's angle to the gradient, degrees", f"{angle:.1f}"))
    if specimen.whole:
        notes.append("These are all examples there are: the numbers have no sampling error.")
    share_N = (np.arange(len(norm_N)) + 0.5) / len(norm_N)
    figures = [
        plots.lines(
            {"": (share_N, norm_N)},
            title="Gradient norm of each example",
            x="share of examples",
            y="|g|",
            logy=bool(norm_N[0] > 0),
            alt=f"Sorted norms of {len(norm_N)} gradients, {norm_N[0]:.3g} to {norm_N[-1]:.3g}",
        ),
        plots.lines(
            {"": (share_N, angle_N)},
            title="Angle to the mean of the others",
            x="share of examples",
            y="degrees",
            levels={"right angle": 90},
            alt=f"Sorted angles of {len(angle_N)} gradients; at 90 degrees they are noise alone",
        ),
    ]
    lead = f"The gradients of {specimen.examples:,} examples, one by one"
    return Findings(lead, ("quantity", "value"), rows, figures, values, notes)


def example_gradients(specimen: Specimen) -> Gradients:
    """The gradient of each example's loss, over the mean number of units that an example has.

    Rows are spread over the mesh as in a batch; each device holds its own rows' gradients.
    """
    params, batches = specimen.params, specimen.batches
    zeros = curvature.zeros_like(params)
    sums = noises.Sums(zeros, jnp.zeros(()), zeros)
    placed = jax.tree.map(lambda x: x.sharding, zeros)
    out = (noises.Sums(placed, None, placed), None)
    add, found = _adding(specimen, _rows_together(specimen)), []
    with progress("noise", 2 * len(batches)) as bar:
        how = dict(program=specimen.program, tick=bar.advance)
        loss, mean = sharpness.value_and_grad(specimen.loss, params, batches, **how)(params)
        step = specimen.program_of_rows(add, out_shardings=out)
        for batch in batches:
            # Virtual devices of one CPU starve with several programs in flight.
            sums, of_rows = jax.block_until_ready(step(params, batch, sums, mean))
            kept = np.asarray(batch["weight"]) > 0
            found.append([np.asarray(values)[kept] for values in of_rows])
            bar.advance()
    count = specimen.examples
    weight = specimen.program(lambda params, batch: specimen.loss(params, batch)[1])
    units = sum(float(weight(params, batch)) for batch in batches) / count  # of an example
    per_unit = noises.Sums(
        curvature.scaled(sums.gradient, 1 / units), sums.squares / units**2, sums.direction
    )
    statistics = noises.statistics(per_unit, count, population=specimen.whole)
    square_N, along_N = (np.concatenate(x).astype(float) for x in zip(*found, strict=True))
    return Gradients(statistics, square_N / units**2, along_N / units, loss)


def _rows_together(specimen: Specimen) -> int:
    """How many rows of a batch have their gradients in memory at a time."""
    size, devices = specimen.experiment.batch_size, batch_shards(specimen.experiment.mesh)
    most = CHUNK_BYTES // (4 * curvature.size(specimen.params))
    fit = [n for n in range(devices, size + 1, devices) if size % n == 0 and n <= most]
    return max(fit, default=devices)


def _adding(specimen: Specimen, rows: int) -> Callable:
    copies = _copies(specimen)

    def loss(params, example):
        some = jax.tree.map(lambda x: jnp.broadcast_to(x, (copies, *x.shape)), example)
        first = (jnp.arange(copies) == 0).astype(jnp.float32)
        return specimen.loss(params, some | {"weight": example["weight"] * first})[0]

    def add(params, batch, sums, mean):
        parts = jax.tree.leaves(batch)[0].shape[0] // rows
        # Strided, so that each part is spread over all devices.
        strided = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731

        def some(sums, examples_K):
            new, gradient_K = noises.example_sums(loss, params, examples_K)
            square_K = jax.vmap(noises.square)(gradient_K)
            along_K = jax.vmap(lambda gradient: curvature.dot(gradient, mean))(gradient_K)
            return jax.tree.map(jnp.add, sums, new), (square_K, along_K)

        sums, found_PK = lax.scan(some, sums, jax.tree.map(strided, batch))
        return sums, tuple(values_PK.T.reshape(-1) for values_PK in found_PK)

    return add


def _copies(specimen: Specimen) -> int:
    """How many rows the model is to see for one example, of which the first alone counts.

    Where it splits its work by hand, a batch has to be large enough to be split.
    """
    mesh = specimen.experiment.mesh
    if all(mesh.shape[axis] == 1 for axis in ("sequence", "expert", "stage")):
        return 1
    stages = specimen.experiment.microbatches if mesh.shape["stage"] > 1 else 1
    return batch_shards(mesh) * stages


def norms(specimen: Specimen, arguments: Any) -> Findings:
    """|w|, |g| and |w| / |g| of each parameter tensor: what LARS makes its rates of."""
    with progress("norms", len(specimen.batches)) as bar:
        at = sharpness.value_and_grad(
            specimen.loss,
            specimen.params,
            specimen.batches,
            program=specimen.program,
            tick=bar.advance,
        )
        loss, gradient = at(specimen.params)
    found = specimen.program(lambda w, g: measures.norms(w, g, g, stacked=specimen.stacked))(
        specimen.params, gradient
    )
    names = [key.removeprefix("param_norm/") for key in found if key.startswith("param_norm/")]
    tensors = [
        {
            "name": name,
            "weight": float(found[f"param_norm/{name}"]),
            "gradient": float(found[f"grad_norm/{name}"]),
            "ratio": float(found[f"trust_ratio/{name}"]),
        }
        for name in names
    ]
    kinds = ("weight", "gradient", "ratio")
    rows = [(t["name"], *(plots.word(t[kind]) for kind in kinds)) for t in tensors]
    ratios = {t["name"]: t["ratio"] for t in tensors if 0 < t["ratio"] < math.inf}
    notes, spread = [], None
    if ratios:
        low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
        spread = ratios[high] / ratios[low]
        notes.append(f"|w| / |g| is {plots.word(spread)} times as large in {high} as in {low}.")
    if len(ratios) < len(tensors):
        notes.append(
            f"{len(tensors) - len(ratios)} tensors are zero or have no gradient: LARS gives them "
            "a ratio of 1."
        )
    for tensor in tensors:
        tensor["ratio"] = tensor["ratio"] if math.isfinite(tensor["ratio"]) else None
    values = {"loss": loss, "spread": spread, "tensors": tensors}
    lead = f"Loss {loss:.4g}; the gradient is that of the mean loss"
    head = ("parameter", "|w|", "|g|", "|w| / |g|")
    return Findings(lead, head, rows, [_ratios(ratios)], values, notes)


def _ratios(ratios: dict[str, float]) -> plots.Figure:
    title, alt = "|w| / |g| of each tensor", f"Ratios of {len(ratios)} tensors"
    if len(ratios) <= MOST_BARS:
        return plots.bars(ratios, title=title, x="|w| / |g|", logx=True, alt=alt)
    place = np.arange(1, len(ratios) + 1)
    series = {"": (place, list(ratios.values()))}
    how = dict(x="place in the model", y="|w| / |g|", logy=True, alt=alt)
    return plots.scatter(series, title=title, **how)
