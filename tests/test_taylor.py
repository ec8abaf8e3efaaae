"""Taylor's expansions of first and of second order, and steepest descent in three norms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import curvature

# Shape letters: E distances, D dims.
STEPS_E = 0.4 * 0.5 ** np.arange(5)


def order(error_E):
    """The slope of log error against log distance."""
    return np.polyfit(np.log(STEPS_E), np.log(np.abs(error_E)), 1)[0]


def test_of_the_exponential_they_are_off_by_the_next_power():
    assert order(np.exp(STEPS_E) - (1 + STEPS_E)) == pytest.approx(2, abs=0.1)
    assert order(np.exp(STEPS_E) - (1 + STEPS_E + STEPS_E**2 / 2)) == pytest.approx(3, abs=0.1)


def test_of_a_loss_they_are_off_by_the_next_power():
    """With the gradient, then with the Hessian's own product as well."""

    def loss(w_D, batch):
        return jnp.exp(jnp.sin(w_D) @ batch["x"]).sum(), jnp.float32(1)

    draw = np.random.default_rng(0)
    w_D, batch = jnp.asarray(draw.normal(size=5), jnp.float32), {"x": draw.normal(size=(5, 3))}
    step_D = jnp.asarray(draw.normal(size=5) / 2, jnp.float32)
    value = loss(w_D, batch)[0]
    slope = jax.grad(lambda w: loss(w, batch)[0])(w_D) @ step_D
    bend = curvature.hessian(loss)(w_D, batch, step_D)[0] @ step_D
    true_E = np.array([loss(w_D + float(e) * step_D, batch)[0] for e in STEPS_E], float)
    first_E = float(value) + STEPS_E * float(slope)
    assert order(true_E - first_E) == pytest.approx(2, abs=0.25)
    assert order(true_E - first_E - STEPS_E**2 / 2 * float(bend)) == pytest.approx(3, abs=0.35)


@pytest.mark.parametrize("norm", [1, 2, np.inf])
def test_steepest_descent_is_the_direction_that_its_norm_makes_it(norm):
    """Of all directions of length 1 none falls faster: the lectures' ratio, without f(x)."""
    g_D = np.array([3.0, -1.0, 0.5])
    steepest_D = {
        1: -np.eye(3)[np.abs(g_D).argmax()] * np.sign(g_D),
        2: -g_D / np.linalg.norm(g_D),
        np.inf: -np.sign(g_D),
    }[norm]
    assert np.linalg.norm(steepest_D, norm) == pytest.approx(1)
    drawn = np.random.default_rng(0).normal(size=(1000, 3))
    drawn /= np.linalg.norm(drawn, norm, axis=1, keepdims=True)
    assert (drawn @ g_D > steepest_D @ g_D).all()
