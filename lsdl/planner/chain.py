"""The reference chain, x <- tanh(x W) in a scan, under the policies of `lsdl.models.remat`.

Its batch is much larger than its width, so that an activation is far larger than the weights of a
layer: one activation, B x D, is the unit of memory here.

Shape letters: N layers, B batch, D width.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsdl.models import remat
from lsdl.planner import count
from lsdl.state import stream

BATCH, WIDTH = 4096, 32


class Program(NamedTuple):
    """What a gradient of the chain, compiled for this machine, takes."""

    activations: float  # temporary memory, in activations
    evaluations: float  # of a layer: 1, and as often as it is computed again


def loss(weight_NDD: jax.Array, x_BD: jax.Array, *, policy: str = "none") -> jax.Array:
    """Half the sum of squares of what the chain ends in."""

    def layer(x_BD, weight_DD):
        return jnp.tanh(x_BD @ weight_DD), None

    return (remat.scan(layer, x_BD, weight_NDD, policy=policy)[0] ** 2).sum() / 2


def gradient(policy: str = "none") -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`(weight_NDD, x_BD) -> gradient_NDD` under `policy`."""
    return jax.grad(functools.partial(loss, policy=policy))


def arrays(
    length: int, *, batch: int = BATCH, width: int = WIDTH, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Weights `(N, D, D)`, which let the chain neither vanish nor saturate, and inputs `(B, D)`."""
    key = jax.random.key(seed)
    weight_NDD = jax.random.normal(stream(key, "weights"), (length, width, width))
    x_BD = jax.random.normal(stream(key, "inputs"), (batch, width))
    return 1.2 * width**-0.5 * weight_NDD, x_BD


@functools.cache  # a program is compiled once
def program(length: int, policy: str, *, batch: int = BATCH) -> Program:
    """Compile the gradient of `length` layers: bytes from the compiler, products from the jaxpr."""
    shapes = jax.eval_shape(lambda: arrays(length, batch=batch))
    traced = jax.jit(gradient(policy)).trace(*shapes)
    products = count.count(traced.jaxpr.jaxpr).total() / (2 * batch * WIDTH * WIDTH)
    temporary_bytes = traced.lower().compile().memory_analysis().temp_size_in_bytes
    # Two of a layer's products are those for its gradients.
    return Program(temporary_bytes / (4 * batch * WIDTH), products / length - 2)


def kept(length: int) -> int:
    """Activations that the backward pass keeps of each layer, without a policy.

    What the layer took in, and the slope of tanh: jax 0.10 keeps two arrays of the slope, so 3.
    """

    def backward(weight_NDD, x_BD):
        return jax.vjp(lambda weight_NDD: loss(weight_NDD, x_BD), weight_NDD)[1]

    found = jax.tree.leaves(jax.eval_shape(backward, *jax.eval_shape(lambda: arrays(length))))
    return sum(array.shape == (length, BATCH, WIDTH) for array in found)


def segments(k: int, length: int, kept: int) -> int:
    """Activations that the program takes with segments of `k` layers: policy `every:k`.

    The inputs of all segments, `kept` of each layer of the one in hand, and the loop's own 4.
    """
    return length // k + kept * k + 4
