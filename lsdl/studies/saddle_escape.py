"""Points where gradient descent stops, and what takes it away: noise, and a rate above a limit.

The saddle is that of x^2 - y^2 + y^4 / 4 at 0. The basins are those of the smaller of two
quadratics in one dimension, a sharp one (curvature 50) and a wide one (curvature 1). The noise is
normal, added to the gradient.

Shape letters: S seeds, L deviations, R runs, P settings, T steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsdl import plots
from lsdl.data.readers import EVALUATION, generator
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Gradient descent stays at a saddle that a little noise leaves; noise, or a learning rate "
    "above the local limit, leaves a sharp minimum and not a wide one."
)
SOURCE = (
    "Lectures: saddle points, stochasticity escapes local minima, local divergence can help; "
    "Jin et al. 2017, How to escape saddle points efficiently (arXiv:1703.00887)"
)
_SADDLE = "lectures on optimisation: noise escapes saddles"
_NOISE = "lecture on loss surfaces: stochasticity escapes local minima"
_RATE = "lecture on loss surfaces: local divergence can help; the limit is 2 / curvature = 0.04"
EXPECTED = {
    "without_noise": Expected(
        "share of 7 runs a seed that leave the saddle within 2,000 steps of 0.05 from (1, 0), "
        "without noise",
        _SADDLE,
        low=0,
        high=0,
    ),
    "with_noise": Expected(
        "share that leaves it, with gradient noise of deviation 1e-8",
        _SADDLE,
        low=1,
        high=1,
    ),
    "logarithm": Expected(
        "slope of the median step of the escape against ln(1 / deviation), times ln(1 + 2 rate): "
        "the distance grows by 1 + 2 rate a step",
        f"{_SADDLE}; the update is linear in y near the saddle",
        low=0.9,
        high=1.1,
    ),
    "strong_noise": Expected(
        "share of 200 runs a seed from the sharp basin that end in the wide one after 2,000 steps "
        "of 0.02, gradient noise of deviation 8",
        _NOISE,
        low=0.8,
    ),
    "weak_noise": Expected(
        "share that ends in the wide basin, gradient noise of deviation 2", _NOISE, low=0, high=0
    ),
    "below_the_limit": Expected(
        "share that ends in the wide basin at the rate 0.039, without noise", _RATE, low=0, high=0
    ),
    "above_the_limit": Expected(
        "share that ends in the wide basin at the rate 0.041, without noise", _RATE, low=1, high=1
    ),
}

RATE, STEPS, RUNS = 0.05, 2_000, 7
DEVIATIONS = (0.0, 1e-8, 1e-6, 1e-4, 1e-2)
GONE = 1.0  # distance from the saddle's ridge at which it is left; the minima are at sqrt(2)
SHARP, WIDE, CENTRE = 50.0, 1.0, 3.0  # curvatures, and where the wide quadratic has its minimum
START = 0.3  # starts are uniform in +-START; the sharp basin is -0.49 to 0.37
STARTS = 200
NOISE = {"rates": (0.02,), "deviations": (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)}
LIMIT = {"rates": (0.01, 0.02, 0.03, 0.035, 0.039, 0.041, 0.045, 0.05), "deviations": (0.0,)}


def cells(scale: str, seeds: int) -> list[Cell]:
    """The saddle, and the two basins with more noise or a larger rate."""
    if scale == "full":
        full = {"batch_size": 45_000, "accum": 45}
        published = "test error 8.75% (He et al. 2016, table 6)"
        return [
            Cell("sgd", config="cifar10_resnet:20", published=published),
            Cell("full_batch", config="cifar10_resnet:20", overrides=full, published="none"),
        ]
    return [
        Cell("saddle", {"kind": "saddle", "seeds": seeds}),
        Cell("noise", {"kind": "basins", "seeds": seeds, **NOISE}),
        Cell("limit", {"kind": "basins", "seeds": seeds, **LIMIT}),
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Steps to the escape by seed, deviation and run; or shares by seed and setting."""
    settings = cell.settings
    seeds = [generator(seed, EVALUATION, 0, 0) for seed in range(settings["seeds"])]
    if settings["kind"] == "saddle":
        found = [_saddle(draw) for draw in seeds]
        path_TL = found[0][1]
        return {"escape": [escape_LR.tolist() for escape_LR, _ in found], "path": path_TL.tolist()}
    pairs_P2 = np.array([(r, d) for r in settings["rates"] for d in settings["deviations"]])
    found = [_basins(draw, *pairs_P2.T) for draw in seeds]
    return {"share": [share_P.tolist() for share_P, _ in found], "path": found[0][1].tolist()}


def _saddle(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The step of each escape (`STEPS` of those that stay), and |y| of the first runs."""
    deviation_L1 = np.array(DEVIATIONS)[:, None]
    x_LR, y_LR = np.ones((len(DEVIATIONS), RUNS)), np.zeros((len(DEVIATIONS), RUNS))
    escape_LR, path = np.full(x_LR.shape, STEPS), []
    for step in range(STEPS):
        path.append(abs(y_LR[:, 0]))
        noise_2LR = deviation_L1 * draw.standard_normal((2, *x_LR.shape))
        x_LR = x_LR - RATE * (2 * x_LR + noise_2LR[0])
        y_LR = y_LR - RATE * (y_LR**3 - 2 * y_LR + noise_2LR[1])
        escape_LR = np.where(abs(y_LR) > GONE, np.minimum(escape_LR, step + 1), escape_LR)
    return escape_LR, np.stack(path)[:300]


def well(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The smaller of two quadratics: its derivative, and whether it is the wide one."""
    wide = WIDE * (x - CENTRE) ** 2 < SHARP * x**2
    return np.where(wide, WIDE * (x - CENTRE), SHARP * x), wide


def _basins(draw, rate_P: np.ndarray, deviation_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The share of runs that end in the wide basin, and the paths of the first."""
    rate_P1, deviation_P1 = rate_P[:, None], deviation_P[:, None]
    x_PR = draw.uniform(-START, START, (len(rate_P), STARTS))
    path = []
    for _ in range(STEPS):
        path.append(x_PR[:, 0])
        slope_PR, _ = well(x_PR)
        x_PR = x_PR - rate_P1 * (slope_PR + deviation_P1 * draw.standard_normal(x_PR.shape))
    return well(x_PR)[1].mean(1), np.stack(path)[:400]


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed."""
    rows = {row["id"]: row for row in table}
    escape_SLR = np.array(rows["saddle"]["escape"])
    left_SL = (escape_SLR < STEPS).mean(-1)
    median_SL = np.median(escape_SLR, -1)
    slopes = [np.polyfit(-np.log(DEVIATIONS[1:]), median_L[1:], 1)[0] for median_L in median_SL]

    def share(cell, setting):
        wanted = NOISE["deviations"] if cell == "noise" else LIMIT["rates"]
        return np.array(rows[cell]["share"])[:, wanted.index(setting)]

    values = {
        "without_noise": left_SL[:, 0],
        "with_noise": left_SL[:, DEVIATIONS.index(1e-8)],
        "logarithm": np.array(slopes) * math.log(1 + 2 * RATE),
        "strong_noise": share("noise", 8.0),
        "weak_noise": share("noise", 2.0),
        "below_the_limit": share("limit", 0.039),
        "above_the_limit": share("limit", 0.041),
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The way off the saddle and its steps; where runs from the sharp basin end."""
    rows = {row["id"]: row for row in table}
    escape_LR = np.concatenate(rows["saddle"]["escape"], -1)[1:]
    inverse = [1 / deviation for deviation in DEVIATIONS[1:]]
    median_L = np.median(escape_LR, 1)
    growth = np.log(np.array(inverse)) / math.log(1 + 2 * RATE)
    law = median_L.mean() + growth - growth.mean()
    path_LT = np.array(rows["saddle"]["path"]).T
    paths = {
        f"deviation {deviation:g}": (np.arange(path_T.size), path_T)
        for deviation, path_T in zip(DEVIATIONS[1:], path_LT[1:], strict=True)
    }
    title = "Distance from the saddle's ridge"
    way = plots.lines(paths, title=title, x="step", y="|y|", logy=True)
    low, high = np.quantile(escape_LR, (0.25, 0.75), axis=1)
    series = {
        "median and quartiles": (inverse, median_L, low, high),
        "slope 1 / ln(1 + 2 rate)": (inverse, law),
    }
    axes = {"x": "1 / deviation of the gradient noise", "y": "steps to |y| = 1"}
    steps = plots.lines(series, title="Steps to leave it", logx=True, **axes)
    shares = []
    for cell, xs, x, title in (
        ("noise", NOISE["deviations"], "deviation of the gradient noise", "Rate 0.02, with noise"),
        ("limit", LIMIT["rates"], "learning rate", "No noise: the sharp limit is 0.04"),
    ):
        share_SP = 100 * np.array(rows[cell]["share"])
        band = (xs, *plots.summary(share_SP))
        y = "runs that end in the wide basin, %"
        shares.append(plots.lines({"mean, least, most": band}, title=title, x=x, y=y))
    left = "|y| grows exponentially, so the steps grow with the logarithm of 1 / deviation."
    out = (
        "Strong noise or a rate above 0.04 ends in the wide basin, weak noise or a lower rate not."
    )
    return {
        "saddle": plots.panels([way, steps], title="Noise leaves a saddle", alt=left),
        "basins": plots.panels(shares, title="Ways out of a sharp minimum", alt=out),
        "paths": _paths(rows),
    }


def _paths(rows: dict) -> plots.Figure:
    """One run of each kind."""
    kept = (
        ("noise", NOISE["deviations"], 2.0, "rate 0.02, noise 2"),
        ("noise", NOISE["deviations"], 8.0, "rate 0.02, noise 8"),
        ("limit", LIMIT["rates"], 0.039, "rate 0.039, no noise"),
        ("limit", LIMIT["rates"], 0.041, "rate 0.041, no noise"),
    )
    series = {
        label: (range(len(rows[cell]["path"])), np.array(rows[cell]["path"])[:, xs.index(value)])
        for cell, xs, value, label in kept
    }
    levels = {"sharp minimum": 0.0, "wide minimum": CENTRE}
    title = "Runs from the sharp basin"
    alt = "Noise of 8 and the rate 0.041 reach the wide minimum; noise of 2 and 0.039 stay."
    return plots.lines(series, title=title, x="step", y="position", levels=levels, alt=alt)
