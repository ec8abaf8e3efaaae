"""Where examples come from: cards (known before any file is opened) and readers.

A card says a data set's sizes and shapes without files, so that an experiment can be built,
planned and traced anywhere. What a reader is, `readers` says.
"""

import contextlib
import difflib
import functools
import inspect
import io
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from lsdl.data import captions, digits, shards, stdlib, synthetic, tabular
from lsdl.data.folder import data_dir, locked
from lsdl.data.readers import Arrays, Features, Leaf, Table
from lsdl.errors import NoDataError, UserError
from lsdl.files import check_name


@dataclass(frozen=True)
class Card:
    """What is known about a data set without opening it."""

    splits: Mapping[str, int]  # examples; of text, documents
    features: Features  # of one example as stored: a dim that varies is None; {} of text
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()  # per channel or feature, in the units of what is stored
    std: tuple[float, ...] = ()
    vocab_size: int = 0  # of what is stored as tokens
    kind: str = "examples"  # examples | text | captions: the last two are still to be tokenised
    captions_per_image: int = 1
    prompt: str = "a photo of a {}"  # the caption that stands for a class


def _images(splits, shape, num_classes, mean, std, **more) -> Card:
    features = {"image": Leaf(shape, np.dtype(np.uint8))}
    if num_classes:
        features["label"] = Leaf((), np.dtype(np.int32))
    return Card(splits, features, num_classes, mean=mean, std=std, **more)


_MNIST, _CIFAR = {"train": 60_000, "test": 10_000}, {"train": 50_000, "test": 10_000}
_IMAGENET = {"train": 1_281_167, "validation": 50_000}
_COCO = {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000}
_VARYING = (None, None, 3)
_CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
_THINGS = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_RGB = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # of ImageNet's train images
_DIGITS = _images(
    digits.SPLITS,
    (8, 8, 1),
    10,
    (4.89,),
    (6.02,),
    class_names=captions.DIGIT_NAMES,
    prompt=captions.DIGIT_PROMPT,
)
CARDS = {
    # mean and std of the train split's pixels
    "digits": _DIGITS,
    "captioned_digits": replace(_DIGITS, kind="captions"),
    "tfds:mnist": _images(
        _MNIST,
        (28, 28, 1),
        10,
        (33.3,),
        (78.6,),
        class_names=captions.DIGIT_NAMES,
        prompt=captions.DIGIT_PROMPT,
    ),
    "tfds:fashion_mnist": _images(_MNIST, (28, 28, 1), 10, (72.9,), (90.0,), class_names=_CLOTHES),
    "tfds:cifar10": _images(
        _CIFAR, (32, 32, 3), 10, (125.3, 123.0, 113.9), (63.0, 62.1, 66.7), class_names=_THINGS
    ),
    "tfds:cifar100": _images(_CIFAR, (32, 32, 3), 100, (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    "tfds:imagenet2012": _images(_IMAGENET, _VARYING, 1000, *_RGB),
    "tfds:coco_captions": _images(_COCO, _VARYING, 0, *_RGB, kind="captions", captions_per_image=5),
}
TABLES = {
    "wine": functools.partial(tabular.table, "wine"),
    "breast_cancer": functools.partial(tabular.table, "breast_cancer"),
    "iris": functools.partial(tabular.table, "iris"),
    "spirals": synthetic.spirals,
    "modular": synthetic.modular,
    "teacher": synthetic.teacher,
}
# TFDS sets of documents: how many tokens they hold is known once they are tokenised.
TEXTS = ("c4", "lm1b", "wikipedia")


def card(source: str) -> Card:
    """The card of an embedded set or `tfds:NAME`: from the code, else from the set on disk."""
    if source in CARDS:
        return CARDS[source]
    if source == "stdlib_text":
        return Card({split: len(files) for split, files in stdlib.files().items()}, {}, kind="text")
    if source.partition(":")[0] in TABLES:
        return _card_of_table(table(source))
    if not source.startswith("tfds:"):
        raise UserError(
            f"data.source={source!r} is unknown: use {_embedded()}, or tfds:NAME for a TFDS set "
            "(docs/howto/data.md makes one)."
        )
    if _set_name(source) in TEXTS:
        return Card({}, {}, kind="text")
    return _card_of_disk(source)


@functools.cache
def table(source: str) -> Table:
    """The embedded table that `NAME:PARAMETER:...` stands for."""
    name, *parameters = source.split(":")
    wanted = inspect.signature(TABLES[name]).parameters
    if len(parameters) != len(wanted):
        form = ":".join([name, *(parameter.upper() for parameter in wanted)])
        raise UserError(f"data.source={source!r} is not of the form {form}.")
    return TABLES[name](*parameters)


def _card_of_table(table: Table) -> Card:
    splits = {name: len(next(iter(leaves.values()))) for name, leaves in table.splits.items()}
    leaves = next(iter(table.splits.values()))  # the first split is the one to train on
    features = {n: Leaf(a.shape[1:], a.dtype) for n, a in leaves.items()}
    moments = {}
    if "features" in leaves:
        x_NF = leaves["features"].astype(np.float64)
        moments = dict(mean=tuple(x_NF.mean(0).tolist()), std=tuple(x_NF.std(0).tolist()))
    names = table.class_names
    vocab_size = table.vocab_size
    return Card(splits, features, len(names), names, vocab_size=vocab_size, **moments)


def _card_of_disk(source: str) -> Card:
    info = _builder(source).info
    if not info.splits:
        raise _missing(source)
    stored = dict(info.features.items())
    sizes = {name: split.num_examples for name, split in info.splits.items()}
    label = stored.get("label")
    classes = getattr(label, "num_classes", None)
    if "image" in stored and classes:
        shape = stored["image"].shape
        middle = (127.5,) * shape[-1]
        names = tuple(label.names) if label.names[0] != "0" else ()
        return _images(sizes, shape, classes, middle, middle, class_names=names)
    if isinstance(stored.get("text"), tfds.features.Text) and "image" not in stored:
        return Card(sizes, {}, kind="text")
    raise UserError(
        f"data.source={source!r} holds neither labelled images nor text: it has "
        f"{', '.join(stored)}."
    )


def split_ranges(source: str, split: str, sizes: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """[(split, start, stop)] of a TFDS slice such as `train[:90%]`, in splits of known `sizes`."""
    infos = {
        name: tfds.core.SplitInfo(name=name, shard_lengths=[count], num_bytes=0)
        for name, count in sizes.items()
    }
    try:
        parts = tfds.core.ReadInstruction.from_spec(split).to_absolute(infos)
        ranges = [
            (p.splitname, p.from_ or 0, sizes[p.splitname] if p.to is None else p.to) for p in parts
        ]
    except (KeyError, ValueError, AssertionError) as error:
        raise _no_split(source, split, sizes) from error
    count = sum(stop - start for _, start, stop in ranges)
    if count < 1:
        raise UserError(f"{source} has no split {split!r} with examples in it: {count} are left.")
    return ranges


def num_examples(source: str, split: str, *, declared: int | None = None) -> int:
    """Examples of `split`, which may be a TFDS slice such as `train[:90%]`; of text, documents.

    `declared`, if given, wins over the card: for a set whose size the card does not know.
    """
    if declared is not None:
        return declared
    return sum(stop - start for _, start, stop in split_ranges(source, split, card(source).splits))


def open_reader(source: str, split: str, *, expected: int | None = None):
    """A random-access reader of `split`, from disk; `digits` are prepared at first use.

    Raises `UserError` if the set is not on disk or does not hold `expected` examples.
    """
    if source.partition(":")[0] in TABLES:
        reader = _open_table(source, split)
    elif source == "captioned_digits":
        reader = captions.CaptionedDigits(open_reader("digits", split))
    else:
        reader = _open_prepared(source, split)
    if expected is not None and len(reader) != expected:
        raise UserError(
            f"{source} {split} holds {len(reader)} examples where {expected} were expected: "
            "the files are not those of the card; prepare the set again, or set data.*_examples."
        )
    return reader


class Documents:
    """The field `text` of a TFDS set as documents."""

    def __init__(self, reader, identity: str):
        self._reader, self.identity = reader, identity

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> bytes:
        return self._reader[i]["text"]


def open_documents(source: str, split: str) -> Documents | stdlib.Documents:
    """The documents of a set of text; those of the standard library are opened when read."""
    if source == "stdlib_text":
        files = stdlib.files()
        ranges = split_ranges(source, split, card(source).splits)
        return stdlib.Documents([f for name, a, b in ranges for f in files[name][a:b]])
    reader = _open_prepared(source, split)
    return Documents(reader, f"{_builder(source).info.full_name} {split} {len(reader)}")


def _open_table(source: str, split: str) -> Arrays:
    splits = table(source).splits
    ranges = split_ranges(source, split, _card_of_table(table(source)).splits)
    return Arrays(
        {
            leaf: np.concatenate([splits[name][leaf][start:stop] for name, start, stop in ranges])
            for leaf in splits[ranges[0][0]]
        }
    )


def _open_prepared(source: str, split: str):
    if source == "digits":
        _prepare(source)
    builder = _builder(source)
    try:
        reader = builder.as_data_source(split=split)
        if not builder.info.splits:
            return reader  # TFDS's mock of a set: examples without files
        parts = builder.info.splits[split].file_instructions
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
    _checked(source, builder, parts)
    return shards.Records(
        reader,
        [(part.filename, part.skip, part.take) for part in parts],
        what=f"{source} {split}",
        mend=_mend(source, builder),
        images={
            name: stored.shape
            for name, stored in builder.info.features.items()
            if isinstance(stored, tfds.features.Image)
        },
    )


def shards_of(source: str, split: str, *, digests: bool = False) -> list[shards.Shard]:
    """The files that `split` is read from, once they are as they were prepared; [] of a table.

    `digests`: every byte of them is read. Raises `DataError` for one that is not.
    """
    if source.partition(":")[0] in TABLES or source == "stdlib_text":
        return []
    source = "digits" if source == "captioned_digits" else source
    if source == "digits":
        _prepare(source)
    builder = _builder(source)
    if not builder.info.splits:
        return []
    parts = builder.info.splits[split].file_instructions
    return _checked(source, builder, parts, digests=digests)


def _checked(source: str, builder, parts, *, digests: bool = False) -> list[shards.Shard]:
    kind = builder.info.file_format
    counts = kind == tfds.core.FileFormat.ARRAY_RECORD
    adapter = tfds.core.file_adapters.ADAPTER_FOR_FORMAT[kind]
    return shards.check(
        Path(builder.data_dir),
        {part.basename(): part.examples_in_shard for part in parts},
        count=adapter.num_examples if counts else None,
        digests=digests,
        mend=_mend(source, builder),
    )


def _mend(source: str, builder) -> str:
    if source == "digits":
        again = "the next run prepares it again"
    elif _is_stock(source):
        again = f"then: {_command(source)}"
    else:
        again = "prepare it again as you did"
    return f"delete {builder.data_dir}, and {again}."


def _set_name(source: str) -> str:
    """Of `tfds:NAME/CONFIG:VERSION` the NAME."""
    return re.split("[/:]", source.removeprefix("tfds:"))[0]


def _is_stock(source: str) -> bool:
    """Whether TFDS can prepare the set: without TensorFlow it finds no code for some of TEXTS."""
    stock = (*TEXTS, *tfds.list_builders(with_community_datasets=False))
    return source in CARDS or _set_name(source) in stock


def _embedded() -> str:
    names = [name for name in CARDS if not name.startswith("tfds:")]
    return ", ".join([*names, *TABLES, "stdlib_text"])


def _builder(source: str) -> tfds.core.DatasetBuilder:
    if source == "digits":
        return digits.Digits(data_dir=str(data_dir()), file_format="array_record")
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of what `_missing` explains
    name = source.removeprefix("tfds:")
    for word in re.split("[/:]", name):
        check_name(word, what="data.source")
    try:
        # What is on disk comes before what TFDS has code for: in lsdl's folder, then in TFDS's own.
        for folder in (str(data_dir()), None):
            with contextlib.suppress(tfds.core.DatasetNotFoundError):
                return tfds.core.read_only_builder.builder_from_files(name, data_dir=folder)
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS prints what `_missing` says
            return tfds.builder(name)
    except Exception as error:  # a builder is other people's code: it may raise anything
        if "No module named" in str(error) or _is_stock(source):
            raise _missing(source) from error
        reason = str(error).strip().partition("\n")[0]
        there = sorted(path.name for path in data_dir().glob("*/"))
        near = difflib.get_close_matches(name, there, n=1)
        hint = f" Did you mean 'tfds:{near[0]}'?" if near else " docs/howto/data.md prepares one."
        raise UserError(
            f"TFDS knows no data set {name!r} that could be read, and {data_dir()} holds none of "
            f"that name ({type(error).__name__}: {reason}).{hint}"
        ) from error


def _no_split(source: str, split: str, splits: Mapping) -> UserError:
    return UserError(
        f"{source} has no split {split!r}: it has {', '.join(splits)}, and slices of them."
    )


def _missing(source: str) -> NoDataError:
    return NoDataError(f"{source} is not on disk. Prepare it once: {_command(source)}")


def _command(source: str) -> str:
    return (
        "pip install -e '.[tfds-prepare]', then python -c \"import tensorflow_datasets as t; "
        f"t.builder('{source.removeprefix('tfds:')}', data_dir='{data_dir()}', "
        "file_format='array_record').download_and_prepare()\""
    )


def _prepare(source: str) -> None:
    """Write the embedded set to disk unless it is there; processes that start together wait."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # a second's work needs no log
    if _builder(source).is_prepared():
        return
    with locked(data_dir()):
        # A builder reads the folder when it is made, so it has to be made under the lock.
        builder = _builder(source)
        if not builder.is_prepared():
            tfds.disable_progress_bar()
            with contextlib.redirect_stdout(io.StringIO()):
                builder.download_and_prepare(
                    download_config=tfds.download.DownloadConfig(compute_stats="skip")
                )
            for split in builder.info.splits:
                _checked(source, builder, builder.info.splits[split].file_instructions)
