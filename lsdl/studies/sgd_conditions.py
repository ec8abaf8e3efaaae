"""What decaying rates do to noise, and when one pass of SGD beats one step of gradient descent.

Shape letters: A arms, R replicas, E epochs, T steps, N examples, B batch, D inputs (the last is the
constant 1), C classes.
"""

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl.analysis import descent, logistic
from lsdl.optim.conditions import conditions
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "With noise a constant rate ends on a plateau, 1/t converges like 1/t and e^-t stops too soon; "
    "SGD is ahead early, where each step costs less, and gradient descent late."
)
SOURCE = (
    "Lecture on optimisation, part 2: the conditions on the learning rate, phases of GD and SGD; "
    "Robbins and Monro 1951; Bottou and Bousquet 2008, The tradeoffs of large scale learning"
)
_NOISY = "x <- x - rate (x + N(0, 1)), x_0 = 10, 4,000 replicas, 10,000 steps"
_CONDITIONS = "lecture on optimisation, part 2: the two conditions on the learning rate"
_PHASES = "lecture on optimisation, part 2: phases of GD and SGD"
EXPECTED = {
    "constant": Expected(
        f"E x^2 of the last 1,000 steps over rate / (2 - rate) at rate 0.1; {_NOISY}",
        _CONDITIONS,
        low=0.95,
        high=1.05,
    ),
    "inverse": Expected("E x^2 times t at rate 1/t, after 10,000 steps", _CONDITIONS, 0.9, 1.1),
    "exponential": Expected("smallest E x^2 of all steps at rate e^-t", _CONDITIONS, low=10),
    "inverse_sqrt": Expected(
        "E x^2 times the root of t at rate 1/sqrt(t), after 10,000 steps: 1/2",
        _CONDITIONS,
        0.45,
        0.55,
    ),
    "sqrt_slower": Expected(
        "E x^2 at rate 1/sqrt(t) over at 1/t, after 10,000 steps", _CONDITIONS, low=10
    ),
    "square_sums": Expected(
        "of the four rates, how many meet the lecture's two conditions while the sum of their "
        "squares diverges: 1/sqrt(t), which Robbins and Monro exclude",
        "Robbins and Monro 1951: the sum of squares is finite",
        low=1,
        high=1,
    ),
    "early": Expected(
        "largest ratio of SGD's training loss (batch 16, fresh subsets) to gradient descent's at "
        "equal gradient evaluations, after 1 and 2 epochs, logistic regression on digits",
        _PHASES,
        high=1,
    ),
    "late": Expected(
        "excess loss of gradient descent over that of SGD at rate 1/t after 1,000 epochs",
        _PHASES,
        high=0.1,
    ),
    "plateau": Expected(
        "excess loss of SGD at a constant rate after 1,000 epochs over after 100 (means of 50 "
        "epochs)",
        _PHASES,
        low=0.5,
        high=2,
    ),
    "order": Expected(
        "slope of log excess against log epochs from 100 to 1,000, SGD at rate 1/t",
        "Bottou and Bousquet 2008: excess of order 1/t",
        low=-1.5,
        high=-0.7,
    ),
}

REPLICAS, STEPS, WINDOW = 4_000, 10_000, 1_000
# Their steps count from 1: the first rate of 1/t is 1.
RATES = {
    "constant": ("constant", 0.1, {}),
    "1/t": ("inverse_time", 1.0, {"period_steps": 1}),
    "1/sqrt(t)": ("rsqrt", 1.0, {"period_steps": 1}),
    "e^-t": ("exponential", math.exp(-1), {"decay_factor": math.exp(-1)}),
}
EPOCHS, BATCH, RATE, DECAY = 1_000, 16, 0.1, 0.03
ARMS = ("GD", "SGD, constant rate", "SGD, rate 1/t")


def cells(scale: str, seeds: int) -> list[Cell]:
    """The noisy quadratic and logistic regression, for each seed; ResNet-50 at full scale."""
    if scale == "full":
        name = "optim.schedule.name"
        arms = {
            "constant": {name: "constant"},
            "inverse_time": {name: "inverse_time", "optim.schedule.period_epochs": 5.0},
            "warmup_cosine": {name: "warmup_cosine"},
        }
        file = "configs/imagenet_resnet50.py:256"
        return [Cell(arm, {"schedule": arm}, file, fields) for arm, fields in arms.items()]
    kinds = ("noisy", "phases")
    return [Cell(f"{k}-s{seed}", {"kind": k, "seed": seed}) for k in kinds for seed in range(seeds)]


def measure(cell: Cell, folder: Path) -> dict:
    """E x^2 under four rates, or the excess losses of three arms after each epoch."""
    seed = cell.settings["seed"]
    if cell.settings["kind"] == "noisy":
        return _noisy(jax.random.key(seed))
    with jax.enable_x64(True):
        return _phases(seed)


def _noisy(key: jax.Array) -> dict:
    square_TA = np.asarray(_squares(key, rates(STEPS)), np.float64)
    shown = np.unique(np.geomspace(1, STEPS, 121).astype(int))
    row = {"steps": shown.tolist()}
    for name, square_T in zip(RATES, square_TA.T, strict=True):
        row[f"last {name}"] = float(square_T[-1])
        row[f"smallest {name}"] = float(square_T.min())
        row[f"mean {name}"] = float(square_T[-WINDOW:].mean())
        row[f"E x^2 {name}"] = square_T[shown - 1].tolist()
    return row


def rates(steps: int) -> jax.Array:
    """`rate_TA` of the four schedules."""
    schedules = [descent.schedule(n, peak, steps=steps, **s) for n, peak, s in RATES.values()]
    return jax.vmap(lambda t: jnp.stack([jnp.float32(s(t)) for s in schedules]))(jnp.arange(steps))


@jax.jit
def _squares(key: jax.Array, rate_TA: jax.Array) -> jax.Array:
    """E x^2 after each step; the arms A see the same noise."""

    def step(x_AR, inputs):
        t, rate_A = inputs
        noise_R = jax.random.normal(jax.random.fold_in(key, t), (REPLICAS,))
        x_AR -= rate_A[:, None] * (x_AR + noise_R[None])
        return x_AR, (x_AR**2).mean(1)

    x_AR = jnp.full((rate_TA.shape[1], REPLICAS), 10.0)
    return lax.scan(step, x_AR, (jnp.arange(len(rate_TA)), rate_TA))[1]


def _phases(seed: int) -> dict:
    x_ND, label_N = descent.digits("train")
    x_ND, y_NC = jnp.asarray(descent.with_bias(x_ND)), jnp.asarray(descent.one_hot(label_N))
    steps = len(x_ND) // BATCH
    id_TB = descent.subsets(seed, len(x_ND), size=BATCH, steps=EPOCHS * steps)
    losses = _courses(x_ND, y_NC, id_TB.reshape(EPOCHS, steps, BATCH))
    row = {"best": float(logistic.minimum(x_ND, y_NC, decay=DECAY))}
    return row | {arm: np.asarray(v).tolist() for arm, v in zip(ARMS, losses, strict=True)}


@jax.jit
def _courses(x_ND: jax.Array, y_NC: jax.Array, id_ETB: jax.Array) -> list[jax.Array]:
    """The training loss at the start and after each epoch, of each arm."""
    full = functools.partial(logistic.loss, x_BD=x_ND, y_BC=y_NC, decay=DECAY)
    start_DC = jnp.zeros((x_ND.shape[1], y_NC.shape[1]))

    def on_batch(w_DC, id_B):
        return jax.grad(logistic.loss)(w_DC, x_ND[id_B], y_NC[id_B], decay=DECAY)

    def epochs(tx):
        def epoch(carry, id_TB):
            params, state = carry
            run = dict(state=state, record=descent.nothing)
            carry, _ = descent.descend(tx, on_batch, params, id_TB, **run)
            return carry, full(carry[0])

        return lax.scan(epoch, (start_DC, tx.init(start_DC)), id_ETB)[1]

    gd = optax.sgd(1 / logistic.largest_curvature(x_ND, decay=DECAY))
    gradient = lambda w_DC, _: jax.grad(full)(w_DC)  # noqa: E731
    # Asymptotically 1 / (decay x t), as the theory of strongly convex losses asks for.
    period = round(1 / (RATE * DECAY))
    inverse = descent.schedule("inverse_time", RATE, steps=1, period_steps=period)
    courses = [
        descent.descend(gd, gradient, start_DC, jnp.arange(len(id_ETB)), record=full)[1],
        epochs(optax.sgd(RATE)),
        epochs(optax.sgd(inverse)),
    ]
    return [jnp.concatenate([full(start_DC)[None], loss_E]) for loss_E in courses]


def claims(table: Sequence[dict]) -> list[Claim]:
    """Second moments against their limits, and excess losses of the arms against each other."""
    noisy = [row for row in table if row["kind"] == "noisy"]
    phases = [row for row in table if row["kind"] == "phases"]
    found = [conditions(name, descent.shape(**fields)) for name, _, fields in RATES.values()]
    lecture_only = [c for c in found if c.to_zero and c.sum_infinite and not c.squares_finite]

    def each(rows, value):
        return [value(row) for row in rows]

    def early(row):
        return max(row[arm][t] / row["GD"][t] for arm in ARMS[1:] for t in (1, 2))

    def tail(row, epoch):
        return np.mean(_excess(row, ARMS[1])[epoch - 49 : epoch + 1])

    def slope(row):
        t = np.arange(100, EPOCHS + 1)
        return np.polyfit(np.log(t), np.log(_excess(row, ARMS[2])[t]), 1)[0]

    values = {
        "constant": each(noisy, lambda row: row["mean constant"] / (0.1 / 1.9)),
        "inverse": each(noisy, lambda row: row["last 1/t"] * STEPS),
        "exponential": each(noisy, lambda row: row["smallest e^-t"]),
        "inverse_sqrt": each(noisy, lambda row: row["last 1/sqrt(t)"] * STEPS**0.5),
        "sqrt_slower": each(noisy, lambda row: row["last 1/sqrt(t)"] / row["last 1/t"]),
        "square_sums": len(lecture_only),
        "early": each(phases, early),
        "late": each(phases, lambda row: _excess(row, "GD")[-1] / _excess(row, ARMS[2])[-1]),
        "plateau": each(phases, lambda row: tail(row, EPOCHS) / tail(row, 100)),
        "order": each(phases, slope),
    }
    return judged(EXPECTED, values)


def _excess(row: dict, arm: str) -> np.ndarray:
    return np.array(row[arm]) - row["best"]


def figure(table: Sequence[dict]) -> dict:
    """E x^2 by step under each rate, and the excess loss by epoch of gradient descent and SGD."""
    from lsdl import plots

    noisy = next(row for row in table if row["kind"] == "noisy")
    phases = next(row for row in table if row["kind"] == "phases")
    epochs = np.unique(np.geomspace(1, EPOCHS, 121).astype(int))
    return {
        "rates": plots.lines(
            {name: (noisy["steps"], noisy[f"E x^2 {name}"]) for name in RATES},
            title="Noisy quadratic, 4,000 replicas",
            x="step",
            y="E x^2",
            logx=True,
            logy=True,
        ),
        "phases": plots.lines(
            {arm: (epochs.tolist(), _excess(phases, arm)[epochs].tolist()) for arm in ARMS},
            title="Logistic regression on digits",
            x="epochs of gradient evaluations",
            y="excess training loss",
            logx=True,
            logy=True,
        ),
    }
