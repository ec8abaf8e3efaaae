"""`loader.batch(step)`: the global batch of a step, a pure function of (seed, step) and its ramp.

A resumed or resized run needs no iterator state: it asks for the next step. Which rows a process
reads follows from where the mesh puts the batch, never from the process's number.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from lsdl.data.permutation import permuted
from lsdl.data.ramp import Ramp
from lsdl.data.readers import EVALUATION, TRAIN, generator, generators
from lsdl.data.skip import Skips, place
from lsdl.data.transforms import Transform
from lsdl.state import Batch


class Loader:
    """Batches of one split as global arrays.

    Training (`train=True`) shuffles and drops each epoch's last partial batch. With a `ramp` of
    several batch sizes there is none: the permutations follow one another, through the batches.
    Evaluation reads in order, counts every example once, and fills the last batch with rows of
    weight 0.
    A batch has the leaves of `spec`, of which `weight` is made here. `limit`: only the split's
    first examples. `skip`: training leaves these batches out, and the next ones move up.
    """

    def __init__(
        self,
        reader,
        *,
        spec: Mapping[str, jax.ShapeDtypeStruct],
        batch_size: int,
        sharding: NamedSharding,
        train: bool,
        seed: int = 0,
        sampling: str = "epoch",
        transforms: Sequence[Transform] = (),
        prefetch: int = 2,
        limit: int | None = None,
        ramp: Ramp | None = None,
        skip: Skips = (),
    ):
        self._reader = reader
        self._spec = {name: leaf for name, leaf in spec.items() if name != "weight"}
        self._batch_size = batch_size
        self._sharding = sharding
        self._train = train
        self._seed = seed
        self._sampling = sampling
        self._transforms = tuple(transforms)
        self._prefetch = prefetch
        self._skip = skip
        self.num_examples = min(len(reader), limit or len(reader))
        full, rest = divmod(self.num_examples, batch_size)
        self.num_batches = full if train or not rest else full + 1
        self._ramp = ramp if ramp and len(ramp.phases) > 1 else None

    def batch_size_at(self, step: int) -> int:
        return self._ramp.batch_size_at(step) if self._ramp else self._batch_size

    @functools.cache  # noqa: B019  (as many entries as batch sizes, and it ends with the run)
    def _own(self, batch_size: int) -> np.ndarray:
        """The rows that this process's devices hold."""
        shards = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        return np.unique(np.concatenate([np.arange(batch_size)[s] for s in shards]))

    def batch(self, step: int) -> Batch:
        """The batch of `step`; for evaluation, the split's `step`-th batch of `num_batches`."""
        size = self.batch_size_at(step)
        own = self._own(size)
        host = self.rows(step, own)
        place = np.full(size, -1)
        place[own] = np.arange(len(own))

        def make(leaf):
            shape = (size, *leaf.shape[1:])
            pick = lambda index: leaf[place[index[0]]]  # noqa: E731
            return jax.make_array_from_callback(shape, self._sharding, pick)

        return jax.tree.map(make, host)

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """`batch(start) ... batch(stop - 1)`, made and sent to the devices ahead of their use."""
        options = grain.ReadOptions(
            num_threads=min(self._prefetch, 16), prefetch_buffer_size=self._prefetch
        )
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(int(step)))
        return iter(steps.to_iter_dataset(options))

    def rows(self, step: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Those `rows` of the global batch of `step`, on the host."""
        index, epoch, counter = self._locate(step, rows)
        valid = index >= 0
        index = np.maximum(index, 0)  # padding repeats the first example, with weight 0
        if not self._transforms and hasattr(self._reader, "rows"):
            found = self._reader.rows(index)
            batch = {name: found[name] for name in self._spec}
        else:
            stream = TRAIN if self._train else EVALUATION
            draws = generators(self._seed, stream, epoch.tolist(), counter.tolist())
            examples = [self._example(*row) for row in zip(index.tolist(), draws, strict=True)]
            batch = {name: np.stack([e[name] for e in examples]) for name in self._spec}
        batch = {name: batch[name].astype(leaf.dtype) for name, leaf in self._spec.items()}
        for name, leaf in self._spec.items():
            if batch[name].shape[1:] != leaf.shape[1:]:
                raise ValueError(f"{name} is {batch[name].shape[1:]}, not {leaf.shape[1:]}.")
        batch["weight"] = valid.astype(np.float32)
        return batch

    def identities(self, step: int) -> np.ndarray:
        """What decides the examples of the global batch of `step`: int64 (3, batch).

        Record index, and epoch and counter of the random draws: the same on all processes.
        """
        located = self._locate(step, np.arange(self.batch_size_at(step)))
        return np.stack([np.asarray(part, np.int64) for part in located])

    def _locate(self, step: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each row's record index (-1: padding), and the epoch and counter of its random draws."""
        examples, step = self.num_examples, place(step, self._skip)
        if not self._train:
            position = step * self._batch_size + rows
            return np.where(position < examples, position, -1), np.zeros_like(rows), position
        if self._sampling == "replace":
            draws = generator(self._seed, TRAIN, step, 2**63)
            draws = draws.integers(examples, size=self.batch_size_at(step))
            return draws[rows], np.full_like(rows, step), rows
        if self._ramp:
            epoch, position = np.divmod(self._ramp.examples_before(step) + rows, examples)
        else:
            number, step_in_epoch = divmod(step, self.num_batches)
            epoch = np.full_like(rows, number)
            position = step_in_epoch * self._batch_size + rows
        index = np.empty_like(position)
        for number in np.unique(epoch):
            among = epoch == number
            where = dict(examples=examples, seed=self._seed, epoch=int(number))
            index[among] = permuted(position[among], **where)
        return index, epoch, position

    def _example(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = {name: np.asarray(value) for name, value in self._reader[index].items()}
        for transform in self._transforms:
            example = transform(example, rng)
        return example
