"""The transformer block and the stack of blocks, for every model that has one.

What the families differ in is data, a `Style`: there is one attention, one MLP and one block.
Shape letters: B batch, L length, D embed, H heads, G key-value heads, K head_dim, F mlp.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import (
    ACTIVATIONS,
    Dropout,
    Dtype,
    dense,
    layer_norm,
    lecun_normal,
    rms_norm,
)


@dataclass(frozen=True)
class Style:
    """How a family of transformers departs from the plain pre-norm block."""

    activation: str  # one of layers.ACTIVATIONS
    norm_eps: float
    causal: bool = False
    norm: str = "layer"  # layer | rms
    post_norm: bool = False  # normalise after the residual sum, as in 2017
    gated: bool = False  # activation(gate) * up in the MLP (Shazeer 2020)
    bias: bool = True
    kv_heads: int = 0  # key-value heads that the query heads share; 0: one for each
    rope_theta: float = 0.0  # base of the rotary embedding; 0: none
    init_std: float = 0.0  # of the kernels; 0: LeCun's
    residual_scale: float = 1.0  # of that, for the two kernels that write to the residual stream

    def make_norm(self, name: str, dtype: Dtype) -> nn.Module:
        make = {"layer": layer_norm, "rms": rms_norm}[self.norm]
        return make(eps=self.norm_eps, dtype=dtype, name=name)

    def make_dense(self, features: int, axes, *, dtype: Dtype, name: str, residual: bool = False):
        std = self.init_std * (self.residual_scale if residual else 1.0)
        init = nn.initializers.normal(std) if std else lecun_normal
        return dense(features, axes, dtype=dtype, name=name, bias=self.bias, kernel_init=init)


def gpt2_residual_scale(num_layers: int) -> float:
    """Source: Radford et al. 2019, section 2.3: 1 / sqrt(residual layers), two in each block."""
    return 1 / math.sqrt(2 * num_layers)


def segment_mask(segment_BL: jax.Array) -> jax.Array:
    """`(B, 1, L, L)` bool: whether query and key lie in the same segment (0, padding, is one)."""
    return (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]


def positions(segment_BL: jax.Array) -> jax.Array:
    """`(B, L)` int32: each token's place within its segment."""
    index_BL = jnp.broadcast_to(jnp.arange(segment_BL.shape[1])[None], segment_BL.shape)
    starts = segment_BL[:, 1:] != segment_BL[:, :-1]
    start_BL = jnp.pad(jnp.where(starts, index_BL[:, 1:], 0), ((0, 0), (1, 0)))
    return index_BL - jax.lax.cummax(start_BL, axis=1)


def learned_positions(position_LD: jax.Array, token_BL: jax.Array, segment_BL=None) -> jax.Array:
    """`(B or 1, L, D)`: each token's row of the table, by its place or by that in its segment."""
    if segment_BL is None:
        return position_LD[None, : token_BL.shape[1]]
    return position_LD[positions(segment_BL)]


def rotary(x_BLHK: jax.Array, position_BL: jax.Array, theta: float) -> jax.Array:
    """Rotate each pair (k, k + K/2) of features by position x theta^(-2k/K), in float32.

    Source: Su et al. 2021, eq. 34, with the pairs half a head apart as in LLaMA's public weights.
    """
    half = x_BLHK.shape[-1] // 2
    frequency_K = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BLHK = position_BL[..., None, None] * frequency_K[None, None, None]
    cos, sin = jnp.cos(angle_BLHK), jnp.sin(angle_BLHK)
    a, b = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BLHK.dtype)


def attend(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None) -> jax.Array:
    """`(B, L, H, K)`: softmax attention, within each segment if there are any."""
    mask = None if segment_BL is None else segment_mask(segment_BL)
    return jax.nn.dot_product_attention(
        query_BLHK, key_BLGK, value_BLGK, mask=mask, is_causal=causal
    )


class Attention(nn.Module):
    """Multi-head self-attention, softmax in float32. `attention`: another function than `attend`.

    Source: Vaswani et al. 2017, section 3.2; grouped-query form: Ainslie et al. 2023.
    """

    num_heads: int
    style: Style
    dtype: Dtype
    attention: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD, segment_BL=None, position_BL=None):
        *_, length, width = x_BLD.shape
        style, head_dim = self.style, width // self.num_heads

        def heads(name, number):
            # One dim for heads and head_dim: split over tensor, it is split between heads.
            make = style.make_dense
            y_BLD = make(number * head_dim, ("embed", "heads"), dtype=self.dtype, name=name)(x_BLD)
            y_BLHK = y_BLD.reshape(-1, length, number, head_dim)
            return nn.with_logical_constraint(y_BLHK, ("batch", "length", "heads", "head_dim"))

        kv_heads = style.kv_heads or self.num_heads
        query_BLHK, key_BLGK = heads("query", self.num_heads), heads("key", kv_heads)
        value_BLGK = heads("value", kv_heads)
        if style.rope_theta:
            query_BLHK = rotary(query_BLHK, position_BL, style.rope_theta)
            key_BLGK = rotary(key_BLGK, position_BL, style.rope_theta)
        y_BLHK = (self.attention or attend)(
            query_BLHK, key_BLGK, value_BLGK, causal=style.causal, segment_BL=segment_BL
        )
        out = style.make_dense(
            width, ("heads", "embed"), dtype=self.dtype, name="out", residual=True
        )
        return out(y_BLHK.reshape(x_BLD.shape))


class Mlp(nn.Module):
    """Two dense layers with an activation between them, or three if the style is gated.

    Source: Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, eq. 6.
    """

    mlp_dim: int
    style: Style
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BLD):
        def wide(name):
            make = self.style.make_dense
            return make(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name=name)(x_BLD)

        activation = ACTIVATIONS[self.style.activation]
        h_BLF = (
            activation(wide("gate")) * wide("up") if self.style.gated else activation(wide("up"))
        )
        h_BLF = nn.with_logical_constraint(h_BLF, ("batch", "length", "mlp"))
        down = self.style.make_dense(
            x_BLD.shape[-1], ("mlp", "embed"), dtype=self.dtype, name="down", residual=True
        )
        return down(h_BLF)


class Block(nn.Module):
    """A residual block: attention, then MLP, normalised before or after.

    `(carry, segment, position) -> (carry, nothing)`, the form that `nn.scan` takes.
    Source: Xiong et al. 2020, figure 1.
    """

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Dtype
    style: Style
    train: bool
    attention: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD, segment_BL=None, position_BL=None):
        x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "embed"))
        drop = Dropout(self.dropout, self.train)

        def residual(x_BLD, norm, layer):
            norm = self.style.make_norm(norm, self.dtype)
            if self.style.post_norm:
                return norm(x_BLD + drop(layer(x_BLD)))
            return x_BLD + drop(layer(norm(x_BLD)))

        attn = Attention(self.num_heads, self.style, self.dtype, self.attention, name="attn")
        x_BLD = residual(x_BLD, "attn_norm", lambda x_BLD: attn(x_BLD, segment_BL, position_BL))
        x_BLD = residual(x_BLD, "mlp_norm", Mlp(self.mlp_dim, self.style, self.dtype, name="mlp"))
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """`num_layers` blocks, one after another, or as one scanned block with stacked parameters.

    Scanning compiles one block instead of `num_layers`; unrolled is faster on CPU. `segment_BL`,
    if given, keeps attention within each segment. `pipe`, if given, runs the scanned blocks:
    `pipe(blocks, params, x, segment, position) -> x`, where `blocks(params, x, segment, position)`
    is a stack of as many blocks as `params` holds.
    """

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Dtype
    style: Style
    remat: str = "none"
    scan_layers: bool = False
    attention: Callable | None = None
    pipe: Callable | None = None

    @nn.compact
    def __call__(self, x_BLD, segment_BL=None, *, train: bool):
        fields = shared(self, Block) | {"train": train}
        if segment_BL is None:
            position_BL = jnp.arange(x_BLD.shape[1])[None]
        else:
            position_BL = positions(segment_BL)
        if self.scan_layers:
            if self.pipe and not self.is_initializing():
                params = self.variables["params"]["blocks"]
                return self.pipe(self._run(fields), params, x_BLD, segment_BL, position_BL)
            blocks = self._scanned(self.num_layers)(**fields, name="blocks")
            return blocks(x_BLD, segment_BL, position_BL)[0]
        block = remat.wrap(Block, self.remat)
        for layer in range(self.num_layers):
            x_BLD, _ = block(**fields, name=f"block_{layer}")(x_BLD, segment_BL, position_BL)
        return x_BLD

    def _scanned(self, length: int):
        return nn.scan(
            remat.wrap(Block, self.remat, scanned=True),
            length=length,
            in_axes=nn.broadcast,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
        )

    def _run(self, fields: dict) -> Callable:
        def blocks(params, x_BLD, segment_BL, position_BL):
            length = jax.tree.leaves(params)[0].shape[0]
            module = self._scanned(length)(**fields, parent=None)
            return module.apply({"params": params}, x_BLD, segment_BL, position_BL)[0]

        return blocks


def shared(module: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """The fields of `module` that a module of `cls` inside it has too, by the same names."""
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    return {name: getattr(module, name) for name in names if hasattr(module, name)}
