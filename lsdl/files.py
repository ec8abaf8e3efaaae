"""Files that lsdl writes and reads again: whole or absent, regular, and JSON in the strict sense.

A folder may come from a stranger: what is opened is a regular file under its own name, of a size
that a reader can bear, and nothing in it is executed.
"""

import difflib
import errno
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import IO, Any

from lsdl.errors import UserError

MOST_BYTES = 2**26  # of a JSON file that is read at once
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of what becomes a file or a folder


def check_name(name: str, *, what: str) -> str:
    """`name`, if it stays below the folder it is put in; else `UserError`."""
    if not NAME.fullmatch(name):
        shown = name if len(name) <= 140 else f"{name[:137]}..."
        raise UserError(
            f"{what}={shown!r} names a file: use at most 128 letters, digits, dots, hyphens and "
            "underscores, the first a letter or a digit."
        )
    return name


def open_regular(path: Path) -> IO[bytes]:
    """`path` opened for reading, if it is a regular file and no link to one.

    Raises `UserError` for a link, a pipe or a device; `FileNotFoundError` if there is none.
    """
    try:
        # A pipe would not be opened before somebody writes into it.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise _irregular(path) from error
        if error.errno == errno.EACCES:
            raise UserError(f"{path} cannot be read: {error.strerror}.") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _irregular(path)
    return open(descriptor, "rb")


def check_regular(path: Path, *, folder: bool = False) -> None:
    """Raise `UserError` unless `path` is a regular file (or a `folder`) or absent."""
    try:
        mode = os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        raise _irregular(path, "folder" if folder else "file")


def _irregular(path: Path, kind: str = "file") -> UserError:
    return UserError(
        f"{path} is no regular {kind}: lsdl follows no links and opens no pipes there; put the "
        f"{kind} itself in its place."
    )


def read_json(path: Path) -> Any:
    """What the JSON file `path` holds.

    Raises `UserError` for what is no regular file, too large, or no JSON; `FileNotFoundError` if
    there is none.
    """
    with open_regular(path) as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise UserError(
            f"{path} has more than the {MOST_BYTES:,} bytes that lsdl reads: shorten it."
        )
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON as lsdl writes it ({error}): mend it.") from error


def parse_json(text: str | bytes) -> Any:
    """The value of strict JSON: no NaN, no key twice, no nesting that exhausts the stack.

    Raises `ValueError`.
    """
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_constant(word: str) -> None:
    raise ValueError(f"{word} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} stands there twice")
        found[key] = value
    return found


def plain(value: Any) -> Any:
    """`value` as strict JSON has it: NaN and infinities, which it does not know, become null."""
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader or a crash sees the old file or the new one, never half."""
    write_text(path, json.dumps(plain(value), indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Likewise of any text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Likewise of anything. Safe on the disk when this returns; a link is replaced, not followed.

    Raises `UserError` where a folder, a pipe or a device is in its place.
    """
    if not path.is_symlink():
        check_regular(path)
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a crash; a link of somebody's is not followed
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the disk know what names `folder` holds: a rename is not safe before that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def near_file(path: str, folder: str) -> str:
    """The Python file whose name is like that of `path`, beside it or in `folder`; "": none is."""
    found = [p for place in (folder, os.path.dirname(path)) for p in Path(place).glob("*.py")]
    there = {file.stem: str(file) for file in found if file.is_file()}
    close = difflib.get_close_matches(Path(path).stem, there, n=1)
    return there[close[0]] if close else ""
