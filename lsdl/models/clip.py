"""CLIP: an image and a text tower that meet in one embedding space (Radford et al. 2021).

Shape letters: B batch, H height, W width, L length, D embed, E shared embedding.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import vit
from lsdl.models.gpt import Gpt
from lsdl.models.layers import Dtype, dense


def _size(embed_dim: int, vision: str, text_width: int, text_layers: int, text_heads: int, act):
    image = {f"vision_{name}": value for name, value in vit.SIZES[vision].items()}
    text = dict(
        text_width=text_width,
        text_num_layers=text_layers,
        text_num_heads=text_heads,
        text_mlp_dim=4 * text_width,
    )
    return dict(embed_dim=embed_dim, activation=act, **image, **text)


# Radford et al. 2021, table 20 (B/32, B/16, L/14: quick GELU); Cherti et al. 2023, table 25 of
# OpenCLIP (H/14, g/14: GELU).
SIZES = {
    "b32": _size(512, "b32", 512, 12, 8, "quick_gelu"),
    "b16": _size(512, "b16", 512, 12, 8, "quick_gelu"),
    "l14": _size(768, "l14", 768, 12, 12, "quick_gelu"),
    "h14": _size(1024, "h14", 1024, 24, 16, "gelu"),
    "g14": _size(1024, "g14", 1024, 24, 16, "gelu"),
}


class Clip(nn.Module):
    """`image (B, H, W, channels), caption (B, L) -> (image (B, E), text (B, E), scale, bias)`.

    Features are of unit length, float32; `scale` (the inverse temperature, at most 100) is a
    learned scalar, and so is `bias`, of the sigmoid loss, unless `bias_init` is 0: then it is 0.
    A caption ends with its largest token and is read there; what follows is padding.
    """

    embed_dim: int
    vocab_size: int
    vocab_padded: int
    max_length: int
    vision_patch: int
    vision_width: int
    vision_num_layers: int
    vision_num_heads: int
    vision_mlp_dim: int
    text_width: int
    text_num_layers: int
    text_num_heads: int
    text_mlp_dim: int
    activation: str = "quick_gelu"
    norm_eps: float = 1e-5
    scale_init: float = 1 / 0.07
    bias_init: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False

    def setup(self):
        self.vision = vit.Encoder(
            self.vision_patch,
            self.vision_width,
            self.vision_num_layers,
            self.vision_num_heads,
            self.vision_mlp_dim,
            class_tokens=1,
            activation=self.activation,
            norm_eps=self.norm_eps,
            stem=0,
            dropout=0.0,
            dtype=self.dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
            patch_bias=False,
            embed_norm=True,
        )
        self.text = Gpt(
            "gpt2",
            self.vocab_size,
            self.vocab_padded,
            self.max_length,
            self.text_width,
            self.text_num_layers,
            self.text_num_heads,
            self.text_mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            remat=self.remat,
            scan_layers=self.scan_layers,
        )
        project = lambda name: dense(  # noqa: E731
            self.embed_dim, ("embed", None), dtype=self.dtype, bias=False, name=name
        )
        self.vision_projection = project(None)
        self.text_projection = project(None)
        start = nn.initializers.constant(math.log(self.scale_init))
        self.log_scale = self.param("log_scale", nn.with_logical_partitioning(start, ()), ())
        start = nn.initializers.constant(self.bias_init)
        boxed = nn.with_logical_partitioning(start, ())
        self.bias = self.param("bias", boxed, ()) if self.bias_init else jnp.zeros(())

    def encode_image(self, image_BHWC, *, train: bool) -> jax.Array:
        """`(B, E)`, of unit length."""
        x_BLD = self.vision(image_BHWC, train=train)
        return _unit(self.vision_projection(x_BLD[:, 0]))

    def encode_text(self, caption_BL, *, train: bool) -> jax.Array:
        """`(B, E)`, of unit length."""
        x_BLD, _ = self.text(caption_BL, train=train)
        end_B = caption_BL.argmax(1)
        x_BD = jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]
        return _unit(self.text_projection(x_BD))

    def __call__(self, image_BHWC, caption_BL, *, train: bool):
        image_BE = self.encode_image(image_BHWC, train=train)
        text_BE = self.encode_text(caption_BL, train=train)
        scale = jnp.exp(jnp.minimum(self.log_scale, math.log(100.0)))
        return image_BE, text_BE, scale, self.bias


def _unit(x_BE: jax.Array) -> jax.Array:
    x_BE = x_BE.astype(jnp.float32)
    return x_BE / jnp.linalg.norm(x_BE, axis=-1, keepdims=True)
