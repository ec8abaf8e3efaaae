"""`loader.batch(step)`: the global batch of a step, a pure function of (seed, step).

A resumed or resized run needs no iterator state: it asks for the next step. Which rows a process
reads follows from where the mesh puts the batch, never from the process's number.
"""

import zlib
from collections.abc import Iterator, Mapping, Sequence

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from lsdl.data.readers import EVALUATION, TRAIN, generator
from lsdl.data.transforms import Transform
from lsdl.state import Batch


def permuted(positions: np.ndarray, *, examples: int, seed: int, epoch: int) -> np.ndarray:
    """Record index of each of the epoch's `positions`, under the epoch's own permutation.

    Needs no memory for the permutation itself (Grain's index shuffle, a block cipher).
    """
    # Grain takes one 32-bit seed and adds the epoch to it, which would make epoch 1 of seed 0 the
    # same order as epoch 0 of seed 1: mix the two properly instead.
    mixed = zlib.crc32(np.array([seed, epoch], np.uint64).tobytes())
    draw = grain.experimental.index_shuffle
    return np.array(
        [draw(int(p), max_index=examples - 1, seed=mixed, rounds=4) for p in positions], np.int64
    )


class Loader:
    """Batches of one split as global arrays.

    Training (`train=True`) shuffles and drops each epoch's last partial batch. Evaluation reads in
    order, counts every example once, and fills the last batch with rows of weight 0.
    A batch has the leaves of `spec`, of which `weight` is made here. `limit`: only the split's
    first examples.
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
        self.num_examples = min(len(reader), limit or len(reader))
        full, rest = divmod(self.num_examples, batch_size)
        self.num_batches = full if train or not rest else full + 1
        shards = sharding.addressable_devices_indices_map((batch_size,)).values()
        self._rows = np.unique(np.concatenate([np.arange(batch_size)[s] for s in shards]))

    def batch(self, step: int) -> Batch:
        """The batch of `step`; for evaluation, the split's `step`-th batch of `num_batches`."""
        host = self.rows(step, self._rows)
        place = np.full(self._batch_size, -1)
        place[self._rows] = np.arange(len(self._rows))

        def make(leaf):
            shape = (self._batch_size, *leaf.shape[1:])
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
        epoch, index, counter = self._locate(step, rows)
        valid = index >= 0
        index = np.maximum(index, 0)  # padding repeats the first example, with weight 0
        if not self._transforms and hasattr(self._reader, "rows"):
            found = self._reader.rows(index)
            batch = {name: found[name] for name in self._spec}
        else:
            examples = [self._example(i, epoch, c) for i, c in zip(index, counter, strict=True)]
            batch = {name: np.stack([e[name] for e in examples]) for name in self._spec}
        batch = {name: batch[name].astype(leaf.dtype) for name, leaf in self._spec.items()}
        for name, leaf in self._spec.items():
            if batch[name].shape[1:] != leaf.shape[1:]:
                raise ValueError(f"{name} is {batch[name].shape[1:]}, not {leaf.shape[1:]}.")
        batch["weight"] = valid.astype(np.float32)
        return batch

    def _locate(self, step: int, rows: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        """The epoch, each row's record index (-1: padding), and each row's random counter."""
        examples = self.num_examples
        if not self._train:
            position = step * self._batch_size + rows
            return 0, np.where(position < examples, position, -1), position
        if self._sampling == "replace":
            draws = generator(self._seed, TRAIN, step, 2**63)
            draws = draws.integers(examples, size=self._batch_size)
            return step, draws[rows], rows
        epoch, step_in_epoch = divmod(step, self.num_batches)
        position = step_in_epoch * self._batch_size + rows
        index = permuted(position, examples=examples, seed=self._seed, epoch=epoch)
        return epoch, index, position

    def _example(self, index: int, epoch: int, counter: int) -> dict[str, np.ndarray]:
        example = {name: np.asarray(value) for name, value in self._reader[int(index)].items()}
        if self._transforms:
            stream = TRAIN if self._train else EVALUATION
            rng = generator(self._seed, stream, epoch, counter)
            for transform in self._transforms:
                example = transform(example, rng)
        return example
