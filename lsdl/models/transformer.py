"""The transformer block and the stack of blocks, for every model that has one.

Shape letters: B batch, L length, D embed, H heads, K head_dim, F mlp.
"""

import jax
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, dense, layer_norm


class Attention(nn.Module):
    """Multi-head self-attention. Source: Vaswani et al. 2017, section 3.2."""

    num_heads: int
    dtype: Dtype
    causal: bool = False

    @nn.compact
    def __call__(self, x_BLD):
        *_, length, width = x_BLD.shape

        def heads(name):
            # One dim for heads and head_dim: split over tensor, it is split between heads.
            y_BLD = dense(width, ("embed", "heads"), dtype=self.dtype, name=name)(x_BLD)
            y_BLHK = y_BLD.reshape(-1, length, self.num_heads, width // self.num_heads)
            return nn.with_logical_constraint(y_BLHK, ("batch", "length", "heads", "head_dim"))

        y_BLHK = jax.nn.dot_product_attention(
            heads("query"), heads("key"), heads("value"), is_causal=self.causal
        )
        out = dense(width, ("heads", "embed"), dtype=self.dtype, name="out")
        return out(y_BLHK.reshape(x_BLD.shape))


class Mlp(nn.Module):
    """Two dense layers with a GELU between them. Source: Vaswani et al. 2017, section 3.3."""

    mlp_dim: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BLD):
        width = x_BLD.shape[-1]
        h_BLF = dense(self.mlp_dim, ("embed", "mlp"), dtype=self.dtype, name="up")(x_BLD)
        h_BLF = nn.with_logical_constraint(nn.gelu(h_BLF), ("batch", "length", "mlp"))
        return dense(width, ("mlp", "embed"), dtype=self.dtype, name="down")(h_BLF)


class Block(nn.Module):
    """A pre-norm residual block: attention, then MLP. Source: Xiong et al. 2020, figure 1b.

    `(carry, nothing) -> (carry, nothing)`, the form that `nn.scan` takes.
    """

    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Dtype
    train: bool
    causal: bool = False

    @nn.compact
    def __call__(self, x_BLD, _=None):
        x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "embed"))
        drop = Dropout(self.dropout, self.train)
        y_BLD = layer_norm(dtype=self.dtype, name="attn_norm")(x_BLD)
        y_BLD = Attention(self.num_heads, self.dtype, self.causal, name="attn")(y_BLD)
        x_BLD = x_BLD + drop(y_BLD)
        y_BLD = layer_norm(dtype=self.dtype, name="mlp_norm")(x_BLD)
        y_BLD = Mlp(self.mlp_dim, self.dtype, name="mlp")(y_BLD)
        x_BLD = x_BLD + drop(y_BLD)
        return nn.with_logical_constraint(x_BLD, ("batch", "length", "embed")), None


class Stack(nn.Module):
    """`num_layers` blocks, one after another, or as one scanned block with stacked parameters.

    Scanning compiles one block instead of `num_layers`; unrolled is faster on CPU.
    """

    num_layers: int
    num_heads: int
    mlp_dim: int
    dropout: float
    dtype: Dtype
    remat: str = "none"
    scan_layers: bool = False
    causal: bool = False

    @nn.compact
    def __call__(self, x_BLD, *, train: bool):
        fields = dict(
            num_heads=self.num_heads,
            mlp_dim=self.mlp_dim,
            dropout=self.dropout,
            dtype=self.dtype,
            train=train,
            causal=self.causal,
        )
        if self.scan_layers:
            scanned = nn.scan(
                remat.wrap(Block, self.remat, scanned=True),
                length=self.num_layers,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scanned(**fields, name="blocks")(x_BLD, None)[0]
        block = remat.wrap(Block, self.remat)
        for layer in range(self.num_layers):
            x_BLD, _ = block(**fields, name=f"block_{layer}")(x_BLD)
        return x_BLD
