"""`loader.batch(step)` is a pure function of (seed, step), and so is every row of it."""

import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.data import readers, transforms
from lsdl.data.loader import Loader
from lsdl.sharding.mesh import make_mesh

BATCH = 16


class Reader:
    """Examples read one by one: pixels drawn once, the label is the example's number."""

    def __init__(self, examples, shape=(5, 4, 2), delay=lambda i: 0.0):
        self.pixels = np.random.default_rng(0).integers(1, 256, (examples, *shape), np.uint8)
        self.delay = delay
        self.read = []

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        self.read.append(i)
        time.sleep(self.delay(i))
        return {"image": self.pixels[i], "label": i, "unused": "text"}


def spec(shape=(5, 4, 2)):
    leaf = jax.ShapeDtypeStruct
    return {
        "image": leaf((BATCH, *shape), np.uint8),
        "label": leaf((BATCH,), np.int32),
        "weight": leaf((BATCH,), np.float32),
    }


def sharding(*axes):
    return NamedSharding(make_mesh({"data": 4, "fsdp": 2, "tensor": 1}), P(*axes))


def loader(reader, *, train=True, **kwargs):
    kwargs = dict(spec=spec(), batch_size=BATCH, sharding=sharding(("data", "fsdp"))) | kwargs
    return Loader(reader, train=train, **kwargs)


def in_memory(reader):
    return readers.in_memory(reader, ("image", "label"))


def whole(loader, step):
    return loader.rows(step, np.arange(BATCH))


def labels(loader, steps):
    return np.concatenate([whole(loader, step)["label"] for step in steps])


def epoch(loader, number):
    return range(number * loader.num_batches, (number + 1) * loader.num_batches)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert a[name].dtype == b[name].dtype


KINDS = {
    "epochs": dict(train=True),
    "epochs, transformed": dict(train=True, transforms=[transforms.shift(2), transforms.flip()]),
    "replace": dict(train=True, sampling="replace"),
    "replace, transformed": dict(train=True, sampling="replace", transforms=[transforms.shift(1)]),
    "evaluation": dict(train=False),
    "evaluation, transformed": dict(train=False, transforms=[transforms.shift(2)]),
}
kinds = pytest.mark.parametrize("kind", KINDS)


# --- the order of training ------------------------------------------------------------------------


@pytest.mark.threat(23)
@pytest.mark.parametrize("examples", [16, 31, 32, 50, 100])
def test_an_epoch_repeats_no_example(examples):
    training = loader(Reader(examples), seed=1)
    assert training.num_batches == examples // BATCH
    for number in range(3):
        seen = labels(training, epoch(training, number))
        assert len(np.unique(seen)) == len(seen) == examples // BATCH * BATCH
        assert set(seen) <= set(range(examples))


def test_what_an_epoch_drops_is_not_always_the_same():
    training = loader(Reader(17))
    dropped = {136 - labels(training, epoch(training, number)).sum() for number in range(20)}
    assert len(dropped) > 5


def test_orders_differ_between_epochs_and_seeds():
    """Above all epoch 1 of seed 0 is not epoch 0 of seed 1."""
    orders = set()
    for seed in range(4):
        training = loader(Reader(64), seed=seed)
        orders |= {tuple(labels(training, epoch(training, number))) for number in range(4)}
    assert len(orders) == 16


def test_limit_bounds_training_too():
    training = loader(Reader(100), limit=32)
    assert (training.num_examples, training.num_batches) == (32, 2)
    assert sorted(labels(training, range(2))) == list(range(32))


# --- sampling with replacement --------------------------------------------------------------------


def test_replace_repeats_examples_and_reaches_all():
    training = loader(Reader(20), sampling="replace")
    draws = labels(training, range(200))
    assert any(len(set(whole(training, s)["label"])) < BATCH for s in range(5))
    expected = len(draws) / 20
    assert np.abs(np.bincount(draws, minlength=20) - expected).max() < 5 * np.sqrt(expected)


def test_replace_differs_between_steps_and_seeds():
    batches = [
        tuple(whole(loader(Reader(1000), sampling="replace", seed=seed), step)["label"])
        for seed in range(3)
        for step in range(3)
    ]
    assert len(set(batches)) == 9


def test_replace_never_changes():
    training = loader(Reader(1000), sampling="replace", seed=5)
    assert whole(training, 3)["label"].tolist() == [
        *(235, 959, 657, 717, 92, 121, 356, 349, 495, 919, 341, 390, 296, 612, 552, 297)
    ]


# --- a row needs no other row ---------------------------------------------------------------------

SUBSETS = [[0], [15], [3, 4, 5], [15, 0, 7], list(range(8)), list(range(1, BATCH, 2))]


@pytest.mark.threat(14)
@kinds
@pytest.mark.parametrize("rows", SUBSETS, ids=str)
def test_any_rows_are_those_of_the_whole_batch(kind, rows):
    """So that any split between processes gives the same global batch."""
    any_loader = loader(Reader(37), seed=2, **KINDS[kind])
    for step in (0, 2, 7):
        batch = whole(any_loader, step)
        same(any_loader.rows(step, np.array(rows)), {name: batch[name][rows] for name in batch})


@kinds
def test_streamed_and_in_memory_are_the_same(kind):
    reader = Reader(37)
    streamed, kept = loader(reader, **KINDS[kind]), loader(in_memory(reader), **KINDS[kind])
    for step in range(5):
        same(whole(streamed, step), whole(kept, step))


@kinds
def test_a_row_is_its_example(kind):
    """Label, pixels and weight belong together; leaves have the dtypes of the spec."""
    reader = Reader(37)
    any_loader = loader(reader, **KINDS[kind])
    batch = whole(any_loader, 1)
    assert {name: array.dtype for name, array in batch.items()} == {
        "image": np.uint8,
        "label": np.int32,
        "weight": np.float32,
    }
    if "transformed" not in kind:
        np.testing.assert_array_equal(batch["image"], reader.pixels[batch["label"]])
    np.testing.assert_array_equal(batch["weight"], np.ones(BATCH))


def test_a_wrong_shape_is_an_error():
    with pytest.raises(ValueError, match=r"image is \(5, 4, 2\), not \(8, 8, 1\)"):
        whole(loader(Reader(16), spec=spec((8, 8, 1))), 0)


# --- global arrays --------------------------------------------------------------------------------


@pytest.mark.threat(14)
@kinds
def test_a_batch_is_a_function_of_the_step(kind):
    """The same twice, in any order, from another loader, and through `batches`."""
    first, second = (loader(Reader(50), seed=4, **KINDS[kind]) for _ in range(2))
    forward = [jax.device_get(first.batch(step)) for step in range(3)]
    backward = [jax.device_get(second.batch(step)) for step in (2, 1, 0)][::-1]
    ahead = [jax.device_get(batch) for batch in first.batches(0, 3)]
    late = [jax.device_get(batch) for batch in second.batches(2, 3)]
    for step in range(3):
        same(forward[step], whole(first, step))
        same(forward[step], backward[step])
        same(forward[step], ahead[step])
    same(forward[2], late[0])


@pytest.mark.threat(14)
@pytest.mark.parametrize(
    ("axes", "shards"),
    [((("data", "fsdp"),), 8), (("data",), 4), (("fsdp",), 2), ((("fsdp", "data"),), 8), ((), 1)],
    ids=str,
)
@pytest.mark.parametrize("kind", ["epochs, transformed", "evaluation"])
def test_every_device_holds_its_rows(axes, shards, kind):
    split = loader(Reader(37), sharding=sharding(*axes), **KINDS[kind])
    batch, host = split.batch(2), whole(split, 2)
    assert batch.keys() == host.keys()
    for name, array in batch.items():
        assert array.sharding == sharding(*axes)
        assert array.shape == host[name].shape
        assert len({str(shard.index) for shard in array.addressable_shards}) == shards
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, host[name][shard.index])


def test_a_row_is_read_once_however_many_devices_hold_it():
    reader = Reader(40)
    loader(reader, sharding=sharding()).batch(0)
    assert len(reader.read) == BATCH


@pytest.mark.threat(14)
def test_prefetched_batches_keep_their_order():
    """Even where an earlier batch takes longer than a later one."""
    reader = Reader(96, delay=lambda i: 0.01 if i < 32 else 0.0)
    evaluation = loader(reader, train=False, prefetch=4)
    found = [batch["label"][0] for batch in evaluation.batches(0, 6)]
    assert [int(label) for label in found] == [0, 16, 32, 48, 64, 80]


def test_batches_are_made_ahead():
    reader = Reader(160)
    batches = loader(reader, train=False, prefetch=2).batches(0, 10)
    next(batches)
    deadline = time.monotonic() + 20
    while len(reader.read) < 3 * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(reader.read) >= 3 * BATCH
    assert len(list(batches)) == 9


def test_batches_may_be_empty():
    assert list(loader(Reader(32)).batches(3, 3)) == []


@pytest.mark.threat(24)
def test_an_error_of_the_reader_reaches_the_caller():
    reader = Reader(64)
    reader.delay = lambda i: 0 / (40 - i)
    with pytest.raises(ZeroDivisionError):
        list(loader(reader, train=False).batches(0, 4))


# --- evaluation -----------------------------------------------------------------------------------


@pytest.mark.threat(23)
@pytest.mark.parametrize("limit", [None, 5, 16, 1000])
@pytest.mark.parametrize("examples", [1, 15, 16, 17, 48, 50])
def test_evaluation_counts_every_example_once_in_order(examples, limit):
    counted = min(examples, limit or examples)
    evaluation = loader(Reader(examples), train=False, limit=limit)
    assert evaluation.num_examples == counted
    assert evaluation.num_batches == -(-counted // BATCH)
    steps = range(evaluation.num_batches)
    weight = np.concatenate([whole(evaluation, step)["weight"] for step in steps])
    assert set(weight) <= {0, 1}
    assert weight.sum() == counted
    found = labels(evaluation, steps)
    np.testing.assert_array_equal(found[weight == 1], np.arange(counted))


def test_evaluation_draws_by_the_example_alone():
    """Not by the batch that it falls into; and by the seed."""
    reader = Reader(37, shape=(3, 3, 1))
    moved = dict(train=False, transforms=[transforms.shift(1)], spec=spec((3, 3, 1)))
    images = {}
    for seed, size in ((0, BATCH), (0, 8), (1, BATCH)):
        evaluation = loader(reader, seed=seed, batch_size=size, **moved)
        batches = [evaluation.rows(step, np.arange(size)) for step in range(evaluation.num_batches)]
        images[seed, size] = np.concatenate([b["image"] for b in batches])[:37]
    np.testing.assert_array_equal(images[0, BATCH], images[0, 8])
    assert not np.array_equal(images[0, BATCH], images[1, BATCH])
    assert not np.array_equal(images[0, BATCH], reader.pixels)


def test_evaluation_draws_otherwise_than_training():
    """A row of the first epoch and the example of the same number are not moved alike."""
    reader = Reader(64)
    reader.pixels[:] = reader.pixels[0]
    both = [loader(reader, train=t, transforms=[transforms.shift(2)]) for t in (True, False)]
    first, second = (whole(each, 0)["image"] for each in both)
    assert (first == second).all(axis=(1, 2, 3)).mean() < 0.5


def test_padding_repeats_the_first_example():
    """Padding goes through the model: it must not hold what could overflow there."""
    reader = Reader(17)
    batch = whole(loader(reader, train=False), 1)
    np.testing.assert_array_equal(batch["weight"], [1.0] + [0.0] * 15)
    np.testing.assert_array_equal(batch["label"], [16] + [0] * 15)
    np.testing.assert_array_equal(batch["image"], reader.pixels[batch["label"]])


# --- transforms -----------------------------------------------------------------------------------


@pytest.mark.threat(14)
@pytest.mark.parametrize("seed", [0, 7, 2**70])
def test_a_generator_that_is_put_back_draws_as_a_new_one(seed):
    """Whatever was drawn from it before: half a word is left over by the first, 32-bit draws."""
    epochs, indices = [0, 0, 5, 2**40], [3, 0, 2**63 + 1, 3]
    drawn = []
    for rng in readers.generators(seed, readers.TRAIN, epochs, indices):
        drawn.append((rng.integers(3), rng.normal(), rng.permutation(9).tolist(), rng.integers(7)))
    for epoch, index, found in zip(epochs, indices, drawn, strict=True):
        rng = readers.generator(seed, readers.TRAIN, epoch, index)
        new = rng.integers(3), rng.normal(), rng.permutation(9).tolist(), rng.integers(7)
        assert found == new


def test_transforms_are_applied_in_order():
    def add(value):
        return lambda example, rng: example | {"image": example["image"] * 2 + value}

    reader = Reader(16)
    reader.pixels = reader.pixels // 8
    batch = whole(loader(reader, transforms=[add(1), add(5)]), 0)
    np.testing.assert_array_equal(batch["image"], 4 * reader.pixels[batch["label"]] + 7)


@pytest.mark.parametrize("sampling", ["epoch", "replace"])
def test_every_row_and_epoch_draws_its_own_augmentation(sampling):
    """Over 64 steps of 16 rows every offset comes up, about equally often and independently."""
    reader = Reader(256, shape=(3, 3, 1))
    reader.pixels[:] = 0
    reader.pixels[:, 1, 1] = 255
    training = loader(
        reader, spec=spec((3, 3, 1)), transforms=[transforms.shift(1)], sampling=sampling
    )
    images = np.stack([whole(training, step)["image"] for step in range(64)])
    where = images.reshape(64, BATCH, 9).argmax(-1)
    expected = 64 * BATCH / 9
    assert np.abs(np.bincount(where.ravel(), minlength=9) - expected).max() < 5 * expected**0.5
    # Chance alone makes 1/9 of them equal.
    assert (where[1:] == where[:-1]).mean() < 0.2  # from step to step
    assert (where[16:] == where[:-16]).mean() < 0.2  # from epoch to epoch
    assert (where[:, 1:] == where[:, :-1]).mean() < 0.2  # from row to row


def test_augmentation_follows_the_seed():
    reader = Reader(16)
    reader.pixels[:] = reader.pixels[0]
    batches = [
        whole(loader(reader, seed=seed, transforms=[transforms.shift(2)]), 0)["image"]
        for seed in (0, 1)
    ]
    assert not np.array_equal(*batches)
