"""PH-15, double descent: the error peaks where the training data are just fit, and falls again.

Three models. Features: cos(w x + b) of digits with w from N(0, 1 / D), least squares of least norm
on one-hot labels. Nets: one ReLU layer, squared error, full-batch Adam, pixels from 0 to 1 (in a
first run on standardised ones, a few rarely lit pixels made nearly all of the error). Epochs:
gradient descent on least squares whose features have two scales; the risk is exact. Noise redraws
20% of the training labels, never the valid ones. Errors are squared, summed over the classes.

Shape letters: S seeds, N examples, D pixels, F features, C classes, H hidden, T checks.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import descent
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "The risk peaks where a model can just fit its training data, and falls below the classical "
    "minimum as it grows on; so it may over the epochs."
)
SOURCE = (
    "Lectures: double descent, conventional and deep intuition; Belkin et al. 2019, Reconciling "
    "modern machine-learning practice and the bias-variance trade-off (arXiv:1812.11118)"
)
_BELKIN = "Belkin et al. 2019: random Fourier features of least norm"
_NET = "Belkin et al. 2019: fully connected nets, threshold at n K parameters"
_EPOCHS = "Nakkiran et al. 2020: double descent over epochs"
_CELL = {
    "clean": "random cosine features on 300 digits",
    "noise": "the same with 20% of the training labels redrawn",
}


def _features(kind: str) -> dict[str, Expected]:
    of = _CELL[kind]
    return {
        f"peak_{kind}": Expected(
            f"number of features N with the largest median squared error on valid, {of}",
            _BELKIN,
            low=300,
            high=300,
        ),
        f"height_{kind}": Expected(
            f"median squared error on valid at N = 300 over at N = 100, {of}", _BELKIN, low=20
        ),
        f"second_{kind}": Expected(
            f"median squared error on valid at N = 8,000 over the lowest at N < 300, {of}",
            _BELKIN,
            high=1 - 1e-6,
        ),
        f"norm_{kind}": Expected(
            f"number of features N with the largest median norm of the coefficients, {of}",
            _BELKIN,
            low=300,
            high=300,
        ),
    }


EXPECTED = {
    **_features("clean"),
    **_features("noise"),
    "net_peak": Expected(
        "largest squared error on valid from 750 to 12,000 parameters (a quarter of n K to four "
        "times) over the lowest below 750, ReLU nets of one layer, 300 digits, 20% label noise",
        _NET,
        low=1.1,
    ),
    "net_second": Expected(
        "squared error on valid of the widest net over that peak", _NET, high=0.9
    ),
    "epoch_rise": Expected(
        "risk at the peak over at the first minimum before it, over steps of gradient descent on "
        "least squares with features of two scales",
        "Heckel and Yilmaz 2021: superposed bias-variance trade-offs",
        low=1.1,
    ),
    "epoch_second": Expected(
        "risk at the end over at the peak, the same",
        "Heckel and Yilmaz 2021: superposed bias-variance trade-offs",
        high=0.9,
    ),
    "net_epochs": Expected(
        "points of valid error from the peak over the steps to the end, the widest ReLU net on 300 "
        "digits, 20% label noise: whether digits show it too",
        _EPOCHS,
        low=1.0,
    ),
}

COUNT, CLASSES, NOISE = 300, 10, 0.2
FEATURES = (20, 50, 100, 150, 200, 250, 280, 300, 320, 360, 500, 1_000, 2_000, 4_000, 8_000)
WIDTHS = (2, 4, 8, 12, 20, 32, 40, 56, 80, 128, 512)
FULL_WIDTHS = (1, 2, 4, 8, 12, 16, 32, 64)  # of Nakkiran's pre-activation ResNet-18
RATE, STEPS, EVERY = 3e-3, 3_000, 50
EPOCH_SCALES = (1.0, 0.02)  # standard deviations of the fast and of the slow features
EPOCH_DIMS = (110, 4)  # how many
EPOCH_ENERGY = (1.0, 0.4)  # of the signal in them
EPOCH_COUNT, EPOCH_NOISE = 400, 1.4
EPOCH_STEPS = np.unique(np.round(np.logspace(0, 7, 141)).astype(int))


def cells(scale: str, seeds: int) -> list[Cell]:
    """Features at both noise levels, nets of each width, epochs; at full scale what exists."""
    if scale == "full":
        found = "risk peaks at N = n and falls below the classical minimum (Belkin et al. 2019)"
        noisy = "test error peaks where the width just fits (Nakkiran et al. 2020)"
        net = "configs/cifar10_resnet.py:preact18"
        same = {
            "data.label_noise": 0.15,
            "optim.name": "adam",
            "optim.weight_decay": 0.0,
            "optim.schedule.name": "constant",
            "optim.schedule.peak": 1e-4,
            "total_epochs": 4_000.0,
        }
        return [Cell("mnist_features", {"examples": 10_000}, published=found)] + [
            Cell(f"cifar10_width_{k}", {}, net, {"model.width": k} | same, noisy)
            for k in FULL_WIDTHS
        ]
    net = {"model": "net", "pixels": "0 to 1", "seeds": seeds}
    nets = [Cell(f"net-{h}", {**net, "size": h}) for h in WIDTHS]
    features = Cell("features", {"model": "features", "seeds": seeds})
    return [features, Cell("epochs", {"model": "epochs", "seeds": seeds}), *nets]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Errors on valid: lists by seed, then by feature count, step or nothing."""
    seeds = cell.settings["seeds"]
    if cell.settings["model"] == "features":
        found = [_features_of(seed) for seed in range(seeds)]
        return {name: [row[name] for row in found] for name in found[0]}
    if cell.settings["model"] == "epochs":
        return {"risk": [epoch_risk(seed).tolist() for seed in range(seeds)]}
    return _net(cell.settings["size"], seeds)


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of the seed's own training digits and their one-hot labels, clean and with noise."""
    train, _ = digits.load()
    draw = np.random.default_rng(seed)
    ids = draw.choice(len(train.label_N), COUNT, replace=False)
    label_N = np.asarray(train.label_N)[ids]
    noisy_N = np.where(draw.random(COUNT) < NOISE, draw.integers(CLASSES, size=COUNT), label_N)
    return ids, _one_hot(label_N), _one_hot(noisy_N)


def _one_hot(label_N: np.ndarray) -> np.ndarray:
    return np.eye(CLASSES)[np.asarray(label_N)]


def least_norm(z_NF: np.ndarray, y_NC: np.ndarray) -> np.ndarray:
    """The coefficients that fit best, those of least norm among several."""
    if z_NF.shape[1] <= z_NF.shape[0]:
        return np.linalg.lstsq(z_NF, y_NC)[0]
    return z_NF.T @ np.linalg.solve(z_NF @ z_NF.T, y_NC)


def _features_of(seed: int) -> dict[str, list[float]]:
    ids, *labels = drawn(seed)
    y_NC, (train, valid) = np.concatenate(labels, 1), digits.load()
    x_ND, valid_ND = (np.asarray(split.x_ND, np.float64) for split in (train, valid))
    x_ND, target_NC = x_ND[ids], _one_hot(valid.label_N)
    draw = np.random.default_rng((seed, 1))
    w_DF = draw.normal(size=(x_ND.shape[1], max(FEATURES))) / np.sqrt(x_ND.shape[1])
    b_F = draw.uniform(0, 2 * np.pi, max(FEATURES))
    z_NF, valid_NF = (np.cos(x @ w_DF + b_F[None]) for x in (x_ND, valid_ND))
    row = {f"{name}_{kind}": [] for kind in _CELL for name in ("error", "wrong", "norm")}
    for count in FEATURES:
        scale = np.sqrt(2 / count)
        beta_FC = least_norm(scale * z_NF[:, :count], y_NC)
        guess_NC = scale * valid_NF[:, :count] @ beta_FC
        for kind, part in zip(_CELL, (np.s_[:, :CLASSES], np.s_[:, CLASSES:]), strict=True):
            wrong_N = guess_NC[part].argmax(1) != np.asarray(valid.label_N)
            row[f"error_{kind}"].append(((guess_NC[part] - target_NC) ** 2).sum(1).mean())
            row[f"wrong_{kind}"].append(100 * wrong_N.mean())
            row[f"norm_{kind}"].append(np.linalg.norm(beta_FC[part]))
    return {name: np.array(values).tolist() for name, values in row.items()}


def _net(width: int, seeds: int) -> dict[str, Any]:
    (train_ND, _), (valid_ND, label_N) = (descent.examples("digits", n) for n in ("train", "valid"))
    ids_SN, _, noisy_SNC = map(np.stack, zip(*map(drawn, range(seeds)), strict=True))
    valid = digits.Split(jnp.float32(valid_ND / 16), jnp.int32(label_N))
    x_SND, y_SNC = jnp.float32(train_ND[ids_SN] / 16), jnp.float32(noisy_SNC)
    found = _trained(width, digits.keys(seeds), x_SND, y_SNC, valid)
    names = ("train_loss", "error", "wrong")
    return {
        name: np.asarray(value_ST).tolist() for name, value_ST in zip(names, found, strict=True)
    }


@functools.partial(jax.jit, static_argnums=0)
def _trained(
    width: int, keys_S: jax.Array, x_SND: jax.Array, y_SNC: jax.Array, valid: digits.Split
) -> tuple[jax.Array, ...]:
    """Squared error on train and valid, and percent of valid that is wrong, every `EVERY` steps."""
    net = digits.Classifier(width)
    optimizer = optax.adam(RATE)

    def squared(params, x_ND, y_NC):
        return jnp.square(net.logits(params, x_ND) - y_NC).sum(1).mean()

    def one(params, x_ND, y_NC):
        def step(state, _):
            params, moments = state
            gradient = jax.grad(squared)(params, x_ND, y_NC)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), None

        def check(state, _):
            state, _ = lax.scan(step, state, length=EVERY)
            params = state[0]
            target_NC = jax.nn.one_hot(valid.label_N, CLASSES)
            wrong = 100 * (1 - net.accuracy(params, valid))
            errors = squared(params, x_ND, y_NC), squared(params, valid.x_ND, target_NC)
            return state, (*errors, wrong)

        return lax.scan(check, (params, optimizer.init(params)), length=STEPS // EVERY)[1]

    return jax.vmap(one)(net.init(keys_S), x_SND, y_SNC)


def epoch_risk(seed: int) -> np.ndarray:
    """The excess risk of gradient descent from zero at each of `EPOCH_STEPS`.

    Least squares on `EPOCH_COUNT` examples whose fast features have a standard deviation of 1 and
    whose few slow ones have a small one: these are learnt last, when the noise has long been fit in
    the fast ones. Steps are taken all at once, in the eigenvectors of the second moments.
    Source: Heckel and Yilmaz 2021.
    """
    draw = np.random.default_rng(seed)
    scale_F = np.repeat(EPOCH_SCALES, EPOCH_DIMS)
    x_NF = draw.normal(size=(EPOCH_COUNT, len(scale_F))) * scale_F[None]
    parts = [draw.normal(size=dims) for dims in EPOCH_DIMS]
    unit = [part / np.linalg.norm(part) for part in parts]
    signal = [np.sqrt(e) * u for e, u in zip(EPOCH_ENERGY, unit, strict=True)]
    true_F = np.concatenate(signal) / scale_F
    y_N = x_NF @ true_F + EPOCH_NOISE * draw.normal(size=EPOCH_COUNT)
    value_F, vector_FF = np.linalg.eigh(x_NF.T @ x_NF / EPOCH_COUNT)
    end_F = vector_FF.T @ np.linalg.solve(x_NF.T @ x_NF, x_NF.T @ y_N)
    kept_TF = (1 - 0.1 * value_F / value_F[-1])[None] ** EPOCH_STEPS[:, None]
    theta_TF = ((1 - kept_TF) * end_F[None]) @ vector_FF.T
    return (((theta_TF - true_F[None]) * scale_F[None]) ** 2).sum(1)


def turns(curve_T: Sequence[float]) -> tuple[float, float, float]:
    """The lowest point before the peak, the peak, and the end.

    The peak is the point that lies highest above all that was reached before it.
    """
    curve_T = np.asarray(curve_T, np.float64)
    before_T = np.minimum.accumulate(curve_T)
    peak = int(np.argmax(curve_T - before_T))
    return float(before_T[peak]), float(curve_T[peak]), float(curve_T[-1])


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Of the features the medians over seeds; of the others one value for each seed."""
    (features,) = (row for row in table if row["model"] == "features")
    (epochs,) = (row for row in table if row["model"] == "epochs")
    below = [i for i, count in enumerate(FEATURES) if count < COUNT]
    values = {}
    for kind in _CELL:
        error_F, norm_F = (np.median(features[f"{n}_{kind}"], 0) for n in ("error", "norm"))
        values |= {
            f"peak_{kind}": FEATURES[error_F.argmax()],
            f"height_{kind}": error_F[FEATURES.index(300)] / error_F[FEATURES.index(100)],
            f"second_{kind}": error_F[FEATURES.index(8_000)] / error_F[below].min(),
            f"norm_{kind}": FEATURES[norm_F.argmax()],
        }
    width_H, error_SH, wrong_ST = _by_width(table)
    count_H = np.array([parameters(width) for width in width_H])
    near_H = (count_H >= 750) & (count_H <= 12_000)
    peak_S = error_SH[:, near_H].max(1)
    turn_S3 = np.array([turns(risk_T) for risk_T in epochs["risk"]])
    return judged(
        EXPECTED,
        {
            **values,
            "net_peak": peak_S / error_SH[:, count_H < 750].min(1),
            "net_second": error_SH[:, -1] / peak_S,
            "epoch_rise": turn_S3[:, 1] / turn_S3[:, 0],
            "epoch_second": turn_S3[:, 2] / turn_S3[:, 1],
            "net_epochs": [np.subtract(*turns(wrong_T)[1:]) for wrong_T in wrong_ST],
        },
    )


def parameters(width: int) -> int:
    """Of a net of one hidden layer."""
    return (64 + 1) * width + (width + 1) * CLASSES


def _nets(table: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted((row for row in table if row["model"] == "net"), key=lambda row: row["size"])


def _by_width(table: Sequence[Mapping[str, Any]]) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Widths, the last error of each, and the widest net's wrong percents over the steps."""
    nets = _nets(table)
    error_SH = np.stack([np.array(row["error"])[:, -1] for row in nets], 1)
    return [row["size"] for row in nets], error_SH, np.array(nets[-1]["wrong"])


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The peak over features, over the width of a net, and over the steps."""
    (features,) = (row for row in table if row["model"] == "features")
    (epochs,) = (row for row in table if row["model"] == "epochs")
    labels = {"clean": "clean labels", "noise": "20% label noise"}
    panels = []
    for name, title, y in (
        ("error", "Error peaks at N = n", "squared error on valid"),
        ("norm", "where the norm does", "norm of the coefficients"),
    ):
        series = {
            label: (FEATURES, *_median(features[f"{name}_{kind}"]))
            for kind, label in labels.items()
        }
        axes = dict(x="random features N (n = 300 digits)", y=y, logx=True, logy=True)
        panels.append(plots.lines(series, title=title, **axes))
    alt = "Error and norm rise by orders of magnitude at N = 300 and fall again."
    figures = {"features": plots.panels(panels, title="Random features of least norm", alt=alt)}
    width_H, error_SH, wrong_ST = _by_width(table)
    count_H = [parameters(width) for width in width_H]
    train_SH = np.stack([np.array(row["train_loss"])[:, -1] for row in _nets(table)], 1)
    wrong_SH = np.stack([np.array(row["wrong"])[:, -1] for row in _nets(table)], 1)
    series = {"valid": (count_H, *_median(error_SH)), "training": (count_H, *_median(train_SH))}
    axes = dict(x="parameters (n K = 3,000)", logx=True)
    pair = [
        plots.lines(series, title="Squared error", y="squared error", **axes),
        plots.lines(
            {"valid": (count_H, *_median(wrong_SH))}, title="Wrong", y="valid error, %", **axes
        ),
    ]
    figures["nets"] = plots.panels(
        pair,
        title="ReLU nets of one layer, 20% label noise",
        alt="The squared error rises up to the threshold and falls after it; the share of wrong "
        "digits falls all along.",
    )
    steps = EVERY * np.arange(1, wrong_ST.shape[1] + 1)
    left = plots.lines(
        {"medians of the seeds": (EPOCH_STEPS, *_median(epochs["risk"]))},
        title="Least squares, features of two scales",
        x="steps of gradient descent",
        y="excess risk",
        logx=True,
    )
    right = plots.lines(
        {"medians of the seeds": (steps, *_median(wrong_ST))},
        title=f"ReLU net of {width_H[-1]}, digits, 20% noise",
        x="steps of Adam",
        y="valid error, %",
        logx=True,
    )
    alt = "The risk falls, rises as noise is fit and falls again where slow features are learnt."
    figures["epochs"] = plots.panels([left, right], title="Over the steps", alt=alt)
    return figures


def _median(value_SF: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """With the lowest and the highest seed."""
    value_SF = np.array(value_SF)
    return np.median(value_SF, 0), value_SF.min(0), value_SF.max(0)
