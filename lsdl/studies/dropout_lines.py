"""PHN-05 and PHN-06, line projections with and without dropout, and what a slice proves.

The lectures' text allows the initial or the trained parameters as the centre, their formula the
initial ones alone: both are measured. Directions are the lectures': normal numbers, each tensor as
long as the parameters' own, so that biases of zero do not move. SGD with momentum.

Shape letters: S seeds, N examples, B batch, T steps, P points, Q slices.
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
from lsdl.analysis import curvature, landscape
from lsdl.models.mlp import Mlp
from lsdl.state import stream
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A slope at the centre of a slice proves that it is no minimum, and a slice that bends down "
    "that the surface is not convex; the converses prove nothing."
)
SOURCE = (
    "Lecture on loss surfaces: line projection, with and without dropout; Li et al. 2018, "
    "Visualizing the loss landscape of neural nets (arXiv:1712.09913)"
)
_LINE = "lecture on loss surfaces: visualising the loss surface by line projection"
_LI = "Li et al. 2018: convexity of a random slice proves nothing"
_NET = "ReLU net 64-64-64-10 on digits, 12 random directions with each tensor's own length"
EXPECTED = {
    "slope": Expected(
        f"mean slope at the centre without its sign, initial over trained parameters, {_NET}, no "
        "dropout",
        f"{_LINE}: a slope there means no minimum",
        low=5,
    ),
    "flat_slices": Expected(
        "largest cosine of the gradient and a slice at the initial parameters, without its sign: "
        "even far from a minimum a random slice sees little of the gradient",
        f"{_LINE}: the converse proves nothing",
        high=0.15,
    ),
    "convex_slices": Expected(
        "share of slices through the trained parameters that bend down nowhere (31 points, up to "
        "0.3), no dropout",
        _LI,
        low=0.9,
    ),
    "negative_curvature": Expected(
        "smallest eigenvalue of the Hessian over the largest, there: below zero, though the slices "
        "are convex",
        _LI,
        high=-1e-6,
    ),
    "width": Expected(
        "rise of the training loss at the ends of the slices through the trained parameters, "
        "dropout 0.2 over none, both evaluated without dropout",
        "lecture on loss surfaces: the two figures, with and without dropout",
        high=1 - 1e-6,
    ),
    "gap": Expected(
        "valid minus training loss at the centre, dropout 0.2 over none, trained parameters",
        "lecture on loss surfaces: the two figures, with and without dropout",
        high=1 - 1e-6,
    ),
    "noisy_slices": Expected(
        "share of slices that bend down somewhere where each point draws its own dropout: the "
        "noise of the masks, of which nothing follows",
        f"{_LINE}: a slice is one function's",
        low=0.9,
    ),
}

HIDDEN, DROPOUT = (64, 64), 0.2
EPOCHS, BATCH, RATE, MOMENTUM = 40, 32, 0.02, 0.9
SLICES, POINTS, BOUND = 12, 31, 0.3
LANCZOS_STEPS = 60
CENTRES = {"start": "initial", "end": "trained"}


def cells(scale: str, seeds: int) -> list[Cell]:
    """Without dropout and with it; at full scale the lecture's own data."""
    if scale == "full":
        rates = {"none": 0.0, "dropout": DROPOUT}
        return [
            Cell(name, {}, "fashion_mnist_mlp", {"model.dropout": rate}, "curves, no numbers")
            for name, rate in rates.items()
        ]
    return [Cell(f"dropout-{rate:g}", {"dropout": rate, "seeds": seeds}) for rate in (0.0, DROPOUT)]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Of both centres the slices `(S, Q, P)`, slopes and cosines `(S, Q)`; the curvature."""
    train, _ = digits.load()
    rate, seeds = cell.settings["dropout"], cell.settings["seeds"]
    shape = {"size": BATCH, "steps": EPOCHS * (len(train.label_N) // BATCH)}
    ids = np.stack([digits.batches(s, len(train.label_N), **shape) for s in range(seeds)])
    keys_S = digits.keys(seeds)
    centres = dict(zip(CENTRES, _trained(rate, keys_S, ids), strict=True))
    points = jnp.asarray(landscape.line(-BOUND, BOUND, POINTS)[:, 0], jnp.float32)
    row: dict[str, Any] = {}
    for name, params_S in centres.items():
        ends = [jax.tree.map(lambda leaf, s=s: leaf[s], params_S) for s in range(seeds)]
        own_SQ = _stacked([_directions(*at) for at in zip(ends, keys_S, strict=True)])
        found = _projected(params_S, own_SQ, points)
        row |= {f"{key}_{name}": np.asarray(value).tolist() for key, value in found.items()}
    noisy = _noisy(DROPOUT, keys_S, centres["end"], own_SQ, points)
    row["noisy_end"] = np.asarray(noisy).tolist()
    if rate == 0:
        row["extremes"] = [_extremes(params, key) for params, key in zip(ends, keys_S, strict=True)]
    return row


def loss(params: Any, split: digits.Split, key: jax.Array | None = None, *, rate: float = 0.0):
    """The mean cross-entropy in nats, with dropout drawn from `key` if there is one."""
    model = Mlp(hidden=HIDDEN, num_classes=10, dropout=rate)
    keys = {} if key is None else {"dropout": key}
    logits_NC = model.apply({"params": params}, split.x_ND, train=key is not None, rngs=keys)
    log_p_NC = jax.nn.log_softmax(logits_NC)
    return -jnp.take_along_axis(log_p_NC, split.label_N[:, None], 1).mean()


@functools.partial(jax.jit, static_argnums=0)
def _trained(rate: float, keys_S: jax.Array, id_STB: jax.Array) -> tuple[Any, Any]:
    """The initial and the trained parameters, `(S, ...)`."""
    train, _ = digits.load()
    optimizer = optax.sgd(RATE, MOMENTUM)
    start_S = digits.Classifier(*HIDDEN).init(keys_S)

    def one(params, key, id_TB):
        def step(state, at):
            params, moments = state
            t, id_B = at
            mask = stream(key, "dropout", t) if rate else None
            gradient = jax.grad(loss)(params, digits.rows(train, id_B), mask, rate=rate)
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), None

        times = jnp.arange(len(id_TB))
        return lax.scan(step, (params, optimizer.init(params)), (times, id_TB))[0][0]

    return start_S, jax.vmap(one)(start_S, keys_S, id_STB)


def _moved(params: Any, direction: Any, x: jax.Array) -> Any:
    return jax.tree.map(lambda w, d: w + x * d, params, direction)


def _directions(params: Any, key: jax.Array) -> Any:
    """Those of all slices, `(Q, ...)`."""
    keys_Q = jax.random.split(stream(key, "slices"), SLICES)
    return landscape.slices(params, keys_Q, landscape.tensor_normalised)


def _stacked(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@jax.jit
def _projected(params_S: Any, own_SQ: Any, points_P: jax.Array) -> dict[str, jax.Array]:
    """Training and valid loss along each slice, and how the gradient stands to it."""
    train, valid = digits.load()

    def one(args):
        params, own_Q = args
        gradient = jax.grad(loss)(params, train)

        def along(own):
            slope = curvature.dot(gradient, own)
            lengths = jnp.sqrt(curvature.dot(gradient, gradient) * curvature.dot(own, own))

            def at(x):
                moved = _moved(params, own, x)
                return loss(moved, train), loss(moved, valid)

            train_P, valid_P = lax.map(at, points_P)
            return {"train": train_P, "valid": valid_P, "slope": slope, "cosine": slope / lengths}

        return lax.map(along, own_Q)

    return lax.map(one, (params_S, own_SQ))


@functools.partial(jax.jit, static_argnums=0)
def _noisy(
    rate: float, keys_S: jax.Array, params_S: Any, own_SQ: Any, points_P: jax.Array
) -> jax.Array:
    """The training loss along each slice, a dropout of its own at each point."""
    train, _ = digits.load()

    def one(args):
        key, params, own_Q = args
        keys_QP = jax.random.split(stream(key, "masks"), (SLICES, len(points_P)))

        def along(args):
            own, keys_P = args
            at = lambda a: loss(_moved(params, own, a[0]), train, a[1], rate=rate)  # noqa: E731
            return lax.map(at, (points_P, keys_P))

        return lax.map(along, (own_Q, keys_QP))

    return lax.map(one, (keys_S, params_S, own_SQ))


def _extremes(params: Any, key: jax.Array) -> list[float]:
    """The smallest and the largest Ritz value of the training loss's Hessian."""
    train, _ = digits.load()
    gradient = jax.grad(lambda params: loss(params, train))
    product = jax.jit(lambda v: jax.jvp(gradient, (params,), (v,))[1])
    own = stream(key, "lanczos")
    found = curvature.spectrum(product, params, starts=1, steps=LANCZOS_STEPS, key=own)
    return [float(found.values_RK[0].min()), float(found.values_RK[0].max())]


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    none, dropped = (next(r for r in table if r["dropout"] == rate) for rate in (0.0, DROPOUT))
    centre = POINTS // 2

    def rise(row):
        loss_SQP = np.array(row["train_end"])
        return ((loss_SQP[..., 0] + loss_SQP[..., -1]) / 2 - loss_SQP[..., centre]).mean(1)

    def gap(row):
        return np.subtract(*(np.array(row[f"{n}_end"])[:, 0, centre] for n in ("valid", "train")))

    def steepness(name):
        return np.abs(none[f"slope_{name}"]).mean(1)

    def bent(loss_SQP):
        return np.array([[landscape.bent_down(loss_P) > 0 for loss_P in q] for q in loss_SQP])

    extreme_S2 = np.array(none["extremes"])
    return judged(
        EXPECTED,
        {
            "slope": steepness("start") / steepness("end"),
            "flat_slices": np.abs(none["cosine_start"]).max(1),
            "convex_slices": 1 - bent(none["train_end"]).mean(1),
            "negative_curvature": extreme_S2[:, 0] / extreme_S2[:, 1],
            "width": rise(dropped) / rise(none),
            "gap": gap(dropped) / gap(none),
            "noisy_slices": bent(dropped["noisy_end"]).mean(1),
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The slices of one seed at both centres; those of the mean net with dropout and without."""
    none, dropped = (next(r for r in table if r["dropout"] == rate) for rate in (0.0, DROPOUT))
    x_P = landscape.line(-BOUND, BOUND, POINTS)[:, 0]
    axes = dict(x="alpha, in lengths of each tensor", y="loss, nats")
    lines = [
        plots.lines(
            {f"slice {q + 1}": (x_P, none[f"train_{name}"][0][q]) for q in range(5)},
            title=f"Through the {word} parameters",
            **axes,
        )
        for name, word in CENTRES.items()
    ]
    words = {"no dropout": none, "dropout 0.2": dropped}
    both = {}
    for word, row in words.items():
        for split, label in (("train", "training"), ("valid", "valid")):
            value_SP = np.mean(row[f"{split}_end"], 1)
            both[f"{label}, {word}"] = (x_P, *plots.summary(value_SP))
    noisy = {
        "masks drawn at each point": (x_P, dropped["noisy_end"][0][0]),
        "no dropout in evaluation": (x_P, dropped["train_end"][0][0]),
    }
    pair = [
        plots.lines(both, title="Trained with and without dropout, mean slice", **axes),
        plots.lines(noisy, title="One slice of the net with dropout", **axes),
    ]
    alt = "Slices are tilted at the initial parameters and level at the trained ones."
    return {
        "centres": plots.panels(lines, title="Line projections, training loss", alt=alt),
        "dropout": plots.panels(
            pair,
            title="Line projections with and without dropout",
            alt="Trained with dropout the training loss rises less; with masks drawn at each point "
            "a slice is noise.",
        ),
    }
