"""Tasks: what a batch holds, what the model sees of it, and the loss as sums.

Shape letters: B batch, H height, W width, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax

from lsdl.state import Batch


@dataclass(frozen=True)
class Classification:
    """One label per image; softmax cross-entropy in nats.

    Pixels travel as stored (uint8) and are standardised on the device with `mean` and `std`.
    """

    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def spec(self, batch_size: int) -> Mapping[str, jax.ShapeDtypeStruct]:
        """The leaves of a batch. `weight` is 0 for rows that only fill the batch."""
        shape = jax.ShapeDtypeStruct
        return {
            "image": shape((batch_size, *self.image_shape), jnp.uint8),
            "label": shape((batch_size,), jnp.int32),
            "weight": shape((batch_size,), jnp.float32),
        }

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        """Random transforms of the global batch, on the device: none for this task."""
        del key
        return batch

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        """What the model is called with: standardised pixels, float32."""
        mean_BHWC, std_BHWC = jnp.array((self.mean, self.std))[:, None, None, None]
        return ((batch["image"].astype(jnp.float32) - mean_BHWC) / std_BHWC,)

    def loss(
        self, outputs: jax.Array, batch: Batch, *, extra: Mapping | None = None
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """`logits (B, C)` -> loss summed over examples, their weight, sums of the metrics."""
        del extra
        logits_BC, label_B, weight_B = outputs, batch["label"], batch["weight"]
        loss_B = optax.softmax_cross_entropy_with_integer_labels(logits_BC, label_B)
        correct_B = logits_BC.argmax(-1) == label_B
        return (
            (loss_B * weight_B).sum(),
            weight_B.sum(),
            {"accuracy": (correct_B * weight_B).sum()},
        )
