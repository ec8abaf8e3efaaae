"""The Vision Transformer (Dosovitskiy et al. 2021), with an optional convolution stem.

Shape letters: B batch, H height, W width, L length (patches), D embed, C classes.
"""

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models.layers import Dropout, Dtype, conv, dense, layer_norm, lecun_normal
from lsdl.models.transformer import Stack


class Vit(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    The patches are averaged after the last norm (Beyer et al. 2022, "Better plain ViT baselines").
    `stem` 3x3 convolutions come before the patches (Xiao et al. 2021, "Early convolutions help
    transformers see better"); 0 is the plain ViT.
    """

    patch: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    num_classes: int
    stem: int = 0
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    scan_layers: bool = False

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        x_BHWD = image_BHWC.astype(self.dtype)
        for i in range(self.stem):
            x_BHWD = conv(self.width, 3, dtype=self.dtype, name=f"stem_{i}")(x_BHWD)
            x_BHWD = nn.gelu(x_BHWD)
        x_BHWD = conv(
            self.width,
            self.patch,
            stride=self.patch,
            padding="VALID",
            axes=("conv_in", "embed"),
            kernel_init=lecun_normal,
            dtype=self.dtype,
            name="patches",
        )(x_BHWD)
        x_BLD = x_BHWD.reshape(len(x_BHWD), -1, self.width)
        position_LD = self.param(
            "position",
            nn.with_logical_partitioning(nn.initializers.normal(0.02), ("length", "embed")),
            x_BLD.shape[1:],
        )
        x_BLD = x_BLD + position_LD[None].astype(self.dtype)
        x_BLD = Dropout(self.dropout, train)(x_BLD)
        x_BLD = Stack(
            self.num_layers,
            self.num_heads,
            self.mlp_dim,
            self.dropout,
            self.dtype,
            self.remat,
            self.scan_layers,
            name="stack",
        )(x_BLD, train=train)
        x_BLD = layer_norm(dtype=self.dtype, name="norm")(x_BLD)
        head = dense(self.num_classes, ("embed", "classes"), dtype=self.dtype, name="head")
        return head(x_BLD.mean(1)).astype(jnp.float32)
