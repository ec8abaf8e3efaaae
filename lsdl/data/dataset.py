"""One experiment's data: what an example looks like after its transforms, and its splits' readers.

Leaves of an example, by kind of data: `image` uint8 and `label`; `features` float32 and `label`
or `target`; `token` (L + 1,), with `segment` (0: padding) and `loss_weight` (L,) where there are
such; `image`, `caption` (T,) (0: padding) and `label`. Whole numbers are int32.
"""

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lsdl.data.part import Part, make_part
from lsdl.data.readers import Features, Interleaving, Mixture, NoisyLabels, in_memory, nbytes
from lsdl.data.shards import Shard
from lsdl.data.transforms import Transform, parse
from lsdl.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Made by `make`, from cards: nothing is opened before `reader` or `check` is called."""

    features: Mapping[str, jax.ShapeDtypeStruct]  # of one example after transforms: no batch dim
    counts: Mapping[str, int]  # examples of train, valid and test
    num_classes: int  # 0: there are none
    class_names: tuple[str, ...]  # (): unknown
    mean: tuple[float, ...]  # of the input leaf, by channel or feature; (): none
    std: tuple[float, ...]
    vocab_size: int  # 0: no tokens
    separator: int | None  # the token that begins a document and ends a caption
    token_bytes: np.ndarray | None  # (vocab_size,) bytes of text that each token stands for
    prompt: str  # the caption that stands for a class, its name being {}
    caption: Callable[[str], np.ndarray] | None  # text -> (T,) int32; None without captions
    reader: Callable[[str], Any]  # of a split: opened once and kept
    transforms: Callable[[str], Sequence[Transform]]  # of a split
    check: Callable[[], Any]  # raises UserError unless every split can be opened
    shards: Callable[[], list[Shard]]  # of all splits, once every byte of them has been looked at
    identity: Callable[[], str]  # of what determines the records: names, splits, counts, files


def make(
    source: str,
    *,
    splits: Mapping[str, str],
    declared: Mapping[str, int | None],
    transforms: Sequence[str],
    eval_transforms: Sequence[str],
    mixture: Sequence[tuple[str, float]],
    label_noise: float,
    tokenizer: str,
    seq_len: int,
    segments: bool,
    in_memory_mib: float,
    seed: int,
) -> Dataset:
    """The data of `source`, read from its `splits` (`train[:90%]`), of `declared` sizes if given.

    `mixture`: ((source, weight), ...) of the training examples, instead of `source` alone.
    Raises `UserError` for what does not fit together.
    """
    part = functools.partial(make_part, tokenizer=tokenizer, seq_len=seq_len, segments=segments)
    main, mixed = part(source), [part(name) for name, _ in _checked(mixture)]
    _check_alike(main, mixed)
    _check_noise(main, label_noise)
    order = Interleaving([weight for _, weight in mixture]) if mixture else None
    counts = _counts(main, mixed, order, splits, declared)

    special = (main.tokenizer.separator,) if main.tokenizer else ()
    train = [parse(word, special=special) for word in transforms]
    evaluation = [parse(word, special=special) for word in eval_transforms]
    features = _transformed(main, transforms, train)
    seen = _transformed(main, eval_transforms, evaluation)
    if features != seen:
        raise UserError(
            "data.transforms and data.eval_transforms must make the same of an example: "
            f"{_shapes(features)} and {_shapes(seen)}."
        )
    vocab_size = _vocab_size(main, [*train, *evaluation])

    @functools.cache
    def opened(split: str):
        if split != "train" or not order:
            reader = main.open(splits[split], examples=counts[split])
        else:
            shares = zip(mixed, order.used(counts[split]), strict=True)
            opened = [p.open(splits[split], examples=n, at_most=True) for p, n in shares]
            reader = Mixture(opened, order, counts[split])
        if split == "train" and label_noise:
            return NoisyLabels(
                reader, share=label_noise, num_classes=main.card.num_classes, seed=seed
            )
        return reader

    @functools.cache
    def reader(split: str):
        found = opened(split)
        small = nbytes(main.features, counts[split]) <= in_memory_mib * 2**20
        return in_memory(found, main.features) if small and not hasattr(found, "rows") else found

    read = [(p, splits["train"]) for p in mixed or [main]]
    read += [(main, splits[split]) for split in ("valid", "test")]
    return Dataset(
        features={n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in features.items()},
        counts={split: counts[split] for split in SPLITS},
        num_classes=main.card.num_classes,
        class_names=main.card.class_names,
        mean=main.card.mean,
        std=main.card.std,
        vocab_size=vocab_size,
        separator=main.tokenizer.separator if main.tokenizer else None,
        token_bytes=_token_bytes(main, vocab_size),
        prompt=main.card.prompt,
        caption=main.caption if main.card.kind == "captions" else None,
        reader=reader,
        transforms=lambda split: train if split == "train" else evaluation,
        check=lambda: [opened(split) for split in SPLITS],
        shards=lambda: [s for part, split in read for s in part.shards(split, digests=True)],
        identity=functools.cache(lambda: _identity(read, counts, mixture, label_noise)),
    )


def _counts(
    main: Part,
    mixed: Sequence[Part],
    order: Interleaving | None,
    splits: Mapping[str, str],
    declared: Mapping[str, int | None],
) -> dict[str, int]:
    counts = {split: main.count(splits[split], declared[split]) for split in SPLITS[1:]}
    if order and declared["train"] is None:
        available = [other.count(splits["train"]) for other in mixed]
        return counts | {"train": order.longest(available)}
    return counts | {"train": main.count(splits["train"], declared["train"])}


def _identity(read: Sequence[tuple[Part, str]], *more: Any) -> str:
    """A digest of what the parts of `read` hold, and of what is made of them."""
    made = [[part.identity(split) for part, split in read], *more]
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]


def _checked(mixture: Sequence) -> Sequence[tuple[str, float]]:
    """`mixture`, whose entries have no type of their own in a config."""
    for entry in mixture:
        good = isinstance(entry, tuple | list) and len(entry) == 2
        name, weight = entry if good else (None, None)
        good = good and isinstance(name, str) and isinstance(weight, int | float)
        if not good or not 0 < weight < math.inf:
            raise UserError(
                f"data.mixture has the entry {entry!r}: write ('SOURCE', WEIGHT), the weight "
                "positive."
            )
    return mixture


def _check_alike(main: Part, mixed: Sequence[Part]) -> None:
    """Everything that a task derives from a part must be the same for all of them."""
    for other in mixed:
        ours, theirs = (
            (dict(p.features), p.card.num_classes, p.card.vocab_size) for p in (main, other)
        )
        if ours != theirs:
            raise UserError(
                f"data.mixture has {other.source}, whose examples differ from those of "
                f"{main.source}: {_shapes(other.features)}, {other.card.num_classes} classes, "
                f"where {_shapes(main.features)}, {main.card.num_classes} classes are needed."
            )


def _check_noise(main: Part, share: float) -> None:
    if not 0 <= share <= 1:
        raise UserError(f"data.label_noise={share} must be within [0, 1].")
    if share and not main.card.num_classes:
        raise UserError(f"data.label_noise={share} must be 0: {main.source} has no labels.")


def _transformed(main: Part, words: Sequence[str], transforms: Sequence[Transform]) -> Features:
    """What the transforms make of the source's features, all of fixed shape."""
    features = main.features
    for word, transform in zip(words, transforms, strict=True):
        try:
            features = transform.features(features)
        except ValueError as error:
            raise UserError(
                f"The transform {word!r} does not fit {main.source}: {str(error).rstrip('.')}."
            ) from error
    if any(None in leaf.shape for leaf in features.values()):
        raise UserError(
            f"{main.source} has images of no fixed shape: both data.transforms and "
            "data.eval_transforms need one that fixes it, such as 'center_crop:224'."
        )
    return features


def _vocab_size(main: Part, transforms: Sequence[Transform]) -> int:
    """Of the source's tokens, or of what the transforms make of them."""
    for transform in transforms:
        if 0 < transform.vocab_size < main.card.vocab_size:
            raise UserError(
                f"mask has a vocabulary of {transform.vocab_size}, and the tokens are of one of "
                f"{main.card.vocab_size}: it must be at least that."
            )
    return max([main.card.vocab_size, *(t.vocab_size for t in transforms)])


def _token_bytes(main: Part, vocab_size: int) -> np.ndarray | None:
    if not main.tokenizer or not main.tokenizer.vocab_size:
        return None
    return np.pad(main.tokenizer.token_bytes, (0, vocab_size - main.card.vocab_size))


def _shapes(features: Features) -> str:
    return ", ".join(f"{n} {leaf.shape} {leaf.dtype.name}" for n, leaf in features.items())
