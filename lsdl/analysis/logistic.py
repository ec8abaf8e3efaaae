"""Softmax regression with a little weight decay: the convex problem with a minimum to measure from.

Shape letters: N examples, B batch, D inputs, C classes.
"""

import functools

import jax
import jax.numpy as jnp
import optax

from lsdl.analysis import descent


def loss(w_DC: jax.Array, x_BD: jax.Array, y_BC: jax.Array, *, decay: float) -> jax.Array:
    """Mean cross-entropy of the one-hot `y_BC`, plus half of `decay` times |w|^2."""
    z_BC = x_BD @ w_DC
    fit_B = jax.nn.logsumexp(z_BC, 1) - (z_BC * y_BC).sum(1)
    return fit_B.mean() + decay / 2 * (w_DC**2).sum()


def largest_curvature(x_ND: jax.Array, *, decay: float) -> jax.Array:
    """A bound on the Hessian's eigenvalues everywhere.

    Source: Boehning 1992: the Hessian of softmax cross-entropy is at most half the second moments.
    """
    return jnp.linalg.eigvalsh(x_ND.T @ x_ND / len(x_ND))[-1] / 2 + decay


@functools.partial(jax.jit, static_argnames=("decay", "steps"))
def minimum(x_ND: jax.Array, y_NC: jax.Array, *, decay: float, steps: int = 1_500) -> jax.Array:
    """The smallest loss, by heavy ball at Polyak's rate and momentum."""
    low, high = jnp.sqrt(decay), jnp.sqrt(largest_curvature(x_ND, decay=decay))
    tx = optax.sgd(4 / (low + high) ** 2, ((high - low) / (high + low)) ** 2)
    value = functools.partial(loss, x_BD=x_ND, y_BC=y_NC, decay=decay)
    start_DC = jnp.zeros((x_ND.shape[1], y_NC.shape[1]))
    gradient = lambda w_DC, _: jax.grad(value)(w_DC)  # noqa: E731
    (w_DC, _), _ = descent.descend(
        tx, gradient, start_DC, jnp.arange(steps), record=descent.nothing
    )
    return value(w_DC)
