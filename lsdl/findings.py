"""What each kind of `lsdl.analyze` measures of a run: a table, figures, and values to store.

Shape letters: P points, T places of a density, or checkpoints.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import curvature, landscape, sharpness
from lsdl.errors import UserError
from lsdl.progress import Progress
from lsdl.specimen import Specimen, opened

DIRECTIONS = ("filter", "tensor", "random", "pca")
TOLERANCE = 1e-3  # an eigenvalue's residual over the largest: see `curvature.eigenpairs`
EPSILONS = (1e-3, 5e-4)  # of Keskar's box
SAM_RHO = 0.05


@dataclass
class Findings:
    """What was found, as it is told, drawn and stored."""

    lead: str
    head: Sequence[str]
    rows: list[Sequence[object]]
    figures: list[plots.Figure]
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def hessian(specimen: Specimen, arguments: Any) -> Findings:
    """Eigenvalues, trace, condition and spectral density."""
    params, key = specimen.params, jax.random.key(arguments.seed)
    most = (arguments.steps + (arguments.starts - 1) * arguments.steps // 2) * len(specimen.batches)
    with _progress("hessian", most) as bar:
        product = curvature.mean(
            specimen.product(arguments.of),
            params,
            specimen.batches,
            program=specimen.program,
            tick=bar.advance,
        )
        first, rest = jax.random.split(key)
        steps = arguments.steps
        pairs = curvature.eigenpairs(
            product, params, top=arguments.top, key=first, steps=steps, tolerance=TOLERANCE
        )
        more = curvature.random_starts(
            product, params, starts=arguments.starts - 1, steps=steps // 2, key=rest
        )
        spectrum = curvature.quadrature(itertools.chain([pairs.lanczos], more))
    return _of_spectrum(specimen, arguments.of, pairs, spectrum)


def _of_spectrum(specimen, matrix: str, pairs, spectrum) -> Findings:
    largest, rate = float(pairs.values[0]), specimen.rate
    trace, error = spectrum.trace()
    edge = sharpness.edge(largest, rate)
    rows = [
        (f"eigenvalue {i}", plots.word(value), plots.word(residual))
        for i, (value, residual) in enumerate(zip(pairs.values, pairs.residuals, strict=True), 1)
    ]
    rows += [
        ("smallest eigenvalue", plots.word(pairs.smallest), plots.word(pairs.smallest_residual)),
        ("trace", plots.word(trace), plots.word(error)),
        ("condition number, at least", plots.word(pairs.lanczos.condition()), ""),
        (f"lambda_max eta / 2 at eta {rate:.3g}", plots.word(edge), ""),
    ]
    low = min(values_K.min() for values_K in spectrum.values_RK)
    high = max(values_K.max() for values_K in spectrum.values_RK)
    width = 0.01 * (high - low)
    at_T = np.linspace(low - 5 * width, high + 5 * width, 400)
    density_T = np.maximum(spectrum.density(at_T, width), 1e-12)
    shown = density_T > 1e-7 * density_T.max()
    figure = plots.lines(
        {"": (at_T[shown], density_T[shown])},
        title="Spectral density",
        x="eigenvalue",
        y="share per unit",
        logy=True,
        alt=f"Density of the {spectrum.size} eigenvalues from {low:.3g} to {high:.3g}",
    )
    notes = _step_notes(specimen)
    unsettled = sum(r > TOLERANCE * abs(largest) for r in pairs.residuals)
    if unsettled:
        notes.append(
            f"{unsettled} of the eigenvalues have a residual above {TOLERANCE:g} of the largest: "
            "raise --steps."
        )
    values = {
        "matrix": matrix,
        "parameters": spectrum.size,
        "eigenvalues": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "smallest": pairs.smallest,
        "trace": trace,
        "trace_error": error,
        "condition_at_least": pairs.lanczos.condition(),
        "learning_rate": rate,
        "edge": edge,
        "density": {"at": at_T.tolist(), "share": density_T.tolist(), "width": width},
    }
    lead = f"The {matrix} matrix of {spectrum.size:,} parameters"
    return Findings(lead, ("quantity", "value", "residual or error"), rows, [figure], values, notes)


def _step_notes(specimen: Specimen) -> list[str]:
    optimiser = specimen.run.fields["optim.name"]
    if optimiser == "sgd":
        return []
    return [
        f"lambda_max eta / 2 is of plain gradient descent; this run's {optimiser} has a bound of "
        "its own."
    ]


def sharp(specimen: Specimen, arguments: Any) -> Findings:
    """Keskar's phi, SAM's ball, and the largest eigenvalue beside the rate."""
    params, key = specimen.params, jax.random.key(arguments.seed)
    evaluations = 20 * (1 + len(EPSILONS)) + arguments.steps // 2
    rows, values = [], {}
    with _progress("sharpness", evaluations * len(specimen.batches)) as bar:
        how = dict(program=specimen.program, tick=bar.advance)
        at = sharpness.value_and_grad(specimen.loss, params, specimen.batches, **how)
        ascents = {
            f"phi in the box, epsilon {epsilon:g}": sharpness.box(at, params, epsilon=epsilon)
            for epsilon in EPSILONS
        }
        dims = min(100, curvature.size(params))
        name = f"phi along {dims} directions, epsilon {EPSILONS[0]:g}"
        ascents[name] = sharpness.subspace_box(at, params, epsilon=EPSILONS[0], dims=dims, key=key)
        ball = sharpness.ball(at, params, rho=SAM_RHO)
        product = curvature.mean(specimen.product("hessian"), params, specimen.batches, **how)
        pairs = curvature.eigenpairs(product, params, top=1, key=key, steps=arguments.steps // 2)
    for name, ascent in ascents.items():
        rows.append((name, plots.word(ascent.phi), f"{ascent.highest:.4g}", ascent.evaluations))
        values[name] = ascent._asdict() | {"phi": ascent.phi}
    rise = ball.highest - ball.loss
    rows.append((f"SAM's rise, rho {SAM_RHO:g}", plots.word(rise), f"{ball.highest:.4g}", 2))
    largest, rate = float(pairs.values[0]), specimen.rate
    rows.append(("lambda_max", plots.word(largest), "", len(pairs.lanczos.diagonal_K)))
    edge = sharpness.edge(largest, rate)
    rows.append((f"lambda_max eta / 2 at eta {rate:.3g}", plots.word(edge), "", ""))
    values |= {"loss": ball.loss, "sam_rise": rise, "sam_rho": SAM_RHO}
    values |= {"lambda_max": largest, "learning_rate": rate, "edge": edge}
    lead = f"Loss {ball.loss:.4g}; phi is 100 times the highest rise over 1 + loss"
    head = ("measure", "value", "highest loss", "evaluations")
    return Findings(lead, head, rows, [], values, _step_notes(specimen))


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
    figure = plots.heatmap(
        loss_YX[::-1],
        title=f"Loss of {specimen.split}",
        x=f"direction 1 ({arguments.direction})",
        y="direction 2",
        columns=[float(f"{v:.3g}") for v in x[:, 0]],
        rows=[float(f"{v:.3g}") for v in y[::-1, 0]],
        z="loss",
        logz=low > 0 and high > 20 * low,
        alt=f"Loss on {number} x {number} points, from {low:.3g} to {high:.3g}",
    )
    values = {"x": x[:, 0].tolist(), "y": y[:, 0].tolist()}
    values |= {name: z.reshape(number, number).tolist() for name, z in found.items()}
    figures = [figure]
    if path is not None:
        values |= {"path": path.points_TQ.tolist(), "shares": path.shares.tolist()}
        shares = f"{path.shares[0]:.1%} and {path.shares[1]:.1%}"
        rows.append(("of the path's extent", shares))
        figures.append(_drawn_path(path, shares))
    lead = f"{number} x {number} points of {specimen.examples:,} examples each"
    return Findings(lead, ("loss", "value"), rows, figures, values, notes)


def _drawn_path(path: landscape.Path, shares: str) -> plots.Figure:
    x_T, y_T = path.points_TQ.T
    return plots.scatter(
        {"checkpoints": (x_T, y_T), "the last": (x_T[-1:], y_T[-1:])},
        title=f"The path in its plane: {shares}",
        x="direction 1 (pca)",
        y="direction 2",
        alt=f"{len(x_T)} checkpoints in the plane of most extent",
    )


def _around(coordinates: np.ndarray, number: int) -> np.ndarray:
    low, high = float(coordinates.min()), float(coordinates.max())
    margin = 0.2 * max(high - low, 1e-3)
    return landscape.line(low - margin, high + margin, number)


KINDS: dict[str, Callable[[Specimen, Any], Findings]] = {
    "hessian": hessian,
    "sharpness": sharp,
    "line": line,
    "plane": plane,
    "interpolate": interpolate,
}


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
    with _progress(arguments.kind, ticks) as bar:
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


@contextlib.contextmanager
def _progress(name: str, ticks: int) -> Iterator[Progress]:
    bar = Progress(0, ticks, name, silent=False, unit="batch")
    try:
        yield bar
    finally:
        bar.close()
