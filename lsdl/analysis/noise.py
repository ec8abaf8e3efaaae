"""The noise of minibatch gradients: its size beside the gradient's, the batch size that asks for.

B_simple = tr Sigma / |G|^2, where G is the mean gradient and Sigma the covariance of the examples'
gradients: at that batch size a minibatch's noise is as large as the gradient.

Source: McCandlish et al. 2018, "An empirical model of large-batch training", section 2.2 (B_simple)
and appendix A.1 (two batch sizes).

Shape letters: N examples, K chunk, T steps.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsdl.errors import UserError

map_ = jax.tree.map


class Statistics(NamedTuple):
    """What `example_statistics` returns: a gradient, and scalars."""

    gradient: Any  # the mean
    square: jax.Array  # |G|^2
    trace: jax.Array  # tr Sigma
    cosine: jax.Array  # the mean over all pairs of different examples

    @property
    def noise_scale(self) -> jax.Array:
        """B_simple, in examples."""
        return self.trace / self.square


def square(tree: Any) -> jax.Array:
    """The sum of the squares of all elements."""
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))


def dot(a: Any, b: Any) -> jax.Array:
    """The inner product of two trees."""
    return sum(jax.tree.leaves(map_(jnp.vdot, a, b)))


def cosine(a: Any, b: Any) -> jax.Array:
    """Of the angle between two trees; 0 if one of them is zero."""
    length = jnp.sqrt(square(a) * square(b))
    return jnp.where(length > 0, dot(a, b) / jnp.where(length > 0, length, 1), 0)


class Sums(NamedTuple):
    """Over examples, to be added up and given to `statistics`."""

    gradient: Any
    squares: jax.Array  # of their lengths
    direction: Any  # of the gradients made 1 long


def no_sums(params: Any) -> Sums:
    """Of no example."""
    zeros = map_(jnp.zeros_like, params)
    return Sums(zeros, jnp.zeros(()), zeros)


def example_sums(
    loss: Callable[[Any, Any], jax.Array], params: Any, examples_K: Any
) -> tuple[Sums, Any]:
    """(the sums over examples, their gradients, stacked) of `loss(params, example)`."""
    gradient_K = jax.vmap(jax.grad(loss), (None, 0))(params, examples_K)
    square_K = jax.vmap(square)(gradient_K)
    inverse_K = jnp.where(square_K > 0, lax.rsqrt(jnp.where(square_K > 0, square_K, 1)), 0)

    def weighted(weight_K):
        return map_(lambda g: jnp.tensordot(weight_K, g, 1), gradient_K)

    sums = Sums(weighted(jnp.ones_like(square_K)), square_K.sum(), weighted(inverse_K))
    return sums, gradient_K


def statistics(sums: Sums, count: int, *, population: bool) -> Statistics:
    """The noise of the `count` examples of `sums`; see `example_statistics`."""
    mean = map_(lambda x: x / count, sums.gradient)
    mean_square, trace = square(mean), sums.squares / count - square(mean)
    if not population:
        trace *= count / (count - 1)
        mean_square -= trace / count
    pairs = (square(sums.direction) - count) / (count * (count - 1))
    return Statistics(mean, mean_square, trace, pairs)


def example_statistics(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    examples: Any,
    *,
    population: bool,
    chunk: int,
) -> Statistics:
    """The noise of `loss(params, example)` from every example's own gradient.

    The leaves of `examples` are `(N, ...)`; the gradients of `chunk` of them are in memory at a
    time. `population`: these examples are all there are, as where minibatches are drawn from them.
    Else they are a sample, and `square` and `trace` are unbiased for what it was drawn from.
    """
    count = len(jax.tree.leaves(examples)[0])
    if count < 2 or chunk < 1:
        raise UserError(f"{count} examples in chunks of {chunk}: 2 or more, of 1 or more.")

    def add(sums, examples_K):
        return map_(jnp.add, sums, example_sums(loss, params, examples_K)[0]), None

    whole = count - count % chunk
    sums, _ = lax.scan(
        add,
        no_sums(params),
        map_(lambda x: x[:whole].reshape(-1, chunk, *x.shape[1:]), examples),
    )
    if whole < count:
        sums, _ = add(sums, map_(lambda x: x[whole:], examples))
    return statistics(sums, count, population=population)


def jackknife(square_N: np.ndarray, along_N: np.ndarray, mean_square: float) -> float:
    """The standard error of a sample's B_simple, from leaving out one example at a time.

    `square_N` are the examples' |g|^2, `along_N` their products with the mean gradient, whose own
    square, the biased one, is `mean_square`. Source: Efron and Stein 1981.
    """
    square_N, along_N = (np.asarray(x, float) for x in (square_N, along_N))
    count = len(square_N)
    rest = count - 1
    mean_N = (count**2 * mean_square - 2 * count * along_N + square_N) / rest**2
    trace_N = ((square_N.sum() - square_N) / rest - mean_N) * rest / (rest - 1)
    ratio_N = trace_N / (mean_N - trace_N / rest)
    return float(np.sqrt(rest * ratio_N.var()))


def two_batch(small_square, big_square, small: int, big: int) -> tuple[Any, Any]:
    """(tr Sigma, |G|^2), both unbiased, from |gradient|^2 of a batch of `small` and one of `big`.

    Either estimate may be negative. Source: McCandlish et al. 2018, appendix A.1, equations A.2
    and A.3.
    """
    if not 0 < small < big:
        raise UserError(f"The two batch sizes are {small} and {big}: the first must be smaller.")
    trace = (small_square - big_square) / (1 / small - 1 / big)
    return trace, (big * big_square - small * small_square) / (big - small)


def noise_scale(small_square_T, big_square_T, small: int, big: int) -> tuple[float, float]:
    """(B_simple, its standard error) of a series of independent steps at nearly the same G.

    The ratio of the means of `two_batch`'s estimates, not the mean of their ratios; the error is
    the delta method's. Takes two steps or more.
    """
    small_square_T, big_square_T = (np.asarray(x, float) for x in (small_square_T, big_square_T))
    steps = len(small_square_T)
    if steps < 2:
        raise UserError(f"{steps} steps have no standard error: give two or more.")
    trace_T, square_T = two_batch(small_square_T, big_square_T, small, big)
    ratio = trace_T.mean() / square_T.mean()
    residual_T = (trace_T - ratio * square_T) / square_T.mean()
    return float(ratio), float(residual_T.std(ddof=1) / np.sqrt(steps))
