"""The digits, whole and in memory, and a small net for them: for runs that are one program.

Train and valid alone: no study reads the test split.

Shape letters: N examples, D = 64 pixels, C classes, S seeds, T steps,
B batch.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsdl.analysis import descent
from lsdl.data.readers import TRAIN, generator
from lsdl.models.mlp import Mlp


class Split(NamedTuple):
    x_ND: jax.Array  # each pixel standardised by the train split's mean and deviation
    label_N: jax.Array


@functools.cache
def load() -> tuple[Split, Split]:
    """(train, valid): 1,257 and 270 images."""
    return tuple(
        Split(jnp.array(x_ND, jnp.float32), jnp.array(label_N, jnp.int32))
        for x_ND, label_N in map(descent.digits, ("train", "valid"))
    )


class Classifier:
    """A ReLU net with `hidden` layers: He's initialisation, biases of zero, no dropout."""

    def __init__(self, *hidden: int):
        self._model = Mlp(hidden=hidden, num_classes=10)

    def init(self, keys_S: jax.Array) -> Any:
        """Parameters for each key, `(S, ...)`."""
        return _init(self._model, keys_S)

    def logits(self, params: Any, x_ND: jax.Array) -> jax.Array:
        return self._model.apply({"params": params}, x_ND, train=False)

    def loss(self, params: Any, batch: Split) -> jax.Array:
        """The mean cross-entropy in nats."""
        logits_NC = jax.nn.log_softmax(self.logits(params, batch.x_ND))
        return -jnp.take_along_axis(logits_NC, batch.label_N[:, None], 1).mean()

    def example_loss(self, params: Any, example: Split) -> jax.Array:
        """Of one image, `(D,)`."""
        return self.loss(params, jax.tree.map(lambda x: x[None], example))

    def accuracy(self, params: Any, split: Split) -> jax.Array:
        return (self.logits(params, split.x_ND).argmax(-1) == split.label_N).mean()


@functools.partial(jax.jit, static_argnums=0)
def _init(model: Mlp, keys_S: jax.Array) -> Any:
    def init(key):
        return model.init(key, jnp.zeros((1, 64)), train=False)["params"]

    return jax.vmap(init)(keys_S)


def batches(seed: int, count: int, *, size: int, steps: int) -> np.ndarray:
    """Ids of each step's batch, `(T, B)`: every epoch in a new order, what is left over dropped.

    Drawn by numpy: a compiler takes seconds over a permutation.
    """
    per_epoch = count // size
    orders = [
        generator(seed, TRAIN, epoch, 0).permutation(count)[: per_epoch * size]
        for epoch in range(-(-steps // per_epoch))
    ]
    return np.concatenate(orders).reshape(-1, size)[:steps]


def keys(seeds: int) -> jax.Array:
    """One for each seed."""
    return jax.vmap(jax.random.key)(jnp.arange(seeds))


def rows(split: Split, ids: jax.Array) -> Split:
    """The examples of `ids`."""
    return Split(split.x_ND[ids], split.label_N[ids])


def step(net: Classifier, optimizer, state: tuple, batch: Split) -> tuple:
    """One update of `(params, opt_state)`."""
    params, opt_state = state
    gradient = jax.grad(net.loss)(params, batch)
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return jax.tree.map(jnp.add, params, updates), opt_state
