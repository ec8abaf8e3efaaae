"""What a transformer's activations take: closed forms, tensor by tensor, of numbers alone.

Korthikanti et al. 2022, section 4, for the block that lsdl has. Theirs keeps 34 s b h + 5 a s^2 b
bytes at two bytes a number; ours keeps what jax's differentiation of `models.transformer.Block`
saves, which is more: a norm keeps four numbers a feature where one would do, GELU up to six, and
attention, where it is no kernel, two L x L matrices of every head. `block` has a line for each, and
tests/test_analytic.py holds them to what the traced program keeps, number by number.

Letters as in models/transformer.py: D width, H heads, G key-value heads, K head_dim, F mlp, L
length, N layers, V vocabulary.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax

# tanh's derivative keeps 1 - tanh^2 alone in jax 0.11.2 and 0.12, and in 0.10.2 tanh and 1 - tanh.
_MORE = int(jax.__version_info__ < (0, 11))
# What an MLP keeps of each of its F features, the activation's input and the result included:
# (numbers, numbers where it is gated, bytes besides).
KEPT = {
    "relu": (1, 3, 1),
    "tanh": (2 + _MORE, 4, 0),
    "elu": (2, 4, 2),
    "silu": (4, 6, 0),
    "gelu": (2, 4, 0),  # with a derivative of its own (models/layers.py)
    "gelu_tanh": (5 + _MORE, 7 + _MORE, 0),
    "quick_gelu": (4, 6, 0),
}


@dataclass(frozen=True)
class Block:
    """A transformer block, as `models.transformer.Block` is told of it."""

    width: int
    num_heads: int
    mlp_dim: int
    activation: str
    kv_heads: int = 0  # 0: one for each head
    norm: str = "layer"  # layer | rms
    gated: bool = False
    post_norm: bool = False
    dropout: bool = False
    kernel: bool = False  # attention is one, and has no scores in memory
    scored: float = 1.0  # of all pairs of queries and keys, those that have scores otherwise

    @property
    def kv_width(self) -> int:
        """Of keys, and of values."""
        return self.width // self.num_heads * (self.kv_heads or self.num_heads)


@dataclass(frozen=True)
class Split:
    """Into how many parts the devices split the tensors of each role, the batch included."""

    residual: int = 1  # what lies between the layers, and norms
    whole: int = 1  # the same where a product takes it: its length is gathered then
    heads: int = 1
    kv_heads: int = 1
    mlp: int = 1
    vocab: int = 1
    table: int = 1  # the output table where it is multiplied by
    kernels: float = 1  # the blocks' kernels where they lie


class Line(NamedTuple):
    """A tensor that a layer's backward pass needs."""

    what: str
    part: str  # norm | attention | mlp
    per_token: float  # numbers
    bytes_each: int
    role: str  # a field of Split

    def nbytes(self, tokens: int, split: Split) -> float:
        """Of one device, where the step has `tokens` in a microbatch."""
        return tokens * self.per_token * self.bytes_each / getattr(split, self.role)


def block(b: Block, length: int, itemsize: int) -> list[Line]:
    """What one block keeps for its backward pass, `itemsize` bytes being those of a product."""
    width, heads, wide = b.width, b.num_heads, b.mlp_dim
    lines = []

    def add(part: str, what: str, per_token: float, nbytes: int, role: str) -> None:
        lines.append(Line(what, part, per_token, nbytes, role))

    for of in ("attention", "mlp"):
        # x - mean, 2x (of the mean square) and scale / std; in float32 whatever the products are.
        add(of, f"{of}'s norm: three factors", 3 * width, 4, "residual")
        add(of, f"{of}'s norm: statistics", {"layer": 4, "rms": 2}[b.norm], 4, "residual")
        add(of, f"{of}'s input", width, itemsize, "residual")
        if b.dropout:
            add(of, f"{of}'s dropout mask", width, 1, "residual")
    add("attention", "queries", width, itemsize, "heads")
    add("attention", "keys and values", 2 * b.kv_width, itemsize, "kv_heads")
    if b.kernel:
        add("attention", "scores: logarithms of sums", heads, 4, "heads")
        add("attention", "attention's result, for the kernel", width, itemsize, "heads")
    else:
        add("attention", "scores: exponentials", heads * length * b.scored, 4, "heads")
        add("attention", "scores: probabilities", heads * length * b.scored, itemsize, "heads")
        add("attention", "scores: sums", 2 * heads, 4, "heads")
    add("attention", "attention's result", width, itemsize, "heads")
    plain, gated, signs = KEPT[b.activation]
    what = f"{b.activation} and its factors"
    add("mlp", what, (gated if b.gated else plain) * wide, itemsize, "mlp")
    if signs:
        add("mlp", f"{b.activation}'s signs", signs * wide, 1, "mlp")
    return lines


def kept_weights(b: Block, itemsize: int) -> int:
    """Numbers of a layer's kernels that are kept beside the parameters: joined, or in bfloat16.

    Queries, keys and values are one product, and so are gate and up: their kernels are put side by
    side. In another type than the parameters' float32 all kernels are.
    """
    joined = b.width * (b.width + 2 * b.kv_width) + (2 * b.width * b.mlp_dim if b.gated else 0)
    others = b.width**2 + (1 if b.gated else 2) * b.width * b.mlp_dim
    return joined + (others if itemsize < 4 else 0)


class Moments(NamedTuple):
    """Bytes of a device at the moments when it may have most, beside state and gradients."""

    weights: float  # of all layers: kernels kept in another form (`kept_weights`)
    saved: float  # of all layers, from the forward pass until their backward pass
    loss: float  # what the logits take, and what leads to them
    attention: float  # what the backward pass of one layer takes beside: its attention
    mlp: float  # and its MLP

    @property
    def peak(self) -> float:
        """What waits and the largest of the others."""
        return self.weights + self.saved + max(self.loss, self.attention, self.mlp)


def moments(
    b: Block,
    *,
    layers: int,
    length: int,
    tokens: int,
    itemsize: int,
    remat: str,
    split: Split,
    vocab: int = 0,
    chunk: int = 0,
) -> Moments:
    """Of a stack of blocks over the `tokens` of a microbatch of all devices, under `remat`.

    none: each layer's tensors wait for its backward pass. full: its input alone does, the rest is
    computed again, one layer at a time. `vocab`, `chunk`: of a language model, the padded
    vocabulary and the positions of each sequence whose logits exist at one time (0: all).
    """
    lines = block(b, length, itemsize)
    of = lambda part: sum(x.nbytes(tokens, split) for x in lines if x.part == part)  # noqa: E731
    hidden, whole = (tokens * b.width * itemsize / n for n in (split.residual, split.whole))
    scores = 0 if b.kernel else tokens * b.num_heads * length * b.scored * 4 / split.heads
    wide = tokens * b.mlp_dim * itemsize / split.mlp
    saved = layers * (hidden if remat == "full" else of("attention") + of("mlp"))
    # A layer's backward pass has its own tensors, out of the stack or computed again, and what
    # flows: three of the hidden states' size, and in attention the scores' gradient, in place or
    # not (CPU compilers of jax 0.10 to 0.12 do either: a half stands for that), and the mask, a
    # byte for each. Of what is computed again an MLP makes its input and result alone, fused.
    attention = of("attention") + 1.5 * scores + scores / 4 + 3 * whole
    mlp = of("mlp") + 2 * wide + 3 * whole
    if remat == "full":
        norm = sum(x.nbytes(tokens, split) for x in lines if x.part == "mlp" and x.role != "mlp")
        mlp = of("attention") + norm + (4 + b.gated) * wide + 3 * whole
    # Logits, their gradient and its copy for the product with the table; in pieces, which are
    # computed again, two more. The table whole, and its gradient before it is reduced; the last
    # norm; the hidden states and their gradient.
    pieces = 0 < chunk < length
    rows = tokens * (chunk if pieces else length) / length
    loss = (5 if pieces else 3) * rows * vocab * 4 / split.vocab
    loss += 2 * vocab * b.width * 4 / split.table + (3 * 4 / itemsize + 3) * hidden
    weights = layers * kept_weights(b, itemsize) * itemsize / split.kernels
    return Moments(0.0 if remat == "full" else weights, saved, loss, attention, mlp)
