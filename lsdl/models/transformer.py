"""The transformer block and the stack of blocks, for every model that has one.

What the families differ in is data, a `Style`: there is one attention, one MLP and one block.
Shape letters: B batch, L length, D embed, H heads, G key-value heads, J the query, key and value
heads of one of these, K head_dim, F mlp, T gate and up, E experts, C capacity of an expert,
N layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import moe, remat
from lsdl.models.attention import attend
from lsdl.models.layers import (
    ACTIVATIONS,
    Dropout,
    Dtype,
    Weights,
    dense,
    layer_norm,
    lecun_normal,
    rms_norm,
)

LAYERS = {nn.PARTITION_NAME: "layers"}  # the dim of stacked parameters


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
    experts: moe.Experts | None = None  # of a mixture in the place of the MLP

    def make_norm(self, name: str, dtype: Dtype) -> nn.Module:
        make = {"layer": layer_norm, "rms": rms_norm}[self.norm]
        return make(eps=self.norm_eps, dtype=dtype, name=name)

    def make_init(self, *, residual: bool = False) -> Callable:
        std = self.init_std * (self.residual_scale if residual else 1.0)
        return nn.initializers.normal(std) if std else lecun_normal

    def make_dense(self, features: int, axes, *, residual: bool = False, make=dense, **fields):
        init = self.make_init(residual=residual)
        return make(features, axes, bias=self.bias, kernel_init=init, **fields)


def gpt2_residual_scale(num_layers: int) -> float:
    """Source: Radford et al. 2019, section 2.3: 1 / sqrt(residual layers), two in each block."""
    return 1 / math.sqrt(2 * num_layers)


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

        kv_heads = style.kv_heads or self.num_heads
        group = self.num_heads // kv_heads

        def weights(name, number):
            # One dim for heads and head_dim: split over tensor, it is split between heads.
            make = functools.partial(style.make_dense, make=Weights, dtype=self.dtype, name=name)
            kernel_DF, bias_F = make(number * head_dim, ("embed", "heads"))(width)
            shape = (kv_heads, -1, head_dim)
            return kernel_DF.reshape(width, *shape), bias_F.reshape(shape)

        # One product, whose gradient to x is one sum over the devices that share the heads.
        parts = ("query", self.num_heads), ("key", kv_heads), ("value", kv_heads)
        kernels, biases = zip(*(weights(*part) for part in parts), strict=True)
        kernel_DGJK, bias_GJK = jnp.concatenate(kernels, 2), jnp.concatenate(biases, 1)
        y_BLGJK = jnp.einsum("BLD,DGJK->BLGJK", x_BLD.astype(self.dtype), kernel_DGJK)
        y_BLGJK += bias_GJK[None, None]

        def heads(y_BLHK):
            return nn.with_logical_constraint(y_BLHK, ("batch", "length", "heads", "head_dim"))

        query_BLHK = heads(y_BLGJK[..., :group, :].reshape(-1, length, self.num_heads, head_dim))
        key_BLGK, value_BLGK = heads(y_BLGJK[..., group, :]), heads(y_BLGJK[..., group + 1, :])
        if style.rope_theta:
            query_BLHK = rotary(query_BLHK, position_BL, style.rope_theta)
            key_BLGK = rotary(key_BLGK, position_BL, style.rope_theta)
        query_BLHK, key_BLGK = remat.name(query_BLHK, "query"), remat.name(key_BLGK, "key")
        value_BLGK = remat.name(value_BLGK, "value")
        y_BLHK = (self.attention or attend)(
            query_BLHK, key_BLGK, value_BLGK, causal=style.causal, segment_BL=segment_BL
        )
        y_BLHK = remat.name(y_BLHK, "attn_out")
        out = style.make_dense(
            width, ("heads", "embed"), dtype=self.dtype, name="out", residual=True
        )
        return remat.name(out(y_BLHK.reshape(x_BLD.shape)), "attn_proj")


class Mlp(nn.Module):
    """Two dense layers with an activation between them, or three if the style is gated.

    With `each_expert`, `(B, E, C, D) -> (B, E, C, D)`: each expert's own, on its tokens.
    Source: Vaswani et al. 2017, section 3.3; gated: Shazeer 2020, eq. 6.
    """

    mlp_dim: int
    style: Style
    dtype: Dtype
    each_expert: bool = False

    @nn.compact
    def __call__(self, x_BLD):
        make = functools.partial(
            self.style.make_dense,
            make=moe.ExpertDense if self.each_expert else dense,
            dtype=self.dtype,
        )

        def wide(*names):
            fields = dict(features=self.mlp_dim, axes=("embed", "mlp"))
            if self.each_expert or len(names) == 1:
                return [make(**fields, name=name)(x_BLD) for name in names]
            # One product, for the reason that attention has one.
            weights = [make(**fields, make=Weights, name=n)(x_BLD.shape[-1]) for n in names]
            kernel_DTF, bias_TF = (jnp.stack(w, -2) for w in zip(*weights, strict=True))
            y_BLTF = jnp.einsum("BLD,DTF->BLTF", x_BLD.astype(self.dtype), kernel_DTF)
            return [y_BLTF[:, :, t] + bias_TF[t][None, None] for t in range(len(names))]

        activation = ACTIVATIONS[self.style.activation]
        if self.style.gated:
            gate_BLF, up_BLF = wide("gate", "up")
            gate_BLF = activation(remat.name(gate_BLF, "mlp_gate"))
            h_BLF = gate_BLF * remat.name(up_BLF, "mlp_up")
        else:
            (up_BLF,) = wide("up")
            h_BLF = activation(remat.name(up_BLF, "mlp_up"))
        places = ("experts", None) if self.each_expert else ("length",)
        h_BLF = nn.with_logical_constraint(h_BLF, ("batch", *places, "mlp"))
        h_BLF = remat.name(h_BLF, "mlp_hidden")
        down = make(x_BLD.shape[-1], ("mlp", "embed"), name="down", residual=True)
        return remat.name(down(h_BLF), "mlp_out")


class Mixture(nn.Module):
    """`(B, L, D) -> (B, L, D)`, and what `Routing` tells of each sequence: an MLP of experts."""

    mlp_dim: int
    style: Style
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BLD, segment_BL=None):
        experts = self.style.experts
        routing = moe.Router(experts, self.style.make_init(), name="router")(x_BLD, segment_BL)
        mlp = Mlp(self.mlp_dim, self.style, self.dtype, each_expert=True, name="experts")
        y_BLD = moe.collect(mlp(moe.dispatch(x_BLD, routing, experts)), routing)
        return y_BLD, {"balance": routing.balance, "dropped": routing.dropped}


class Block(nn.Module):
    """A residual block: attention, then MLP, normalised before or after.

    `(carry, segment, position) -> (carry, told)`, the form that `nn.scan` takes; `told` is what a
    `Mixture` tells of its routing, or None.
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
        drop = Dropout(self.dropout, self.train)

        def between(x_BLD):
            return nn.with_logical_constraint(x_BLD, ("batch", "residual_length", "embed"))

        def residual(x_BLD, norm, layer):
            norm = self.style.make_norm(norm, self.dtype)
            if self.style.post_norm:
                y_BLD, told = layer(x_BLD)
                return norm(x_BLD + drop(y_BLD)), told
            y_BLD, told = layer(norm(x_BLD))
            return x_BLD + drop(y_BLD), told

        def attn(x_BLD):
            layer = Attention(self.num_heads, self.style, self.dtype, self.attention, name="attn")
            return layer(x_BLD, segment_BL, position_BL), None

        def mlp(x_BLD):
            fields = dict(mlp_dim=self.mlp_dim, style=self.style, dtype=self.dtype, name="mlp")
            if self.style.experts:
                return Mixture(**fields)(x_BLD, segment_BL)
            return Mlp(**fields)(x_BLD), None

        x_BLD, _ = residual(between(x_BLD), "attn_norm", attn)
        x_BLD, told = residual(between(x_BLD), "mlp_norm", mlp)
        return between(x_BLD), told


class Stack(nn.Module):
    """`num_layers` blocks, one after another, or as one scanned block with stacked parameters.

    `(B, L, D)[, segment (B, L)] -> ((B, L, D), told)`: what the blocks tell, each leaf `(B, N)`.

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
        more = segment_BL, position_BL
        if not self.scan_layers:
            return self._unrolled(fields, x_BLD, *more)
        if self.is_initializing():
            x_BLD, told = self._initial(fields)(x_BLD, *more)
        else:
            x_BLD, told = self._scanned(fields, x_BLD, *more)
        return x_BLD, jax.tree.map(lambda x_NB: x_NB.T, told)

    def _unrolled(self, fields: dict, x_BLD, segment_BL, position_BL):
        def layer(i: int, *, parent: nn.Module) -> Callable:
            block = Block(**fields, parent=parent, name=f"block_{i}")

            def run(carry):
                x_BLD, told = carry
                x_BLD, tells = block(x_BLD, segment_BL, position_BL)
                return x_BLD, (*told, tells)

            return run

        layers = [functools.partial(layer, i) for i in range(self.num_layers)]
        x_BLD, told = remat.chain(self, layers, (x_BLD, ()), policy=self.remat)
        if not told:
            return x_BLD, None
        return x_BLD, jax.tree.map(lambda *x_B: jnp.stack(x_B, axis=1), *told)

    def _initial(self, fields: dict) -> nn.Module:
        """The blocks that make the stacked parameters."""
        return nn.scan(
            Block,
            length=self.num_layers,
            in_axes=nn.broadcast,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            metadata_params=LAYERS,
        )(**fields, name="blocks")

    def _scanned(self, fields: dict, *inputs):
        def blocks(params, x_BLD, *more, rngs=None):
            def body(x_BLD, layer):
                params, rngs = layer
                variables = {"params": nn.meta.remove_axis(params, 0, LAYERS)}
                block = Block(**fields, name="blocks", parent=None)
                return block.apply(variables, x_BLD, *more, rngs=rngs)

            return remat.scan(body, x_BLD, (params, rngs), policy=self.remat)

        params = self.variables["params"]["blocks"]
        if self.pipe:
            return self.pipe(lambda *args: blocks(*args)[0], params, *inputs), None
        rngs = {}
        if self.has_rng("dropout"):
            rngs["dropout"] = jax.random.split(self.make_rng("dropout"), self.num_layers)
        return blocks(params, *inputs, rngs=rngs)


def shared(module: nn.Module, cls: type[nn.Module]) -> dict[str, Any]:
    """The fields of `module` that a module of `cls` inside it has too, by the same names."""
    names = {field.name for field in dataclasses.fields(cls)} - {"parent", "name"}
    return {name: getattr(module, name) for name in names if hasattr(module, name)}
