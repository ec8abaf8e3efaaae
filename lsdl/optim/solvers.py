"""Directions from second derivatives, for small problems on one device.

Each link turns the gradient g into the direction that the rate then multiplies. H is the Hessian of
the step's loss, reached through `grad_fn` of the step; d the damping, added to the diagonal.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from lsdl.errors import UserError

TOLERANCE = 1e-6  # of conjugate gradients: the residual's norm over the gradient's


def newton(damping: float, limit: int) -> optax.GradientTransformationExtraArgs:
    """(H + d I)^-1 g with the whole of H: n^2 numbers and n^3 steps, refused beyond n = `limit`."""

    def init(params):
        number = sum(leaf.size for leaf in jax.tree.leaves(params))
        if number > limit:
            raise UserError(
                f"optim.name=newton would hold the {number} x {number} numbers of the Hessian: "
                f"optim.newton_limit={limit} is the most parameters it takes, so use newton_cg."
            )
        return optax.EmptyState()

    def update(updates, state, params, *, grad_fn, **extra):
        gradient, unravel = ravel_pytree(updates)
        product = _product(grad_fn, params)
        column = lambda basis: ravel_pytree(product(unravel(basis)))[0]  # noqa: E731
        identity = jnp.eye(gradient.size, dtype=gradient.dtype)
        hessian = jax.lax.map(column, identity, batch_size=64)
        return unravel(jnp.linalg.solve(hessian + damping * identity, gradient)), state

    return optax.GradientTransformationExtraArgs(init, update)


def newton_cg(damping: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """(H + d I)^-1 g by at most `steps` conjugate gradients, which end where H curves down.

    Source: Nocedal and Wright 2006, algorithm 7.1.
    """

    def update(updates, state, params, *, grad_fn, **extra):
        product = _damped(_product(grad_fn, params), damping)
        return conjugate_gradients(product, updates, steps), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def gauss_newton(damping: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """(J^T H_out J + d I)^-1 g by conjugate gradients: H without the curvature of the model.

    Source: Schraudolph 2002, section 3; Martens 2010.
    """

    def update(updates, state, params, *, gauss_newton_fn, **extra):
        product = _damped(lambda vector: gauss_newton_fn(params, vector), damping)
        return conjugate_gradients(product, updates, steps), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def coordinate_descent(damping: float) -> optax.GradientTransformationExtraArgs:
    """g_i / (H_ii + d) along one coordinate i, one after another; 0 where H_ii + d <= 0."""

    def init(params):
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(updates, state, params, *, grad_fn, **extra):
        gradient, unravel = ravel_pytree(updates)
        i = state.count % gradient.size
        basis = jnp.zeros_like(gradient).at[i].set(1)
        curved = ravel_pytree(_product(grad_fn, params)(unravel(basis)))[0][i] + damping
        length = jnp.where(curved > 0, gradient[i] / jnp.where(curved > 0, curved, 1), 0)
        count = optax.safe_increment(state.count)
        return unravel(basis * length), optax.ScaleByScheduleState(count)

    return optax.GradientTransformationExtraArgs(init, update)


def conjugate_gradients(product: Callable, gradient: Any, steps: int) -> Any:
    """X with `product(x) = gradient`: at most `steps` products, from x = 0.

    A direction without positive curvature ends it: x is what was found before, or the gradient.
    Source: Nocedal and Wright 2006, algorithm 5.2.
    """
    dot, add = optax.tree.vdot, optax.tree.add_scale
    start = dot(gradient, gradient)

    def goes_on(carry):
        i, _, _, _, square, ended = carry
        return (i < steps) & (square > TOLERANCE**2 * start) & ~ended

    def step(carry):
        i, x, residual, direction, square, _ = carry
        image = product(direction)
        curved = dot(direction, image)
        down = curved <= 0
        length = jnp.where(down, jnp.where(i == 0, 1, 0), square / jnp.where(down, 1, curved))
        x, residual = add(x, length, direction), add(residual, -length, image)
        new = dot(residual, residual)
        return i + 1, x, residual, add(residual, new / square, direction), new, down

    zeros = optax.tree.zeros_like(gradient)
    carry = (0, zeros, gradient, gradient, start, jnp.zeros((), bool))
    return jax.lax.while_loop(goes_on, step, carry)[1]


def _product(grad_fn: Callable, params: Any) -> Callable:
    """`v -> H v`, forward through the gradient. Source: Pearlmutter 1994."""
    return lambda vector: jax.jvp(grad_fn, (params,), (vector,))[1]


def _damped(product: Callable, damping: float) -> Callable:
    return lambda vector: optax.tree.add_scale(product(vector), damping, vector)
