"""Minima and what is learnt in them: laws of their volume, and the studies on made-up tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import volume
from lsdl.errors import UserError

# --- radii and volumes ----------------------------------------------------------------------------

CURVED = {"a": np.float32([[1.0, 4.0]]), "b": np.float32([9.0])}  # of a bowl, in 3 dims
CUT = 0.125


def bowl(params):
    return sum(jax.tree.leaves(jax.tree.map(lambda c, w: (c * w**2).sum() / 2, CURVED, params)))


CENTRE = jax.tree.map(lambda c: jnp.zeros_like(jnp.asarray(c)), CURVED)


def directions_of(count):
    """Of length 1, drawn with equal density everywhere: a matrix, and the same as a stack."""
    draw = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    return draw, {"a": jnp.asarray(draw[:, None, :2]), "b": jnp.asarray(draw[:, 2:])}


def test_a_bowl_has_its_exact_radii_and_volume():
    count = 2_000
    draw, directions = directions_of(count)
    losses = volume.stacked_losses(bowl, CENTRE, directions, at_a_time=500)
    found = volume.radii(losses, count, cut=CUT, tolerance=1e-4)
    exact_K = np.sqrt(2 * CUT / (draw**2 @ np.array([1.0, 4.0, 9.0])))
    np.testing.assert_allclose(found.radius_K, exact_K, rtol=2e-4)
    assert not (found.floored_K | found.open_K).any()
    # The ellipsoid of the half axes sqrt(2 cut / c).
    exact = math.log10(4 / 3 * math.pi * math.prod(math.sqrt(2 * CUT / c) for c in (1, 4, 9)))
    volumes = volume.volume(found.radius_K, 3)
    assert volumes.mean == pytest.approx(exact, abs=0.02)
    assert volumes.typical < volumes.mean


def test_directions_drawn_one_by_one_give_the_same_radii():
    _, directions = directions_of(4)
    of_stack = volume.radii(volume.stacked_losses(bowl, CENTRE, directions), 4, cut=CUT)
    direction = lambda i: jax.tree.map(lambda d: d[i], directions)  # noqa: E731
    losses = volume.drawn_losses(jax.jit(bowl), CENTRE, direction)
    np.testing.assert_allclose(
        volume.radii(losses, 4, cut=CUT).radius_K, of_stack.radius_K, rtol=1e-5
    )


def test_the_first_wall_counts_and_not_the_ground_behind_it():
    wave = lambda r_K: np.where(r_K < 2, r_K, 0.0)  # noqa: E731
    assert volume.radii(wave, 2, cut=1.0).radius_K == pytest.approx(1, rel=1e-3)


def test_limits_of_the_search_are_told():
    slopes_K = np.array([1e9, 1.0, 1e-9, np.nan])
    found = volume.radii(
        lambda r_K: np.where(r_K > 0, slopes_K * r_K, 0), 4, cut=1.0, low=1e-2, high=10.0
    )
    assert found.radius_K == pytest.approx([1e-2, 1.0, 10.0, 1e-2], rel=1e-3)
    assert found.floored_K.tolist() == [True, False, False, True]
    assert found.open_K.tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="no basin"):
        volume.radii(lambda r_K: 1 + r_K, 2, cut=0.5)
    with pytest.raises(ValueError, match="make no search"):
        volume.radii(lambda r_K: r_K, 2, cut=0.5, low=0.0)


def test_a_ball_has_the_volume_of_a_ball():
    found = volume.volume(np.full(5, 2.0), 3)
    assert found.typical == pytest.approx(math.log10(4 / 3 * math.pi * 8))
    assert found.mean == pytest.approx(found.typical)
    assert found.error == pytest.approx(0, abs=1e-9)
    orders, error = volume.orders_between(np.full(5, 2.0), np.full(5, 0.02), 6762)
    assert orders == pytest.approx(2 * 6762)
    assert error == pytest.approx(0, abs=1e-9)
