"""The plain ReLU nets that showed how wide first weights must be drawn (He et al. 2015).

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, conv, dense

# The small net of He et al. 2015, table 1, and their large net B of table 3, by layers of weights.
# In 30 the small one has 16 more of its last layers. Borders are kept. From memory of the paper,
# whose text was not at hand: held by the numbers of layers, and by nothing that it prints.
_SMALL = dict(stem_width=64, stem_pool=3, kernel=2, widths=(128, 256), pyramid=(6, 3, 2, 1))
_LARGE = dict(stem_width=96, stem_pool=2, kernel=3, widths=(256, 512, 512), pyramid=(7, 3, 2, 1))
SIZES = {
    "14": _SMALL | {"depths": (4, 6)},
    "22": _LARGE | {"depths": (6, 6, 6)},
    "30": _SMALL | {"depths": (4, 22)},
}
STEM = 7  # pixels of the first kernel, which takes every other place


def pyramid_pool(x_BHWD: jax.Array, bins: tuple[int, ...]) -> jax.Array:
    """The largest of each of n x n bins that cover the image, for each n: `(B, D sum of n^2)`.

    Bins share a row where the side is no multiple of n. Source: He et al. 2014, Spatial pyramid
    pooling in deep convolutional networks (arXiv:1406.4729), section 2.
    """
    rows = [_largest(_largest(x_BHWD, 1, n), 2, n).reshape(len(x_BHWD), -1) for n in bins]
    return jnp.concatenate(rows, -1)


def _largest(x_BHWD: jax.Array, axis: int, n: int) -> jax.Array:
    side = x_BHWD.shape[axis]
    ends = [(i * side // n, -(-(i + 1) * side // n)) for i in range(n)]
    return jnp.stack([lax.slice_in_dim(x_BHWD, *e, axis=axis).max(axis) for e in ends], axis)


class Layer(nn.Module):
    """Convolution, relu, and a pool of `pool` x `pool` places where that is more than one."""

    features: int
    size: int
    stride: int
    pool: int
    gain: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BHWD):
        fields = dict(kernel_init=_normal(self.gain), dtype=self.dtype, name="conv")
        x_BHWD = conv(self.features, self.size, stride=self.stride, **fields)(x_BHWD)
        x_BHWD = nn.relu(remat.name(x_BHWD, "conv"))
        if self.pool > 1:
            x_BHWD = nn.max_pool(x_BHWD, (self.pool,) * 2, (self.pool,) * 2, "SAME")
        return nn.with_logical_constraint(x_BHWD, ("conv_batch", None, None, None))


def _normal(gain: float) -> nn.initializers.Initializer:
    return nn.initializers.variance_scaling(gain, "fan_in", "normal")


class Msra(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    A 7 x 7 convolution and a pool, stages of `depths` convolutions of `widths` with a pool of 2
    between them, a pyramid of bins, dense layers; nothing is normalised and nothing skipped.
    Weights start normal with variance `gain` / n, n the inputs of a unit, and biases at 0: 2 is
    He's, from which the mean square of a signal neither grows nor shrinks on its way, and 1 that
    which it was compared with. `num_classes=0` returns the features before the last layer.
    Source: He et al. 2015, Delving deep into rectifiers (arXiv:1502.01852), section 2.2.
    """

    num_classes: int
    depths: tuple[int, ...] = SIZES["14"]["depths"]
    widths: tuple[int, ...] = SIZES["14"]["widths"]
    stem_width: int = 64
    stem_pool: int = 3
    kernel: int = 2
    pyramid: tuple[int, ...] = SIZES["14"]["pyramid"]
    hidden: tuple[int, ...] = (4096, 4096)
    gain: float = 2.0
    dropout: float = 0.5
    dtype: Dtype = jnp.float32
    remat: str = "none"

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        rows = [(self.stem_width, STEM, 2, self.stem_pool)]
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            between = 1 if stage == len(self.depths) - 1 else 2
            rows += [(width, self.kernel, 1, 1)] * (depth - 1) + [(width, self.kernel, 1, between)]
        layers = [
            functools.partial(Layer, *row, self.gain, self.dtype, name=f"layer_{i}")
            for i, row in enumerate(rows)
        ]
        x_BHWD = remat.chain(self, layers, image_BHWC.astype(self.dtype), policy=self.remat)
        x_BD = pyramid_pool(x_BHWD, self.pyramid)
        axes = ("embed", "mlp")
        fields = dict(kernel_init=_normal(self.gain), dtype=self.dtype)
        for i, features in enumerate(self.hidden):
            x_BD = nn.relu(dense(features, axes, name=f"dense_{i}", **fields)(x_BD))
            x_BD = nn.with_logical_constraint(x_BD, ("batch", axes[1]))
            x_BD = Dropout(self.dropout, train)(x_BD)
            axes = axes[::-1]
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        head = dense(self.num_classes, (axes[0], "classes"), name="head", **fields)
        return head(x_BD).astype(jnp.float32)
