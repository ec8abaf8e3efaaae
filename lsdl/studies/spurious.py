"""PH-29: ten weak features and a shortcut that agrees with the label until it does not.

Labels are +-1. Each core feature is 0.4 times the label plus unit noise: all ten together reach 90%
at best. The shortcut is +-1, the label's sign in a share of the training examples, and in the
future drawn without the label, or turned round.
Shape letters: S seeds, A agreements, N examples, F features, C classes, T steps, B batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import descent
from lsdl.models.mlp import Mlp
from lsdl.state import stream
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A feature that nearly always agrees with the label in training takes over: the training error "
    "is low, and once the correlation is gone the future error is high."
)
SOURCE = (
    "Lecture on optimisation and regularisation: spurious features, 99.79 % and 98.51 %; Geirhos "
    "et al. 2020, Shortcut learning in deep neural networks (arXiv:2004.07780)"
)
_LECTURE = "lecture: spurious features, a correlation of 99.79 %"
EXPECTED = {
    "train": Expected(
        "training accuracy in % of a net with a shortcut that agrees with 99.8 % of the labels",
        _LECTURE,
        low=99,
    ),
    "future": Expected(
        "points of future accuracy, where the shortcut is independent of the label, that the net "
        "loses against one trained without it",
        _LECTURE,
        low=20,
    ),
    "flipped": Expected(
        "future accuracy in % where the shortcut says the opposite: below a coin's",
        _LECTURE,
        high=50,
    ),
    "unchanged": Expected(
        "points by which the net is ahead of one trained without the shortcut on data that keep it",
        _LECTURE,
        low=5,
    ),
    "probe": Expected(
        "the shortcut's weight over the largest of a core feature, each feature with deviation 1, "
        "in a logistic probe on the training data",
        _LECTURE,
        low=2,
    ),
    "response": Expected(
        "the same in the linear function closest to the net's own logit",
        _LECTURE,
        low=2,
    ),
    "weaker": Expected(
        "points of future accuracy lost at an agreement of 98.51 %: the lecture's other number",
        "lecture: spurious features, a correlation of 98.51 %",
        low=10,
    ),
}

CORE, SIGNAL = 10, 0.4
AGREEMENTS = (0.5, 0.8, 0.9, 0.95, 0.9851, 0.998)  # and none: the column is empty
TRAIN, FUTURE = 2_000, 10_000
HIDDEN, BATCH, STEPS, RATE = (32,), 100, 400, 3e-3
FUTURES = ("kept", "independent", "flipped")


class Examples(NamedTuple):
    x_NF: jax.Array  # the shortcut is the last feature
    label_N: jax.Array


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale the net that a colour for each class would mislead."""
    if scale == "full":
        told = "none; tint each class of the train split: no transform of lsdl knows the label"
        return [Cell("cifar10", {}, "configs/cifar10_resnet.py:20", {}, told)]
    return [Cell("shortcut", {"seeds": seeds, "steps": STEPS})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """By seed, then by agreement, the last of them without a shortcut; accuracies in %."""
    seeds, steps = cell.settings["seeds"], cell.settings["steps"]
    ids = [digits.batches(seed, TRAIN, size=BATCH, steps=steps) for seed in range(seeds)]
    agreement_A = jnp.array([*AGREEMENTS, 0.5])
    used_A = jnp.array([1.0] * len(AGREEMENTS) + [0.0])
    by_agreement = jax.vmap(_measured, (None, None, 0, 0))
    run = jax.jit(jax.vmap(by_agreement, (0, 0, None, None)))
    row = run(digits.keys(seeds), np.stack(ids), agreement_A, used_A)
    return {name: np.asarray(value, float).tolist() for name, value in row.items()}


def draw(key: jax.Array, count: int, agreement, *, used=1.0) -> Examples:
    """Labels 0 and 1, core features, and a shortcut with the label's sign in such a share.

    `used` 0 leaves the shortcut's column empty.
    """
    label_N = jax.random.bernoulli(stream(key, "label"), 0.5, (count,))
    sign_N = 2.0 * label_N - 1
    core_NF = SIGNAL * sign_N[:, None] + jax.random.normal(stream(key, "core"), (count, CORE))
    agrees_N = jax.random.bernoulli(stream(key, "shortcut"), agreement, (count,))
    shortcut_N = used * jnp.where(agrees_N, sign_N, -sign_N)
    return Examples(jnp.concatenate([core_NF, shortcut_N[:, None]], 1), label_N.astype(jnp.int32))


def _measured(key: jax.Array, id_TB: jax.Array, agreement, used) -> dict[str, jax.Array]:
    train = draw(stream(key, "train"), TRAIN, agreement, used=used)
    model = Mlp(HIDDEN, 2)
    params = model.init(stream(key, "init"), train.x_NF[:1], train=False)["params"]

    def logit(params, x_NF):
        z_NC = model.apply({"params": params}, x_NF, train=False)
        return z_NC[:, 1] - z_NC[:, 0]

    def gradient(params, id_B):
        def loss(params):
            z_B = logit(params, train.x_NF[id_B])
            return optax.sigmoid_binary_cross_entropy(z_B, train.label_N[id_B]).mean()

        return jax.grad(loss)(params)

    tx = optax.adam(RATE)
    (params, _), _ = descent.descend(tx, gradient, params, id_TB, record=descent.nothing)

    def accuracy(examples):
        return 100 * ((logit(params, examples.x_NF) > 0) == examples.label_N).mean()

    found = {"train": accuracy(train)}
    for name, share in zip(FUTURES, (agreement, 0.5, 1 - agreement), strict=True):
        found[name] = accuracy(draw(stream(key, name), FUTURE, share, used=used))
    x_NF = train.x_NF / (train.x_NF.std(0) + 1e-6)[None]
    response_F = jnp.linalg.lstsq(_with_bias(x_NF), logit(params, train.x_NF))[0][:-1]
    return found | {"probe": probe(x_NF, train.label_N)[:-1], "response": response_F}


def _with_bias(x_NF: jax.Array) -> jax.Array:
    return jnp.concatenate([x_NF, jnp.ones((len(x_NF), 1))], 1)


def probe(x_NF: jax.Array, label_N: jax.Array, *, decay: float = 1e-4) -> jax.Array:
    """Logistic regression with a little decay, by Newton's method: the weights, and the bias."""
    x_NF = _with_bias(x_NF)

    def newton(w_F, _):
        p_N = jax.nn.sigmoid(x_NF @ w_F)
        gradient_F = x_NF.T @ (p_N - label_N) / len(x_NF) + decay * w_F
        hessian_FF = (x_NF.T * (p_N * (1 - p_N))[None]) @ x_NF / len(x_NF)
        return w_F - jnp.linalg.solve(hessian_FF + decay * jnp.eye(len(w_F)), gradient_F), None

    return lax.scan(newton, jnp.zeros(x_NF.shape[1]), length=15)[0]


def dominance(weight_SAF: Any, agreement: float) -> np.ndarray:
    """The shortcut's weight over the largest of a core feature, of each seed."""
    weight_SF = np.abs(np.array(weight_SAF)[:, AGREEMENTS.index(agreement)])
    return weight_SF[:, -1] / weight_SF[:, :-1].max(1)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    (row,) = table
    accuracy = {name: np.array(row[name]) for name in ("train", *FUTURES)}
    strong, lecture = (AGREEMENTS.index(a) for a in (0.998, 0.9851))
    without_S = accuracy["independent"][:, -1]
    return judged(
        EXPECTED,
        {
            "train": accuracy["train"][:, strong],
            "future": without_S - accuracy["independent"][:, strong],
            "flipped": accuracy["flipped"][:, strong],
            "unchanged": accuracy["kept"][:, strong] - accuracy["kept"][:, -1],
            "probe": dominance(row["probe"], 0.998),
            "response": dominance(row["response"], 0.998),
            "weaker": without_S - accuracy["independent"][:, lecture],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Accuracies by agreement, and what the strongest shortcut weighs."""
    (row,) = table
    percent = 100 * np.array(AGREEMENTS)
    labels = {
        "train": "train",
        "independent": "future, independent",
        "flipped": "future, turned round",
    }
    series = {label: (percent, *_summary(row[name])) for name, label in labels.items()}
    left = plots.lines(
        series,
        levels={"without the shortcut": float(np.mean(np.array(row["independent"])[:, -1]))},
        title="Right in training, wrong later",
        x="training examples that the shortcut agrees with, %",
        y="accuracy, %",
    )
    names = [*(f"core {i}" for i in range(1, CORE + 1)), "shortcut"]
    strong = AGREEMENTS.index(0.998)
    weights = {
        label: dict(zip(names, np.array(row[name])[:, strong].mean(0).tolist(), strict=True))
        for name, label in (("probe", "logistic probe"), ("response", "the net's logit"))
    }
    right = plots.bars(weights, title="At 99.8 %", x="weight of a feature of deviation 1")
    alt = "As the shortcut's agreement grows the training accuracy grows and the future one falls."
    return {"shortcut": plots.panels([left, right], title="A spurious feature", alt=alt)}


def _summary(value_SA: Any) -> tuple:
    value_SA = np.array(value_SA)[:, :-1]
    return value_SA.mean(0), value_SA.min(0), value_SA.max(0)
