"""Decoder-only language models: GPT-2, GPT-3 and the LLaMA form.

Shape letters: B batch, L length, D embed, V vocabulary (padded), N layers.
"""

from collections.abc import Callable
from dataclasses import replace

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models.layers import Dropout, Dtype, gathered
from lsdl.models.moe import Experts
from lsdl.models.transformer import (
    Stack,
    Style,
    gpt2_residual_scale,
    learned_positions,
    shared,
)


def _size(width: int, num_layers: int, num_heads: int, mlp_dim: int = 0) -> dict:
    return dict(
        width=width, num_layers=num_layers, num_heads=num_heads, mlp_dim=mlp_dim or 4 * width
    )


# Radford et al. 2019, table 2, with the head counts of the released weights.
GPT2_SIZES = {
    "124m": _size(768, 12, 12),
    "350m": _size(1024, 24, 16),
    "774m": _size(1280, 36, 20),
    "1.5b": _size(1600, 48, 25),
}
# Brown et al. 2020, table 2.1; 13B has the width that its heads give, 5,120 (printed 5,140).
GPT3_SIZES = {
    "125m": _size(768, 12, 12),
    "350m": _size(1024, 24, 16),
    "760m": _size(1536, 24, 16),
    "1.3b": _size(2048, 24, 16),
    "2.7b": _size(2560, 32, 32),
    "6.7b": _size(4096, 32, 32),
    "13b": _size(5120, 40, 40),
    "175b": _size(12288, 96, 96),
}
# Touvron et al. 2023 (LLaMA 2), table 1 and section 2.2, and Grattafiori et al. 2024 (Llama 3),
# table 3. 110m is ours, for one device.
LLAMA_SIZES = {
    "110m": _size(768, 12, 12, 2048) | {"kv_heads": 4},
    "1b": _size(2048, 16, 32, 8192) | {"kv_heads": 8},
    "7b": _size(4096, 32, 32, 11008) | {"kv_heads": 32},
    "8b": _size(4096, 32, 32, 14336) | {"kv_heads": 8},
    "70b": _size(8192, 80, 64, 28672) | {"kv_heads": 8},
}
FORMS = ("gpt2", "llama")


class Gpt(nn.Module):
    """`token (B, L) int32[, segment (B, L)] -> (hidden (B, L, D), table (V, D)[, routing])`.

    The logits are `hidden @ table.T`: the task makes them, whole or in pieces.
    `form` gpt2: learned positions, LayerNorm, biases (Radford et al. 2019). llama: rotary
    positions, RMSNorm, a gated MLP, grouped-query attention, no biases (Touvron et al. 2023).
    `segment`, if given, keeps attention and positions within each document (0 is padding).
    `vocab_padded` rows of the table are a multiple of what the mesh splits; those from
    `vocab_size` on stand for nothing. `tied`: the embedding is the output table too.
    With `num_experts`, each block has so many MLPs and a token goes to `experts_per_token` of them
    (lsdl/models/moe.py). `routing` is then `balance` and `dropped` of each layer, `(B, N)` both.
    Documents that share a window share its experts' slots.
    """

    form: str
    vocab_size: int
    vocab_padded: int
    max_length: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    kv_heads: int = 0
    num_experts: int = 0
    experts_per_token: int = 0
    capacity_factor: float = 0.0
    rope_theta: float = 10_000.0
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-5
    tied: bool = True
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False
    attention: Callable | None = None
    pipe: Callable | None = None

    def make_style(self) -> Style:
        sizes = self.num_experts, self.experts_per_token, self.capacity_factor
        style = Style(
            self.activation,
            self.norm_eps,
            causal=True,
            init_std=0.02,
            experts=Experts(*sizes) if self.num_experts else None,
        )
        if self.form == "gpt2":
            return replace(style, residual_scale=gpt2_residual_scale(self.num_layers))
        return replace(
            style,
            norm="rms",
            gated=True,
            bias=False,
            kv_heads=self.kv_heads,
            rope_theta=self.rope_theta,
        )

    @nn.compact
    def __call__(self, token_BL, segment_BL=None, *, train: bool):
        style = self.make_style()

        def table(name, rows, role):
            boxed = nn.with_logical_partitioning(nn.initializers.normal(0.02), (role, "embed"))
            return self.param(name, boxed, (rows, self.width))

        def whole(table_VD):
            """For the lookup, and for the loss, which else gathers it for each of its chunks."""
            return gathered(table_VD.astype(self.dtype), ("vocab", "embed"))

        embedding_VD = whole(table("embedding", self.vocab_padded, "vocab"))
        x_BLD = embedding_VD[token_BL]
        if self.form == "gpt2":
            position_LD = table("position", self.max_length, "length").astype(self.dtype)
            position_LD = gathered(position_LD, (None, "embed"))
            x_BLD = x_BLD + learned_positions(position_LD, token_BL, segment_BL)
        x_BLD = Dropout(self.dropout, train)(x_BLD)
        x_BLD, routing = Stack(**shared(self, Stack), style=style, name="stack")(
            x_BLD, segment_BL, train=train
        )
        hidden_BLD = style.make_norm("norm", self.dtype)(x_BLD)
        output_VD = embedding_VD
        if not self.tied:
            output_VD = whole(table("output", self.vocab_padded, "vocab"))
        return (hidden_BLD, output_VD, routing) if routing else (hidden_BLD, output_VD)
