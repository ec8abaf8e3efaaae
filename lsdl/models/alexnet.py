"""AlexNet with its two groups of convolutions (Krizhevsky et al. 2012), or with batch norm.

And C1, a shallow one for images of 32 x 32 pixels (Keskar et al. 2017).

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from lsdl.errors import UserError
from lsdl.models import remat
from lsdl.models.layers import Dropout, Dtype, batch_norm, conv, dense

# (kernel size, groups, local response normalisation, max pool) of the five convolutions
LAYERS = (
    (11, 1, True, True),
    (5, 2, True, True),
    (3, 1, False, False),
    (3, 2, False, False),
    (3, 2, False, True),
)
STRIDE = 4  # of the first
LEAST = 64  # pixels that leave one position after the last pool
SHALLOW = ((5, 1, False, True),) * 2  # of C1, whose strides are the pools' alone


def local_response_norm(x_BHWD: jax.Array) -> jax.Array:
    """Each channel over the root of the squares of itself and the two on either side, in float32.

    Source: Krizhevsky et al. 2012, section 3.3: x / (2 + 1e-4 sum of 5 squares)^0.75.
    """
    square_BHWD = jnp.square(x_BHWD.astype(jnp.float32))
    sides = ((0, 0), (0, 0), (0, 0), (2, 2))
    total_BHWD = lax.reduce_window(square_BHWD, 0.0, lax.add, (1, 1, 1, 5), (1, 1, 1, 1), sides)
    return (x_BHWD / (2.0 + 1e-4 * total_BHWD) ** 0.75).astype(x_BHWD.dtype)


def tiling_padding(side: int) -> tuple[int, int]:
    """Zeros before and after, for the first kernel's strides to end at the border: 224 -> 227."""
    extra = -(side - LAYERS[0][0]) % STRIDE
    return extra // 2, extra - extra // 2


class Convolution(nn.Module):
    """One of the five, or of C1's two: convolution, norm and relu, pool."""

    features: int
    size: int
    groups: int
    response_norm: bool
    pool: bool
    stride: int
    shallow: bool
    batch_norm: bool
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        tiling = self.stride > 1
        x_BHWD = conv(
            self.features,
            self.size,
            stride=self.stride,
            groups=self.groups,
            padding=[tiling_padding(n) for n in x_BHWD.shape[1:3]] if tiling else self.size // 2,
            **_initial(0.01, 0.01, self.shallow),
            dtype=self.dtype,
            name="conv",
        )(x_BHWD)
        x_BHWD = remat.name(x_BHWD, "conv")
        if self.batch_norm:
            mode = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
            x_BHWD = batch_norm(**mode, name="norm")(x_BHWD)
        x_BHWD = nn.relu(x_BHWD)
        if self.response_norm and not self.batch_norm:
            x_BHWD = local_response_norm(x_BHWD)
        if self.pool:
            border = "SAME" if self.shallow else "VALID"
            x_BHWD = nn.max_pool(x_BHWD, (3, 3), (2, 2), border)
        return nn.with_logical_constraint(x_BHWD, ("conv_batch", None, None, None))


def _initial(std: float, bias: float, shallow: bool) -> dict:
    """You et al.'s normal weights and constant biases; of C1 those of its authors' Keras."""
    if shallow:
        return {"kernel_init": nn.initializers.glorot_uniform()}
    return {
        "kernel_init": nn.initializers.normal(std),
        "bias_init": nn.initializers.constant(bias),
    }


class AlexNet(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    The published net sees 227 x 227 pixels; 224 x 224 are padded to that, any side from 64 on will
    do. With `batch_norm`, batch normalisation after each convolution takes the place of local
    response normalisation (AlexNet-BN of You et al. 2017). `num_classes=0` returns the features
    before the last layer. The initial values are those whose norms You et al. print in table 2:
    weights from N(0, 0.01^2), 0.005 in the hidden dense layers; biases 0.01, there 0.1.

    Two `widths` in place of five make C1: 5 x 5 convolutions of stride 1, pools that keep the
    border, and `batch_norm` after the hidden dense layers too.
    Source: `shallownet` of network_zoo.py in github.com/keskarnitish/large-batch-training. The
    paper's appendix, as others quote it, has a stride of 2 in the convolutions, not in the pools.
    """

    num_classes: int
    widths: tuple[int, ...] = (96, 256, 384, 384, 256)
    hidden: tuple[int, ...] = (4096, 4096)
    batch_norm: bool = False
    dropout: float = 0.5
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        shallow = len(self.widths) == len(SHALLOW)
        if not shallow and min(image_BHWC.shape[1:3]) < LEAST:
            raise UserError(
                f"The image of {image_BHWC.shape[1]} x {image_BHWC.shape[2]} pixels is too small "
                f"for alexnet: it needs {LEAST} x {LEAST}."
            )
        mode = (shallow, self.batch_norm, self.dtype, train, self.axis_name)
        rows, first = (SHALLOW, 1) if shallow else (LAYERS, STRIDE)
        layers = [
            functools.partial(
                Convolution, features, *row, 1 if i else first, *mode, name=f"layer_{i}"
            )
            for i, (features, row) in enumerate(zip(self.widths, rows, strict=True))
        ]
        x_BHWD = remat.chain(self, layers, image_BHWC.astype(self.dtype), policy=self.remat)
        x_BD = x_BHWD.reshape(len(x_BHWD), -1)
        axes = ("embed", "mlp")
        for i, features in enumerate(self.hidden):
            x_BD = self._dense(x_BD, features, axes, 0.005, 0.1, f"dense_{i}")
            if shallow and self.batch_norm:
                norm = dict(train=train, axis_name=self.axis_name, dtype=self.dtype, axis=axes[1])
                x_BD = batch_norm(**norm, name=f"norm_{i}")(x_BD)
            x_BD = nn.with_logical_constraint(nn.relu(x_BD), ("batch", axes[1]))
            x_BD = Dropout(self.dropout, train)(x_BD)
            axes = axes[::-1]
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        axes = (axes[0], "classes")
        return self._dense(x_BD, self.num_classes, axes, 0.01, 0.01, "head").astype(jnp.float32)

    def _dense(self, x_BD, features, axes, std, bias, name):
        return dense(
            features,
            axes,
            **_initial(std, bias, len(self.widths) == len(SHALLOW)),
            dtype=self.dtype,
            name=name,
        )(x_BD)
