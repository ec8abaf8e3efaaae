"""The CIFAR-style residual network of 6n + 2 layers (He et al. 2016, section 4.2).

Shape letters: B batch, H height, W width, D channels, C classes.
"""

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import Dtype, batch_norm, conv, dense


class ResidualBlock(nn.Module):
    """conv-BN-relu-conv-BN plus the input; across stages the shortcut is option A.

    Option A adds no parameters: the input is subsampled and padded with zero channels.
    """

    features: int
    stride: int
    dtype: Dtype
    train: bool
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BHWD):
        def norm(name):
            return batch_norm(
                train=self.train, axis_name=self.axis_name, dtype=self.dtype, name=name
            )

        def convolve(stride, name):
            return conv(self.features, 3, stride=stride, bias=False, dtype=self.dtype, name=name)

        y_BHWD = nn.relu(norm("norm_0")(convolve(self.stride, "conv_0")(x_BHWD)))
        y_BHWD = norm("norm_1")(convolve(1, "conv_1")(y_BHWD))
        extra = self.features - x_BHWD.shape[-1]
        if self.stride != 1 or extra:
            x_BHWD = x_BHWD[:, :: self.stride, :: self.stride]
            x_BHWD = jnp.pad(x_BHWD, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))
        return nn.relu(x_BHWD + y_BHWD)


class CifarResNet(nn.Module):
    """`image (B, H, W, channels) -> logits (B, num_classes)`, float32.

    Three stages of n = (depth - 2) / 6 blocks, of `width`, 2 `width` and 4 `width` channels.
    `axis_name` is filled by the partitioner: the manual mesh axes that split the batch.
    """

    depth: int
    num_classes: int
    width: int = 16
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, image_BHWC, *, train: bool):
        block = remat.wrap(ResidualBlock, self.remat)
        norm = batch_norm(train=train, axis_name=self.axis_name, dtype=self.dtype, name="stem_norm")
        x_BHWD = image_BHWC.astype(self.dtype)
        x_BHWD = conv(self.width, 3, bias=False, dtype=self.dtype, name="stem")(x_BHWD)
        x_BHWD = nn.relu(norm(x_BHWD))
        for stage in range(3):
            for i in range((self.depth - 2) // 6):
                x_BHWD = block(
                    self.width * 2**stage,
                    2 if stage and not i else 1,
                    self.dtype,
                    train,
                    self.axis_name,
                    name=f"stage_{stage}_block_{i}",
                )(x_BHWD)
                x_BHWD = nn.with_logical_constraint(x_BHWD, ("batch", None, None, None))
        head = dense(self.num_classes, ("conv_out", "classes"), dtype=self.dtype, name="head")
        return head(x_BHWD.mean((1, 2))).astype(jnp.float32)
