"""Readers: `len(reader)` and `reader[i] -> dict of numpy`, a pure function of i.

A reader that also has `rows(index) -> dict` gives many examples at once, stacked.
"""

import heapq
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from lsdl.errors import UserError


@dataclass(frozen=True)
class Leaf:
    """One array of an example: a dim that varies between examples is None (jax allows none)."""

    shape: tuple[int | None, ...]
    dtype: np.dtype


Features = Mapping[str, Leaf]  # of one example: no batch dim

TRAIN, NOISE, EVALUATION = range(3)  # what random numbers are for


def generator(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one example: a function of the four numbers alone."""
    counter = np.array([0, stream, epoch, index], np.uint64)
    return np.random.Generator(np.random.Philox(key=seed, counter=counter))


def generators(
    seed: int, stream: int, epochs: Iterable[int], indices: Iterable[int]
) -> Iterator[np.random.Generator]:
    """`generator` of each (epoch, index) in turn: draw from one before the next is asked for.

    It is one object that is put back each time, as a new one asks the system for entropy first.
    """
    bits = np.random.Philox(key=seed)
    fresh, rng = bits.state, np.random.Generator(bits)
    for epoch, index in zip(epochs, indices, strict=True):
        fresh["state"]["counter"] = (0, stream, epoch, index)
        bits.state = fresh
        yield rng


class Arrays:
    """Examples in memory: `arrays[name][i]`."""

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self.arrays = dict(arrays)
        self._len = len(next(iter(self.arrays.values())))

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[i] for name, array in self.arrays.items()}

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        return {name: array[index] for name, array in self.arrays.items()}


@dataclass(frozen=True, eq=False)
class Table:
    """A whole data set in memory: `splits[split][leaf][i]`."""

    splits: Mapping[str, Mapping[str, np.ndarray]]
    class_names: tuple[str, ...] = ()
    vocab_size: int = 0


def in_memory(reader, names: Sequence[str]) -> Arrays:
    """All examples of `reader`, read once."""
    examples = [reader[i] for i in range(len(reader))]
    return Arrays({name: np.stack([e[name] for e in examples]) for name in names})


def nbytes(features: Features, examples: int) -> float:
    """Decoded size of `examples` examples, in bytes; infinite if their size varies."""
    if any(None in leaf.shape for leaf in features.values()):
        return math.inf
    return examples * sum(math.prod(f.shape) * f.dtype.itemsize for f in features.values())


class NoisyLabels:
    """A share of the labels replaced by labels drawn uniformly, the true one among them.

    Which labels, and by what, is a function of (seed, i) alone.
    """

    def __init__(self, reader, *, share: float, num_classes: int, seed: int):
        self._reader, self._share, self._seed = reader, share, seed
        self._num_classes = num_classes

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        example = dict(self._reader[i])
        draw = generator(self._seed, NOISE, 0, int(i))
        if draw.random() < self._share:
            example["label"] = draw.integers(self._num_classes, dtype=np.int32)
        return example


class Mixture:
    """Examples of several readers in a fixed, even interleaving.

    Among the first n examples, any n, reader s has less than 1 more or less than its share.
    A reader that is too short for its share starts again.
    """

    def __init__(self, readers: Sequence, order: "Interleaving", examples: int):
        self._readers, self._order, self._examples = readers, order, examples

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        which, place = self._order.locate(i)
        reader = self._readers[which]
        return reader[place % len(reader)]


class Interleaving:
    """Which source the i-th example comes from, and its place there, for any i.

    Each source's j-th turn has the window [floor(j/w), ceil((j+1)/w)), and earliest deadline
    first keeps them all. `weights` are scaled to a sum of 1.
    Source: Baruah et al. 1996, "Proportionate progress", with one resource.
    """

    LONGEST = 100_000  # turns before the order repeats

    def __init__(self, weights: Sequence[float]):
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(weight.denominator for weight in exact))
        turns = [int(weight * scale) for weight in exact]
        self.turns = [t // math.gcd(*turns) for t in turns]  # of each source in a period
        self.period = sum(self.turns)
        if self.period > self.LONGEST:
            raise UserError(
                f"data.mixture has the weights {tuple(weights)}, whose order repeats only after "
                f"{self.period} examples: give weights of fewer digits."
            )
        self._which = self._earliest_deadline_first()
        hot = self._which[:, None] == np.arange(len(turns))
        self._before = np.concatenate([np.zeros((1, len(turns)), int), hot.cumsum(0)])

    def locate(self, i: int) -> tuple[int, int]:
        """(source, place in the source) of the i-th example."""
        block, turn = divmod(int(i), self.period)
        which = int(self._which[turn])
        return which, block * self.turns[which] + int(self._before[turn, which])

    def used(self, examples: int) -> list[int]:
        """How many of each source's examples the first `examples` take."""
        block, turn = divmod(examples, self.period)
        return [block * t + int(b) for t, b in zip(self.turns, self._before[turn], strict=True)]

    def longest(self, counts: Sequence[int]) -> int:
        """The most examples that can be taken without one repeated, of sources of `counts`."""
        # A source is less than one turn behind its share.
        most = min((c + 1) * self.period // t for c, t in zip(counts, self.turns, strict=True))
        while any(u > c for u, c in zip(self.used(most), counts, strict=True)):
            most -= 1
        return most

    def _earliest_deadline_first(self) -> np.ndarray:
        later = [(0, s) for s in range(len(self.turns))]  # (when its next turn may come, source)
        ready: list[tuple[int, int]] = []  # (deadline, source)
        taken = [0] * len(self.turns)
        order = np.empty(self.period, int)
        for now in range(self.period):
            while later and later[0][0] <= now:
                _, s = heapq.heappop(later)
                heapq.heappush(ready, (-(-(taken[s] + 1) * self.period // self.turns[s]), s))
            _, s = heapq.heappop(ready)
            order[now] = s
            taken[s] += 1
            heapq.heappush(later, (taken[s] * self.period // self.turns[s], s))
        return order
