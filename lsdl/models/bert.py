"""BERT: a bidirectional encoder trained to fill in masked tokens (Devlin et al. 2019).

Shape letters: B batch, L length, D embed, V vocabulary (padded), T token types.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models.layers import ACTIVATIONS, Dropout, Dtype, gathered
from lsdl.models.transformer import Stack, Style, learned_positions, shared

# Devlin et al. 2019, section 3.
SIZES = {
    "base": dict(width=768, num_layers=12, num_heads=12, mlp_dim=3072),
    "large": dict(width=1024, num_layers=24, num_heads=16, mlp_dim=4096),
}
TOKEN_TYPES = 2


class Bert(nn.Module):
    """`token (B, L) int32[, segment (B, L)] -> (hidden (B, L, D), table (V, D), bias (V,))`.

    The logits are `hidden @ table.T + bias`, `hidden` being the output of the masked-language
    head's transform; the table is the embedding's. `features` true returns the encoder's last
    hidden states instead. Of the two token types, which told the sentences of the
    next-sentence task apart, all tokens have the first. There is no pooler: nothing here trains
    it. `segment` as in `gpt.Gpt`.
    """

    vocab_size: int
    vocab_padded: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    dropout: float = 0.1
    dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False
    attention: Callable | None = None
    pipe: Callable | None = None

    @nn.compact
    def __call__(self, token_BL, segment_BL=None, *, train: bool, features: bool = False):
        style = Style(self.activation, self.norm_eps, post_norm=True, init_std=0.02)

        def table(name, rows, role):
            boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), (role, "embed"))
            return self.param(name, boxed, (rows, self.width))

        # Whole for the lookup, and for the loss, which else gathers it for each of its chunks.
        embedding_VD = table("embedding", self.vocab_padded, "vocab").astype(self.dtype)
        embedding_VD = gathered(embedding_VD, ("vocab", "embed"))
        position_LD = table("position", self.max_length, "length").astype(self.dtype)
        position_LD = gathered(position_LD, (None, "embed"))
        type_TD = table("token_type", TOKEN_TYPES, None).astype(self.dtype)
        place_BLD = learned_positions(position_LD, token_BL, segment_BL)
        x_BLD = embedding_VD[token_BL]
        x_BLD = x_BLD + place_BLD + type_TD[0][None, None]
        x_BLD = style.make_norm("embed_norm", self.dtype)(x_BLD)
        x_BLD = Dropout(self.dropout, train)(x_BLD)
        x_BLD, _ = Stack(**shared(self, Stack), style=style, name="stack")(
            x_BLD, segment_BL, train=train
        )
        if features:
            return x_BLD
        transform = style.make_dense(
            self.width, ("embed", None), dtype=self.dtype, name="head_transform"
        )
        hidden_BLD = ACTIVATIONS[self.activation](transform(x_BLD))
        hidden_BLD = style.make_norm("head_norm", self.dtype)(hidden_BLD)
        boxed = nn.with_logical_partitioning(nn.initializers.zeros, ("vocab",))
        return hidden_BLD, embedding_VD, self.param("head_bias", boxed, (self.vocab_padded,))
