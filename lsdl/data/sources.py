"""Where examples come from: cards (known before any file is opened) and readers.

A reader has `len(reader)` and `reader[i] -> dict of numpy`. A card says the same data's sizes and
shapes without files, so that an experiment can be built, planned and traced anywhere.
"""

import contextlib
import fcntl
import io
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tensorflow_datasets as tfds

from lsdl.data import digits
from lsdl.errors import UserError


@dataclass(frozen=True)
class Card:
    """What is known about a data set without opening it."""

    splits: Mapping[str, int]  # examples
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]  # per channel, in the units of the stored pixels
    std: tuple[float, ...]


_IMAGENET_MEAN, _IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
CARDS = {
    # mean and std of the train split's pixels
    "digits": Card(digits.SPLITS, (8, 8, 1), 10, (4.89,), (6.02,)),
    "tfds:mnist": Card({"train": 60_000, "test": 10_000}, (28, 28, 1), 10, (33.3,), (78.6,)),
    "tfds:fashion_mnist": Card(
        {"train": 60_000, "test": 10_000}, (28, 28, 1), 10, (72.9,), (90.0,)
    ),
    "tfds:cifar10": Card(
        {"train": 50_000, "test": 10_000},
        (32, 32, 3),
        10,
        (125.3, 123.0, 113.9),
        (63.0, 62.1, 66.7),
    ),
    "tfds:cifar100": Card(
        {"train": 50_000, "test": 10_000},
        (32, 32, 3),
        100,
        (129.3, 124.1, 112.4),
        (68.2, 65.4, 70.4),
    ),
}


def data_dir() -> Path:
    """Where prepared data sets lie: `$LSDL_DATA_DIR`, else `lsdl/data` in the user's cache."""
    if "LSDL_DATA_DIR" in os.environ:
        return Path(os.environ["LSDL_DATA_DIR"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lsdl" / "data"


def card(source: str) -> Card:
    """The card of `digits` or `tfds:NAME`: from the table, else from the set on disk."""
    if source in CARDS:
        return CARDS[source]
    if not source.startswith("tfds:"):
        raise UserError(
            f"data.source={source!r} is unknown: use {_embedded()}, or tfds:NAME for a TFDS set."
        )
    info = _builder(source).info
    if not info.splits:
        raise _missing(source)
    features = dict(info.features.items())
    classes = getattr(features.get("label"), "num_classes", None)
    if "image" not in features or classes is None:
        raise UserError(
            f"data.source={source!r} holds no labelled images: it has {', '.join(features)}."
        )
    image = features["image"].shape
    if None in image:
        raise UserError(f"data.source={source!r} has images of no fixed shape ({image}).")
    channels = image[-1]
    sizes = {name: split.num_examples for name, split in info.splits.items()}
    return Card(sizes, image, classes, (127.5,) * channels, (127.5,) * channels)


def num_examples(source: str, split: str, *, declared: int | None = None) -> int:
    """Examples of `split`, which may be a TFDS slice such as `train[:90%]`.

    `declared`, if given, wins over the card: for a set whose size the card does not know.
    """
    if declared is not None:
        return declared
    sizes = card(source).splits
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[count], num_bytes=0)
        for name, count in sizes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        ends = [(p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts]
        count = sum(end - start for start, end in ends)
    except (KeyError, ValueError, AssertionError) as error:
        raise _no_split(source, split, sizes) from error
    if count < 1:
        raise UserError(f"{source} has no split {split!r} with examples in it: {count} are left.")
    return count


def open_reader(source: str, split: str, *, expected: int):
    """A random-access reader of `split`, from disk; `digits` are prepared at first use.

    Raises `UserError` if the set is not on disk or does not hold `expected` examples.
    """
    if source == "digits":
        _prepare(source)
    builder = _builder(source)
    try:
        reader = builder.as_data_source(split=split)
    except (tfds.core.DatasetNotFoundError, AssertionError, FileNotFoundError) as error:
        raise _missing(source) from error
    except (KeyError, ValueError) as error:
        raise _no_split(source, split, builder.info.splits) from error
    except NotImplementedError as error:
        if not builder.is_prepared():
            raise _missing(source) from error
        raise UserError(
            f"{source} lies on disk in a format without random access: prepare it again with "
            f"file_format='array_record' ({' '.join(str(error).split())})"
        ) from error
    if len(reader) != expected:
        raise UserError(
            f"{source} {split} holds {len(reader)} examples where {expected} were expected: "
            "the files are not those of the card; prepare the set again, or set data.*_examples."
        )
    return reader


class InMemory:
    """A reader decoded once: `arrays[name][i]` are the examples."""

    def __init__(self, reader, names: tuple[str, ...]):
        examples = [reader[i] for i in range(len(reader))]
        self.arrays = {name: np.stack([e[name] for e in examples]) for name in names}
        self._len = len(examples)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: array[i] for name, array in self.arrays.items()}


def nbytes(spec: Mapping[str, jax.ShapeDtypeStruct], examples: int) -> int:
    """Decoded size of `examples` examples, in bytes."""
    return examples * sum(s.size * s.dtype.itemsize for s in spec.values())


def _embedded() -> str:
    return " or ".join(name for name in CARDS if not name.startswith("tfds:"))


def _builder(source: str) -> tfds.core.DatasetBuilder:
    if source == "digits":
        return digits.Digits(data_dir=str(data_dir()), file_format="array_record")
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of what `_missing` explains
    name = source.removeprefix("tfds:")
    try:
        # What is on disk comes before what TFDS has code for: in lsdl's folder, then in TFDS's own.
        for folder in (str(data_dir()), None):
            with contextlib.suppress(tfds.core.DatasetNotFoundError):
                return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        return tfds.builder(name)
    except Exception as error:  # a builder is other people's code: it may raise anything
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"TFDS knows no data set {name!r} that could be read, and {data_dir()} holds none of "
            f"that name ({type(error).__name__}: {reason})."
        ) from error


def _no_split(source: str, split: str, splits: Mapping) -> UserError:
    return UserError(
        f"{source} has no split {split!r}: it has {', '.join(splits)}, and slices of them."
    )


def _missing(source: str) -> UserError:
    name = source.removeprefix("tfds:")
    return UserError(
        f"{source} is not on disk. Prepare it once: pip install -e '.[tfds-prepare]', then "
        f"python -c \"import tensorflow_datasets as t; t.builder('{name}', data_dir="
        f"'{data_dir()}', file_format='array_record').download_and_prepare()\""
    )


def _prepare(source: str) -> None:
    """Write the embedded set to disk unless it is there; processes that start together wait."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # a second's work needs no log
    if _builder(source).is_prepared():
        return
    with _locked(data_dir()):
        # A builder reads the folder when it is made, so it has to be made under the lock.
        builder = _builder(source)
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(compute_stats="skip")
                )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(
            f"The data folder {folder} cannot be written ({error.strerror}): set LSDL_DATA_DIR."
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
