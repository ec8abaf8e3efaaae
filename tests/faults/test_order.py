"""The records of a global batch are a function of (seed, data, skip list, step), and of no more."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.data import skip
from lsdl.data.loader import Loader
from lsdl.data.permutation import permuted
from lsdl.errors import UserError

GOLDEN = {  # (examples, seed, epoch): the first eight records
    (10, 0, 0): [3, 2, 4, 1, 8, 5, 9, 7],
    (1797, 0, 0): [231, 245, 997, 197, 1094, 322, 1594, 44],
    (1797, 0, 1): [12, 704, 101, 708, 1001, 1259, 733, 1602],
    (1797, 1, 0): [486, 1699, 1714, 1282, 123, 214, 1371, 187],
    (5_000_000_000, 7, 3): [
        918039801,
        909914084,
        2008608475,
        2000465350,
        4230592925,
        4239259776,
        3173628847,
        3182279346,
    ],
}
LONG = [pytest.param(n, marks=pytest.mark.faults) for n in range(1, 21)]


class Records:
    """Example i is the number i."""

    def __init__(self, examples):
        self.examples = examples

    def __len__(self):
        return self.examples

    def rows(self, index):
        return {"number": np.asarray(index)}


def made(examples, size, *, devices=1, prefetch=2, seed=0, **more):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("data",))
    return Loader(
        Records(examples),
        spec={"number": jax.ShapeDtypeStruct((size,), np.int32)},
        batch_size=size,
        sharding=NamedSharding(mesh, P("data")),
        train=True,
        prefetch=prefetch,
        seed=seed,
        **more,
    )


def reference(examples, size, seed, step):
    """By the definition: permutation after permutation, each without its last partial batch."""
    epoch, inside = divmod(step, examples // size)
    positions = inside * size + np.arange(size)
    return permuted(positions, examples=examples, seed=seed, epoch=epoch)


def drawn_skips(draw, steps):
    firsts = draw.integers(0, steps, draw.integers(0, 4))
    return skip.joined([(int(f), int(f + draw.integers(1, 9))) for f in firsts])


def left(skips, number):
    """The first `number` places that are not left out, by the definition."""
    out = {place for first, end in skips for place in range(first, end)}
    return [p for p in range(number + len(out)) if p not in out][:number]


@pytest.mark.threat(14)
@pytest.mark.parametrize("start", [0, *LONG[:4]])
def test_the_records_of_a_step_on_any_topology(start, record_property):
    """Whatever the devices, the workers that make batches, the processes and the restarts."""
    draw = np.random.default_rng(start)
    rounds = 300 if start else 40
    for _ in range(rounds):
        size = 8 * int(draw.integers(1, 5))
        examples, seed = (
            size * int(draw.integers(1, 9)) + int(draw.integers(size)),
            draw.integers(99),
        )
        skips = drawn_skips(draw, 30)
        first = int(draw.integers(0, 30))
        devices, workers = int(draw.choice([1, 2, 4, 8])), int(draw.integers(0, 5))
        loader = made(examples, size, devices=devices, prefetch=workers, seed=seed, skip=skips)
        places = left(skips, first + 3)[first:]
        batches = loader.batches(first, first + 3)
        for step, (place, batch) in enumerate(zip(places, batches, strict=True), start=first):
            wanted = reference(examples, size, seed, place)
            np.testing.assert_array_equal(batch["number"], wanted)
            np.testing.assert_array_equal(loader.identities(step)[0], wanted)
            processes = int(draw.choice([1, 2, 4]))  # each reads the rows that it holds
            parts = np.split(np.arange(size), processes)
            found = [loader.rows(step, part)["number"] for part in parts]
            np.testing.assert_array_equal(np.concatenate(found), wanted)
    record_property("schedules", rounds)


@pytest.mark.threat(14, 23)
@pytest.mark.parametrize("part", [0, *LONG])
def test_an_epoch_is_a_permutation(part, record_property):
    """For every number of examples up to 5,000, in the long tier."""
    sizes = [1, 2, 3, 7, 64, 1000] if part == 0 else range(part, 5_001, 20)
    for examples in sizes:
        found = permuted(np.arange(examples), examples=examples, seed=examples, epoch=part)
        assert np.array_equal(np.sort(found), np.arange(examples)), examples
    record_property("permutations", len(sizes))


@pytest.mark.threat(14, 15)
@pytest.mark.parametrize("key", GOLDEN)
def test_the_permutations_are_the_golden_ones(key):
    examples, seed, epoch = key
    found = permuted(np.arange(8), examples=examples, seed=seed, epoch=epoch)
    assert found.tolist() == GOLDEN[key]


@pytest.mark.threat(14)
def test_a_batch_that_is_left_out_moves_the_next_ones_up():
    assert skip.joined([(5, 8), (2, 3)], [(7, 9), (3, 4)]) == ((2, 4), (5, 9))
    assert [skip.place(step, ((2, 4), (5, 9))) for step in range(6)] == [0, 1, 4, 9, 10, 11]
    draw = np.random.default_rng(3)
    for _ in range(200):
        skips = drawn_skips(draw, 50)
        assert [skip.place(step, skips) for step in range(40)] == left(skips, 40)


@pytest.mark.parametrize("wrong", [(1,), (2, 2), (-1, 3), (0, 1.5), (True, 2), "ab"])
def test_a_wrong_entry_is_named(wrong):
    with pytest.raises(UserError, match=r"data\.skip_batches has the entry"):
        skip.check([wrong])


@pytest.mark.parametrize("field", ["data.skip_batches=((1,2),)", "guard.spike=rewind"])
def test_a_batch_ramp_leaves_nothing_out(load, field):
    from lsdl.experiment import build

    ramp = "batch_ramp=((50.0,2),)"
    with pytest.raises(UserError, match="with a batch_ramp"):
        build(load("digits_mlp:smoke", "total_epochs=2", ramp, field))
