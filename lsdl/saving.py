"""One save at a time, behind the next steps: written, committed, and told of if it fails."""

import errno
import os
import secrets
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lsdl import commits, processes
from lsdl.errors import LOCKED, STORAGE, LockedError, StorageError
from lsdl.progress import tell
from lsdl.rundir import RunDir, named

SPARE = 1.1  # of a state's bytes have to be free before it is saved
COMMIT_WAIT_S = 1200  # for process 0 to digest and commit what all have written: as orbax waits
NOT_ONCE_MORE = (LockedError, SystemExit)
STORAGE_ERRORS = (OSError, ValueError, RuntimeError)  # tensorstore's are of the last two
KNOWN_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class _Save:
    folder: Path  # staging
    manifest: commits.Manifest
    needed_bytes: float


class Saver:
    """Saves into the folder `root`, and what of it went wrong.

    `written` waits until all processes have written the files of the save that was begun, and
    raises what met them. `keep` is what `commits.superseded` keeps; the steps that are committed
    here are added to `verified`.
    """

    def __init__(
        self,
        root: Path,
        *,
        written: Callable[[], None],
        owner: RunDir | None,
        keep: Mapping[str, int],
        verified: set[int],
    ):
        self._root, self._written, self._owner = root, written, owner
        self._keep, self._verified = keep, verified
        self._token, self._attempts = "", 0
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.failed: StorageError | None = None  # and not yet made good by the next save

    @property
    def due_again(self) -> bool:
        return self.failed is not None and self._thread is None

    def begin(
        self, step: int, write: Callable[[Path], None], *, size_bytes: int, **origin: object
    ) -> None:
        """Have `write` fill a folder with `size_bytes`; commit it in the background.

        `origin`: the manifest's other fields. The save before this one has to be settled.
        """
        self._attempts += 1
        owner = self._shared_token()
        folder = commits.staging(self._root, step, owner, self._attempts)
        manifest = commits.Manifest(step, owner=owner, **origin)
        self._save = _Save(folder, manifest, SPARE * size_bytes)
        try:
            processes.together(self._prepare, main_alone=True)
            write(folder)
        except (OSError, StorageError, LockedError) as error:
            self._fail(error)
            return
        self._thread = threading.Thread(target=self._finish, name=f"save {step}")
        self._thread.start()

    def settle(self, *, wait: bool, last: bool = False) -> None:
        """Take note of how the save behind these steps went, if it is over.

        Raises what ends the run; `last`: any failure, there is no step to make it good.
        """
        if self._thread and (wait or not self._thread.is_alive()):
            self.wait()
            error, self._thread, self._error = self._error, None, None
            if error:
                self._fail(error, last=last)
            else:
                self.failed = None

    def wait(self) -> None:
        """Until nothing is written any more."""
        if self._thread:
            self._thread.join()

    def clean(self) -> None:
        """Delete what this process began and did not commit: threads of it may still write."""
        if self._token and not self._thread and processes.is_main():
            commits.purge(self._root, owner=self._token)

    def _prepare(self) -> None:
        """Make the staging folder, if there is room for what goes into it."""
        self._check_owned()
        try:
            self.clean()
            self._root.mkdir(parents=True, exist_ok=True)
            if _free_bytes(self._root) < self._save.needed_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._save.folder.mkdir()
        except OSError as error:
            raise StorageError(self._sentence(error)) from error

    def _finish(self) -> None:
        """Once all processes have written, commit; what goes wrong waits for `settle`."""
        error: BaseException | None = None
        try:
            self._written()
            if processes.is_main():
                self._commit()
        except Exception as raised:
            error = raised
        if jax.process_count() > 1:
            try:
                key = f"lsdl/commit/{self._save.folder.name}"
                told = processes.from_main(key, str(_code(error)), wait_s=COMMIT_WAIT_S)
                if error is None and int(told):
                    error = SystemExit(int(told))  # process 0 says why
            except SystemExit as gone:
                error = error or gone
        self._error = error

    def _commit(self) -> None:
        manifest = self._save.manifest
        commits.commit(self._save.folder, manifest, fence=self._check_owned)
        self._verified.add(manifest.step)
        scores = {step: _loss(self._root / str(step)) for step in commits.steps(self._root)}
        try:
            for step in commits.superseded(scores, **self._keep, verified=self._verified):
                commits.discard(self._root, step)
                self._verified.discard(step)
        except OSError as error:
            tell(f"old steps in {self._root} could not be deleted: {named(error)}.")

    def _fail(self, error: BaseException, *, last: bool = False) -> None:
        """Tell of a save that failed; raise if it is not to be tried once more."""
        if isinstance(error, NOT_ONCE_MORE) or not isinstance(error, STORAGE_ERRORS):
            raise error
        if processes.is_main():
            self._check_owned()  # if it is another's, that is the reason
            self.clean()
        failure = error if isinstance(error, StorageError) else StorageError(self._sentence(error))
        if self.failed or last or jax.process_count() > 1:
            raise failure
        self.failed = failure
        tell(f"{failure} It is tried once more.")

    def _sentence(self, error: Exception) -> str:
        needed, free = self._save.needed_bytes, _free_bytes(self._root)
        missing = f", {_mb(needed - free)} missing" if needed > free else ""
        return (
            f"Step {self._save.manifest.step} could not be saved in {self._root}: "
            f"{_cause(error)}; it needs {_mb(needed)}, {_mb(free)} are free{missing}."
        )

    def _check_owned(self) -> None:
        if self._owner:
            self._owner.check_owned()

    def _shared_token(self) -> str:
        """The owner's token, in all processes process 0's: they write into one folder."""
        if not self._token:
            token = self._owner.token if self._owner else secrets.token_hex(6)
            raw = np.frombuffer(bytes.fromhex(token), np.uint8)
            if jax.process_count() > 1:
                raw = multihost_utils.broadcast_one_to_all(raw)
            self._token = np.asarray(raw, np.uint8).tobytes().hex()
        return self._token


def _loss(folder: Path) -> float | None:
    try:
        return commits.read_manifest(folder).metrics.get("loss")
    except (commits.Damage, OSError):
        return None


def _code(error: BaseException | None) -> int:
    return 0 if error is None else LOCKED if isinstance(error, LockedError) else STORAGE


def _cause(error: Exception) -> str:
    """What the system said, out of what tensorstore made of it."""
    if isinstance(error, OSError) and error.errno:
        return named(error)
    text = str(error)
    for number in KNOWN_ERRORS:
        if os.strerror(number) in text:
            return named(OSError(number, os.strerror(number)))
    return " ".join(text.split())[:200] or type(error).__name__


def _free_bytes(path: Path) -> int:
    """Free space where `path` is, or will be."""
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free


def _mb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
