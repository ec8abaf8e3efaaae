"""Tasks: what a batch holds, what the model sees of it, and the loss as sums.

Every task has
    spec(batch_size)             the leaves of a batch; `weight` is 0 for rows that only fill it
    prepare(batch, key)          random transforms of the global training batch, on the device
    inputs(batch)                what the model is called with
    loss(outputs, batch, extra)  (loss summed over units, their weight, sums of the metrics)
    derive(means)                metrics that are functions of means, such as perplexity
    shown                        the metrics of a results table, besides the loss
    unit, units_per_example      what the loss is a mean over, and how many an example has

Shape letters: B batch, L length, C classes, V vocabulary, K regression targets, N layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lsdl.errors import UserError
from lsdl.losses import contrastive, token_cross_entropy
from lsdl.state import Batch

Features = Mapping[str, jax.ShapeDtypeStruct]  # of one example, without a batch dim
Loss = tuple[jax.Array, jax.Array, dict[str, jax.Array]]


def _spec(task, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    leaves = dict(task.features) | {"weight": jax.ShapeDtypeStruct((), jnp.float32)}
    return {
        name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype)
        for name, leaf in leaves.items()
    }


def _unchanged(task, batch: Batch, key: jax.Array) -> Batch:
    return batch


def _nothing(task, means: Mapping[str, float]) -> dict[str, float]:
    return {}


def standardised(x, mean: tuple[float, ...], std: tuple[float, ...]) -> jax.Array:
    """`x` in float32 with `mean` and `std` of each channel (the last dim) taken out, if known."""
    x = jnp.asarray(x, jnp.float32)
    if not mean:
        return x
    shape = (1,) * (x.ndim - 1) + (len(mean),)
    return (x - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)


def _input_leaf(features: Features) -> str:
    return "image" if "image" in features else "features"


@dataclass(frozen=True)
class Classification:
    """One label per example, or a distribution over the classes; softmax cross-entropy in nats.

    The input is the leaf `image` or `features`, standardised on the device with `mean` and `std`:
    pixels travel as stored. `label_smoothing` mixes the uniform distribution into the labels
    (Szegedy et al. 2016, section 7); `mixup` is the alpha of MixUp's Beta(alpha, alpha), one draw
    for a batch, each row mixed with the next (Zhang et al. 2018, eq. 2).
    With a teacher's logits in `extra`, `distill_weight` of the loss is on them: the Kullback-
    Leibler divergence at `distill_temperature`, times its square (Hinton et al. 2015, section 2),
    or the teacher's most probable class if that is 0 (Touvron et al. 2021, eq. 3). A model with a
    distillation head answers the teacher there.
    """

    features: Features
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    label_smoothing: float = 0.0
    mixup: float = 0.0
    distill_weight: float = 0.0
    distill_temperature: float = 0.0

    unit, units_per_example = "examples", 1
    spec, derive = _spec, _nothing

    @property
    def shown(self) -> tuple[str, ...]:
        return ("accuracy", "top5") if self.num_classes > 10 else ("accuracy",)

    def prepare(self, batch: Batch, key: jax.Array) -> Batch:
        if not self.mixup:
            return batch
        share = jax.random.beta(key, self.mixup, self.mixup)
        mix = lambda x: share * x + (1 - share) * jnp.roll(x, 1, axis=0)  # noqa: E731
        leaf = _input_leaf(self.features)
        mixed = {leaf: mix(batch[leaf].astype(jnp.float32)), "label": mix(self._soft(batch))}
        return batch | mixed

    def _soft(self, batch: Batch) -> jax.Array:
        label = batch["label"]
        return jax.nn.one_hot(label, self.num_classes) if label.ndim == 1 else label

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        return (standardised(batch[_input_leaf(self.features)], self.mean, self.std),)

    def loss(self, outputs: Any, batch: Batch, *, extra: Mapping | None = None) -> Loss:
        """`logits (B, C)`, or with those of a distillation head, `(logits, distilled)`."""
        logits_BC, distilled_BC = outputs if isinstance(outputs, tuple) else (outputs, None)
        label_BC, weight_B = self._soft(batch), batch["weight"]
        _check_shape(logits_BC, label_BC, "a number for each class")
        smooth_BC = optax.smooth_labels(label_BC, self.label_smoothing)
        loss_B = optax.softmax_cross_entropy(logits_BC, smooth_BC)
        if extra and "teacher" in extra:
            student_BC = logits_BC if distilled_BC is None else distilled_BC
            loss_B = (1 - self.distill_weight) * loss_B
            loss_B += self.distill_weight * self._distill(student_BC, extra["teacher"])
        elif distilled_BC is not None:
            loss_B = (loss_B + optax.softmax_cross_entropy(distilled_BC, smooth_BC)) / 2
        target_B = label_BC.argmax(-1)
        correct_B = logits_BC.argmax(-1) == target_B
        metrics = {"accuracy": (correct_B * weight_B).sum()}
        if "top5" in self.shown:
            chosen_B1 = jnp.take_along_axis(logits_BC, target_B[:, None], axis=1)
            in_top5_B = (logits_BC > chosen_B1).sum(1) < 5
            metrics["top5"] = (in_top5_B * weight_B).sum()
        return (loss_B * weight_B).sum(), weight_B.sum(), metrics

    def _distill(self, student_BC: jax.Array, teacher_BC: jax.Array) -> jax.Array:
        if not self.distill_temperature:
            hard_B = teacher_BC.argmax(-1)
            return optax.softmax_cross_entropy_with_integer_labels(student_BC, hard_B)
        student_BC, teacher_BC = (x / self.distill_temperature for x in (student_BC, teacher_BC))
        divergence_B = optax.losses.kl_divergence(
            jax.nn.log_softmax(student_BC), jax.nn.softmax(teacher_BC)
        )
        return self.distill_temperature**2 * divergence_B


@dataclass(frozen=True)
class Regression:
    """`target (K,)` of each example: the squared error, averaged over the K targets."""

    features: Features
    mean: tuple[float, ...]
    std: tuple[float, ...]

    unit, units_per_example = "examples", 1
    shown = ()
    spec, prepare, derive = _spec, _unchanged, _nothing

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        return (standardised(batch[_input_leaf(self.features)], self.mean, self.std),)

    def loss(self, outputs: jax.Array, batch: Batch, *, extra: Mapping | None = None) -> Loss:
        del extra
        _check_shape(outputs, batch["target"], "a number for each target")
        loss_B = jnp.square(outputs - batch["target"]).mean(1)
        return (loss_B * batch["weight"]).sum(), batch["weight"].sum(), {}


def _check_shape(outputs: jax.Array, wanted: jax.Array, what: str) -> None:
    if outputs.shape != wanted.shape:
        raise UserError(
            f"The model's outputs have the shape {outputs.shape}, and the task takes "
            f"{wanted.shape}: {what}, of each example."
        )


def _perplexity(task, means: Mapping[str, float]) -> dict[str, float]:
    return {"perplexity": math.exp(min(means["cross_entropy"], 700.0))}


@dataclass(frozen=True)
class Language:
    """Each token from those before it: cross-entropy in nats per token.

    An example is a window of L + 1 tokens, `token (L + 1,)`. With `segment (L + 1,)` (0 is
    padding, 1, 2, ... the documents that were packed into the window) no document sees another
    and no document's first token is predicted from another's last. `loss_weight (L,)`, if there,
    weights the targets. `token_bytes (V,)` is the text that each token stands for, in bytes, for
    bits per byte. `z_loss` and `chunk` as in `losses.token_cross_entropy`. Of a mixture of experts
    `balance` times the balance loss of each layer is added (Fedus et al. 2021, eq. 4), taken for
    each sequence and weighted like its tokens: a sum over examples, as all of the loss.
    """

    features: Features
    vocab_size: int
    token_bytes: tuple[int, ...]
    z_loss: float = 0.0
    chunk: int = 0
    balance: float = 0.0

    unit = "tokens"
    spec, prepare = _spec, _unchanged

    @property
    def units_per_example(self) -> int:
        return self.features["token"].shape[0] - 1

    @property
    def shown(self) -> tuple[str, ...]:
        return ("accuracy", "perplexity", *(("bits_per_byte",) if self.token_bytes else ()))

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        derived = _perplexity(self, means)
        if self.token_bytes:
            derived["bits_per_byte"] = means["cross_entropy"] / means["bytes"] / math.log(2)
        return derived

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        names = ("token", "segment") if "segment" in batch else ("token",)
        return tuple(batch[name][:, :-1] for name in names)

    def loss(self, outputs: tuple, batch: Batch, *, extra: Mapping | None = None) -> Loss:
        """`(hidden (B, L, D), table (V, D)[, routing])`: the product of two is the logits.

        `routing`, of a mixture of experts, is {"balance", "dropped"} of each layer, `(B, N)`.
        """
        del extra
        hidden_BLD, table_VD, *routing = outputs
        target_BL = batch["token"][:, 1:]
        weight_BL = jnp.broadcast_to(batch["weight"][:, None], target_BL.shape)
        if "loss_weight" in batch:
            weight_BL = weight_BL * batch["loss_weight"]
        if "segment" in batch:
            before_BL, after_BL = batch["segment"][:, :-1], batch["segment"][:, 1:]
            weight_BL = weight_BL * ((before_BL == after_BL) & (after_BL > 0))
        outputs = hidden_BLD, table_VD
        loss, weight, metrics = _token_loss(self, outputs, target_BL, weight_BL)
        if routing:
            weight_B = weight_BL.sum(1)
            loss += self.balance * (routing[0]["balance"].sum(1) * weight_B).sum()
            metrics |= {name: (x_BN.mean(1) * weight_B).sum() for name, x_BN in routing[0].items()}
        return loss, weight, metrics


@dataclass(frozen=True)
class MaskedLanguage:
    """The tokens that were hidden from the model (Devlin et al. 2019, section 3.1).

    An example is `token (L,)` with some of them masked, `target (L,)` and `loss_weight (L,)`, 1
    where a token is to be guessed; `segment (L,)` as for `Language`.
    """

    features: Features
    vocab_size: int
    token_bytes: tuple[int, ...] = ()
    z_loss: float = 0.0
    chunk: int = 0

    unit = "tokens"
    shown = ("accuracy", "perplexity")
    spec, prepare, derive = _spec, _unchanged, _perplexity

    @property
    def units_per_example(self) -> int:
        return self.features["token"].shape[0]

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        return tuple(batch[name] for name in ("token", "segment") if name in batch)

    def loss(self, outputs: tuple, batch: Batch, *, extra: Mapping | None = None) -> Loss:
        """`(hidden (B, L, D), table (V, D), bias (V,))`, together the logits."""
        del extra
        weight_BL = batch["weight"][:, None] * batch["loss_weight"]
        if "segment" in batch:
            weight_BL = weight_BL * (batch["segment"] > 0)
        return _token_loss(self, outputs, batch["target"], weight_BL)


def _token_loss(task, outputs: tuple, target_BL: jax.Array, weight_BL: jax.Array) -> Loss:
    hidden_BLD, table_VD, *bias = outputs
    sums = token_cross_entropy(
        hidden_BLD,
        table_VD,
        target_BL,
        weight_BL,
        vocab_size=task.vocab_size,
        bias_V=bias[0] if bias else None,
        z_loss=task.z_loss,
        chunk=task.chunk,
    )
    if task.token_bytes:
        bytes_BL = jnp.array(task.token_bytes, jnp.float32)[target_BL]
        sums["bytes"] = (bytes_BL * weight_BL).sum()
    return sums.pop("loss"), weight_BL.sum(), sums


@dataclass(frozen=True)
class Contrastive:
    """Images and captions of one another: which of the batch belong together.

    `form` and `chunk` as in `losses.contrastive`. The loss compares every row with every other
    one, so it is no sum over microbatches; its value does not depend on how the batch is split.
    """

    features: Features
    mean: tuple[float, ...]
    std: tuple[float, ...]
    form: str = "softmax"
    chunk: int = 0

    unit, units_per_example = "examples", 1
    shown = ("accuracy",)
    spec, prepare, derive = _spec, _unchanged, _nothing

    def image(self, batch: Batch) -> jax.Array:
        return standardised(batch["image"], self.mean, self.std)

    def inputs(self, batch: Batch) -> tuple[jax.Array, ...]:
        return self.image(batch), batch["caption"]

    def loss(self, outputs: tuple, batch: Batch, *, extra: Mapping | None = None) -> Loss:
        """`(image (B, E), text (B, E), scale, bias)`, features of unit length."""
        del extra
        image_BE, text_BE, scale, bias = outputs
        sums = contrastive(
            image_BE,
            text_BE,
            scale,
            bias,
            batch["row"],
            batch["weight"],
            form=self.form,
            chunk=self.chunk,
        )
        return sums.pop("loss"), batch["weight"].sum(), sums
