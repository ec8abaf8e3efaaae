"""Each task's loss is its equation, as sums with weights: exact under padding and sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import step as steps
from lsdl.data import sources
from lsdl.experiment import build
from lsdl.tasks import (
    Classification,
    Contrastive,
    Language,
    MaskedLanguage,
    Regression,
    standardised,
)
from tests.curves import drawn_state
from tests.tiny import close, jit, random_batch
from tests.zoo import small


def features(**leaves):
    return {name: jax.ShapeDtypeStruct(*leaf) for name, leaf in leaves.items()}


INT, FLOAT = np.int32, np.float32
LABELLED = features(image=((4, 3, 2), np.uint8), label=((), INT))
TASK = Classification(LABELLED, 5, (10.0, 100.0), (2.0, 50.0))


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


def loss(outputs, batch, task=TASK, **options):
    arrays = jax.tree.map(jnp.asarray, (outputs, batch))
    return jax.device_get(task.loss(*arrays, **options))


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
    task = Classification(card.features, card.num_classes, card.mean, card.std)
    reader = sources.open_reader("digits", "train", expected=1257)
    (pixels,) = task.inputs({"image": np.stack([row["image"] for row in reader])})
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


def test_features_are_standardised_one_by_one():
    task = Classification(features(features=((2,), FLOAT), label=((), INT)), 2, (1.0, -1), (2.0, 4))
    (x,) = task.inputs({"features": np.float32([[1, -1], [3, 3]])})
    np.testing.assert_array_equal(x, [[0, 0], [1, 1]])
    raw = np.float32([[1, 2]])
    np.testing.assert_array_equal(standardised(raw, (), ()), raw)


# --- what the labels may be -----------------------------------------------------------------------


def soft(size, classes=5, seed=3):
    """Distributions over the classes."""
    share = np.random.default_rng(seed).random((size, classes)).astype(np.float32)
    return share / share.sum(1, keepdims=True)


def with_(**fields):
    return Classification(LABELLED, 5, (), (), **fields)


def cross_entropy(logits, label_BC):
    logits = np.float64(logits)
    return -(label_BC * (logits - np.log(np.exp(logits).sum(1, keepdims=True)))).sum(1)


def test_labels_may_be_distributions():
    logits, rows = batch(6, padding=2)
    whole = loss(logits, rows | {"label": np.eye(5, dtype=np.float32)[rows["label"]]})
    close(whole, loss(logits, rows), rtol=1e-6)
    label = soft(6)
    total, _, metrics = loss(logits, rows | {"label": label})
    np.testing.assert_allclose(total, cross_entropy(logits, label)[:4].sum(), rtol=1e-5)
    assert metrics["accuracy"] == (logits.argmax(1) == label.argmax(1))[:4].sum()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_mixes_in_the_uniform_distribution(smoothing):
    """Szegedy et al. 2016, section 7: (1 - e) y + e / C."""
    logits, rows = batch(6, padding=1)
    label = (1 - smoothing) * np.eye(5)[rows["label"]] + smoothing / 5
    total, _, metrics = loss(logits, rows, with_(label_smoothing=smoothing))
    np.testing.assert_allclose(total, cross_entropy(logits, label)[:5].sum(), rtol=1e-5)
    assert metrics == loss(logits, rows)[2]


def test_mixup_mixes_each_row_with_one_other(key):
    """Zhang et al. 2018, eq. 2: one share for inputs and labels alike."""
    task, (_, rows) = with_(mixup=0.4), batch(8)
    mixed = jax.device_get(task.prepare(rows, key))
    hot = np.eye(5, dtype=np.float32)[rows["label"]]
    assert mixed.keys() == rows.keys()
    np.testing.assert_allclose(mixed["label"].sum(1), 1, rtol=1e-6)
    pixels = np.float32(rows["image"]).reshape(8, -1)
    other, found = np.roll(pixels, 1, 0), mixed["image"].reshape(8, -1)
    ((share,), *_) = np.linalg.lstsq((pixels - other).reshape(-1, 1), (found - other).reshape(-1))
    assert 0 <= share <= 1
    np.testing.assert_allclose(found, share * pixels + (1 - share) * other, rtol=1e-4, atol=1e-3)
    expected = share * hot + (1 - share) * np.roll(hot, 1, 0)
    np.testing.assert_allclose(mixed["label"], expected, atol=1e-5)
    again = jax.device_get(task.prepare(rows, key))
    jax.tree.map(np.testing.assert_array_equal, again, mixed)
    new = jax.device_get(task.prepare(rows, jax.random.key(1)))
    assert np.abs(new["label"] - mixed["label"]).max() > 1e-3
    np.testing.assert_array_equal(new["weight"], rows["weight"])


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_shares_are_from_the_beta_distribution(alpha):
    task, rows = with_(mixup=alpha), batch(2)[1] | {"label": np.array([0, 1], np.int32)}
    keys = jax.random.split(jax.random.key(0), 2000)
    share = jit(jax.vmap(lambda key: task.prepare(rows, key)["label"][0, 0]))(keys)
    assert ((share >= 0) & (share <= 1)).all()
    assert abs(float(share.mean()) - 0.5) < 0.04
    assert float(share.var()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_mixup_trains_on_soft_labels_and_off_it_changes_nothing(key):
    logits, rows = batch(8)
    prepared = with_(mixup=0.4).prepare(rows, key)
    total, *_ = loss(logits, prepared, with_(mixup=0.4))
    expected = cross_entropy(logits, np.array(prepared["label"])).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert with_().prepare(rows, key) is rows


# --- the five most probable classes ---------------------------------------------------------------


def test_top5_is_of_many_classes_alone():
    many = Classification(LABELLED, 30, (), ())
    assert many.shown == ("accuracy", "top5")
    assert TASK.shown == ("accuracy",)
    draw = np.random.default_rng(0)
    logits = np.float32(draw.standard_normal((64, 30)))
    rows = batch(64, padding=9)[1] | {"label": draw.integers(30, size=64).astype(np.int32)}
    best = np.argsort(-logits, axis=1)[:, :5]
    inside = (best == rows["label"][:, None]).any(1)
    metrics = loss(logits, rows, many)[2]
    assert metrics["top5"] == inside[:55].sum()
    assert metrics["accuracy"] == (best[:, 0] == rows["label"])[:55].sum()
    assert 0 < metrics["accuracy"] < metrics["top5"] < 55


# --- distillation ---------------------------------------------------------------------------------


def softmax(logits):
    share = np.exp(np.float64(logits))
    return share / share.sum(1, keepdims=True)


def teacher_logits(size):
    return np.float32(2 * np.random.default_rng(9).standard_normal((size, 5)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_is_the_divergence_from_the_teacher(temperature, weight):
    """Hinton et al. 2015, section 2: at a temperature, times its square."""
    (logits, rows), teacher = batch(6, padding=1), teacher_logits(6)
    task = with_(distill_weight=weight, distill_temperature=temperature)
    total, *_ = loss(logits, rows, task, extra={"teacher": teacher})
    p, q = softmax(teacher / temperature), softmax(logits / temperature)
    taught = temperature**2 * (p * np.log(p / q)).sum(1)
    expected = (1 - weight) * formula(logits, rows) + weight * taught
    np.testing.assert_allclose(total, expected[:5].sum(), rtol=1e-5)


def test_a_student_as_good_as_its_teacher_has_nothing_to_learn():
    logits, rows = batch(6)
    task = with_(distill_weight=1.0, distill_temperature=3.0)
    value_and_grad = jax.value_and_grad(lambda x: task.loss(x, rows, extra={"teacher": logits})[0])
    total, slope = value_and_grad(jnp.asarray(logits))
    assert abs(total) < 1e-5
    assert np.abs(slope).max() < 1e-5


def test_hard_distillation_has_the_teachers_label():
    """Touvron et al. 2021, eq. 3."""
    (logits, rows), teacher = batch(6, padding=1), teacher_logits(6)
    total, *_ = loss(logits, rows, with_(distill_weight=0.5), extra={"teacher": teacher})
    expected = (formula(logits, rows) + formula(logits, rows | {"label": teacher.argmax(1)})) / 2
    np.testing.assert_allclose(total, expected[:5].sum(), rtol=1e-5)


def test_a_distillation_head_answers_the_teacher():
    """And without a teacher, the labels."""
    (logits, rows), teacher = batch(6), teacher_logits(6)
    distilled = batch(6, seed=5)[0]
    total, *_ = loss(
        (logits, distilled), rows, with_(distill_weight=0.4), extra={"teacher": teacher}
    )
    taught = formula(distilled, {"label": teacher.argmax(1)})
    expected = 0.6 * formula(logits, rows) + 0.4 * taught
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)
    alone, _, metrics = loss((logits, distilled), rows, with_())
    expected = (formula(logits, rows) + formula(distilled, rows)) / 2
    np.testing.assert_allclose(alone, expected.sum(), rtol=1e-5)
    assert metrics == loss(logits, rows)[2]


# --- regression -----------------------------------------------------------------------------------


def test_regression_is_the_squared_error_averaged_over_the_targets():
    task = Regression(features(features=((2,), FLOAT), target=((3,), FLOAT)), (), ())
    rows = random_batch(task, 6, padding=2)
    outputs = np.float32(np.random.default_rng(4).standard_normal((6, 3)))
    total, weight, metrics = loss(outputs, rows, task)
    expected = np.square(np.float64(outputs) - rows["target"]).mean(1)
    np.testing.assert_allclose(total, expected[:4].sum(), rtol=1e-5)
    assert (weight, metrics) == (4, {})


# --- language -------------------------------------------------------------------------------------

VOCAB, PADDED = 11, 16
WINDOW = features(token=((7,), INT), segment=((7,), INT), loss_weight=((6,), FLOAT))
LANGUAGE = Language(WINDOW, VOCAB, ())
MASKED = MaskedLanguage(
    features(token=((6,), INT), target=((6,), INT), segment=((6,), INT), loss_weight=((6,), FLOAT)),
    VOCAB,
)


def hidden_and_table(size, *, bias, seed=2):
    """What a language model returns for `size` rows of 6 tokens."""
    draw = lambda *shape: np.float32(rng.standard_normal(shape))  # noqa: E731
    rng = np.random.default_rng(seed)
    return (draw(size, 6, 4), draw(PADDED, 4), *([draw(PADDED)] if bias else []))


def token_losses(outputs, target_BL):
    """Cross-entropy of each token and whether it is the most probable one, in float64."""
    hidden, table, *bias = (np.float64(x) for x in outputs)
    logits = (hidden @ table.T + (bias[0] if bias else 0))[..., :VOCAB]
    log_z = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, target_BL[..., None], -1)[..., 0]
    return log_z - chosen, logits.argmax(-1) == target_BL


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_language_counts_each_token_that_its_document_predicts(packed, weighted):
    kept = ["token", *["segment"] * packed, *["loss_weight"] * weighted]
    task = Language({name: WINDOW[name] for name in kept}, VOCAB, ())
    rows = random_batch(task, 5, padding=2)
    outputs = hidden_and_table(5, bias=False)
    total, weight, metrics = loss(outputs, rows, task)
    each, correct = token_losses(outputs, rows["token"][:, 1:])
    counted = np.zeros((5, 6))
    for b in range(3):
        for t in range(6):
            same = not packed or rows["segment"][b, t] == rows["segment"][b, t + 1] > 0
            counted[b, t] = same * (rows["loss_weight"][b, t] if weighted else 1)
    assert 0 < counted.sum() < 18 + (not packed and not weighted)
    np.testing.assert_allclose(weight, counted.sum())
    np.testing.assert_allclose(total, (each * counted).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], total, rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], (correct * counted).sum())


def test_the_model_sees_all_tokens_but_the_last():
    rows = random_batch(LANGUAGE, 3)
    token, segment = LANGUAGE.inputs(rows)
    np.testing.assert_array_equal(token, rows["token"][:, :-1])
    np.testing.assert_array_equal(segment, rows["segment"][:, :-1])
    plain = Language({"token": WINDOW["token"]}, VOCAB, ())
    assert len(plain.inputs(random_batch(plain, 3))) == 1


def test_masked_language_counts_the_masked_tokens_alone():
    rows = random_batch(MASKED, 5, padding=2)
    outputs = hidden_and_table(5, bias=True)
    total, weight, metrics = loss(outputs, rows, MASKED)
    each, correct = token_losses(outputs, rows["target"])
    counted = rows["weight"][:, None] * rows["loss_weight"] * (rows["segment"] > 0)
    np.testing.assert_allclose(weight, counted.sum())
    np.testing.assert_allclose(total, (each * counted).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], (correct * counted).sum())
    for found, name in zip(MASKED.inputs(rows), ("token", "segment"), strict=True):
        np.testing.assert_array_equal(found, rows[name])


def test_z_loss_is_in_the_loss_and_not_in_the_perplexity():
    rows, outputs = random_batch(LANGUAGE, 5), hidden_and_table(5, bias=False)
    with_z = Language(WINDOW, VOCAB, (), z_loss=0.1)
    total, weight, metrics = loss(outputs, rows, with_z)
    plain = loss(outputs, rows, LANGUAGE)
    assert total > plain[0] + 0.1
    close((weight, metrics), plain[1:], rtol=1e-6)


def test_perplexity_is_the_exponential_of_the_mean():
    assert LANGUAGE.derive({"cross_entropy": np.log(7.0)}) == {"perplexity": pytest.approx(7)}
    assert MASKED.derive({"cross_entropy": 0.0}) == {"perplexity": 1}
    assert np.isfinite(LANGUAGE.derive({"cross_entropy": 1e9})["perplexity"])


def test_a_uniform_model_of_bytes_needs_eight_bits():
    """Whatever a token stands for: bits are of the text's bytes."""
    for token_bytes, bits in ((1, 8.0), (4, 2.0)):
        task = Language({"token": WINDOW["token"]}, 256, (token_bytes,) * 256)
        rows = random_batch(task, 5, padding=1)
        outputs = (np.ones((5, 6, 4), np.float32), np.zeros((256, 4), np.float32))
        _, weight, sums = loss(outputs, rows, task)
        assert sums["bytes"] == weight * token_bytes == 4 * 6 * token_bytes
        derived = task.derive({name: float(value / weight) for name, value in sums.items()})
        assert derived["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
        assert derived["perplexity"] == pytest.approx(256, rel=1e-5)
        assert task.shown == ("accuracy", "perplexity", "bits_per_byte")
    assert LANGUAGE.shown == ("accuracy", "perplexity")


def test_bytes_are_those_of_the_targets_that_count():
    task = Language(WINDOW, VOCAB, tuple(range(VOCAB)))
    rows = random_batch(task, 5, padding=2)
    _, weight, sums = loss(hidden_and_table(5, bias=False), rows, task)
    counted = rows["weight"][:, None] * rows["loss_weight"]
    before, after = rows["segment"][:, :-1], rows["segment"][:, 1:]
    counted = counted * (before == after) * (after > 0)
    assert sums["bytes"] == (counted * rows["token"][:, 1:]).sum()
    assert weight == counted.sum()


# --- contrastive ----------------------------------------------------------------------------------

PAIRS = Contrastive(
    features(image=((4, 3, 2), np.uint8), caption=((5,), INT)), (10.0, 100.0), (2.0, 50.0)
)


def unit_features(size):
    draw = np.random.default_rng(6).standard_normal((2, size, 4))
    image, text = np.float32(draw / np.linalg.norm(draw, axis=-1, keepdims=True))
    return image, text, np.float32(3.0), np.float32(-0.5)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_contrastive_matches_the_rows_of_the_batch(form):
    task = Contrastive(PAIRS.features, PAIRS.mean, PAIRS.std, form)
    rows = random_batch(task, 6, padding=2) | {"row": np.arange(6)}
    outputs = unit_features(6)
    total, weight, metrics = loss(outputs, rows, task)
    image, text, scale, bias = (np.float64(x) for x in outputs)
    logits = scale * image[:4] @ text[:4].T + bias
    if form == "softmax":
        expected = cross_entropy(logits, np.eye(4)) + cross_entropy(logits.T, np.eye(4))
        expected = expected.sum() / 2
    else:
        expected = np.log1p(np.exp(-logits * (2 * np.eye(4) - 1))).sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 4
    assert metrics == {"accuracy": (logits.argmax(1) == np.arange(4)).sum()}


def test_contrastive_inputs_are_standardised_pixels_and_captions():
    rows = random_batch(PAIRS, 3)
    image, caption = PAIRS.inputs(rows)
    expected = (np.float64(rows["image"]) - [10, 100]) / [2, 50]
    np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(caption, rows["caption"])


# --- every task -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "unit", "units"),
    [(TASK, "examples", 1), (PAIRS, "examples", 1), (LANGUAGE, "tokens", 6), (MASKED, "tokens", 6)],
    ids=lambda value: type(value).__name__ if hasattr(value, "unit") else str(value),
)
def test_a_task_says_what_its_loss_is_a_mean_over(task, unit, units):
    assert (task.unit, task.units_per_example) == (unit, units)
    spec = task.spec(5)
    assert spec.keys() == {*task.features, "weight"}
    assert all(leaf.shape[0] == 5 for leaf in spec.values())
    assert (spec["weight"].shape, spec["weight"].dtype) == ((5,), np.float32)


TRAINED = ["mlp", "mlp regression", "vit distill", "gpt2", "bert", "clip", "clip sigmoid"]


def spoiled(task, rows, count):
    """`rows` with other contents in the last `count` of them, and in padded tokens."""
    noise = random_batch(task, len(rows["weight"]), seed=1)

    def spoil(name, leaf):
        if name == "weight":
            return leaf
        leaf = np.concatenate([leaf[:-count], noise[name][-count:]])
        if name in ("token", "target") and "segment" in rows:
            return np.where(rows["segment"] == 0, noise[name], leaf)
        return leaf

    return {name: spoil(name, leaf) for name, leaf in rows.items()}


@pytest.mark.parametrize("name", TRAINED)
def test_padding_changes_no_loss_and_no_gradient(load, name):
    """Rows of weight 0, and tokens of segment 0, whatever they hold or whether they are there."""
    experiment = build(small(load, name), devices=jax.devices()[:1])
    task, state = experiment.task, drawn_state(experiment)
    grads = jit(steps.make_grads(steps.make_loss(experiment.module.apply, task), accum=1))
    rows = random_batch(task, 8, padding=3)

    def sums(rows):
        found = grads(state, rows | {"row": np.arange(len(rows["weight"]))})
        return jax.device_get({name: found[name] for name in steps.SUMMED})

    expected = sums(rows)
    other = spoiled(task, rows, 3)
    assert all((other[name] != leaf).any() for name, leaf in rows.items() if name != "weight")
    close(sums(other), expected, rtol=1e-5, atol=1e-6)
    close(sums({name: leaf[:5] for name, leaf in rows.items()}), expected, rtol=1e-5, atol=1e-5)
