"""Inception-v1, known as GoogLeNet (Szegedy et al. 2015), without its auxiliary classifiers.

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, batch_norm, conv, dense

# Source: Szegedy et al. 2015, table 1: #1x1, #3x3 reduce, #3x3, #5x5 reduce, #5x5, pool proj.
MODULES = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}
POOLED = ("3a", "4a", "5a")  # a max pool of stride 2 comes before these


class Convolution(nn.Module):
    """A convolution, batch norm or else a bias, relu.

    With a `multiplier` it is separable: each input channel's own `multiplier` filters, then a 1x1
    convolution of them all.
    """

    features: int
    size: int
    batch_norm: bool
    dtype: Dtype
    train: bool
    axis_name: str | None
    stride: int = 1
    multiplier: int = 0

    @nn.compact
    def __call__(self, x_BHWD):
        size, stride = self.size, self.stride
        if self.multiplier:
            channels = x_BHWD.shape[-1]
            x_BHWD = conv(
                channels * self.multiplier,
                size,
                stride=stride,
                groups=channels,
                bias=False,
                kernel_init=nn.initializers.lecun_normal(),
                dtype=self.dtype,
                name="depthwise",
            )(x_BHWD)
            size, stride = 1, 1
        bias = not self.batch_norm
        fields = dict(stride=stride, bias=bias, dtype=self.dtype, name="conv")
        x_BHWD = remat.name(conv(self.features, size, **fields)(x_BHWD), "conv")
        if self.batch_norm:
            mode = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
            x_BHWD = batch_norm(**mode, name="norm")(x_BHWD)
        return nn.relu(x_BHWD)


def _halved(x_BHWD):
    return nn.max_pool(x_BHWD, (3, 3), (2, 2), "SAME")


class Mixed(nn.Module):
    """Four branches side by side: 1x1, 3x3, 5x5 and a pool, the last three with a 1x1 of their own.

    `widths` is a row of `MODULES`; with `pooled`, a max pool of stride 2 comes first.
    Source: Szegedy et al. 2015, figure 2b.
    """

    widths: tuple[int, ...]
    pooled: bool
    batch_norm: bool
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        def convolve(x_BHWD, features, size, name):
            mode = (self.batch_norm, self.dtype, self.train, self.axis_name)
            return Convolution(features, size, *mode, name=name)(x_BHWD)

        x_BHWD = _halved(x_BHWD) if self.pooled else x_BHWD
        one, reduce_3, three, reduce_5, five, project = self.widths
        pooled_BHWD = nn.max_pool(x_BHWD, (3, 3), (1, 1), "SAME")
        branches = (
            convolve(x_BHWD, one, 1, "one"),
            convolve(convolve(x_BHWD, reduce_3, 1, "reduce_3"), three, 3, "three"),
            convolve(convolve(x_BHWD, reduce_5, 1, "reduce_5"), five, 5, "five"),
            convolve(pooled_BHWD, project, 1, "project"),
        )
        y_BHWD = jnp.concatenate(branches, axis=-1)
        return nn.with_logical_constraint(y_BHWD, ("conv_batch", None, None, None))


class Inception(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    The first layer is separable, with `stem_multiplier` filters for each colour: 2,712 weights as
    in the published table; 0 makes it one 7x7 convolution of 9,408. `batch_norm` follows every
    convolution (Ioffe and Szegedy 2015, section 4.2); without it there are biases, and never the
    local response normalisation of the original. `num_classes=0` returns the pooled features.
    `width_factor` multiplies every width.
    """

    num_classes: int
    width_factor: float = 1.0
    stem_multiplier: int = 8
    batch_norm: bool = True
    dropout: float = 0.4
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        mode = (self.batch_norm, self.dtype, train, self.axis_name)

        def wide(features):
            return max(1, round(self.width_factor * features))

        stem = dict(stride=2, multiplier=self.stem_multiplier, name="stem")
        x_BHWD = image_BHWC.astype(self.dtype)
        x_BHWD = _halved(Convolution(wide(64), 7, *mode, **stem)(x_BHWD))
        x_BHWD = Convolution(wide(64), 1, *mode, name="reduce")(x_BHWD)
        x_BHWD = Convolution(wide(192), 3, *mode, name="conv")(x_BHWD)
        modules = [
            functools.partial(
                Mixed, tuple(map(wide, widths)), name in POOLED, *mode, name=f"mixed_{name}"
            )
            for name, widths in MODULES.items()
        ]
        x_BHWD = remat.chain(self, modules, x_BHWD, policy=self.remat)
        x_BD = Dropout(self.dropout, train)(x_BHWD.mean((1, 2)))
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        head = dense(self.num_classes, ("conv_out", "classes"), dtype=self.dtype, name="head")
        return head(x_BD).astype(jnp.float32)
