"""Steps' folders without orbax, and what can happen to them."""

import os
import random
import shutil
from pathlib import Path

from lsdl import commits

FILES = {"state/d/a1": b"x" * 700, "state/d/b2": b"y" * 90, "state/_METADATA": b"{}", "notes": b""}


def committed(root, step, *, run=None, files=FILES, **fields):
    """A committed step of `files`, {path: bytes}."""
    folder = commits.staging(root, step, "0123456789ab", 1)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data + str(step).encode())
    manifest = commits.Manifest(step, run, "0123456789ab", **fields)
    commits.commit(folder, manifest, fence=lambda: None)
    return root / str(step)


def all_files(folder):
    return sorted(p for p in Path(folder).rglob("*") if p.is_file())


def tree(folder):
    """{path: bytes, or where a link goes} of all that lies in `folder`."""
    return {
        str(p.relative_to(folder)): os.readlink(p)
        if p.is_symlink()
        else p.read_bytes()
        if p.is_file()
        else None
        for p in sorted(Path(folder).rglob("*"))
    }


def flip_bit(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def flip_byte(path, draw):
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
    path.write_bytes(data)


def truncate(path, draw):
    os.truncate(path, draw.randrange(path.stat().st_size))


def empty(path, draw):
    os.truncate(path, 0)


def delete(path, draw):
    path.unlink()


def zero_page(path, draw):
    """4 KiB, or what there is, becomes zeros; at least one byte changes."""
    data = bytearray(path.read_bytes())
    start = draw.choice([i for i, byte in enumerate(data) if byte])
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def append(path, draw):
    path.write_bytes(path.read_bytes() + bytes([draw.randrange(256)]))


DAMAGES = (flip_bit, flip_byte, truncate, empty, delete, zero_page, append)


def swap(folder, draw):
    """Two files of different content change places."""
    while True:
        one, other = draw.sample(all_files(folder), 2)
        if one.read_bytes() != other.read_bytes():
            break
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def damage(folder, draw: random.Random, *, other=None):
    """Do one thing to one file of `folder`, or two; `other`: another step's folder to copy from.

    Returns what was done, in words.
    """
    kind = draw.choice([*DAMAGES, swap, *([_replace] if other else [])])
    if kind is swap:
        swap(folder, draw)
        return "swap"
    if kind is _replace:
        return _replace(folder, draw, other)
    few_bytes = kind in (truncate, flip_bit, flip_byte, zero_page, empty)
    files = [p for p in all_files(folder) if not few_bytes or any(p.read_bytes())]
    path = draw.choice(files)
    kind(path, draw)
    return f"{kind.__name__} {path.relative_to(folder)}"


def _replace(folder, draw, other):
    """A file, as it is in another step; of orbax's names those that both have."""
    both = [
        p
        for p in all_files(folder)
        if (other / p.relative_to(folder)).is_file()
        and (other / p.relative_to(folder)).read_bytes() != p.read_bytes()
    ]
    path = draw.choice(both)
    shutil.copyfile(other / path.relative_to(folder), path)
    return f"replace {path.relative_to(folder)}"
