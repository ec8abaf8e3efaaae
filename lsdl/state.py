"""What a train step reads and writes: arrays only, no functions and no settings."""

import zlib
from typing import Any

import jax
from flax import struct

Batch = dict[str, jax.Array]  # every leaf has the global batch as its first dim


class TrainState(struct.PyTreeNode):
    """Everything that changes during training, and all that a checkpoint holds."""

    step: jax.Array  # int32 scalar: optimizer updates done
    params: Any
    model_state: Any  # other variable collections, such as BatchNorm's running statistics
    opt_state: Any
    key: jax.Array  # typed PRNG key, never changed: streams are derived by name and step
    guard: Any  # lsdl.guard's counts of steps that changed nothing, and its window


def stream(key: jax.Array, name: str, step: jax.Array | int = 0) -> jax.Array:
    """The key of the random stream `name` at `step`.

    Streams have names so that a new one does not shift the others.
    """
    return jax.random.fold_in(jax.random.fold_in(key, zlib.crc32(name.encode())), step)
