"""Sharpness, where the maximum is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.analysis import sharpness
from lsdl.analysis.curvature import random_like, stacked
from lsdl.sharding import mesh as meshes

# Shape letters: N parameters.
CURVED = {"a": np.linspace(1, 4, 24).reshape(4, 6), "b": np.linspace(0.5, 2, 8)}
KEY = jax.random.key(0)


def params():
    draw = np.random.default_rng(0).normal
    return jax.tree.map(lambda c: jnp.asarray(draw(size=c.shape), jnp.float32), CURVED)


def loss(moved, batch):
    """A mean of `batch["weight"]` equal bowls around `batch["centre"]`, 0.5 above 0."""
    away = jax.tree.map(
        lambda c, w, o: (c * (w - o) ** 2).sum() / 2, CURVED, moved, batch["centre"]
    )
    return batch["weight"] * (sum(jax.tree.leaves(away)) + 0.5), batch["weight"]


def at(centre=None, start=None):
    start = start or params()
    batch = {"centre": centre or start, "weight": jnp.float32(3)}
    return sharpness.value_and_grad(loss, start, [batch, batch | {"weight": jnp.float32(1)}])


def test_a_value_and_its_gradient_are_means_over_all_batches():
    start = params()
    centre = jax.tree.map(lambda w: w + 1, start)
    value, gradient = at(centre)(start)
    assert value == pytest.approx(0.5 + sum(c.sum() for c in CURVED.values()) / 2, rel=1e-6)
    for name, curved in CURVED.items():
        np.testing.assert_allclose(gradient[name], -curved, rtol=1e-5)


def test_the_box_is_as_wide_as_the_parameters_are_large():
    start = params()
    # Down from the start's neighbour the loss rises on to the corner of the box.
    centre = jax.tree.map(lambda w: w - 1e-3 * jnp.sign(w), start)
    found = sharpness.box(at(centre), start, epsilon=0.05, iterations=30)
    wide = {name: 0.05 * (abs(np.asarray(w)) + 1) + 1e-3 for name, w in start.items()}
    highest = 0.5 + sum((CURVED[name] * w**2).sum() / 2 for name, w in wide.items())
    assert found.highest == pytest.approx(highest, rel=1e-4)
    assert found.loss == pytest.approx(0.5, abs=1e-4)
    wanted = 100 * (highest - found.loss) / (1 + found.loss)
    assert found.phi == pytest.approx(wanted, rel=1e-3)


def test_along_all_axes_a_subspace_is_the_whole_space():
    start = {"b": params()["b"]}
    bowl = lambda moved, batch: ((CURVED["b"] * (moved["b"] - batch) ** 2).sum(), jnp.float32(1))  # noqa: E731
    centre = start["b"] - 1e-3 * jnp.sign(start["b"])
    of = sharpness.value_and_grad(bowl, start, [centre])
    whole = sharpness.box(of, start, epsilon=0.1, iterations=30)
    # Twice as long axes: the pseudoinverse halves coordinates and so the box.
    axes = {"b": 2 * jnp.eye(8)}
    found = sharpness.along(of, start, axes, epsilon=0.1, iterations=30)
    half = 2 * 0.1 * (abs(np.asarray(start["b"])) / 2 + 1) + 1e-3
    assert found.highest == pytest.approx((CURVED["b"] * half**2).sum(), rel=1e-4)
    found = sharpness.along(of, start, {"b": jnp.eye(8)}, epsilon=0.1, iterations=30)
    assert found.highest == pytest.approx(whole.highest, rel=1e-5)


def test_a_random_subspace_reaches_less_than_the_whole_space():
    start = params()
    centre = jax.tree.map(lambda w: w - 1e-3 * jnp.sign(w), start)
    found = sharpness.subspace_box(at(centre), start, epsilon=0.05, dims=4, key=KEY)
    whole = sharpness.box(at(centre), start, epsilon=0.05)
    assert found.loss < found.highest < whole.highest
    assert found.evaluations <= 60


def test_the_ball_goes_along_the_gradient():
    start = params()
    centre = jax.tree.map(lambda w: w - 0.1, start)
    found = sharpness.ball(at(centre), start, rho=0.3)
    flat = np.concatenate([c.ravel() for c in CURVED.values()])
    step = 0.3 * flat / np.linalg.norm(flat)
    assert found.highest == pytest.approx(0.5 + (flat * (0.1 + step) ** 2).sum() / 2, rel=1e-5)
    assert found.loss == pytest.approx(0.5 + (flat * 0.01).sum() / 2, rel=1e-5)


def test_at_the_edge_gradient_descent_neither_grows_nor_shrinks():
    largest, rate = 8.0, 0.25
    assert sharpness.edge(largest, rate) == 1
    assert abs(1 - rate * largest) == 1  # the factor of a step along the sharpest direction


def test_every_layout_gives_the_same_sharpness():
    mesh = meshes.make_mesh(meshes.parse_mesh("fsdp=4,tensor=2", 8), jax.devices())
    specs = {"a": P("fsdp", "tensor"), "b": P("fsdp")}
    start = params()
    split = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in start.items()}
    centre = jax.tree.map(lambda w: np.asarray(w) - 0.1, start)
    for measure in (
        lambda f, w: sharpness.box(f, w, epsilon=0.05),
        lambda f, w: sharpness.subspace_box(f, w, epsilon=0.05, dims=4, key=KEY),
        lambda f, w: sharpness.ball(f, w, rho=0.1),
    ):
        alone, found = measure(at(centre), start), measure(at(centre, split), split)
        assert found.highest == pytest.approx(alone.highest, rel=1e-5)
    basis = stacked(split, 3)
    assert basis["a"].sharding.spec == P(None, "fsdp", "tensor")
    assert random_like(split, KEY)["b"].sharding.spec == P("fsdp")
