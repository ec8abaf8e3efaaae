"""What feeding costs: `python -m benchmarks.loader [--case digits|jpeg|text] [--pairs N]`.

`lsdl.data.loader.Loader` alone, to the batches on one device, beside peers that read the same
records by the same reader, with the same transforms and as many workers: plain Grain in threads,
and torch's DataLoader in processes, if this Python has torch. The digits also beside the compiled
step that they feed. In turn, as many batches each time. Prints JSON, one for each case and peer:
ratio = lsdl's time for a batch / the other's of each pair; cpu_ratio: of the seconds that the cores
were busy.
"""

import functools
import importlib.metadata
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from benchmarks import contest, jpegs, loop, record
from lsdl import components, config, course
from lsdl.data.loader import Loader
from lsdl.data.transforms import Transform
from lsdl.sharding import mesh as meshes
from lsdl.sharding import partition
from lsdl.state import Batch

STEPS = 20  # of a measurement of the compiled step
Seconds = tuple[float, float]  # (wall, CPU), of a batch


@dataclass(frozen=True)
class Case:
    """The training data of a config with overrides."""

    title: str
    config: str
    fields: dict[str, Any]
    batches: int  # of a measurement
    prepare: Callable[[], Any] = lambda: None
    peers: tuple[str, ...] = ("grain", "torch")

    @property
    def overrides(self) -> list[str]:
        return [f"--config.{field}={value}" for field, value in self.fields.items()]


_ALL = {f"data.{split}_split": "train" for split in ("train", "valid", "test")}
_TEXT = {"data.source": "stdlib_text", "data.tokenizer": "bytes"}
_TEXT |= {"data.valid_split": "valid", "data.test_split": "test"}
_TEXT |= {"data.train_examples": 8192, "data.valid_examples": 64, "data.test_examples": 64}
CASES = {
    "digits": Case(
        "192 digits of 8 x 8, in memory, shifted",
        "configs/digits_vit.py",
        {"batch_size": 192},
        batches=200,
        peers=("grain", "torch", "step"),
    ),
    "jpeg": Case(
        "64 JPEGs of 500 x 375, decoded, a random part at 224 x 224, flipped",
        "configs/imagenet_resnet50.py",
        {"batch_size": 64, "data.source": "tfds:smooth_jpegs", **_ALL},
        batches=8,
        prepare=jpegs.prepare,
    ),
    "text": Case(
        "32 windows of 1,024 tokens with their segments, from a row of tokens on disk",
        "configs/lm_gpt2.py",
        {"batch_size": 32, **_TEXT},
        batches=200,
    ),
}


@dataclass(frozen=True, eq=False)
class Feed:
    """What all read, and what is to come out."""

    reader: Any
    transforms: Sequence[Transform]
    spec: dict[str, jax.ShapeDtypeStruct]  # of a batch, without weights
    batch_size: int
    workers: int

    def example(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """What a peer makes of a record."""
        example = {name: np.asarray(value) for name, value in example.items()}
        for transform in self.transforms:
            example = transform(example, rng)
        return {name: example[name] for name in self.spec}

    def sent(self, batch: dict[str, np.ndarray]) -> Batch:
        typed = {n: batch[n].astype(leaf.dtype, copy=False) for n, leaf in self.spec.items()}
        return jax.device_put(typed, SingleDeviceSharding(jax.devices()[0]))


@functools.cache
def feed(name: str) -> Feed:
    """Of a case; once in each process."""
    CASES[name].prepare()
    fields, _ = config.load(CASES[name].config, CASES[name].overrides)
    data = components.make_data(fields)
    spec = dict(components.make_task(fields, data).spec(fields.batch_size))
    del spec["weight"]  # the loader's own
    transforms = tuple(data.transforms("train"))
    return Feed(data.reader("train"), transforms, spec, fields.batch_size, fields.data.prefetch)


def of_lsdl(name: str) -> Callable[[], Iterator[Batch]]:
    read = feed(name)
    mesh = meshes.make_mesh(meshes.parse_mesh("data=1", 1), jax.devices()[:1])
    loader = Loader(
        read.reader,
        spec=read.spec,
        batch_size=read.batch_size,
        sharding=NamedSharding(mesh, partition.BATCH_SPEC),
        train=True,
        transforms=read.transforms,
        prefetch=read.workers,
    )
    return lambda: loader.batches(0, CASES[name].batches)


def of_grain(name: str) -> Callable[[], Iterator[Batch]]:
    read = feed(name)
    records = grain.MapDataset.source(read.reader).seed(0).shuffle().repeat()
    batches = records.random_map(read.example).batch(read.batch_size).map(read.sent)
    options = grain.ReadOptions(num_threads=read.workers, prefetch_buffer_size=read.workers)
    return lambda: iter(batches[: CASES[name].batches].to_iter_dataset(options))


class Examples:
    """A map-style data set for torch, opened again by each of its workers."""

    def __init__(self, name: str):
        self._name = name

    def __len__(self) -> int:
        return len(feed(self._name).reader)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        read = feed(self._name)
        example = read.example(read.reader[i], _worker_rng())
        return {name: np.ascontiguousarray(leaf) for name, leaf in example.items()}


@functools.cache
def _worker_rng() -> np.random.Generator:
    import torch

    return np.random.default_rng(torch.initial_seed())


def of_torch(name: str) -> Callable[[], Iterator[Batch]]:
    from torch.utils.data import DataLoader, RandomSampler

    read, examples = feed(name), Examples(name)
    number = CASES[name].batches * read.batch_size
    loader = DataLoader(
        examples,
        read.batch_size,
        sampler=RandomSampler(examples, num_samples=number),
        num_workers=read.workers,
        multiprocessing_context="spawn",  # a fork would take jax's locks with it
        persistent_workers=True,
    )

    def batches():
        for batch in loader:
            yield read.sent({name: leaf.numpy() for name, leaf in batch.items()})

    return batches


def clocks() -> Seconds:
    """Of this process and its workers."""
    workers = sum(contest.cpu_s(worker.pid) for worker in multiprocessing.active_children())
    return time.perf_counter(), time.process_time() + workers


def fed(name: str, batches: Callable[[], Iterator[Batch]]) -> Seconds:
    """From the first worker's start to the last batch's arrival."""
    began = clocks()
    for batch in batches():
        jax.block_until_ready(batch)
    return tuple((b - a) / CASES[name].batches for a, b in zip(began, clocks(), strict=True))


def of_step(name: str) -> Callable[[], Seconds]:
    """The time of the step instead of a batch's."""
    experiment = loop.shortened(CASES[name].config, CASES[name].overrides, STEPS)
    programs = course._compiled(experiment, 0)
    return lambda: tuple(seconds / STEPS for seconds in loop.of_steps(experiment, programs))


PEERS = {  # what each is called, and how it is made
    "grain": ("plain Grain", of_grain),
    "torch": ("torch's DataLoader", of_torch),
    "step": ("the compiled step that it feeds", of_step),
}


def main() -> int:
    parser = record.parser("loader", pairs=7)
    parser.add_argument("--case", choices=CASES, help="this one alone")
    arguments = parser.parse_args()
    for name in [arguments.case] if arguments.case else CASES:
        for peer in CASES[name].peers:
            if peer == "torch" and not importlib.util.find_spec("torch"):
                print(f"{name}: torch is not here, not yet run", file=sys.stderr)
                continue
            record.tell(measured(name, peer, arguments.pairs), arguments.out)
    return 0


def measured(name: str, peer: str, pairs: int) -> dict[str, Any]:
    """The benchmark's JSON."""
    title, make = PEERS[peer]
    ours, theirs = functools.partial(fed, name, of_lsdl(name)), make(name)
    if peer != "step":
        theirs = functools.partial(fed, name, theirs)
    times = []
    for i in range(pairs + 1):  # the first pair warms
        ways = [ours, theirs]
        pair = {way: way() for way in (ways if i % 2 else ways[::-1])}
        times.append([pair[way] for way in ways])
    examples = feed(name).batch_size

    def told(side: int) -> dict[str, float]:
        batch_s = statistics.median(pair[side][0] for pair in times[1:])
        return {"batch_s": batch_s, "examples_per_s": examples / batch_s}

    found = {
        "match": f"{name}, {CASES[name].title}",
        "device": record.device(),
        "peer": title,
        "lsdl": told(0),
        "theirs": told(1),
        **record.ratios(times[1:]),
        "n": pairs,
        **record.origin(),
    }
    if peer == "torch":
        found["versions"] |= {"torch": importlib.metadata.version("torch")}
    return found


if __name__ == "__main__":
    sys.exit(main())
