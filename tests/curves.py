"""The curve of a short run, for the laws that compare two of them."""

import jax
import numpy as np

from lsdl.experiment import build


def curve(config, *, devices=8, steps=20):
    """Loss, accuracy and norms of the first steps on `devices` virtual devices: {name: (steps,)}."""
    experiment = build(config, devices=jax.devices()[:devices])
    state = experiment.init()
    step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    step = step.compile()
    rows = []
    for batch in experiment.train_loader().batches(0, steps):
        state, metrics = step(state, batch)
        rows.append(metrics)
    rows = jax.device_get(rows)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


NAMES = ("loss", "grad_norm", "update_norm", "param_norm")


def assert_equal_curves(actual, expected, names=NAMES, *, rtol=1e-5):
    for name in names:
        np.testing.assert_allclose(actual[name], expected[name], rtol=rtol, err_msg=name)
