"""The curve of a short run, and the laws that compare two of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from lsdl.experiment import build
from lsdl.optim.groups import path
from lsdl.state import TrainState
from tests.tiny import FAST, FULL, drawn, random_batch

NAMES = ("loss", "grad_norm", "update_norm", "param_norm")


def curve(config, *, devices=8, steps=20, noise=False, fast=True):
    """(metrics of each of the first steps, state after the last) on `devices` virtual devices.

    With `noise` the parameters and the batches are noise, and a batch's last rows have no weight.
    `fast` compiles in a hurry; loops then run too slowly to pay.
    """
    experiment = build(config, devices=jax.devices()[:devices])
    start = drawn_state(experiment) if noise else _start(_alone(config), fast)
    state = jax.device_put(jax.tree.map(jnp.copy, start), experiment.shardings)
    step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    step = step.compile(compiler_options=FAST if fast and (noise or config.accum == 1) else FULL)
    batches = _noise(experiment, steps) if noise else experiment.train_loader().batches(0, steps)
    rows = []
    for batch in batches:
        state, metrics = step(state, batch)
        rows.append(metrics)
    rows = jax.device_get(rows)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, host(state)


def _alone(config):
    """`config` without what changes no initial value."""
    alone = ConfigDict(config)
    alone.update({"mesh": "data=1", "partitioner": "jit", "rules": "dp", "remat": "none"})
    alone.update({"dcn_mesh": "", "param_rules": ()})
    alone.accum = 1
    alone.log.measure = ()
    return FrozenConfigDict(alone)


@functools.lru_cache(maxsize=8)
def _start(config, fast):
    # One device's start for all: one compilation, and that each mesh starts alike is a test's own.
    init = build(config, devices=jax.devices()[:1]).init
    return init.lower().compile(compiler_options=FAST if fast else FULL)()


def drawn_state(experiment):
    """A state whose parameters and statistics are random, on the host."""
    zeros = lambda leaf: np.zeros(leaf.shape, leaf.dtype)  # noqa: E731
    abstract = experiment.abstract_state
    return TrainState(
        zeros(abstract.step),
        drawn(abstract.params),
        drawn(abstract.model_state),
        jax.tree.map(zeros, abstract.opt_state),
        jax.random.key(0),
        jax.tree.map(zeros, abstract.guard),
    )


def _noise(experiment, steps):
    size = experiment.batch_size
    shardings = jax.tree.map(lambda leaf: leaf.sharding, experiment.abstract_batch)
    for seed in range(steps):
        batch = random_batch(experiment.task, size, seed=seed, padding=size // 8)
        yield jax.device_put(batch, shardings)


def host(state):
    """A copy of the state's float arrays on the host (`device_get` on CPU is only a view)."""
    names = ("params", "model_state", "opt_state")
    return {name: jax.tree.map(np.array, getattr(state, name)) for name in names}


def assert_equal_curves(actual, expected, names=NAMES, *, rtol=1e-5):
    for name in names:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=name)


def assert_equal_states(actual, expected, *, rtol=1e-4):
    """Leaf by leaf, in the Euclidean norm: the optimizer's moments, or parameters if it has none.

    Moments are sums of gradients, so a gradient of the right norm and the wrong direction, which
    no curve shows, differs here by order 1. What is zero but for rounding (a key's bias, to which
    softmax is blind) is measured against its tree; Adam moves it at random, so that parameters
    can be compared under SGD alone.
    """
    moments = any(np.ndim(leaf) for leaf in jax.tree.leaves(expected["opt_state"]))
    for name in ("opt_state" if moments else "params", "model_state"):
        expected_leaves = jax.tree_util.tree_leaves_with_path(expected[name])
        scale = np.sqrt(sum(np.sum(np.square(b, dtype=np.float64)) for _, b in expected_leaves))
        for a, (keys, b) in zip(jax.tree.leaves(actual[name]), expected_leaves, strict=True):
            error = np.linalg.norm(np.subtract(a, b, dtype=np.float64))
            assert error <= rtol * np.linalg.norm(b) + 1e-6 * scale, (name, path(keys), error)
