"""The shards of a prepared data set: what the manifest beside them says, and whether it is so.

A truncated array_record opens without an error and holds no record, so that nobody would miss them:
counts and sizes are compared whenever a set is opened, digests where that is quick and on request.
"""

import bisect
import concurrent.futures
import contextlib
import hashlib
import itertools
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lsdl.data.folder import locked
from lsdl.errors import DataError, UserError
from lsdl.files import read_json, write_json

MANIFEST = "shards.json"
QUICK_BYTES = 2**26  # shards of together no more than this are read whole whenever opened


@dataclass(frozen=True)
class Shard:
    """One file of a data set."""

    name: str
    examples: int  # or tokens, of text
    bytes: int
    sha256: str = ""  # "": not known


class Records:
    """The examples of a split; one that cannot be read, or whose shape is wrong, is named.

    `parts`: (file, first record, records) of each shard, in order.
    `images`: {leaf: shape}, a dim that varies None: TFDS writes images of any shape.
    """

    def __init__(
        self,
        reader: Any,
        parts: Sequence[tuple[str, int, int]],
        *,
        what: str,
        mend: str,
        images: Mapping[str, tuple[int | None, ...]] | None = None,
    ):
        self._reader, self._parts, self._what, self._mend = reader, parts, what, mend
        self._images = dict(images or {})
        self._ends = list(itertools.accumulate(number for _, _, number in parts))

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self._reader):
            raise IndexError(i)
        try:
            example = self._reader[i]
        except MemoryError:
            raise
        except Exception as error:  # of somebody else's reader or decoder
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            raise DataError(
                f"{self._place(i)} cannot be read (example {i} of {self._what}; {reason}): "
                f"{self._mend}"
            ) from error
        for leaf, wanted in self._images.items():
            shape = example[leaf].shape
            if not _fits(shape, wanted):
                raise DataError(
                    f"{self._place(i)} has an {leaf} of shape {shape}, where the set declares "
                    f"{wanted} (example {i} of {self._what}): give it that shape, then "
                    f"{self._mend}"
                )
        return example

    def _place(self, i: int) -> str:
        """Where example `i` lies, to begin a sentence."""
        place = bisect.bisect_right(self._ends, i)
        name, first, number = self._parts[place]
        return f"Record {first + i - (self._ends[place] - number)} of the shard {name}"


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        dim in (None, there) for there, dim in zip(shape, wanted, strict=True)
    )


def check(
    folder: Path,
    examples: Mapping[str, int],
    *,
    count: Callable[[Path], int] | None = None,
    digests: bool = False,
    mend: str,
) -> list[Shard]:
    """The shards {name: examples} of `folder`, once they are as its manifest says.

    What the manifest does not know yet is written into it, where it can be written.
    `count` gives the examples that a file really holds. `digests`: read large shards as well.
    Raises `DataError` naming the shard, what is expected and what is there; `mend` says how to
    get the right one.
    """
    stored = _manifest(folder, mend)
    found = [Shard(name, number, _size(folder / name, mend)) for name, number in examples.items()]
    for shard in found:
        known = stored.get(shard.name)
        if known and (known.examples, known.bytes) != (shard.examples, shard.bytes):
            raise DataError(
                f"The shard {folder / shard.name} has {shard.bytes:,} bytes for {shard.examples:,} "
                f"examples, where {MANIFEST} beside it says {known.bytes:,} bytes and "
                f"{known.examples:,} examples: {mend}"
            )
    if count:
        _check_counts(folder, found, count, mend)
    if digests or sum(shard.bytes for shard in found) <= QUICK_BYTES:
        found = _with_digests(folder, found, stored, mend)
    found = [stored[s.name] if s.name in stored and not s.sha256 else s for s in found]
    if any(stored.get(shard.name) != shard for shard in found):
        with contextlib.suppress(UserError, OSError), locked(folder):  # it may be somebody else's
            record(folder, found)
    return found


def record(folder: Path, shards: Sequence[Shard]) -> None:
    """Add `shards` to the manifest of `folder`; whoever calls holds its lock."""
    known = _manifest(folder, "") | {shard.name: shard for shard in shards}
    rows = [asdict(known[name]) for name in sorted(known)]
    write_json(folder / MANIFEST, {"version": 1, "shards": rows})


def made(path: Path, examples: int) -> Shard:
    """The shard that has just been written."""
    return Shard(path.name, examples, path.stat().st_size, digest(path))


def digest(path: Path) -> str:
    """The sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_counts(
    folder: Path, shards: Sequence[Shard], count: Callable[[Path], int], mend: str
) -> None:
    def held(shard: Shard) -> int | str:
        try:
            return count(folder / shard.name)
        except Exception as error:  # of somebody else's reader
            return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(held, shards))
    for shard, number in zip(shards, numbers, strict=True):
        if number != shard.examples:
            there = f"{number:,} examples" if isinstance(number, int) else f"no records ({number})"
            raise DataError(
                f"The shard {folder / shard.name} holds {there}, where {shard.examples:,} examples "
                f"are expected: {mend}"
            )


def _with_digests(
    folder: Path, shards: Sequence[Shard], stored: Mapping[str, Shard], mend: str
) -> list[Shard]:
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        made = list(pool.map(lambda shard: digest(folder / shard.name), shards))
    for shard, new in zip(shards, made, strict=True):
        old = stored[shard.name].sha256 if shard.name in stored else ""
        if old not in ("", new):
            raise DataError(
                f"The shard {folder / shard.name} has the sha256 {new[:12]}..., where {MANIFEST} "
                f"beside it says {old[:12]}...: {mend}"
            )
    return [replace(shard, sha256=new) for shard, new in zip(shards, made, strict=True)]


def _size(path: Path, mend: str) -> int:
    try:
        found = os.lstat(path)
    except OSError as error:
        raise DataError(f"The shard {path} is not there ({error.strerror}): {mend}") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"The shard {path} is no regular file, and lsdl follows no links: {mend}")
    return found.st_size


def _manifest(folder: Path, mend: str) -> dict[str, Shard]:
    """What the manifest of `folder` says, by name; {} if there is none."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return {}
    try:
        rows = [Shard(**row) for row in read_json(path)["shards"]]
        good = all(type(s.examples) is type(s.bytes) is int and type(s.sha256) is str for s in rows)
        names = [shard.name for shard in rows]
        good = good and len(set(names)) == len(names)
    except (UserError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what lsdl writes ({error}): {mend}") from error
    if not good:
        raise DataError(f"{path} is not what lsdl writes: {mend}")
    return {shard.name: shard for shard in rows}
