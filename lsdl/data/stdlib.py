"""The Python files of the running interpreter's standard library: text that every machine has.

Tests, installed packages and files made for this machine are left out. Which split a file belongs
to follows from its path.
"""

import functools
import hashlib
import os
import sysconfig
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
MACHINES_OWN = ("_sysconfigdata", "config-")
# Percent of the paths' hashes; test takes what is left.
TRAIN, VALID = 88, 9


@dataclass(frozen=True)
class File:
    """A document that has not been opened."""

    path: str  # relative to the library
    size: int  # bytes


class Documents:
    """Files as documents: `documents[i]` is the bytes of file i."""

    def __init__(self, files: Sequence[File]):
        self.files = tuple(files)
        self.identity = repr([(file.path, file.size) for file in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> bytes:
        return (_root() / self.files[i].path).read_bytes()

    @property
    def num_bytes(self) -> int:
        return sum(file.size for file in self.files)

    def manifest(self) -> list[dict]:
        """What exactly the text was, for a run that is to be repeated elsewhere."""
        return [
            {"path": f.path, "size": f.size, "sha256": hashlib.sha256(self[i]).hexdigest()}
            for i, f in enumerate(self.files)
        ]


@functools.cache
def files() -> dict[str, tuple[File, ...]]:
    """{split: its files}, by path. Opens none of them."""
    splits: dict[str, list[File]] = {"train": [], "valid": [], "test": []}
    for folder, inner, names in os.walk(_root()):
        inner[:] = [name for name in inner if name not in SKIPPED]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(_root()).as_posix()
            if name.endswith(".py") and not relative.startswith(MACHINES_OWN):
                splits[split_of(relative)].append(File(relative, path.stat().st_size))
    return {
        split: tuple(sorted(found, key=lambda file: file.path)) for split, found in splits.items()
    }


def split_of(path: str) -> str:
    """The split of a file: the same for one path on every machine."""
    percent = zlib.crc32(path.encode()) % 100
    return "train" if percent < TRAIN else "valid" if percent < TRAIN + VALID else "test"


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
