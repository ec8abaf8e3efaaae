"""Links of an optimiser's chain that optax does not have, each with its formula.

Letters: w a parameter, g its gradient, eta the rate of the step, m the momentum, lambda the decay.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lsdl.optim.groups import by_path, stacked_dims


class CorrectedState(NamedTuple):
    velocity: Any  # rate * (sum of past gradients, each with its power of m)
    rate: jax.Array  # the last one that was not 0
    clock: optax.ScaleByScheduleState


def corrected_momentum(
    schedule: optax.Schedule, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
    """V <- m (eta' / eta) v + eta' g, w <- w - v: the rate is inside the buffer, and corrected.

    Equal to a momentum that holds gradients alone under every schedule. Where the rate is 0, as at
    a warm-up's start, the buffer goes on in units of the last rate that was not.
    Source: Goyal et al. 2017, remark 2 and equation 10.
    """

    def init(params):
        kind = optax.tree.dtype(params, "lowest")
        clock = optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))
        return CorrectedState(optax.tree.zeros_like(params), jnp.ones((), kind), clock)

    def update(updates, state, params=None):
        count = state.clock.count
        now = jnp.asarray(schedule(count), state.rate.dtype)
        rate = jnp.where(now == 0, state.rate, now)
        history, moves = momentum * rate / state.rate, now != 0
        velocity = jax.tree.map(lambda v, g: history * v + rate * g, state.velocity, updates)
        step = velocity
        if nesterov:
            step = jax.tree.map(lambda v, g: momentum * v + rate * g, velocity, updates)
        step = jax.tree.map(lambda u: jnp.where(moves, -u, jnp.zeros_like(u)), step)
        clock = optax.ScaleByScheduleState(optax.safe_increment(count))
        return step, CorrectedState(velocity, rate, clock)

    return optax.GradientTransformation(init, update)


class GradientNormState(NamedTuple):
    count: jax.Array
    mean: Any
    square: jax.Array  # one number for all parameters


def scale_by_gradient_norm(
    b1: float, b2: float, eps: float, eps_root: float
) -> optax.GradientTransformation:
    """Adam with r <- b2 r + (1 - b2) ||g||^2, the norm of the whole gradient, as second moment.

    u = s^ / (sqrt(r^ + eps_root) + eps), both moments bias-corrected.
    """

    def init(params):
        square = jnp.zeros((), optax.tree.dtype(params, "lowest"))
        return GradientNormState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), square)

    def update(updates, state, params=None):
        count = optax.safe_increment(state.count)
        mean = optax.tree.update_moment(updates, state.mean, b1, 1)
        square = b2 * state.square + (1 - b2) * optax.tree.norm(updates, squared=True)
        unbiased = optax.tree.bias_correction(mean, b1, count)
        size = jnp.sqrt(square / (1 - b2**count) + eps_root) + eps
        updates = jax.tree.map(lambda s: s / size, unbiased)
        return updates, GradientNormState(count, mean, square)

    return optax.GradientTransformation(init, update)


def scale_by_lars(
    coefficient: float, weight_decay: float, decayed: Callable, trusted: Callable
) -> optax.GradientTransformation:
    """(g + lambda w) c ||w|| / (||g|| + lambda ||w||); 1 for c and the ratio where a norm is 0.

    optax's has the norm of the sum as denominator: the same where there is no decay.
    `decayed` and `trusted` map the parameters to the tree of which leaves are.
    Source: You, Gitman and Ginsburg 2017, equation 6 and algorithm 1.
    """

    def scale(g, w, decays, trusts):
        weight = weight_decay if decays else 0.0
        total = g + weight * w
        if not trusts:
            return total
        size, slope = jnp.linalg.norm(w), jnp.linalg.norm(g)
        below = slope + weight * size
        none = (size == 0) | (below == 0)
        return total * jnp.where(none, 1.0, coefficient * size / jnp.where(none, 1.0, below))

    def init(params):
        decayed(params), trusted(params)  # which refuse a parameter that no rule covers
        return optax.EmptyState()

    def update(updates, state, params=None):
        return jax.tree.map(scale, updates, params, decayed(params), trusted(params)), state

    return optax.GradientTransformation(init, update)


def clip_adaptively(ratio: float) -> optax.GradientTransformation:
    """Each output's gradient is at most `ratio` times as long as its weights.

    optax's, which takes a stack of layers or experts for a convolution, on each of the stack.
    Source: Brock et al. 2021, equation 3.
    """
    one = optax.adaptive_grad_clip(ratio)

    def update(updates, state, params=None):
        def clip(name, leaf):
            def each(g, w):
                return one.update(g, optax.EmptyState(), w)[0]

            for _ in range(stacked_dims(name, leaf[0].ndim)):
                each = jax.vmap(each)
            return each(*leaf)

        pairs = jax.tree.map(lambda g, w: _Pair((g, w)), updates, params)
        return by_path(lambda name, pair: clip(name, pair.leaves))(pairs), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Pair:
    """Two leaves as one: no tree of its own."""

    def __init__(self, leaves: tuple[jax.Array, jax.Array]):
        self.leaves = leaves


def unit_norm() -> optax.GradientTransformation:
    """G / ||g||, and 0 for 0, of which `optax.contrib.normalize` makes NaN."""

    def scale(updates, _):
        norm = optax.tree.norm(updates)
        return jax.tree.map(lambda g: g / jnp.where(norm == 0, 1, norm), updates)

    return optax.stateless(scale)
