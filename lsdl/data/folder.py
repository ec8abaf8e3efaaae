"""The folder of prepared data sets and token caches, and the lock of whoever writes into it."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from lsdl.errors import UserError


def data_dir() -> Path:
    """Where prepared data sets lie: `$LSDL_DATA_DIR`, else `lsdl/data` in the user's cache."""
    if "LSDL_DATA_DIR" in os.environ:
        return Path(os.environ["LSDL_DATA_DIR"]).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "lsdl" / "data"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock: processes that start together wait for the first.

    Raises `UserError` if it cannot be written.
    """
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
