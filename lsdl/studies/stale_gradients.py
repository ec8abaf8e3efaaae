"""Passes over the data to a training loss, by batch size, each at its best rate.

Plain SGD on a 64-64-10 ReLU net and the 1,257 training digits; every batch size tries the same
eleven rates. The training loss is read at the end of each pass, and the passes to 0.1 are
interpolated on its logarithm.

The derivation behind linear scaling, K steps of one example against one step of K:

    w_k = w_{k-1} - a g_k(w_{k-1}),  k = 1 .. K        small steps, each gradient where they are
    v   = w_0 - a (g_1(w_0) + ... + g_K(w_0))          one big step, rate K a on the mean gradient
    w_K - v = a^2 sum_k H_k(w_0) (g_1 + ... + g_{k-1})(w_0) + O(a^3)

Shape letters: S seeds, R rates, P passes, T steps, B batch, K small steps.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import noise
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "The gradients of a batch are all taken where the batch began: past some size that costs "
    "passes over the data, even at the best learning rate."
)
SOURCE = (
    "Lecture: stochastic gradients, batch size; Wilson and Martinez 2003, The general "
    "inefficiency of batch training for gradient descent learning"
)
EXPECTED = {
    "full_batch": Expected(
        "passes to a training loss of 0.1, the full batch over batches of one, each at its best "
        "rate",
        "Wilson and Martinez 2003",
        low=3.0,
    ),
    "order": Expected(
        "least growth of the passes from one batch size to the next of 1, 8, 64, full",
        "Wilson and Martinez 2003",
        low=0.0,
    ),
    "sublinear": Expected(
        "slope of log best rate against log B, of the mean gradient (1: linear scaling; Wilson "
        "and Martinez suggest 0.5)",
        "Wilson and Martinez 2003, lecture on batch size",
        high=0.75,
    ),
    "second_order": Expected(
        "slope of log distance against log rate, between 8 steps of one example and one step of 8",
        "lecture on large batches: the two assumptions behind linear scaling",
        low=1.8,
        high=2.2,
    ),
}
HIDDEN, TARGET = 64, 0.1
RATES = tuple(2.0**i for i in range(-8, 3))
PASSES = {1: 8, 8: 12, 64: 30, 1257: 80}  # by batch size: how many are tried
STEPS, STEP_RATES = 8, tuple(2.0**i for i in range(-12, -6))
LARGEST = 1e3  # nats: the loss of a diverged run
# Goyal et al. 2017, figure 1 and table 1: the top-1 error of ResNet-50 by batch size.
GOYAL = {"256": "23.60%", "8k": "23.74%", "16k": "24.79%", "32k": "27.55%", "64k": "33.96%"}


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each batch size and one for the small steps; at full scale ImageNet, 90 passes."""
    if scale == "full":
        return [
            Cell(f"imagenet-{size}", config=f"imagenet_resnet50:{size}", published=f"error {error}")
            for size, error in GOYAL.items()
        ]
    runs = [
        Cell(
            f"batch-{size}",
            {"batch_size": size, "passes": passes, "rates": list(RATES), "seeds": seeds},
        )
        for size, passes in PASSES.items()
    ]
    return [*runs, Cell("steps", {"steps": STEPS, "rates": list(STEP_RATES), "seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """`loss` by seed, rate and pass; of the small steps `distance` and `length` by seed, rate."""
    given = cell.settings
    train, _ = digits.load()
    net = digits.Classifier(HIDDEN)
    count, seeds = len(train.label_N), given["seeds"]
    if "steps" in given:
        size, steps, run = 1, given["steps"], _small_and_big
    else:
        size, passes = given["batch_size"], given["passes"]
        steps = passes * (count // size)
        run = functools.partial(_curve, passes=passes)
    id_STB = np.stack([digits.batches(s, count, size=size, steps=steps) for s in range(seeds)])
    run = functools.partial(run, net, train)
    over_both = jax.jit(jax.vmap(jax.vmap(run, (None, None, 0)), (0, 0, None)))
    found = over_both(net.init(digits.keys(seeds)), id_STB, jnp.array(given["rates"]))
    return {
        name: np.minimum(np.nan_to_num(value, nan=LARGEST), LARGEST).tolist()
        for name, value in found.items()
    }


def _curve(net, train: digits.Split, params, id_TB, rate, *, passes: int) -> dict[str, Any]:
    """The training loss at the start and at the end of each pass."""
    optimizer = optax.sgd(rate)

    def step(state, id_B):
        return digits.step(net, optimizer, state, digits.rows(train, id_B)), None

    def one_pass(state, id_TB):
        state, _ = lax.scan(step, state, id_TB)
        return state, net.loss(state[0], train)

    start = params, optimizer.init(params)
    id_PTB = id_TB.reshape(passes, -1, id_TB.shape[-1])
    _, loss_P = lax.scan(one_pass, start, id_PTB)
    return {"loss": jnp.concatenate([net.loss(params, train)[None], loss_P])}


def _small_and_big(net, train: digits.Split, params, id_KB, rate) -> dict[str, Any]:
    """How far apart they end, and how far the big step goes."""
    optimizer = optax.sgd(rate)

    def small(state, id_B):
        return digits.step(net, optimizer, state, digits.rows(train, id_B)), None

    (last, _), _ = lax.scan(small, (params, optimizer.init(params)), id_KB)
    mean = jax.grad(net.loss)(params, digits.rows(train, id_KB[:, 0]))
    big = jax.tree.map(lambda w, g: w - len(id_KB) * rate * g, params, mean)
    return {"distance": _distance(last, big), "length": _distance(big, params)}


def _distance(a, b):
    return jnp.sqrt(noise.square(jax.tree.map(jnp.subtract, a, b)))


def passes_to(loss_P: Sequence[float], target: float) -> float:
    """The first pass at which the loss is `target`, between ends of passes; infinity if none."""
    below = np.flatnonzero(np.asarray(loss_P) <= target)
    if not below.size:
        return np.inf
    if below[0] == 0:
        return 0.0
    before, after = np.log(loss_P[below[0] - 1]), np.log(loss_P[below[0]])
    return float(below[0] - (np.log(target) - after) / (before - after))


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The best rate is that of the seeds' mean; the slopes are taken seed by seed."""
    passes_S, rate_S = {}, {}
    for size, passes_SR in _passes(table).items():
        passes_S[size] = passes_SR[:, passes_SR.mean(0).argmin()]
        rate_S[size] = np.array(RATES)[passes_SR.argmin(1)]
    sizes = list(passes_S)
    growth = [passes_S[big] - passes_S[small] for small, big in itertools.pairwise(sizes)]
    (steps,) = (row for row in table if "distance" in row)
    return judged(
        EXPECTED,
        {
            "full_batch": passes_S[sizes[-1]] / passes_S[1],
            "order": min(growth, key=np.mean),
            "sublinear": _slope(sizes, [rate_S[size] for size in sizes]),
            "second_order": _slope(steps["rates"], np.transpose(steps["distance"])),
        },
    )


def _passes(table) -> dict[int, np.ndarray]:
    """Batch size -> passes to the target, by seed and rate."""
    return {
        row["batch_size"]: np.array(
            [[passes_to(loss_P, TARGET) for loss_P in loss_RP] for loss_RP in row["loss"]]
        )
        for row in sorted((row for row in table if "loss" in row), key=lambda r: r["batch_size"])
    }


def _slope(x, y_S: Sequence) -> np.ndarray:
    return np.polyfit(np.log(x), np.log(y_S), 1)[0]


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Passes by rate and batch size, and K small steps against a big one."""
    names = {size: f"B = {size}" for size in PASSES}
    names[max(PASSES)] = "the full batch"
    passes = _passes(table)
    by_rate = plots.lines(
        {names[size]: (RATES, passes_SR.mean(0)) for size, passes_SR in passes.items()},
        title="Passes to a training loss of 0.1",
        x="learning rate",
        y="passes over the data",
        logx=True,
        logy=True,
        alt="Each batch size has its best rate; larger batches need more passes even there.",
    )
    loss = {}
    for row in table:
        if "loss" in row:
            best = passes[row["batch_size"]].mean(0).argmin()
            curve_P = np.mean(row["loss"], 0)[best]
            loss[names[row["batch_size"]]] = (np.arange(len(curve_P)), curve_P)
    by_pass = plots.lines(
        loss,
        title="each at its best rate",
        x="passes over the data",
        y="training loss, nats",
        logy=True,
        levels={"target": TARGET},
        alt="Training loss by pass.",
    )
    (steps,) = (row for row in table if "distance" in row)
    apart = plots.lines(
        {
            "how far the big step goes": (steps["rates"], np.mean(steps["length"], 0)),
            "how far apart they end": (steps["rates"], np.mean(steps["distance"], 0)),
        },
        title=f"{steps['steps']} small steps against one big one",
        x="rate of a small step",
        y="distance of parameters",
        logx=True,
        logy=True,
        alt="The step grows like the rate, the distance like its square.",
    )
    return {
        "passes": plots.panels([by_rate, by_pass], title="Batch gradients go stale"),
        "steps": apart,
    }
