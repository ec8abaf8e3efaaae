"""The Vision Transformer (Dosovitskiy et al. 2021), with an optional convolution stem.

Shape letters: B batch, H height, W width, L length (class tokens, then patches), D embed,
N class tokens, C classes.
"""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models.layers import ACTIVATIONS, Dropout, Dtype, conv, dense, lecun_normal
from lsdl.models.transformer import Stack, Style, shared


def _size(patch: int, width: int, num_layers: int, num_heads: int, mlp_dim: int) -> dict:
    return dict(
        patch=patch, width=width, num_layers=num_layers, num_heads=num_heads, mlp_dim=mlp_dim
    )


# Sources: Dosovitskiy et al. 2021, table 1 (B, L, H); Touvron et al. 2021, table 1 (Ti, S);
# Zhai et al. 2022, table 2 (g, G).
SIZES = {
    f"{name}{patch}": _size(patch, *rest)
    for name, *rest in (
        ("ti", 192, 12, 3, 768),
        ("s", 384, 12, 6, 1536),
        ("b", 768, 12, 12, 3072),
        ("l", 1024, 24, 16, 4096),
        ("h", 1280, 32, 16, 5120),
        ("g", 1408, 40, 16, 6144),
        ("G", 1664, 48, 16, 8192),
    )
    for patch in (14, 16, 32)
}
CLASS_TOKENS = {"mean": 0, "class": 1, "distill": 2}


class Encoder(nn.Module):
    """`image (B, H, W, channels) -> tokens (B, L, D)`, normalised: what every pooling starts from.

    CLIP's image tower (Radford et al. 2021) has `patch_bias` false and `embed_norm` true: it
    normalises the embeddings before the first block too.
    """

    patch: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    class_tokens: int
    activation: str
    norm_eps: float
    stem: int
    dropout: float
    dtype: Dtype
    remat: str
    scan_layers: bool
    attention: Callable | None = None
    pipe: Callable | None = None
    patch_bias: bool = True
    embed_norm: bool = False

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        style = Style(self.activation, self.norm_eps)
        x_BLD = self._patches(image_BHWC.astype(self.dtype))
        normal = nn.initializers.normal(0.02)
        if self.class_tokens:
            boxed = nn.with_logical_partitioning(normal, (None, "embed"))
            class_ND = self.param("class", boxed, (self.class_tokens, self.width))
            shape = (len(x_BLD), *class_ND.shape)
            class_BND = jnp.broadcast_to(class_ND.astype(self.dtype)[None], shape)
            x_BLD = jnp.concatenate([class_BND, x_BLD], axis=1)
        boxed = nn.with_logical_partitioning(normal, ("length", "embed"))
        position_LD = self.param("position", boxed, x_BLD.shape[1:])
        x_BLD = x_BLD + position_LD[None].astype(self.dtype)
        if self.embed_norm:
            x_BLD = style.make_norm("embed_norm", self.dtype)(x_BLD)
        x_BLD = Dropout(self.dropout, train)(x_BLD)
        x_BLD, _ = Stack(**shared(self, Stack), style=style, name="stack")(x_BLD, train=train)
        return style.make_norm("norm", self.dtype)(x_BLD)

    def _patches(self, x_BHWD):
        for i in range(self.stem):
            x_BHWD = conv(self.width, 3, dtype=self.dtype, name=f"stem_{i}")(x_BHWD)
            x_BHWD = ACTIVATIONS[self.activation](x_BHWD)
        x_BHWD = conv(
            self.width,
            self.patch,
            stride=self.patch,
            padding="VALID",
            bias=self.patch_bias,
            axes=("conv_in", "embed"),
            kernel_init=lecun_normal,
            dtype=self.dtype,
            name="patches",
        )(x_BHWD)
        # Split here, the length would split the convolution too, which XLA (jax 0.10.2) gets wrong.
        x_BHWD = nn.with_logical_constraint(x_BHWD, ("batch", None, None, "embed"))
        return x_BHWD.reshape(len(x_BHWD), -1, self.width)


class Vit(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    `pool`: `class` reads a class token; `mean` averages the patches (Beyer et al. 2022, "Better
    plain ViT baselines"); `distill` has a class and a distillation token with a head each (Touvron
    et al. 2021, section 4): both logits come out in training, `(logits, distilled)`, and their
    mean in evaluation. `num_classes=0` returns the pooled features `(B, D)`.
    `stem` 3x3 convolutions come before the patches (Xiao et al. 2021, "Early convolutions help
    transformers see better"); 0 is the plain ViT.
    """

    patch: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    pool: str = "class"
    activation: str = "gelu"
    norm_eps: float = 1e-6
    stem: int = 0
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False
    attention: Callable | None = None
    pipe: Callable | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        x_BLD = Encoder(
            **shared(self, Encoder), class_tokens=CLASS_TOKENS[self.pool], name="encoder"
        )(image_BHWC, train=train)
        pooled_BD = x_BLD.mean(1) if self.pool == "mean" else x_BLD[:, 0]
        if not self.num_classes:
            return pooled_BD.astype(jnp.float32)

        def head(name, x_BD):
            axes = ("embed", "classes")
            make = dense(self.num_classes, axes, dtype=self.dtype, name=name)
            return make(x_BD).astype(jnp.float32)

        logits_BC = head("head", pooled_BD)
        if self.pool != "distill":
            return logits_BC
        distilled_BC = head("distill_head", x_BLD[:, 1])
        return (logits_BC, distilled_BC) if train else (logits_BC + distilled_BC) / 2
