"""Residual networks for ImageNet and for CIFAR, with skips and without (He et al. 2016), or wide.

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from lsdl.errors import UserError
from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, conv, dense, feature_norm, kept, lecun_normal

# What the fields that are words may be.
WORDS = {
    "block": ("basic", "bottleneck", "preact"),
    "stem": ("imagenet", "cifar"),
    "shortcut": ("projection", "pad", "none"),
    "norm": ("batch", "group", "layer"),
}


def _imagenet(block: str, *depths: int) -> dict:
    same = dict(width=64, widening=1, stem="imagenet", shortcut="projection")
    return dict(depths=depths, block=block, **same)


# Source: He et al. 2016, table 1.
SIZES = {
    "18": _imagenet("basic", 2, 2, 2, 2),
    "34": _imagenet("basic", 3, 4, 6, 3),
    "50": _imagenet("bottleneck", 3, 4, 6, 3),
    "101": _imagenet("bottleneck", 3, 4, 23, 3),
    "152": _imagenet("bottleneck", 3, 8, 36, 3),
}


def cifar(depth: int) -> dict:
    """The fields of the CIFAR network of 6n + 2 layers. Source: He et al. 2016, section 4.2."""
    if depth < 8 or (depth - 2) % 6:
        raise UserError(f"depth={depth} must be 6n + 2: 8, 14, 20, 32, 44, 56, 110.")
    depths = ((depth - 2) // 6,) * 3
    return dict(depths=depths, width=16, widening=1, block="basic", stem="cifar", shortcut="pad")


def wide(depth: int, widening: int) -> dict:
    """The fields of WRN-`depth`-`widening`, of 6n + 4 layers.

    Source: Zagoruyko and Komodakis 2016, table 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise UserError(f"depth={depth} must be 6n + 4: 10, 16, 22, 28, 40.")
    return cifar(depth - 2) | dict(widening=widening, block="preact", shortcut="projection")


class ResidualBlock(nn.Module):
    """Two or three convolutions, each normalised, plus the input: `relu(shortcut(x) + f(x))`.

    Where the shape changes, the shortcut `projection` (option B) is a 1x1 convolution, and `pad`
    (option A) subsamples and adds zero channels; `none` is a plain network's `relu(f(x))`. A
    bottleneck has its stride in the 3x3 convolution (Goyal et al. 2017, section 5.1). A `preact`
    block, basic otherwise, has norm and relu before each convolution and none after the sum; its
    projection sees what the first of them makes (He et al. 2016b, Identity mappings).
    `zero_gamma` starts the last norm's scale at 0, and with it f. `dropout` is before the last
    convolution (Zagoruyko and Komodakis 2016, section 2.4).
    """

    features: int
    stride: int
    block: str
    shortcut: str
    norm: str
    zero_gamma: bool
    dropout: float
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        narrow = self.features // 4
        layers = (
            ((1, narrow, 1), (3, narrow, self.stride), (1, self.features, 1))
            if self.block == "bottleneck"
            else ((3, self.features, self.stride), (3, self.features, 1))
        )
        y_BHWD, preact = x_BHWD, self.block == "preact"
        for i, (size, features, stride) in enumerate(layers):
            last = i == len(layers) - 1
            start = nn.initializers.zeros if last and self.zero_gamma else nn.initializers.ones
            norm = functools.partial(self._normalise, name=f"norm_{i}", scale_init=start)
            if preact:
                y_BHWD = nn.relu(norm(y_BHWD))
                x_BHWD = y_BHWD if not i and self._reshapes(x_BHWD) else x_BHWD
            y_BHWD = Dropout(self.dropout, self.train)(y_BHWD) if last else y_BHWD
            y_BHWD = self._convolve(y_BHWD, features, size, stride, f"conv_{i}")
            if not preact:
                y_BHWD = norm(y_BHWD) if last else nn.relu(norm(y_BHWD))
        if self.shortcut != "none":
            y_BHWD = self._skip(x_BHWD) + y_BHWD
        y_BHWD = y_BHWD if preact else nn.relu(y_BHWD)
        return kept(nn.with_logical_constraint(y_BHWD, ("conv_batch", None, None, None)))

    def _reshapes(self, x_BHWD):
        return self.stride > 1 or self.features != x_BHWD.shape[-1]

    def _skip(self, x_BHWD):
        if not self._reshapes(x_BHWD):
            return x_BHWD
        if self.shortcut == "pad":
            extra = self.features - x_BHWD.shape[-1]
            x_BHWD = x_BHWD[:, :: self.stride, :: self.stride]
            return jnp.pad(x_BHWD, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        x_BHWD = self._convolve(x_BHWD, self.features, 1, self.stride, "shortcut")
        return x_BHWD if self.block == "preact" else self._normalise(x_BHWD, "shortcut_norm")

    def _convolve(self, x_BHWD, features, size, stride, name):
        same = dict(padding=size // 2, bias=False, dtype=self.dtype, name=name)
        return remat.name(conv(features, size, stride=stride, **same)(x_BHWD), "conv")

    def _normalise(self, x_BHWD, name, **fields):
        mode = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
        return feature_norm(self.norm, x_BHWD.shape[-1], **mode, **fields, name=name)(x_BHWD)


class ResNet(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    A stem of `width` channels, then one stage of blocks for each of `depths`, the first of
    `widening` times as many channels (4 times that where the blocks are bottlenecks), each later
    one of twice as many at half the resolution. With `preact` blocks the norm and relu behind the
    stem are behind the last block instead. `SIZES`, `cifar` and `wide` hold the published sizes.
    `head_std` is that of the last layer's initial weights, 0 for LeCun's. `num_classes=0` returns
    the pooled features. `axis_name` is filled by the partitioner: the manual mesh axes that split
    the batch.
    """

    depths: tuple[int, ...]
    width: int
    num_classes: int
    block: str = "basic"
    stem: str = "imagenet"
    shortcut: str = "projection"
    norm: str = "batch"
    zero_gamma: bool = False
    head_std: float = 0.0
    widening: int = 1
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        x_BHWD = self._stem(image_BHWC.astype(self.dtype), train)
        width = self.width * self.widening * (4 if self.block == "bottleneck" else 1)
        blocks = [
            functools.partial(
                ResidualBlock,
                width * 2**stage,
                2 if stage and not i else 1,
                self.block,
                self.shortcut,
                self.norm,
                self.zero_gamma,
                self.dropout,
                self.dtype,
                train,
                self.axis_name,
                name=f"stage_{stage}_block_{i}",
            )
            for stage, depth in enumerate(self.depths)
            for i in range(depth)
        ]
        x_BHWD = remat.chain(self, blocks, x_BHWD, policy=self.remat)
        if self.block == "preact":
            x_BHWD = self._activate(x_BHWD, train, "final_norm")
        x_BD = x_BHWD.mean((1, 2))
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        start = nn.initializers.normal(self.head_std) if self.head_std else lecun_normal
        axes = ("conv_out", "classes")
        head = dense(self.num_classes, axes, dtype=self.dtype, name="head", kernel_init=start)
        return head(x_BD).astype(jnp.float32)

    def _stem(self, x_BHWD, train):
        size, stride = {"imagenet": (7, 2), "cifar": (3, 1)}[self.stem]
        same = dict(padding=size // 2, bias=False, dtype=self.dtype, name="stem")
        x_BHWD = conv(self.width, size, stride=stride, **same)(x_BHWD)
        if self.block != "preact":
            x_BHWD = self._activate(x_BHWD, train, "stem_norm")
        if self.stem == "cifar":
            return x_BHWD
        return nn.max_pool(x_BHWD, (3, 3), (2, 2), ((1, 1), (1, 1)))

    def _activate(self, x_BHWD, train, name):
        mode = dict(train=train, axis_name=self.axis_name, dtype=self.dtype)
        return nn.relu(feature_norm(self.norm, x_BHWD.shape[-1], **mode, name=name)(x_BHWD))
