"""How sharp a minimum is: the loss that a small move of the parameters can reach.

None of these numbers survives another scale of the same net's filters (Dinh et al. 2017): compare
nets of one architecture that were trained alike.

Shape letters: N parameters, Q directions of a subspace.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from lsdl.analysis.curvature import (
    Loss,
    coefficients,
    combined,
    dot,
    put,
    random_like,
    scaled,
    stacked,
    unit,
    zeros_like,
)

map_ = jax.tree.map


class Ascent(NamedTuple):
    """The highest loss that was found near the parameters."""

    loss: float  # at the parameters
    highest: float  # the maximum itself is no lower
    evaluations: int

    @property
    def phi(self) -> float:
        """Keskar's measure, in percent of 1 + loss."""
        return 100 * (self.highest - self.loss) / (1 + self.loss)


def value_and_grad(
    loss: Loss,
    params: Any,
    batches: Iterable,
    *,
    program: Callable = jax.jit,
    tick: Callable[[], None] = lambda: None,
) -> Callable[[Any], tuple[float, Any]]:
    """`params -> (the mean loss over all batches, its gradient)`."""

    def add(params, batch, gradient):
        of_batch = jax.value_and_grad(lambda params: loss(params, batch), has_aux=True)
        found, slope = of_batch(params)
        return found, map_(jnp.add, gradient, slope)

    shardings = map_(lambda x: x.sharding, params)
    step = program(add, donate_argnums=2, out_shardings=(None, shardings))

    def whole(params):
        total, gradient = np.zeros(2), zeros_like(params)
        for batch in batches:
            # Virtual devices of one CPU starve with several programs in flight.
            found, gradient = jax.block_until_ready(step(params, batch, gradient))
            total += np.array([float(x) for x in found])
            tick()
        value, weight = map(float, total)
        return value / weight, scaled(gradient, 1 / weight)

    return whole


def box(
    at: Callable[[Any], tuple[float, Any]], params: Any, *, epsilon: float, iterations: int = 10
) -> Ascent:
    """Keskar's ascent in the whole space: each parameter w may move by epsilon (|w| + 1).

    By L-BFGS-B, from the parameters. Its vectors are of float64 and on the host.
    Source: Keskar et al. 2017, metric 2.1 and section 2.2.2.
    """
    leaves, structure = jax.tree.flatten(params)
    flat_N = _flat(leaves)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def of(y_N: np.ndarray) -> tuple[float, np.ndarray]:
        parts = np.split(flat_N + y_N, ends)
        moved = [
            jax.device_put(part.reshape(leaf.shape).astype(leaf.dtype), leaf.sharding)
            for part, leaf in zip(parts, leaves, strict=True)
        ]
        value, gradient = at(jax.tree.unflatten(structure, moved))
        return value, _flat(jax.tree.leaves(gradient))

    return _ascend(of, epsilon * (np.abs(flat_N) + 1), iterations)


def _flat(leaves: list) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])


def subspace_box(
    at: Callable[[Any], tuple[float, Any]],
    params: Any,
    *,
    epsilon: float,
    dims: int = 100,
    key: jax.Array,
    iterations: int = 10,
) -> Ascent:
    """Keskar's ascent along `dims` random directions A: |y| <= epsilon (|A^+ w| + 1).

    The directions have length 1, and lie where the parameters do: as many copies of them.
    Source: Keskar et al. 2017, metric 2.1 and section 2.2.2.
    """
    basis = stacked(params, dims)
    for i in range(dims):
        drawn = unit(random_like(params, jax.random.fold_in(key, i)))
        # Virtual devices of one CPU starve with several programs in flight.
        basis = jax.block_until_ready(put(basis, i, drawn))
    return along(at, params, basis, epsilon=epsilon, iterations=iterations)


def along(
    at: Callable[[Any], tuple[float, Any]],
    params: Any,
    basis: Any,
    *,
    epsilon: float,
    iterations: int = 10,
) -> Ascent:
    """`subspace_box` along the trees of `basis`, which are `stacked`."""
    dims = jax.tree.leaves(basis)[0].shape[0]
    pick = jax.jit(lambda basis, i: map_(lambda s: s[i], basis))
    inner = lambda tree: np.asarray(coefficients(basis, tree), np.float64)  # noqa: E731
    gram_QQ = np.stack([inner(pick(basis, i)) for i in range(dims)])
    pseudo_Q = np.linalg.solve(gram_QQ, inner(params))  # (A^T A)^-1 A^T w

    def of(y_Q: np.ndarray) -> tuple[float, np.ndarray]:
        move = combined(basis, jnp.asarray(y_Q, jnp.float32))
        value, gradient = at(map_(jnp.add, params, move))
        return value, inner(gradient)

    return _ascend(of, epsilon * (np.abs(pseudo_Q) + 1), iterations)


def _ascend(of: Callable, bound: np.ndarray, iterations: int) -> Ascent:
    values = []

    def down(y):
        value, slope = of(y)
        values.append(value if np.isfinite(value) else -np.inf)
        return -value, -slope

    limits = optimize.Bounds(-bound, bound)
    options = {"maxiter": iterations}
    optimize.minimize(
        down, np.zeros_like(bound), jac=True, method="L-BFGS-B", bounds=limits, options=options
    )
    return Ascent(values[0], max(values), len(values))


def ball(at: Callable[[Any], tuple[float, Any]], params: Any, *, rho: float) -> Ascent:
    """SAM's ascent: one step along the gradient, of length `rho`.

    Source: Foret et al. 2021, equation 2.
    """
    value, gradient = at(params)
    step = scaled(gradient, rho / jnp.maximum(jnp.sqrt(dot(gradient, gradient)), 1e-30))
    return Ascent(value, max(value, at(map_(jnp.add, params, step))[0]), 2)


def edge(largest: float, rate: float) -> float:
    """lambda_max eta / 2: gradient descent at the rate eta is stable below 1.

    Of plain gradient descent; with momentum b it is stable below 1 + b.
    Source: Cohen et al. 2021, sections 2 and 3.
    """
    return largest * rate / 2
