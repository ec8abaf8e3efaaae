"""Layers that declare what role each dim of their parameters plays (its logical axis).

Which mesh axis a role is split over is not known here: `lsdl/sharding/rules.py` decides.
Shape letters: B batch, D any feature dim, HWIO the dims of a convolution kernel.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn

Dtype = jnp.dtype
lecun_normal = nn.initializers.lecun_normal()
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

_rows: contextvars.ContextVar = contextvars.ContextVar("rows", default=None)


@contextlib.contextmanager
def example_rows(rows_B: jax.Array) -> Iterator[None]:
    """While the model is applied: which row of the global batch each of its examples is.

    `Dropout` draws each example's mask from its row, so that layout, process count and
    accumulation never change a mask.
    """
    token = _rows.set(rows_B)
    try:
        yield
    finally:
        _rows.reset(token)


class Dropout(nn.Module):
    """Dropout whose masks depend on the key and on an example's row in the global batch alone.

    Source: Srivastava et al. 2014, with the inverted scaling 1 / (1 - rate).
    """

    rate: float
    train: bool

    @nn.compact
    def __call__(self, x_BD):
        if self.rate == 0.0 or not self.train:
            return x_BD
        rows_B = _rows.get()
        rows_B = jnp.arange(len(x_BD)) if rows_B is None else rows_B
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows_B)
        draw = lambda key: jax.random.bernoulli(key, 1.0 - self.rate, x_BD.shape[1:])  # noqa: E731
        return jnp.where(jax.vmap(draw)(keys_B), x_BD / (1.0 - self.rate), 0).astype(x_BD.dtype)


def dense(
    features: int,
    axes: Sequence[str],
    *,
    dtype: Dtype,
    name: str,
    kernel_init: Callable = lecun_normal,
) -> nn.Dense:
    """A dense layer over the last dim; `axes` names the kernel's input and output dims."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, tuple(axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, tuple(axes[1:])),
        name=name,
    )


def conv(
    features: int,
    size: int,
    *,
    dtype: Dtype,
    name: str,
    stride: int = 1,
    bias: bool = True,
    axes: Sequence[str] = ("conv_in", "conv_out"),
    kernel_init: Callable = he_normal,
    padding: str | int = "SAME",
) -> nn.Conv:
    """A square convolution; `axes` names the kernel's input and output channels."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axes[-1],)),
        name=name,
    )


def layer_norm(*, dtype: Dtype, name: str) -> nn.LayerNorm:
    """Layer normalisation over the last dim, statistics in float32 (Ba et al. 2016)."""
    return nn.LayerNorm(
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )


def batch_norm(*, train: bool, axis_name, dtype: Dtype, name: str) -> nn.BatchNorm:
    """Batch normalisation over the **global** batch (Ioffe and Szegedy 2015).

    Under `jit` the mean of a sharded batch is global already; under manual axes (`shard_map`,
    `pmap`) the partitioner names them in `axis_name`.
    """
    return nn.BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        axis_name=axis_name if train else None,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("conv_out",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("conv_out",)),
        name=name,
    )
