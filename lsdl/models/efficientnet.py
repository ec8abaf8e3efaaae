"""EfficientNet: inverted bottlenecks with depthwise convolutions, scaled by two factors.

Source: Tan and Le 2019. Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools
import math

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, SqueezeExcite, batch_norm, conv, dense, kept

# Source: Tan and Le 2019, table 1: expansion, channels, blocks, stride, kernel size.
STAGES = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# The published pairs; they go with images of 224, 240, 260 and 300 pixels.
SIZES = {
    "b0": dict(width_factor=1.0, depth_factor=1.0, dropout=0.2),
    "b1": dict(width_factor=1.0, depth_factor=1.1, dropout=0.2),
    "b2": dict(width_factor=1.1, depth_factor=1.2, dropout=0.3),
    "b3": dict(width_factor=1.2, depth_factor=1.4, dropout=0.3),
}

# TensorFlow's momentum and epsilon, with which the published weights were made.
_norm = functools.partial(batch_norm, eps=1e-3, momentum=0.99)


def scaled_width(channels: int, factor: float) -> int:
    """`channels * factor` to the nearest multiple of 8, at most a tenth below it."""
    scaled = channels * factor
    width = max(8, int(scaled + 4) // 8 * 8)
    return width + 8 if width < 0.9 * scaled else width


class InvertedBottleneck(nn.Module):
    """1x1 to more channels, a depthwise convolution, squeeze and excite, 1x1 to fewer.

    The input is added where the shape stays; `drop_path` is the rate at which the rest is skipped.
    Sources: Sandler et al. 2018, figure 3b; Tan and Le 2019, section 4.
    """

    features: int
    expansion: int
    stride: int
    size: int
    drop_path: float
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        def normed(x_BHWD, features, size, name, **fields):
            make = conv(features, size, bias=False, dtype=self.dtype, name=name, **fields)
            mode = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
            return _norm(**mode, name=f"{name}_norm")(remat.name(make(x_BHWD), "conv"))

        inputs = x_BHWD.shape[-1]
        wide, y_BHWD = inputs * self.expansion, x_BHWD
        if self.expansion > 1:
            y_BHWD = nn.silu(normed(y_BHWD, wide, 1, "expand"))
        # A depthwise filter's fan-out is its own size, which is what fan_in counts.
        start = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        alone = dict(stride=self.stride, groups=wide, kernel_init=start)
        y_BHWD = nn.silu(normed(y_BHWD, wide, self.size, "depthwise", **alone))
        y_BHWD = SqueezeExcite(max(1, inputs // 4), "silu", self.dtype, name="excite")(y_BHWD)
        y_BHWD = normed(y_BHWD, self.features, 1, "project")
        if self.stride == 1 and inputs == self.features:
            y_BHWD = x_BHWD + Dropout(self.drop_path, self.train, whole=True)(y_BHWD)
        return kept(nn.with_logical_constraint(y_BHWD, ("conv_batch", None, None, None)))


class EfficientNet(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    `drop_path` grows linearly from 0 at the first block. Sizes are padded on the right and below,
    as in TensorFlow ("SAME"). `num_classes=0` returns the pooled features.
    """

    num_classes: int
    width_factor: float = 1.0
    depth_factor: float = 1.0
    dropout: float = 0.2
    drop_path: float = 0.2
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        mode = dict(train=train, axis_name=self.axis_name, dtype=self.dtype)

        def normed(x_BHWD, channels, size, stride, name):
            features = scaled_width(channels, self.width_factor)
            plain = dict(stride=stride, bias=False, dtype=self.dtype, name=name)
            x_BHWD = conv(features, size, **plain)(x_BHWD)
            return nn.silu(_norm(**mode, name=f"{name}_norm")(x_BHWD))

        x_BHWD = normed(image_BHWC.astype(self.dtype), 32, 3, 2, "stem")
        rows = [
            (channels, expansion, 1 if i else stride, size)
            for expansion, channels, repeats, stride, size in STAGES
            for i in range(math.ceil(repeats * self.depth_factor))
        ]
        blocks = [
            functools.partial(
                InvertedBottleneck,
                scaled_width(channels, self.width_factor),
                expansion,
                stride,
                size,
                self.drop_path * i / len(rows),
                self.dtype,
                train,
                self.axis_name,
                name=f"block_{i}",
            )
            for i, (channels, expansion, stride, size) in enumerate(rows)
        ]
        x_BHWD = remat.chain(self, blocks, x_BHWD, policy=self.remat)
        x_BD = normed(x_BHWD, 1280, 1, 1, "top").mean((1, 2))
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        head = dense(self.num_classes, ("conv_out", "classes"), dtype=self.dtype, name="head")
        return head(Dropout(self.dropout, train)(x_BD)).astype(jnp.float32)
