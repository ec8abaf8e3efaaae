"""Least squares on raw, centred, standardised and whitened features.

Shape letters: N examples, F features (the last is the constant 1), C outputs, T steps, E entries.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lsdl.analysis import descent
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Centring and scaling the inputs lowers the condition number of least squares by orders of "
    "magnitude, and with it the steps of gradient descent; removing correlations leaves 1."
)
SOURCE = (
    "Lectures on optimisation: whitening, conditioning of the data; LeCun et al. 1998, Efficient "
    "BackProp, section 4.3"
)
_CENTRE = "LeCun et al. 1998, section 4.3"
_WHITEN = "lectures on optimisation: whitening"
_STEPS = (
    "gradient descent's steps to 1e-3 of the excess loss at zero, rate 1 / lambda_max, {}: raw "
    "over standardised"
)
EXPECTED = {
    "kappa_wine": Expected(
        "condition number of the second moments with a bias column, wine: raw over standardised",
        _CENTRE,
        low=1e6,
    ),
    "centred": Expected(
        "condition number raw over centred, the smallest of wine, breast_cancer and digits",
        _CENTRE,
        low=1,
    ),
    "kappa_whitened": Expected(
        "condition number whitened, the largest of wine, breast_cancer and digits",
        _WHITEN,
        high=1 + 1e-6,
    ),
    "standardised": Expected(
        "condition number standardised, the smallest of the three: dividing by the deviations, "
        "which the first lecture calls whitening, leaves the correlations in",
        _WHITEN,
        low=10,
    ),
    "steps_wine": Expected(_STEPS.format("wine"), _CENTRE, low=1000),
    "steps_breast_cancer": Expected(_STEPS.format("breast_cancer"), _CENTRE, low=1000),
    "steps_digits": Expected(
        _STEPS.format("digits") + "; pixels share one unit, but not one deviation",
        _CENTRE,
        low=1000,
    ),
    "steps_whitened": Expected(
        "gradient descent's steps to 1e-3 of the excess, whitened, the largest of the three",
        _WHITEN,
        high=2,
    ),
    "hessian": Expected(
        "largest distance, in units of the largest entry, between the Hessian of the mean squared "
        "error and (2/n) X^T X: the lecture leaves out the 2, and 1/n in two terms",
        "lecture on optimisation and regularisation: least squares",
        high=1e-9,
    ),
    "valid": Expected(
        "condition number of the valid split under the train split's whitening, the smallest of "
        "the three: statistics of the sample, not of the distribution",
        "lecture on optimisation and regularisation: statistics from the whole training set",
        low=1.1,
    ),
}

SOURCES = ("wine", "breast_cancer", "digits")
FORMS = ("raw", "centred", "standardised", "whitened")
TARGET = 1e-3


def cells(scale: str, seeds: int) -> list[Cell]:
    """A data set each; nothing is drawn, so that no seed plays a part."""
    if scale == "full":
        # Every image config standardises channels; the lectures' arm without cannot be set.
        standardised = {"total_epochs": 5.0}
        return [Cell("standardised", {}, "configs/imagenet_resnet50.py:256", standardised)]
    return [Cell(source, {"source": source}) for source in SOURCES]


def measure(cell: Cell, folder: Path) -> dict:
    """Spectra, condition numbers and the exact course of gradient descent, in float64."""
    source = cell.settings["source"]
    x_NF, label_N = descent.examples(source, "train")
    valid_NF, _ = descent.examples(source, "valid")
    varies_F = x_NF.std(0) > 0
    forms = transforms(x_NF[:, varies_F])
    y_NC = descent.one_hot(label_N)
    moments = np.unique(np.geomspace(1, 1e6, 121).astype(int))
    row = {"features": int(varies_F.sum()), "constant": int((~varies_F).sum())}
    row["moments"] = moments.tolist()
    for name, transform in forms.items():
        design_NF = descent.with_bias(transform(x_NF[:, varies_F]))
        spectrum_F, excess_F = modes(design_NF, y_NC)
        row[f"kappa_{name}"] = float(spectrum_F[0] / spectrum_F[-1])
        row[f"steps_{name}"] = steps_to(spectrum_F, excess_F, TARGET)
        row[f"spectrum_{name}"] = spectrum_F.tolist()
        course = [excess(spectrum_F, excess_F, t) for t in (0, *moments.tolist())]
        row[f"excess_{name}"] = (np.array(course[1:]) / course[0]).tolist()
    row["kappa_valid"] = kappa(descent.with_bias(forms["whitened"](valid_NF[:, varies_F])))
    design_NF = descent.with_bias(forms["standardised"](x_NF[:, varies_F]))
    return row | {"hessian_error": _hessian_error(design_NF, y_NC[:, 0])}


def transforms(x_NF: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The four forms of features, with the statistics of `x_NF`."""
    mean_F, std_F = x_NF.mean(0)[None], x_NF.std(0)[None]
    # Principal axes of the standardised features, each then divided by its own deviation: the
    # same span as from the raw ones, without losing digits to their scales.
    _, singular_F, axes_FF = np.linalg.svd((x_NF - mean_F) / std_F, full_matrices=False)
    scaled_FF = axes_FF.T / singular_F[None] * len(x_NF) ** 0.5
    return {
        "raw": lambda x: x,
        "centred": lambda x: x - mean_F,
        "standardised": lambda x: (x - mean_F) / std_F,
        "whitened": lambda x: (x - mean_F) / std_F @ scaled_FF,
    }


def kappa(design_NF: np.ndarray) -> float:
    """Condition number of the second moments (1/n) X^T X."""
    singular_F = np.linalg.svd(design_NF, compute_uv=False)
    return float((singular_F[0] / singular_F[-1]) ** 2)


def modes(design_NF: np.ndarray, y_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues of (1/n) X^T X, largest first, and each one's part of the excess at zero."""
    u_NF, singular_F, _ = np.linalg.svd(design_NF, full_matrices=False)
    return singular_F**2 / len(y_NC), ((u_NF.T @ y_NC) ** 2).sum(1) / len(y_NC)


def excess(spectrum_F: np.ndarray, excess_F: np.ndarray, steps: int) -> float:
    """Mean squared error above the smallest, after `steps` of gradient descent from zero.

    The rate is 1 / lambda_max, so that the error along a mode falls by its 1 - h / h_max a step.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        decay_F = np.where(steps, steps * np.log1p(-spectrum_F / spectrum_F[0]), 0.0)
    return float(excess_F @ np.exp(2 * decay_F))


def steps_to(spectrum_F: np.ndarray, excess_F: np.ndarray, share: float) -> int:
    """The first step with at most `share` of the excess at zero."""
    goal = share * excess(spectrum_F, excess_F, 0)
    high = 1
    while excess(spectrum_F, excess_F, high) > goal:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if excess(spectrum_F, excess_F, middle) <= goal else (middle, high)
        )
    return high


def _hessian_error(design_NF: np.ndarray, y_N: np.ndarray) -> float:
    with jax.enable_x64(True):
        loss = lambda w_F: ((design_NF @ w_F - y_N) ** 2).mean()  # noqa: E731
        hessian_FF = np.asarray(jax.hessian(loss)(jnp.zeros(design_NF.shape[1])))
    expected_FF = 2 / len(y_N) * design_NF.T @ design_NF
    return float(np.abs(hessian_FF - expected_FF).max() / np.abs(expected_FF).max())


def claims(table: Sequence[dict]) -> list[Claim]:
    """The ratios of condition numbers and of steps."""
    rows = {row["source"]: row for row in table}
    every = rows.values()
    wine = rows["wine"]
    values = {
        "kappa_wine": wine["kappa_raw"] / wine["kappa_standardised"],
        "centred": min(row["kappa_raw"] / row["kappa_centred"] for row in every),
        "kappa_whitened": max(row["kappa_whitened"] for row in every),
        "standardised": min(row["kappa_standardised"] for row in every),
        "steps_whitened": max(row["steps_whitened"] for row in every),
        "hessian": max(row["hessian_error"] for row in every),
        "valid": min(row["kappa_valid"] for row in every),
    }
    for source, row in rows.items():
        values[f"steps_{source}"] = row["steps_raw"] / row["steps_standardised"]
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """Spectra and courses of gradient descent on each data set."""
    from lsdl import plots

    figures = {}
    for row in table:
        spectra = {
            form: (list(range(1, len(row[f"spectrum_{form}"]) + 1)), row[f"spectrum_{form}"])
            for form in FORMS
        }
        courses = {form: (row["moments"], row[f"excess_{form}"]) for form in FORMS}
        shown = {name: (x, np.maximum(y, 1e-6).tolist()) for name, (x, y) in courses.items()}
        figures[row["source"]] = plots.panels(
            [
                plots.lines(
                    spectra,
                    title=f"{row['source']}: spectrum",
                    x="eigenvalue, largest first",
                    y="of the second moments",
                    logy=True,
                ),
                plots.lines(
                    shown,
                    title=f"{row['source']}: gradient descent at 1 / lambda_max",
                    x="step",
                    y="excess loss, share of the start",
                    logx=True,
                    logy=True,
                ),
            ]
        )
    return figures
