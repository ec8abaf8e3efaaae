"""Losses are sums with weights: exact under padding, accumulation and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.data import sources
from lsdl.tasks import Classification

TASK = Classification((4, 3, 2), 5, (10.0, 100.0), (2.0, 50.0))


def batch(size, *, padding=0, seed=0):
    """Random logits and a batch, its last `padding` rows of weight 0."""
    rng = np.random.default_rng(seed)
    weight = np.ones(size, np.float32)
    weight[size - padding :] = 0
    return np.float32(3 * rng.standard_normal((size, 5))), {
        "image": rng.integers(0, 256, (size, 4, 3, 2)).astype(np.uint8),
        "label": rng.integers(0, 5, size).astype(np.int32),
        "weight": weight,
    }


def loss(logits, batch, task=TASK):
    return jax.device_get(task.loss(jnp.asarray(logits), jax.tree.map(jnp.asarray, batch)))


def part(logits, batch, rows):
    return logits[rows], {name: leaf[rows] for name, leaf in batch.items()}


def formula(logits, batch):
    """- log softmax at the label, in float64."""
    logits = np.float64(logits)
    shifted = logits - logits.max(1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return -log_softmax[np.arange(len(logits)), batch["label"]]


@pytest.mark.parametrize("size", [1, 7, 64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1000.0])
def test_loss_is_the_sum_of_cross_entropies(size, scale):
    logits, rows = batch(size)
    total, weight, metrics = loss(scale * logits, rows)
    np.testing.assert_allclose(total, formula(scale * logits, rows).sum(), rtol=1e-5)
    assert weight == size
    if scale:
        assert metrics == {"accuracy": (logits.argmax(1) == rows["label"]).sum()}


def test_loss_of_equal_logits_is_the_log_of_the_classes():
    _, rows = batch(8)
    np.testing.assert_allclose(loss(np.zeros((8, 5)), rows)[0] / 8, np.log(5), rtol=1e-6)


def test_a_sure_and_right_model_has_no_loss():
    _, rows = batch(8)
    total, weight, metrics = loss(100 * np.eye(5, dtype=np.float32)[rows["label"]], rows)
    assert total < 1e-6
    assert metrics["accuracy"] == weight == 8


@pytest.mark.parametrize("padding", [1, 5, 7])
@pytest.mark.parametrize("content", ["random", "right", "huge"])
def test_padding_changes_nothing(padding, content):
    """Not the loss, the weight or the accuracy, whatever the rows hold."""
    logits, rows = batch(8, padding=padding)
    if content == "right":
        logits[-padding:] = 9 * np.eye(5)[rows["label"][-padding:]]
    elif content == "huge":
        logits[-padding:] = [[1e30, -1e30, 0, 0, 0]]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        loss(logits, rows),
        loss(*part(logits, rows, slice(8 - padding))),
    )


def test_a_batch_of_padding_alone_sums_to_nothing():
    assert loss(*batch(4, padding=4)) == (0, 0, {"accuracy": 0})


def test_weights_are_linear():
    """A row of weight 2 counts as two rows."""
    logits, rows = batch(6)
    doubled = rows | {"weight": np.float32([2, 1, 1, 1, 1, 1])}
    twice = part(logits, rows, [0, 0, 1, 2, 3, 4, 5])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        loss(logits, doubled),
        loss(*twice),
    )


@pytest.mark.parametrize("cuts", [[8], [1, 15], [4, 8, 12], [15]], ids=str)
def test_sums_over_parts_add_up(cuts):
    """Whether the parts are devices, microbatches or batches of an evaluation."""
    logits, rows = batch(16, padding=3)
    parts = [
        loss(*part(logits, rows, r))
        for r in np.split(np.random.RandomState(0).permutation(16), cuts)
    ]
    total = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), total, loss(logits, rows)
    )


def test_gradient_is_softmax_minus_the_label():
    logits, rows = batch(6, padding=2)
    slope = jax.grad(lambda logits: TASK.loss(logits, rows)[0])(jnp.asarray(logits))
    softmax = np.exp(np.float64(logits))
    softmax /= softmax.sum(1, keepdims=True)
    expected = (softmax - np.eye(5)[rows["label"]]) * rows["weight"][:, None]
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-6)


def test_sums_are_float32():
    logits, rows = batch(4)
    shapes = jax.eval_shape(TASK.loss, logits, rows)
    assert {(leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(shapes)} == {((), "float32")}


# --- what the model sees --------------------------------------------------------------------------


def test_pixels_are_standardised_by_channel():
    _, rows = batch(6)
    (found,) = TASK.inputs(jax.tree.map(jnp.asarray, rows))
    expected = (np.float64(rows["image"]) - [10, 100]) / [2, 50]
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert found.dtype == jnp.float32


def test_digits_are_seen_with_mean_0_and_deviation_1():
    card = sources.card("digits")
    task = Classification(card.image_shape, card.num_classes, card.mean, card.std)
    reader = sources.open_reader("digits", "train", expected=1257)
    (pixels,) = task.inputs(
        {"image": jnp.asarray(sources.InMemory(reader, ("image",)).arrays["image"])}
    )
    assert abs(float(pixels.mean())) < 2e-3
    assert abs(float(pixels.std()) - 1) < 2e-3


@pytest.mark.parametrize("size", [1, 16])
def test_spec_is_what_a_batch_holds(size):
    spec = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in TASK.spec(size).items()}
    made = {name: (leaf.shape, str(leaf.dtype)) for name, leaf in batch(size)[1].items()}
    assert spec == made


def test_preparation_leaves_the_batch_alone(key):
    _, rows = batch(4)
    prepared = TASK.prepare(rows, key)
    assert prepared.keys() == rows.keys()
    for name, leaf in rows.items():
        np.testing.assert_array_equal(prepared[name], leaf)
