"""A plane through the parameters whose loss shows an icon, found by training three points.

The net is a 64-64-32-10 ReLU net on digits, the icon a heart of 16 x 16 cells. A step takes one
batch of 64 digits for all its cells.

Shape letters: S seeds, T steps, P cells of the icon, M cells of a step, B batch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import descent, landscape, noise
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "The loss surface is rich enough that a plane can be found in which the loss shows any icon, "
    "also on examples that were not trained on."
)
SOURCE = (
    "Lecture on loss surfaces: icon-shaped loss planes; Skorokhodov and Burtsev 2019, Loss "
    "landscape sightseeing with multi-point optimization (arXiv:1910.03867)"
)
_ICONS = "Skorokhodov and Burtsev 2019"
EXPECTED = {
    "inside": Expected(
        "mean validation cross-entropy in nats over the heart's cells, after 4,000 steps of Adam "
        "at 2e-3 with 24 cells of each kind a step",
        _ICONS,
        high=0.5,
    ),
    "outside": Expected(
        "mean validation cross-entropy in nats over the other cells", _ICONS, low=2.5
    ),
    "accuracy": Expected("mean validation accuracy inside less outside, in points", _ICONS, low=40),
    "overlap": Expected(
        "intersection over union of the heart and the cells whose validation cross-entropy is "
        "below 1.25 nats, half of what outside is trained to",
        _ICONS,
        low=0.7,
    ),
}

HIDDEN, SIZE, STEPS, CELLS, BATCH, RATE = (64, 32), 16, 4_000, 24, 64, 2e-3
CLIP = 2.5  # nats: a cell outside is not trained to a higher loss
CURVE = 25  # losses are kept of every so many steps


class Plane(NamedTuple):
    """Three points of the space of parameters, as one and the two ways from it."""

    origin: Any
    right: Any
    up: Any


def heart(size: int) -> np.ndarray:
    """True in the cells of the icon, `(size, size)` from the lowest row up."""
    at = (np.arange(size) + 0.5) / size * 2.6 - 1.3
    x, y = at[None], at[:, None] + 0.08
    return (x**2 + y**2 - 1) ** 3 < x**2 * y**3


def centres(size: int) -> np.ndarray:
    """(u, v) of each cell, row by row: `(P, 2)` from -1 to 1."""
    at = landscape.line(-1, 1, size)
    return landscape.grid(at, at)


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale the nets whose planes the paper draws."""
    if scale == "full":
        published = "50 x 50 icons, judged by eye (Skorokhodov and Burtsev 2019)"
        return [
            Cell("fashion_mnist", config="fashion_mnist_mlp", published=published),
            Cell("cifar10", config="cifar10_resnet:20", published=published),
        ]
    return [Cell("heart", {"size": SIZE, "steps": STEPS, "seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Validation loss and accuracy of every cell, row by row, by seed; and the course of both."""
    train, valid = digits.load()
    net = digits.Classifier(*HIDDEN)
    size, steps, seeds = (cell.settings[name] for name in ("size", "steps", "seeds"))
    icon_P = heart(size).ravel()
    draws = [_drawn(seed, icon_P, len(train.label_N), steps) for seed in range(seeds)]
    xs_S = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *draws)
    keys_S3 = jax.vmap(lambda key: jax.random.split(key, 3))(digits.keys(seeds))
    starts = Plane(*(net.init(keys_S3[:, i]) for i in range(3)))
    point_P2 = jnp.asarray(centres(size), jnp.float32)

    def one(args):
        plane, xs = args
        plane, loss_T2 = _trained(net, train, plane, xs, point_P2)
        found = lax.map(lambda at: _scores(net, valid, params_at(plane, at)), point_P2)
        return (*found, loss_T2)

    loss_SP, accuracy_SP, course_ST2 = jax.jit(lambda args: lax.map(one, args))((starts, xs_S))
    return {
        "loss": np.asarray(loss_SP).tolist(),
        "accuracy": np.asarray(accuracy_SP).tolist(),
        "course": np.asarray(course_ST2)[:, ::CURVE].tolist(),
    }


def _drawn(seed: int, icon_P: np.ndarray, count: int, steps: int) -> tuple[np.ndarray, ...]:
    """For each step `CELLS` cells inside, as many outside, and the ids of a batch."""
    inside, outside = np.flatnonzero(icon_P), np.flatnonzero(~icon_P)
    inside_TM = inside[descent.subsets(seed, len(inside), size=CELLS, steps=steps)]
    outside_TM = outside[descent.subsets(seed + 1_000, len(outside), size=CELLS, steps=steps)]
    return inside_TM, outside_TM, digits.batches(seed, count, size=BATCH, steps=steps)


def params_at(plane: Plane, at_2: jax.Array) -> Any:
    """The parameters at (u, v): origin + u right + v up, without the part of up along right."""
    share = noise.dot(plane.up, plane.right) / noise.square(plane.right)
    return jax.tree.map(lambda o, r, w: o + at_2[0] * r + at_2[1] * (w - share * r), *plane)


def _trained(net, train: digits.Split, plane: Plane, xs, point_P2: jax.Array):
    """The plane after all steps; the mean loss of the cells inside and outside at each."""

    def losses(plane, x):
        inside_M, outside_M, id_B = x
        batch = digits.rows(train, id_B)
        at = jax.vmap(lambda at_2: net.loss(params_at(plane, at_2), batch))
        return at(point_P2[inside_M]), at(point_P2[outside_M])

    def target(plane, x):
        inside_M, outside_M = losses(plane, x)
        both = jnp.stack([inside_M.mean(), outside_M.mean()])
        return inside_M.mean() - jnp.minimum(outside_M, CLIP).mean(), both

    tx = optax.adam(RATE)

    def step(carry, x):
        plane, state = carry
        gradient, both = jax.grad(target, has_aux=True)(plane, x)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(plane, updates), state), both

    (plane, _), loss_T2 = lax.scan(step, (plane, tx.init(plane)), xs)
    return plane, loss_T2


def _scores(net, split: digits.Split, params) -> tuple[jax.Array, jax.Array]:
    return net.loss(params, split), net.accuracy(params, split)


def overlap(icon_P: np.ndarray, loss_P: np.ndarray) -> float:
    """Intersection over union of the icon and the cells below half of `CLIP`."""
    low_P = loss_P < CLIP / 2
    return float((icon_P & low_P).sum() / (icon_P | low_P).sum())


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed."""
    (row,) = table
    icon_P = heart(row["size"]).ravel()
    loss_SP, accuracy_SP = np.array(row["loss"]), np.array(row["accuracy"])
    gap_S = accuracy_SP[:, icon_P].mean(1) - accuracy_SP[:, ~icon_P].mean(1)
    values = {
        "inside": loss_SP[:, icon_P].mean(1),
        "outside": loss_SP[:, ~icon_P].mean(1),
        "accuracy": 100 * gap_S,
        "overlap": [overlap(icon_P, loss_P) for loss_P in loss_SP],
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The icon beside the loss and the accuracy of the first seed's plane; the course."""
    (row,) = table
    size = row["size"]
    at = landscape.line(-1, 1, size)[:, 0].round(2).tolist()
    axes = {"x": "along the first direction", "y": "along the second", "columns": at, "rows": at}
    axes["numbers"] = False
    loss, accuracy = (np.array(row[name][0]).reshape(size, size) for name in ("loss", "accuracy"))
    maps = [
        plots.heatmap(heart(size), title="The icon", z="inside", **axes),
        plots.heatmap(
            np.minimum(loss, 2 * CLIP),
            title="Validation cross-entropy",
            z=f"nats, {2 * CLIP:g} and above alike",
            **axes,
        ),
        plots.heatmap(100 * accuracy, title="Validation accuracy", z="percent", **axes),
    ]
    course_TK = np.array(row["course"][0]).T
    xs = np.arange(course_TK.shape[1]) * CURVE
    series = {"inside": (xs, course_TK[0]), "outside": (xs, course_TK[1])}
    course = plots.lines(
        series,
        title="Training loss of the cells",
        x="step",
        y="cross-entropy, nats",
        logy=True,
        levels={"clipped above": CLIP},
    )
    alt = "Loss and accuracy on validation digits show the icon that the plane was trained for."
    return {
        "heart": plots.panels(maps, title="A heart in the loss of a digits net", alt=alt),
        "course": course,
    }
