"""The expected error of a fit in three terms: squared bias, variance and noise.

Least squares in Chebyshev polynomials to 50 points of sin(4.5 x) on [-1, 1] with noise of deviation
0.25, over 400 data sets. The mean of 400 fits varies itself, by the variance / 400: where degrees
are high, that is what is left of the squared bias.

Shape letters: D data sets, N examples, P points, K coefficients.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial import chebyshev

from lsdl import plots
from lsdl.data.readers import EVALUATION, generator
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "The expected squared error is exactly squared bias plus variance plus noise; a richer model "
    "has less bias and more variance, and a penalty on the coefficients turns that round."
)
SOURCE = (
    "Lecture on optimisation and regularisation: bias, variance and noise; Geman et al. 1992, "
    "Neural networks and the bias/variance dilemma"
)
_TERMS = "lecture on optimisation and regularisation: the three terms, as in its last line"
_RIDGE = "lecture on optimisation and regularisation: L2 lowers the variance of the coefficients"
EXPECTED = {
    "identity": Expected(
        "largest distance, over degrees 1 to 15, of squared bias + variance + noise from the error "
        "on fresh noisy targets, relative to it",
        _TERMS,
        high=0.02,
    ),
    "bias": Expected("squared bias of degree 9 over degree 1", _TERMS, high=1 - 1e-6),
    "variance": Expected("variance of degree 9 over degree 1", _TERMS, low=1 + 1e-6),
    "ridge_variance": Expected(
        "variance of degree 9 with the largest L2 penalty (10) over the smallest (1e-4)",
        _RIDGE,
        high=1 - 1e-6,
    ),
    "ridge_bias": Expected(
        "squared bias of degree 9 with the largest L2 penalty over the smallest",
        _RIDGE,
        low=1 + 1e-6,
    ),
    "ridge_identity": Expected(
        "largest relative distance of the three terms from the error, over the penalties",
        _TERMS,
        high=0.02,
    ),
}

DEGREES = tuple(range(1, 16))
PENALTIES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # times |coefficients|^2, beside the squared errors
PENALISED = 9  # the degree that the penalties are tried on
SHOWN = (1, 5, 9)
EXAMPLES, SETS, POINTS, NOISE = 50, 400, 200, 0.25


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale nets on parts of the training set, for the same estimator."""
    if scale == "full":
        return [
            Cell(
                f"part-{i}",
                {"part": i},
                "cifar10_resnet:20",
                {"data.train_split": f"train[{2250 * i}:{2250 * (i + 1)}]", "seed": i},
                "none for this net",
            )
            for i in range(20)
        ]
    return [Cell("chebyshev", {"examples": EXAMPLES, "sets": SETS, "seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """The terms of each degree, and of each penalty, by seed; some fits to look at."""
    examples, sets, seeds = (cell.settings[name] for name in ("examples", "sets", "seeds"))
    found = [_terms(generator(seed, EVALUATION, 0, 0), examples, sets) for seed in range(seeds)]
    row = {
        f"{group}_{name}": [getattr(terms[group], name).tolist() for terms, _ in found]
        for group in ("degree", "penalty")
        for name in Terms._fields
    }
    return row | {"fits": found[0][1]}


class Terms(NamedTuple):
    """Means over the points; `error` is measured and not their sum."""

    bias: np.ndarray  # squared
    variance: np.ndarray
    noise: np.ndarray
    error: np.ndarray


def decomposed(h_DP: np.ndarray, mean_P: np.ndarray, noise_DP: np.ndarray, noise: float) -> Terms:
    """The terms of the predictions `h_DP`, one row for each data set, of targets `mean_P` + noise.

    Source: Geman et al. 1992.
    """
    central_P = h_DP.mean(0)
    return Terms(
        ((central_P - mean_P) ** 2).mean(),
        ((h_DP - central_P[None]) ** 2).mean(),
        np.array(noise),
        ((h_DP - mean_P[None] - noise_DP) ** 2).mean(),
    )


def fitted(x_DN: np.ndarray, y_DN: np.ndarray, degree: int, penalty: float) -> np.ndarray:
    """`c_DK`, the coefficients that least squares plus `penalty` |c|^2 gives each data set."""
    v_DNK = chebyshev.chebvander(x_DN, degree)
    if penalty:
        root_KK = np.sqrt(penalty) * np.eye(degree + 1)
        v_DNK = np.concatenate([v_DNK, np.broadcast_to(root_KK, (len(v_DNK), *root_KK.shape))], 1)
        y_DN = np.concatenate([y_DN, np.zeros((len(y_DN), degree + 1))], 1)
    return np.einsum("dkn,dn->dk", np.linalg.pinv(v_DNK, rcond=1e-14), y_DN)


def _terms(draw, examples: int, sets: int) -> tuple[dict[str, Terms], dict]:
    def truth(x):
        return np.sin(4.5 * x)

    x_DN = draw.uniform(-1, 1, (sets, examples))
    y_DN = truth(x_DN) + NOISE * draw.standard_normal(x_DN.shape)
    x_P = np.sort(draw.uniform(-1, 1, POINTS))
    noise_DP = NOISE * draw.standard_normal((sets, POINTS))

    def terms(degree, penalty=0.0):
        c_DK = fitted(x_DN, y_DN, degree, penalty)
        h_DP = c_DK @ chebyshev.chebvander(x_P, degree).T
        if degree in SHOWN and not penalty:
            shown[f"degree {degree}"] = h_DP[:6].tolist()
        return decomposed(h_DP, truth(x_P), noise_DP, NOISE**2)

    shown = {"x": x_P.tolist(), "truth": truth(x_P).tolist()}
    by_degree = [terms(degree) for degree in DEGREES]
    by_penalty = [terms(PENALISED, penalty) for penalty in PENALTIES]
    stack = lambda parts: Terms(*map(np.stack, zip(*parts, strict=True)))  # noqa: E731
    return {"degree": stack(by_degree), "penalty": stack(by_penalty)}, shown


def _of(row: dict, group: str) -> Terms:
    return Terms(*(np.array(row[f"{group}_{name}"]) for name in Terms._fields))


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed."""
    (row,) = table
    degree, penalty = _of(row, "degree"), _of(row, "penalty")

    def apart(terms):
        total = terms.bias + terms.variance + terms.noise
        return (abs(total - terms.error) / terms.error).max(1)

    def ratio(value, high, low, of):
        return value[:, of.index(high)] / value[:, of.index(low)]

    values = {
        "identity": apart(degree),
        "bias": ratio(degree.bias, 9, 1, DEGREES),
        "variance": ratio(degree.variance, 9, 1, DEGREES),
        "ridge_variance": ratio(penalty.variance, PENALTIES[-1], PENALTIES[0], PENALTIES),
        "ridge_bias": ratio(penalty.bias, PENALTIES[-1], PENALTIES[0], PENALTIES),
        "ridge_identity": apart(penalty),
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The terms and their sum against degree and penalty; fits of 12 data sets."""
    (row,) = table
    drawn = []
    for group, xs, x, title in (
        ("degree", DEGREES, "degree of the polynomial", "Richer models"),
        ("penalty", PENALTIES, "L2 penalty, degree 9", "Stronger penalties"),
    ):
        terms = _of(row, group)
        series = {
            "squared bias": (xs, terms.bias.mean(0)),
            "variance": (xs, terms.variance.mean(0)),
            "noise": (xs, terms.noise.mean(0)),
            "sum of the three": (xs, (terms.bias + terms.variance + terms.noise).mean(0)),
        }
        measured = {"error, measured": (xs, terms.error.mean(0))}
        options = {"logy": True, "logx": group == "penalty", "published": measured}
        drawn.append(plots.lines(series, title=title, x=x, y="mean square", **options))
    fits = row["fits"]
    panels = [
        plots.lines(
            {
                f"data set {i + 1}": (fits["x"], np.where(np.abs(h_P) < 2.5, h_P, np.nan))
                for i, h_P in enumerate(fits[f"degree {d}"])
            }
            | {"truth": (fits["x"], fits["truth"])},
            title=f"Degree {d}",
            x="x",
            y="prediction",
        )
        for d in SHOWN
    ]
    alt = "Bias falls and variance rises with the degree, the other way round with the penalty."
    return {
        "terms": plots.panels(drawn, title="Bias, variance and noise add up to the error", alt=alt),
        "fits": plots.panels(panels, title="Fits to six data sets"),
    }
