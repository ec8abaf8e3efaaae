"""A run's curvature: eigenvalues, spectral density, and measures of sharpness.

Shape letters: T places of a density.
"""

import itertools
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import curvature, sharpness
from lsdl.findings.found import Findings, progress
from lsdl.specimen import Specimen

TOLERANCE = 1e-3  # an eigenvalue's residual over the largest: see `curvature.eigenpairs`
EPSILONS = (1e-3, 5e-4)  # of Keskar's box
SAM_RHO = 0.05
TOP = 5  # eigenvalues, unless --top says how many


def hessian(specimen: Specimen, arguments: Any) -> Findings:
    """Eigenvalues, trace, condition and spectral density."""
    params, key = specimen.params, jax.random.key(arguments.seed)
    most = (arguments.steps + (arguments.starts - 1) * arguments.steps // 2) * len(specimen.batches)
    with progress("hessian", most) as bar:
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
            product, params, top=arguments.top or TOP, key=first, steps=steps, tolerance=TOLERANCE
        )
        more = curvature.random_starts(
            product, params, starts=arguments.starts - 1, steps=steps // 2, key=rest
        )
        spectrum = curvature.quadrature(itertools.chain([pairs.lanczos], more))
    return _of_spectrum(specimen, arguments.of, pairs, spectrum)


def _of_spectrum(specimen, matrix: str, pairs, spectrum) -> Findings:
    largest, rate = float(pairs.values[0]), specimen.peak_rate
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
        (f"lambda_max eta / 2 at the peak rate {rate:.3g}", plots.word(edge), ""),
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
        "peak_rate": rate,
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
    with progress("sharpness", evaluations * len(specimen.batches)) as bar:
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
    largest, rate = float(pairs.values[0]), specimen.peak_rate
    rows.append(("lambda_max", plots.word(largest), "", len(pairs.lanczos.diagonal_K)))
    edge = sharpness.edge(largest, rate)
    rows.append((f"lambda_max eta / 2 at the peak rate {rate:.3g}", plots.word(edge), "", ""))
    values |= {"loss": ball.loss, "sam_rise": rise, "sam_rho": SAM_RHO}
    values |= {"lambda_max": largest, "peak_rate": rate, "edge": edge}
    lead = f"Loss {ball.loss:.4g}; phi is 100 times the highest rise over 1 + loss"
    head = ("measure", "value", "highest loss", "evaluations")
    return Findings(lead, head, rows, [], values, _step_notes(specimen))
