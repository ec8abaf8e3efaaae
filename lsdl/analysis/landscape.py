"""Loss surfaces: directions through the parameters, and the loss at points along them.

A direction is a tree like the parameters and lies where these do. A point is its coordinates along
the directions, from a centre.

Shape letters: P points, Q directions, T checkpoints, C points of one program.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsdl.analysis.curvature import coefficients, combined, dot, put, random_like, stacked
from lsdl.metrics import fetched, means

map_ = jax.tree.map
Sums = Callable[[Any, Any], Mapping[str, jax.Array]]  # (variables, batch) -> loss, weight, ...
Dims = Mapping[str, tuple[int, ...] | None]  # of each parameter, by path: see `filter_dims`
random = random_like  # independent normal numbers


def filter_dims(names: Sequence[str | None]) -> tuple[int, ...] | None:
    """Which dims of a parameter number its filters, from the dims' roles; None of a vector.

    A filter is what makes one output: a kernel's last dim numbers them, with the dims of stacked
    layers and experts; of a table of vectors (words, places, tokens) it is a row.
    """
    stack = [i for i, name in enumerate(names) if name in ("layers", "experts")]
    own = [i for i in range(len(names)) if i not in stack]
    if len(own) < 2:
        return None
    table = len(own) == 2 and names[own[0]] in ("vocab", "length", None)
    return (*stack, own[0] if table else own[-1])


def filter_normalised(direction: Any, params: Any, dims: Dims, *, vectors: str = "zero") -> Any:
    """`direction` with each filter as long as the parameters' own.

    Biases and the scales and shifts of norms, which are vectors, do not move (`vectors="zero"`), or
    are as long as the parameters' as a whole (`"scale"`). A surface is then the same for nets that
    compute the same function with filters of another scale.
    Source: Li et al. 2018, section 4.
    """

    def scale(keys, d, w):
        numbered = dims[jax.tree_util.keystr(keys, simple=True, separator="/")]
        if numbered is None:
            return jnp.zeros_like(d) if vectors == "zero" else _as_long(d, w, ())
        return _as_long(d, w, numbered)

    return jax.tree_util.tree_map_with_path(scale, direction, params)


def slices(params: Any, keys_Q: jax.Array, normalised: Callable[[Any, Any], Any]) -> Any:
    """Random directions, one for each key, as one tree `(Q, ...)`.

    `normalised(direction, params)` gives each its length.
    """
    drawn = [normalised(random(params, key), params) for key in keys_Q]
    return map_(lambda *leaves: jnp.stack(leaves), *drawn)


def tensor_normalised(direction: Any, params: Any) -> Any:
    """`direction` with each array as long as the parameters' own."""
    return map_(lambda d, w: _as_long(d, w, ()), direction, params)


def _as_long(d: jax.Array, w: jax.Array, numbered: tuple[int, ...]) -> jax.Array:
    rest = tuple(i for i in range(d.ndim) if i not in numbered)
    length = lambda x: jnp.sqrt(jnp.sum(jnp.square(x), axis=rest, keepdims=True))  # noqa: E731
    return d * (length(w) / jnp.maximum(length(d), 1e-30))


def difference(start: Any, end: Any) -> Any:
    """The direction in which `end` is 1 away from `start`."""
    return map_(jnp.subtract, end, start)


class Path(NamedTuple):
    """A trajectory in the plane, or along the directions, in which it has most of its extent."""

    directions: list[Any]  # of length 1, orthogonal
    points_TQ: np.ndarray
    shares: np.ndarray  # of the squared distances from the centre, for each direction


def principal(trajectory: Iterable[Any], centre: Any, *, count: int = 2) -> Path:
    """The `count` principal directions of the trees of `trajectory`, seen from `centre`.

    Source: Li et al. 2018, section 7.2.
    """
    apart = [difference(centre, params) for params in trajectory]
    stack = stacked(centre, len(apart))
    for i, delta in enumerate(apart):
        stack = put(stack, i, delta)
    gram_TT = np.stack([np.asarray(coefficients(stack, delta), np.float64) for delta in apart])
    values_T, vectors_TT = np.linalg.eigh((gram_TT + gram_TT.T) / 2)
    values_T, vectors_TT = values_T[::-1].clip(0), vectors_TT[:, ::-1]
    lengths_T = np.sqrt(values_T)
    with np.errstate(divide="ignore"):
        inverse_T = np.where(lengths_T > 1e-6 * lengths_T[0], 1 / lengths_T, 0)
    factors_QT = (vectors_TT * inverse_T).T[:count]
    directions = [combined(stack, jnp.asarray(f_T, jnp.float32)) for f_T in factors_QT]
    points_TQ = (vectors_TT * lengths_T)[:, :count]
    return Path(directions, points_TQ, values_T[:count] / values_T.sum())


def line(low: float, high: float, resolution: int) -> np.ndarray:
    """Evenly spaced coordinates, `(P, 1)`; 0 is exactly 0."""
    x_P = np.linspace(low, high, resolution)
    return np.where(abs(x_P) < 1e-9 * (high - low), 0, x_P)[:, None]


def grid(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """All pairs of two `line`s' coordinates, `(P, 2)`, those of one `y` together."""
    return np.stack(np.meshgrid(x[:, 0], y[:, 0]), axis=-1).reshape(-1, 2)


def surface(
    sums: Sums,
    variables: Mapping[str, Any],
    directions: Sequence[Any],
    points_PQ: np.ndarray,
    batches: Sequence[Any],
    *,
    recalibrate: Callable[[Any], Any] | None = None,
    program: Callable = jax.jit,
    chunk: int = 64,
    at_a_time: int = 1,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Each mean that `sums` makes, `(P,)`, with the parameters moved to each of the points.

    `variables` are {"params", other collections}. `recalibrate(variables)` may give those that a
    point is measured with, such as BatchNorm's statistics there. `chunk` points are one program's
    and its loop takes `at_a_time` of them together, which pays where one leaves a device idle.
    `tick` is called after each chunk and batch.
    """

    def moved(variables, directions, point_Q):
        move = lambda w, *ds: w + sum(c * d for c, d in zip(point_Q, ds, strict=True))  # noqa: E731
        return {**variables, "params": map_(move, variables["params"], *directions)}

    def of_points(variables, directions, point_CQ, states, batch):
        def one(at):
            point_Q, state = at
            return sums({**moved(variables, directions, point_Q), **state}, batch)

        size = at_a_time if at_a_time > 1 else None
        return lax.map(one, (point_CQ, states), batch_size=size)

    def states_of(variables, directions, point_CQ):
        def one(point_Q):
            found = recalibrate(moved(variables, directions, point_Q))
            return {name: found[name] for name in found if name != "params"}

        return lax.map(one, point_CQ)

    step, recalibrated = program(of_points), program(states_of)
    directions = tuple(directions)
    chunk = min(chunk, len(points_PQ))
    parts = []
    for start in range(0, len(points_PQ), chunk):
        point_CQ = np.zeros((chunk, len(directions)), np.float32)
        some = points_PQ[start : start + chunk]
        point_CQ[: len(some)] = some
        states = recalibrated(variables, directions, point_CQ) if recalibrate else {}
        results = (step(variables, directions, point_CQ, states, batch) for batch in batches)
        found = []
        for result in fetched(results):
            found.append(result)
            tick()
        total = map_(lambda *values: np.sum(np.stack(values), 0, np.float64), *found)
        parts.append(map_(lambda x, kept=some: x[: len(kept)], total))
    total = map_(lambda *values: np.concatenate(values), *parts)
    weight = total.pop("weight")
    return means(total, weight)


def barrier(x_P: np.ndarray, loss_P: np.ndarray) -> float:
    """How far the loss between 0 and 1 rises above the straight line between its ends.

    Source: Frankle et al. 2020, section 2, with the mean of the ends in place of the line.
    """
    inside = (x_P >= 0) & (x_P <= 1)
    straight = np.interp(x_P[inside], [0, 1], np.interp([0, 1], x_P, loss_P))
    return float((loss_P[inside] - straight).max())


def bent_down(loss_P: np.ndarray, *, rounding: float = 1e-5) -> float:
    """The share of a slice's inner points that lie above the straight line of their neighbours.

    A convex function's slices have none; none proves nothing. What is less than `rounding`, of 1
    plus the loss, is not counted.
    """
    loss_P = np.asarray(loss_P, np.float64)
    second_P = loss_P[2:] - 2 * loss_P[1:-1] + loss_P[:-2]
    return float((second_P < -rounding * (1 + np.abs(loss_P[1:-1]))).mean())


def cosine(a: Any, b: Any) -> float:
    """Of the angle between two directions."""
    return float(dot(a, b) / jnp.sqrt(dot(a, a) * dot(b, b)))
