"""Documents as one long row of tokens on disk, and the windows of it that are examples.

Every document begins with the separator, so that each of its tokens is predicted exactly once.
Shape letters: N windows, L tokens that an example predicts.
"""

import hashlib
import os
import re
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lsdl.data import shards
from lsdl.data.folder import data_dir, locked
from lsdl.errors import UserError
from lsdl.files import read_json, write_json

CHUNK = 1000  # documents tokenised at a time


@dataclass(frozen=True, eq=False)
class Tokens:
    """What lies on disk: the tokens, where each document begins, and whether that is all."""

    tokens: np.ndarray
    starts: np.ndarray
    complete: bool


class Windows:
    """Example i is `tokens[i L : i L + L + 1]`: L inputs and, one later, L targets.

    `segment`, if wanted, counts the documents within the window from 1.
    """

    def __init__(self, stream: Tokens, *, length: int, examples: int, segments: bool):
        self._tokens, self._starts = stream.tokens, stream.starts
        self._length, self._examples, self._segments = length, examples, segments

    def __len__(self) -> int:
        return self._examples

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return {name: leaf[0] for name, leaf in self.rows(np.array([i])).items()}

    def rows(self, index: np.ndarray) -> dict[str, np.ndarray]:
        place = np.asarray(index)[:, None] * self._length + np.arange(self._length + 1)
        rows = {"token": self._tokens[place].astype(np.int32)}
        if self._segments:
            rows["segment"] = np.stack([self._segment(p[0]) for p in place])
        return rows

    def _segment(self, begin: int) -> np.ndarray:
        first, last = np.searchsorted(self._starts, (begin + 1, begin + self._length + 1))
        segment = np.zeros(self._length + 1, np.int32)
        segment[self._starts[first:last] - begin] = 1
        return segment.cumsum(dtype=np.int32) + 1


def num_windows(tokens: int, *, length: int) -> int:
    """Whole windows in a row of `tokens`; what is left over at the end is not read."""
    return max(tokens - 1, 0) // length


def open_windows(
    name: str,
    documents,
    tokenizer,
    *,
    length: int,
    examples: int,
    at_most: bool = False,
    segments: bool = False,
) -> Windows:
    """The first `examples` windows of the documents, which are tokenised at the first use.

    Raises `UserError` if there are fewer, or with `at_most` if there are none.
    """
    stream = tokenised(name, documents, tokenizer, at_least=examples * length + 1)
    there = num_windows(len(stream.tokens), length=length)
    if there < (1 if at_most else examples):
        raise UserError(
            f"{name} holds {there} windows of {length} tokens where {examples} were expected: set "
            "data.*_examples to what there is, or less."
        )
    examples = min(examples, there)
    return Windows(stream, length=length, examples=examples, segments=segments)


def tokenised(name: str, documents, tokenizer, *, at_least: int | None = None) -> Tokens:
    """The tokens of `documents`, or of the first of them that hold `at_least` so many.

    Written once, by whichever process comes first; the others wait. `documents` has `len`, `[i]`
    and `identity`, which says what the text is.
    """
    key = hashlib.sha256(f"{documents.identity}\n{tokenizer.fingerprint}".encode()).hexdigest()
    slug = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    folder = data_dir() / "tokens" / f"{slug}-{key[:16]}"
    if not _enough(folder, at_least):
        with locked(folder):
            if not _enough(folder, at_least):
                _write(folder, name, documents, tokenizer, at_least)
    shards_of(folder)
    load = lambda file: np.load(folder / file, mmap_mode="r")  # noqa: E731
    return Tokens(load("tokens.npy"), load("starts.npy"), _meta(folder)["complete"])


def shards_of(folder: Path, *, digests: bool = False) -> list[shards.Shard]:
    """The two files of tokens in `folder`; `DataError` unless they are as they were written."""
    meta = _meta(folder)
    return shards.check(
        folder,
        {"tokens.npy": meta["tokens"], "starts.npy": meta["documents"]},
        count=lambda path: len(np.load(path, mmap_mode="r")),
        digests=digests,
        mend=f"delete {folder}, and the next run tokenises {meta['source']} again.",
    )


def _meta(folder: Path) -> dict | None:
    """What `_write` wrote last; None if it did not end."""
    try:
        meta = read_json(folder / "meta.json")
        return meta if isinstance(meta["tokens"] + meta["documents"], int) else None
    except (FileNotFoundError, NotADirectoryError, UserError, KeyError, TypeError):
        return None


def _enough(folder: Path, at_least: int | None) -> bool:
    meta = _meta(folder)
    if meta is None:
        return False
    return meta["complete"] or (at_least is not None and meta["tokens"] >= at_least)


def _write(folder: Path, name: str, documents, tokenizer, at_least: int | None) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    starts, count, text_bytes, read = array("q"), 0, 0, 0
    bar = tqdm(
        total=len(documents),
        desc=f"tokenise {name}",
        unit="documents",
        file=sys.stderr,
        leave=False,
        delay=1,  # a second's work needs no bar
    )
    with bar, open(folder / "tokens.partial", "wb") as file:
        _header(file, dtype, 0)
        while read < len(documents) and (at_least is None or count < at_least):
            texts = [documents[i] for i in range(read, min(read + CHUNK, len(documents)))]
            for ids in tokenizer.encode_batch(texts):
                starts.append(count)
                row = np.empty(len(ids) + 1, dtype)
                row[0], row[1:] = tokenizer.separator, ids
                file.write(row.tobytes())
                count += len(row)
            text_bytes += sum(len(t.encode() if isinstance(t, str) else t) for t in texts)
            read += len(texts)
            bar.update(len(texts))
        file.seek(0)
        _header(file, dtype, count)
        _sync(file)
    with open(folder / "starts.partial", "wb") as file:
        np.save(file, np.frombuffer(starts, np.int64))
        _sync(file)
    for stale in ("meta.json", shards.MANIFEST):  # of a shorter row of tokens
        (folder / stale).unlink(missing_ok=True)
    for stem in ("tokens", "starts"):
        os.replace(folder / f"{stem}.partial", folder / f"{stem}.npy")
    made = {"tokens.npy": count, "starts.npy": read}
    shards.record(folder, [shards.made(folder / file, number) for file, number in made.items()])
    if hasattr(documents, "manifest"):
        write_json(folder / "manifest.json", documents.manifest())
    meta = {
        "source": name,
        "tokenizer": tokenizer.fingerprint,
        "documents": read,
        "tokens": count,
        "bytes": text_bytes,
        "complete": read == len(documents),
    }
    write_json(folder / "meta.json", meta)  # the last: its presence says that all is there


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _header(file, dtype: np.dtype, count: int) -> None:
    """Of a .npy file; numpy leaves room in it, so that another count takes the same bytes."""
    description = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": description, "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
