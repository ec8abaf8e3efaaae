"""The order of an epoch is a permutation, always the same one, and Grain's."""

import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import pytest

from lsdl.data import permutation
from lsdl.data.permutation import permuted


@pytest.mark.parametrize(
    "examples",
    # 2**16 + 1 and 2**18 + 1: one record more than a block has numbers, if its bits are miscounted
    [1, 2, 3, 7, 64, 100, 1257, 2**16 - 1, 2**16, 2**16 + 1, 2**18, 2**18 + 1],
)
def test_permuted_is_a_permutation(examples):
    order = permuted(np.arange(examples), examples=examples, seed=3, epoch=5)
    np.testing.assert_array_equal(np.sort(order), np.arange(examples))


def test_permuted_at_a_position_needs_no_other_position():
    order = permuted(np.arange(100), examples=100, seed=1, epoch=2)
    some = np.array([99, 3, 3, 50])
    np.testing.assert_array_equal(permuted(some, examples=100, seed=1, epoch=2), order[some])


def test_permuted_looks_random():
    order = permuted(np.arange(1257), examples=1257, seed=0, epoch=0)
    assert abs(np.corrcoef(order, np.arange(1257))[0, 1]) < 0.1
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.1
    assert (np.diff(order) == 1).mean() < 0.01


@pytest.mark.threat(14)
@pytest.mark.parametrize(
    ("examples", "seed", "epoch", "order"),
    [
        (10, 0, 0, [3, 2, 4, 1, 8, 5, 9, 7, 0, 6]),
        (10, 0, 1, [6, 0, 3, 1, 4, 9, 7, 8, 5, 2]),
        (10, 1, 0, [0, 2, 4, 3, 8, 9, 5, 7, 6, 1]),
        (12, 2**32 - 1, 10**6, [6, 1, 10, 4, 11, 9, 3, 0, 5, 8, 2, 7]),
    ],
)
def test_permuted_never_changes(examples, seed, epoch, order):
    """A run started with an older lsdl has to go on in the same order."""
    found = permuted(np.arange(examples), examples=examples, seed=seed, epoch=epoch)
    assert found.tolist() == order


@pytest.mark.parametrize(("seed", "epoch", "checksum"), [(0, 0, 1529507575), (7, 59, 1228158040)])
def test_permuted_never_changes_for_the_digits(seed, epoch, checksum):
    found = permuted(np.arange(1257), examples=1257, seed=seed, epoch=epoch)
    assert zlib.crc32(found.astype("<i8").tobytes()) == checksum


@pytest.mark.parametrize(
    "examples",
    [1, 2, 3, 100, 50_000, 2**16, 2**16 + 2, 10**5, 2**17 + 1, 1_281_167, 2**31, 2**33 + 5, 10**15],
)
def test_the_order_is_that_of_grains_index_shuffle(examples):
    """Which is none where there are 2**16 + 1 records, or 2**18 + 1, ...: it repeats one."""
    draw = np.random.default_rng(examples)
    for epoch in range(3):
        positions, seed = draw.integers(0, examples, (5, 8)), int(draw.integers(2**60))
        mixed = zlib.crc32(np.array([seed, epoch], np.uint64).tobytes())
        theirs = [
            grain.experimental.index_shuffle(int(i), max_index=examples - 1, seed=mixed, rounds=4)
            for i in positions.ravel()
        ]
        ours = permuted(positions, examples=examples, seed=seed, epoch=epoch)
        assert ours.dtype == np.int64
        np.testing.assert_array_equal(ours, np.reshape(theirs, positions.shape))


def test_threads_make_the_order_of_an_epoch_once(monkeypatch):
    """Batches ahead come to an epoch's end together."""
    made, encrypted = [], permutation._encrypted

    def slow(*arguments):
        made.append(arguments)
        time.sleep(0.05)
        return encrypted(*arguments)

    monkeypatch.setattr(permutation, "_encrypted", slow)
    where = dict(examples=10, seed=0, epoch=987_654)
    with ThreadPoolExecutor(4) as pool:
        orders = list(pool.map(lambda _: permuted(np.arange(10), **where).tolist(), range(4)))
    assert len(made) == 1
    assert orders == 4 * orders[:1]
