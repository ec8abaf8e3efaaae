"""Layers that declare what role each dim of their parameters plays (its logical axis).

Which mesh axis a role is split over is not known here: `lsdl/sharding/rules.py` decides.
Shape letters: B batch, D any feature dim, HWIO the dims of a convolution kernel.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

from lsdl.errors import UserError

Dtype = jnp.dtype
lecun_normal = nn.initializers.lecun_normal()
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@jax.custom_jvp
def gelu(x: jax.Array) -> jax.Array:
    """Each number times the probability that a normal one is below it, and no approximation.

    With a derivative of its own: that of jax 0.12's erf cannot be traced under shard_map.
    Source: Hendrycks and Gimpel 2016, section 2.
    """
    return x * (1 + lax.erf(x / math.sqrt(2))) / 2


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    (x,), (slope,) = primals, tangents
    below = (1 + lax.erf(x / math.sqrt(2))) / 2
    density = jnp.exp(-jnp.square(x) / 2) / math.sqrt(2 * math.pi)
    return x * below, (below + x * density) * slope


ACTIVATIONS = {
    "relu": nn.relu,
    "elu": nn.elu,
    "tanh": nn.tanh,
    "silu": nn.silu,
    "gelu": gelu,
    "gelu_tanh": nn.gelu,  # the tanh approximation (Hendrycks and Gimpel 2016, section 2)
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # their sigmoid approximation; CLIP's
}

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

    `whole` drops an example's features together: a residual branch that is skipped at random
    (stochastic depth, Huang et al. 2016).
    Source: Srivastava et al. 2014, with the inverted scaling 1 / (1 - rate).
    """

    rate: float
    train: bool
    whole: bool = False

    @nn.compact
    def __call__(self, x_BD):
        if self.rate == 0.0 or not self.train:
            return x_BD
        rows_B = _rows.get()
        rows_B = jnp.arange(len(x_BD)) if rows_B is None else rows_B
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(self.make_rng("dropout"), rows_B)
        shape = (1,) * (x_BD.ndim - 1) if self.whole else x_BD.shape[1:]
        draw = lambda key: jax.random.bernoulli(key, 1.0 - self.rate, shape)  # noqa: E731
        return jnp.where(jax.vmap(draw)(keys_B), x_BD / (1.0 - self.rate), 0).astype(x_BD.dtype)


def dense(
    features: int,
    axes: Sequence[str],
    *,
    dtype: Dtype,
    name: str,
    bias: bool = True,
    kernel_init: Callable = lecun_normal,
    bias_init: Callable = nn.initializers.zeros,
) -> nn.Dense:
    """A dense layer over the last dim; `axes` names the kernel's input and output dims."""
    if len(axes) != 2:
        raise UserError(f"dense {name!r} has axes={axes!r}: name two, of its inputs and outputs.")
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, tuple(axes)),
        bias_init=nn.with_logical_partitioning(bias_init, tuple(axes[1:])),
        name=name,
    )


class Weights(nn.Module):
    """`(kernel (D, F), bias (F,) or 0)`: those of `dense`, for a product that layers share."""

    features: int
    axes: Sequence[str]
    dtype: Dtype
    bias: bool
    kernel_init: Callable

    @nn.compact
    def __call__(self, width: int):
        def make(name, init, axes, shape):
            boxed = nn.with_logical_partitioning(init, tuple(axes))
            return self.param(name, boxed, shape).astype(self.dtype)

        kernel_DF = make("kernel", self.kernel_init, self.axes, (width, self.features))
        if not self.bias:
            return kernel_DF, jnp.zeros(self.features, self.dtype)
        zeros = nn.initializers.zeros
        return kernel_DF, make("bias", zeros, self.axes[1:], (self.features,))


def gathered(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """The parameter `x`, its dims named by `axes`, whole on the mesh axes that split the batch.

    For lookups. From a table that is split where the batch is, XLA's partitioner (jax 0.10.2) takes
    parts of all rows, and makes them whole on every device to split them by the batch.
    """
    _, *wanted = nn.logical_to_mesh_axes(("batch", *axes))
    split = nn.logical_to_mesh_axes(axes)
    if split == PartitionSpec(*wanted):
        return x
    x = lax.with_sharding_constraint(x, split)  # or it is gathered before it is cast
    return lax.with_sharding_constraint(x, PartitionSpec(*wanted))


@jax.custom_jvp
def kept(x: jax.Array) -> jax.Array:
    """`x`, which XLA on CPUs stores, where it would compute it again for each of its readers.

    It takes sums and relus for cheap (jax 0.10.2 and 0.12), and so computes a residual stream
    again, from the first block on, for each kernel's gradient, and drops the optimisation barriers
    that would keep it from that. A quotient it does not take for cheap: this one is x / 1, exactly.
    """
    return lax.platform_dependent(
        x, cpu=lambda x: x / jnp.where(x > jnp.inf, 2, 1).astype(x.dtype), default=lambda x: x
    )


@kept.defjvp
def _kept_jvp(primals, tangents):
    return kept(*primals), *tangents


def _convolve_rows(x_BHWD: jax.Array, kernel_HWIO: jax.Array, *args, **kwargs) -> jax.Array:
    """`lax.conv_general_dilated`, each device on its own rows of the batch with the whole kernel.

    Left to itself, XLA's partitioner (jax 0.10.2) multiplies the kernel's gradient by the number of
    devices that see the same rows, or aborts, where the convolution has groups.
    """
    convolve = lambda x, kernel: lax.conv_general_dilated(x, kernel, *args, **kwargs)  # noqa: E731
    rows = nn.logical_to_mesh_axes(("conv_batch", None, None, None))
    if rows[0] is None or jax.sharding.get_abstract_mesh().empty:
        return convolve(x_BHWD, kernel_HWIO)
    local = jax.shard_map(convolve, in_specs=(rows, PartitionSpec()), out_specs=rows)
    return local(x_BHWD, kernel_HWIO)


def conv(
    features: int,
    size: int,
    *,
    dtype: Dtype,
    name: str,
    stride: int = 1,
    groups: int = 1,
    bias: bool = True,
    axes: Sequence[str] = ("conv_in", "conv_out"),
    kernel_init: Callable = he_normal,
    bias_init: Callable = nn.initializers.zeros,
    padding: str | int | Sequence[tuple[int, int]] = "SAME",
) -> nn.Conv:
    """A square convolution; `axes` names the kernel's input and output channels.

    With `groups`, each group of outputs sees its own share of the inputs; as many groups as inputs
    is a depthwise convolution.
    """
    if len(axes) != 2:
        raise UserError(f"conv {name!r} has axes={axes!r}: name two, of its inputs and outputs.")
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        conv_general_dilated=_convolve_rows if groups > 1 else None,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(kernel_init, (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(bias_init, (axes[-1],)),
        name=name,
    )


def layer_norm(*, dtype: Dtype, name: str, eps: float = 1e-6) -> nn.LayerNorm:
    """Layer normalisation over the last dim, statistics in float32 (Ba et al. 2016)."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ("embed",)),
        name=name,
    )


def rms_norm(*, dtype: Dtype, name: str, eps: float = 1e-6) -> nn.RMSNorm:
    """Division by the root mean square over the last dim (Zhang and Sennrich 2019, eq. 4)."""
    return nn.RMSNorm(
        epsilon=eps,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        name=name,
    )


class BatchNorm(nn.BatchNorm):
    """Flax's, which refuses to train on one value for each feature: their variance is 0."""

    def __call__(self, x_BD, **options):
        if not (self.use_running_average or self.axis_name) and x_BD.size == x_BD.shape[-1]:
            raise UserError(
                "BatchNorm has one value for each feature to normalise, and their variance is 0: "
                "take a batch (or microbatch) of at least 2 examples, or group or layer norm."
            )
        return super().__call__(x_BD, **options)


def batch_norm(
    *,
    train: bool,
    axis_name: str | None,
    dtype: Dtype,
    name: str,
    eps: float = 1e-5,
    momentum: float = 0.9,
    scale_init: Callable = nn.initializers.ones,
    axis: str = "conv_out",
) -> nn.BatchNorm:
    """Batch normalisation over the **global** batch (Ioffe and Szegedy 2015).

    Under `jit` the mean of a sharded batch is global already; under manual axes (`shard_map`,
    `pmap`) the partitioner names them in `axis_name`.
    """
    return BatchNorm(
        use_running_average=not train,
        momentum=momentum,
        epsilon=eps,
        axis_name=axis_name if train else None,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(scale_init, (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis,)),
        name=name,
    )


def group_norm(
    groups: int,
    *,
    dtype: Dtype,
    name: str,
    scale_init: Callable = nn.initializers.ones,
    axis: str = "conv_out",
) -> nn.GroupNorm:
    """Normalisation of an image's channels in `groups`, over all its positions (Wu and He 2018)."""
    return nn.GroupNorm(
        num_groups=groups,
        epsilon=1e-5,
        dtype=dtype,
        scale_init=nn.with_logical_partitioning(scale_init, (axis,)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros, (axis,)),
        name=name,
    )


def feature_norm(
    kind: str, channels: int, *, train: bool, axis_name: str | None, least: int = 2, **fields
) -> nn.BatchNorm | nn.GroupNorm:
    """The normalisation `kind` of the last dim's features: batch, group, or layer (one group).

    32 groups as in Wu and He 2018; fewer where a group would not have `least` channels.
    """
    if kind == "batch":
        return batch_norm(train=train, axis_name=axis_name, **fields)
    groups = {"group": math.gcd(32, max(1, channels // least), channels), "layer": 1}[kind]
    return group_norm(groups, **fields)


class SqueezeExcite(nn.Module):
    """Each channel times a gate in (0, 1) that is computed from all channels' means.

    `(B, H, W, D) -> (B, H, W, D)`. Source: Hu et al. 2018, equations 2 to 4.
    """

    reduced: int
    activation: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWD):
        axes = ("conv_in", "conv_out")
        reduce = dense(self.reduced, axes, dtype=self.dtype, name="reduce")
        expand = dense(x_BHWD.shape[-1], axes, dtype=self.dtype, name="expand")
        gate_BD = expand(ACTIVATIONS[self.activation](reduce(x_BHWD.mean((1, 2)))))
        return x_BHWD * nn.sigmoid(gate_BD)[:, None, None]
