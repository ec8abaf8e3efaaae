"""The multilayer perceptron.

Shape letters: B batch, D features, F hidden, C classes.
"""

import functools

import jax.numpy as jnp
from flax import linen as nn

from lsdl.models import remat
from lsdl.models.layers import ACTIVATIONS, Dropout, Dtype, dense, feature_norm

NORMS = ("none", "batch", "group", "layer")
LEAST = 16  # features of a group (Wu and He 2018, table 3)


class Hidden(nn.Module):
    """One hidden layer: dense, norm, activation, dropout. A norm's own shift is the bias then."""

    features: int
    activation: str
    dropout: float
    dtype: Dtype
    train: bool
    axes: tuple[str, str]
    norm: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x_BD):
        he = nn.initializers.he_normal()
        fields = dict(dtype=self.dtype, bias=self.norm == "none", kernel_init=he)
        x_BF = dense(self.features, self.axes, name="dense", **fields)(x_BD)
        x_BF = remat.name(x_BF, "dense")
        if self.norm != "none":
            own = dict(train=self.train, axis_name=self.axis_name, axis=self.axes[1])
            # With no positions to average over, of a group of two the signs alone would be left.
            fields = dict(dtype=self.dtype, least=LEAST) | own
            norm = feature_norm(self.norm, self.features, name="norm", **fields)
            x_BF = norm(x_BF)
        x_BF = ACTIVATIONS[self.activation](x_BF)
        x_BF = Dropout(self.dropout, self.train)(x_BF)
        return nn.with_logical_constraint(x_BF, ("batch", self.axes[1]))


class Mlp(nn.Module):
    """Any input, flattened, through `hidden` layers to logits.

    `(B, ...) -> (B, num_classes)`, float32. Layers alternate between the logical axes `embed` and
    `mlp`, so that under tensor parallelism each pair needs one all-reduce. `num_classes=0` returns
    the last hidden layer.
    """

    hidden: tuple[int, ...]
    num_classes: int
    activation: str = "relu"
    norm: str = "none"  # of each hidden layer: none | batch | group | layer
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    remat: str = "none"
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, *, train: bool):
        x_BD = x.reshape(len(x), -1).astype(self.dtype)
        axes = ("embed", "mlp")
        layers = [
            functools.partial(
                Hidden,
                features,
                self.activation,
                self.dropout,
                self.dtype,
                train,
                axes[::-1] if i % 2 else axes,
                self.norm,
                self.axis_name,
                name=f"hidden_{i}",
            )
            for i, features in enumerate(self.hidden)
        ]
        x_BD = remat.chain(self, layers, x_BD, policy=self.remat)
        if not self.num_classes:
            return x_BD.astype(jnp.float32)
        last = axes[len(layers) % 2]
        head = dense(self.num_classes, (last, "classes"), dtype=self.dtype, name="head")
        return head(x_BD).astype(jnp.float32)
