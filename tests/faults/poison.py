"""Faults of numbers, put into a run from outside: what gives them is wrapped."""

import jax
import jax.numpy as jnp
import numpy as np

from lsdl import step as steps
from lsdl.data import skip
from lsdl.data.loader import Loader

GRADIENTS = {"nan": jnp.nan, "inf": jnp.inf, "minus inf": -jnp.inf, "x1e6": 1e6}


def _first(tree, change):
    """`tree` with its first array changed."""
    leaves, shape = jax.tree.flatten(tree)
    return jax.tree.unflatten(shape, [change(leaves[0]), *leaves[1:]])


def gradients(monkeypatch, fault, at):
    """The gradient of the steps for which `at(step)` is `fault`, or `fault` times what it was."""
    make = steps.make_grads

    def poisoned(*args, **kwargs):
        grads = make(*args, **kwargs)

        def wrapped(state, batch):
            found = grads(state, batch)
            if fault == "loss":  # alone: the gradient is fine
                return found | {"loss": jnp.where(at(state.step), jnp.nan, found["loss"])}
            spoil = lambda g: jnp.where(at(state.step), g * GRADIENTS[fault], g)  # noqa: E731
            everywhere = jax.tree.map(spoil, found["grads"])
            return found | {
                "grads": everywhere if fault == "x1e6" else _first(found["grads"], spoil)
            }

        return wrapped

    monkeypatch.setattr(steps, "make_grads", poisoned)


def bit(monkeypatch, number, at):
    """Bit `number` of the first parameter's first number, flipped after the steps of `at(step)`."""
    make = steps.make_update

    def flip(w):
        one = w[(0,) * w.ndim]
        bits = jax.lax.bitcast_convert_type(one, jnp.uint32) ^ jnp.uint32(1 << number)
        return w.at[(0,) * w.ndim].set(jax.lax.bitcast_convert_type(bits, w.dtype))

    def make_update(*args, **kwargs):
        update = make(*args, **kwargs)

        def wrapped(state, batch, sums):
            after, metrics = update(state, batch, sums)
            flipped = _first(after.params, flip)
            params = jax.tree.map(
                lambda a, b: jnp.where(at(state.step), a, b), flipped, after.params
            )
            return after.replace(params=params), metrics

        return wrapped

    monkeypatch.setattr(steps, "make_update", make_update)


def batch(monkeypatch, number):
    """Training's batch `number` has wrong labels and a thousand times its weight: a spike."""
    inner = Loader.rows

    def rows(self, step, rows):
        found = inner(self, step, rows)
        if self._train and skip.place(step, self._skip) == number:
            found["label"] = (found["label"] + 5) % 10
            found["weight"] = found["weight"] * np.float32(1e3)
            found["image"] = 255 - found["image"]
        return found

    monkeypatch.setattr(Loader, "rows", rows)
