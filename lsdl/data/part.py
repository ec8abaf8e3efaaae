"""One source as one experiment reads it: tokenised, cut into windows, counted."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsdl.data import captions, corpus, sources, text
from lsdl.data.readers import Features, Leaf
from lsdl.data.shards import Shard
from lsdl.errors import UserError


@dataclass(frozen=True, eq=False)
class Part:
    """A source with the tokenizer and the lengths that its text needs. Made by `make_part`."""

    source: str
    card: sources.Card
    features: Features  # of one example before any transform
    tokenizer: Any  # None: nothing is to be tokenised
    seq_len: int
    segments: bool

    def count(self, split: str, declared: int | None = None) -> int:
        """Examples of `split`, opening nothing; `declared` wins over the card."""
        if declared is not None:
            return declared
        if self.card.kind == "text":
            return self._num_windows(split)
        return sources.num_examples(self.source, split) * self.card.captions_per_image

    def open(self, split: str, *, examples: int, at_most: bool = False):
        """A reader of `split`.

        It must hold `examples`, and of text at least so many; with `at_most` any number will do.
        """
        if self.card.kind == "text":
            return corpus.open_windows(
                self.source,
                sources.open_documents(self.source, split),
                self.tokenizer,
                length=self.seq_len,
                examples=examples,
                at_most=at_most,
                segments=self.segments,
            )
        images = None if at_most else examples // self.card.captions_per_image
        reader = sources.open_reader(self.source, split, expected=images)
        if self.card.kind == "examples":
            return reader
        return captions.Tokenised(
            reader,
            self.tokenizer,
            length=self.seq_len,
            per_image=self.card.captions_per_image,
        )

    def shards(self, split: str, *, digests: bool = False) -> list[Shard]:
        """The prepared files of `split`, looked at as `sources.shards_of` says."""
        return sources.shards_of(self.source, split, digests=digests)

    def identity(self, split: str) -> list:
        """What determines the records of `split`: equal wherever they are equal."""
        found = [self.source, split, self.seq_len, self.segments]
        if self.tokenizer:
            found.append(self.tokenizer.fingerprint)
        if self.source == "stdlib_text":
            return [*found, sources.open_documents(self.source, split).identity]
        # Files that lsdl prepares itself may differ in what packs them, and never in their records.
        own = not self.source.startswith("tfds:")
        return [*found, *([s.name, s.examples, 0 if own else s.bytes] for s in self.shards(split))]

    def caption(self, text: str) -> np.ndarray:
        """(T,) int32: `text` as this part's captions are tokenised."""
        return captions.padded(self.tokenizer, text, length=self.seq_len)

    def _num_windows(self, split: str) -> int:
        if self.source != "stdlib_text" or self.tokenizer.fingerprint != "bytes":
            raise UserError(
                f"How many windows of {self.seq_len} tokens {self.source} {split} holds is known "
                "once it is tokenised: set data.train_examples, data.valid_examples and "
                "data.test_examples to how many the run should use."
            )
        documents = sources.open_documents(self.source, split)
        tokens = documents.num_bytes + len(documents)  # each begins with a separator
        return corpus.num_windows(tokens, length=self.seq_len)


def make_part(source: str, *, tokenizer: str, seq_len: int, segments: bool) -> Part:
    """The part of `source`, from its card. Raises `UserError` for settings that do not fit it."""
    card = sources.card(source)
    textual = card.kind != "examples"
    if textual != (seq_len >= 1) or seq_len < 0:
        rule = "must be at least 1" if textual else "must be 0"
        raise UserError(
            f"data.seq_len={seq_len} {rule}: it is the tokens of a window of text or of a caption, "
            f"and {source} is {'of that kind' if textual else 'of another kind'}."
        )
    if segments and card.kind != "text":
        raise UserError(f"data.segments=True is for text, and {source} is of another kind.")
    found = text.tokenizer(tokenizer) if textual else None
    features = dict(card.features)
    leaf = lambda length: Leaf((length,), np.dtype(np.int32))  # noqa: E731
    if card.kind == "text":
        features = {"token": leaf(seq_len + 1)}
        if segments:
            features["segment"] = leaf(seq_len + 1)
    elif card.kind == "captions":
        features["caption"] = leaf(seq_len)
    if found:
        card = dataclasses.replace(card, vocab_size=found.vocab_size)
    return Part(source, card, features, found, seq_len, segments)
