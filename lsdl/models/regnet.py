"""RegNet: bottlenecks of one width whose 3x3 convolution has groups (Radosavovic et al. 2020).

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import Dtype, SqueezeExcite, batch_norm, conv, dense, kept

# Source: Radosavovic et al. 2020, figure 16, as stages.
SIZES = {
    "y_400mf": dict(depths=(1, 3, 6, 6), widths=(48, 104, 208, 440), group_width=8),
    "y_4gf": dict(depths=(2, 6, 12, 2), widths=(128, 192, 512, 1088), group_width=64),
}


class Block(nn.Module):
    """1x1, 3x3 in groups, squeeze and excite, 1x1, plus the input, projected where it has to be.

    The Y block of Radosavovic et al. 2020, section 4; the gate's width is a quarter of the input's.
    """

    features: int
    group_width: int
    stride: int
    excite: bool
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        def normed(x_BHWD, size, stride, name, groups=1):
            same = dict(padding=size // 2, bias=False, dtype=self.dtype, name=name)
            x_BHWD = conv(self.features, size, stride=stride, groups=groups, **same)(x_BHWD)
            x_BHWD = remat.name(x_BHWD, "conv")
            mode = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
            return batch_norm(**mode, name=f"{name}_norm")(x_BHWD)

        inputs = x_BHWD.shape[-1]
        y_BHWD = nn.relu(normed(x_BHWD, 1, 1, "conv_0"))
        groups = max(1, self.features // self.group_width)
        y_BHWD = nn.relu(normed(y_BHWD, 3, self.stride, "conv_1", groups))
        if self.excite:
            y_BHWD = SqueezeExcite(round(inputs / 4), "relu", self.dtype, name="excite")(y_BHWD)
        y_BHWD = normed(y_BHWD, 1, 1, "conv_2")
        if self.stride != 1 or inputs != self.features:
            x_BHWD = normed(x_BHWD, 1, self.stride, "shortcut")
        y_BHWD = nn.relu(x_BHWD + y_BHWD)
        return kept(nn.with_logical_constraint(y_BHWD, ("conv_batch", None, None, None)))


class RegNet(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    RegNetY, or with `excite` false RegNetX. Each stage halves the resolution and has its depth and
    width. `num_classes=0` returns the pooled features.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    group_width: int
    num_classes: int
    excite: bool = True
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        stem = conv(32, 3, stride=2, padding=1, bias=False, dtype=self.dtype, name="stem")
        mode = dict(train=train, axis_name=self.axis_name, dtype=self.dtype)
        x_BHWD = stem(image_BHWC.astype(self.dtype))
        x_BHWD = nn.relu(batch_norm(**mode, name="stem_norm")(x_BHWD))
        blocks = [
            functools.partial(
                Block,
                width,
                self.group_width,
                1 if i else 2,
                self.excite,
                self.dtype,
                train,
                self.axis_name,
                name=f"stage_{stage}_block_{i}",
            )
            for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True))
            for i in range(depth)
        ]
        x_BHWD = remat.chain(self, blocks, x_BHWD, policy=self.remat)
        x_BD = x_BHWD.mean((1, 2))
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        head = dense(self.num_classes, ("conv_out", "classes"), dtype=self.dtype, name="head")
        return head(x_BD).astype(jnp.float32)
