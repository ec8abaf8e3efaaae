"""The run folder: what lies in it, who owns it, and writes that are whole or absent.

config.json env.json metrics.jsonl tensorboard/ checkpoints/
"""

import errno
import fcntl
import hashlib
import importlib.metadata
import os
import platform
import secrets
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from lsdl.config import compare
from lsdl.errors import LockedError, UserError
from lsdl.files import check_regular, read_json, write_bytes, write_json
from lsdl.secrecy import hidden, hidden_command

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
PATIENCE_S = 0.5  # for a lock: whoever only looks at it holds it for a moment
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")

SETTINGS = (
    *("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL"),
    *("JAX_THREEFRY_PARTITIONABLE", "JAX_NUMPY_DTYPE_PROMOTION"),
)


class RunDir:
    """One run's folder: paths, and the lock that keeps a second trainer out."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.env = self.path / "env.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.audit = self.path / "audit.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.tokenizer = self.path / "tokenizer"
        self.token: str | None = None  # of the owner that this process is; None: it is not
        self._lock = None

    def claim(
        self,
        *,
        source: str,
        overrides: dict,
        fields: dict,
        devices: dict,
        total_steps: int,
        data: str = "",
    ) -> dict:
        """Make the folder this run's: create, lock, compare with what it holds, record.

        `data`: the fingerprint of the run's data; "" if it is not known.
        Returns {field: (stored, current)} of what a resume changes. Raises `UserError` rather
        than mix two experiments in one folder.
        """
        self.create()
        self._take()
        try:
            changes = self.check(fields=fields, total_steps=total_steps)
            self._check_data(data)
        except UserError:
            self.release()
            raise
        self._sign()
        self.write_config(source=source, overrides=overrides, fields=fields, changes=changes)
        if self.newest_step() < total_steps:  # a complete run leaves the record as it is
            self.write_env(devices=devices, data=data)
            self.keep_tokenizer(fields.get("data.tokenizer", ""))
        return changes

    def check(self, *, fields: dict, total_steps: int | None = None) -> dict:
        """What a run of `fields` changes here; `UserError` if it may not. Writes nothing."""
        stored = self.read_config()
        changes = compare(stored["config"], fields) if stored else {}
        if not stored and self.newest_step():
            raise UserError(
                f"{self.path} has checkpoints and no config.json, which says of what: put it back, "
                "or choose another --workdir."
            )
        if (self.checkpoints / "0").exists():  # a run's first is of step 1 or later
            raise UserError(
                f"{self.path} holds converted weights and no run: start one from them with "
                f"--config.init_from={self.path} and another --workdir."
            )
        if total_steps is not None and self.newest_step() > total_steps:
            raise UserError(
                f"{self.path} has {self.newest_step()} steps already, more than the {total_steps} "
                "asked for: raise total_*, or choose another --workdir."
            )
        return changes

    def _check_data(self, data: str) -> None:
        stored = self.read_env().get("data")
        if stored and data and stored != data:
            raise UserError(
                f"The workdir holds a run on other data (fingerprint {stored}, now {data}): other "
                "files, counts or a tokenizer of other content. Bring them back, or choose another "
                "--workdir."
            )

    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        steps = [int(path.name) for path in self.checkpoints.glob("*") if path.name.isdigit()]
        return max(steps, default=0)

    def create(self) -> None:
        """Make the folder, or say in one sentence why it cannot be one."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise UserError(
                f"The workdir {self.path} cannot be created: it or a parent of it is a file; "
                "choose another --workdir."
            ) from error
        except OSError as error:
            kind = LockedError if error.errno in UNWRITABLE else UserError
            raise kind(
                f"The workdir {self.path} cannot be created: {named(error)}; "
                "choose another --workdir."
            ) from error
        self.check_usable()

    def check_usable(self) -> None:
        """Raise what `create` and `acquire` will, as far as it can be seen; makes nothing."""
        self.refuse_links()
        there = next(path for path in (self.path, *self.path.parents) if os.path.lexists(path))
        if there.is_dir() and not os.access(there, os.W_OK | os.X_OK):
            read_only = os.statvfs(there).f_flag & os.ST_RDONLY
            number = errno.EROFS if read_only else errno.EACCES
            error = OSError(number, os.strerror(number))
            raise LockedError(
                f"The workdir {self.path} is not writable: {named(error)} at {there}; mend it, or "
                "choose another --workdir."
            )
        if (self.path / ".lock").is_file():
            with self._open_lock("r") as lock:
                self._lock_file(lock, fcntl.LOCK_SH)

    def acquire(self) -> None:
        """Lock the folder until this process ends, however it ends; `token` is its owner's.

        Raises `LockedError` naming the holder. The kernel drops the lock of a dead process.
        """
        self._take()
        self._sign()

    def _take(self) -> None:
        self.refuse_links()
        lock = self._open_lock("a+")  # held open for the process's life
        try:
            self._lock_file(lock, fcntl.LOCK_EX)
            if not self._is_the_lock(lock):  # replaced while this process waited for it
                raise LockedError(f"The workdir {self.path} has changed hands: start again.")
        except LockedError:
            lock.close()
            raise
        self._lock = lock

    def _sign(self) -> None:
        self.token = secrets.token_hex(6)
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {platform.node()}\n{self.token}\n")
        self._lock.flush()

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = self.token = None

    def check_owned(self) -> None:
        """Raise `LockedError` if the folder has another owner: the lock file was replaced."""
        if not self._lock:
            raise LockedError(f"The workdir {self.path} is not locked by this process.")
        if not self._is_the_lock(self._lock) or self.token not in self._written(self._lock)[1:]:
            raise LockedError(
                f"The workdir {self.path} has another owner now: its .lock was deleted or replaced "
                "while this run had it. Nothing more is saved; end the other run, then start again."
            )

    def _open_lock(self, mode: str) -> IO[str]:
        try:
            return open(self.path / ".lock", mode)
        except OSError as error:
            raise LockedError(
                f"{self.path / '.lock'} cannot be opened: {named(error)}; choose another --workdir."
            ) from error

    def _lock_file(self, lock: IO[str], kind: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                return fcntl.flock(lock, kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() < deadline:
                    time.sleep(0.02)
                    continue
                holder = next(iter(self._written(lock)), "another process")
                raise LockedError(
                    f"The workdir {self.path} is in use by {holder}: wait for it, or choose "
                    "another."
                ) from error

    def _is_the_lock(self, lock: IO[str]) -> bool:
        try:
            there = os.stat(self.path / ".lock")
        except OSError:
            return False
        return os.path.samestat(there, os.fstat(lock.fileno()))

    @staticmethod
    def _written(lock: IO[str]) -> list[str]:
        """The lines of a lock file: its holder and the token."""
        lock.seek(0)
        return lock.read(1000).splitlines()

    def read_config(self) -> dict | None:
        """The stored `config.json`, or None in a new folder."""
        self.refuse_links()
        if not self.config.exists():
            return None
        try:
            stored = read_json(self.config)
            good = isinstance(stored["config"], dict) and isinstance(stored["history"], list)
        except (UserError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config} is not what lsdl writes ({error.__cause__ or error}): mend it, or "
                "choose another --workdir."
            ) from error
        if not good:
            raise UserError(f"{self.config} is not what lsdl writes: choose another --workdir.")
        return stored

    def refuse_links(self) -> None:
        """Raise `UserError` if a part of the folder is a link, a pipe or a device."""
        for file in (self.config, self.env, self.plan, self.metrics, self.path / ".lock"):
            check_regular(file)
        for folder in (self.tensorboard, self.checkpoints, self.tokenizer):
            check_regular(folder, folder=True)

    def keep_tokenizer(self, name: str) -> None:
        """Have a copy of the tokenizer file `name` (`bytes` and "" are none) beside the run.

        Whoever opens the run needs no other file, and reads none that its config names.
        """
        if name in ("", "bytes"):
            return
        self.tokenizer.mkdir(exist_ok=True)
        write_bytes(self.tokenizer / Path(name).name, Path(name).expanduser().read_bytes())

    def own_tokenizer(self, name: str) -> str:
        """What `data.tokenizer=name` of this run's config is to be read from: `bytes`, or the copy.

        Raises `UserError` if there is no copy.
        """
        if name in ("", "bytes"):
            return name
        copy = self.tokenizer / Path(name).name
        self.refuse_links()
        check_regular(copy)
        if not copy.is_file():
            raise UserError(
                f"{self.path} has no copy of its tokenizer {Path(name).name!r}: put the file "
                f"there, as {copy}."
            )
        return str(copy)

    def write_config(self, *, source: str, overrides: dict, fields: dict, changes: dict) -> None:
        """Store the resolved config; a resume that changes fields appends to its history."""
        stored = self.read_config() or {"history": []}
        stored.setdefault("id", secrets.token_hex(8))  # what its checkpoints are told by
        entry = {"time": now(), "overrides": overrides}
        if changes:
            entry["changes"] = {field: list(pair) for field, pair in changes.items()}
        if changes or not stored["history"]:
            stored["history"].append(entry)
        write_json(
            self.config,
            {
                "id": stored["id"],
                "source": hidden(source),
                "overrides": overrides,
                "config": fields,
                "history": stored["history"],
            },
        )

    def note(self, entry: dict) -> None:
        """Append what has happened to the history in `config.json`."""
        stored = self.read_config()
        stored["history"].append({"time": now(), **entry})
        write_json(self.config, stored)

    def read_env(self) -> dict:
        """The stored `env.json`, {} if there is none; `UserError` if it is not one."""
        if not self.env.exists():
            return {}
        found = read_json(self.env)
        if not isinstance(found, dict) or not isinstance(found.get("resumed", []), list):
            raise UserError(f"{self.env} is not what lsdl writes: move it away.")
        return found

    def write_env(self, *, devices: dict, data: str = "") -> None:
        """Record versions, machine, devices, data and commit; a resume's go below `resumed`."""
        env = {
            "time": now(),
            "command": hidden_command([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "python": platform.python_version(),
            "versions": versions(),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "devices": devices,
            "data": data,
            "commit": commit(),
        }
        if self.env.exists():
            first = self.read_env()
            env = first | {"resumed": [*first.get("resumed", []), env]}
        write_json(self.env, env | {"resumed": env.get("resumed", [])})


def versions() -> dict[str, str]:
    """{package: version} of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def code_digest() -> str:
    """sha256 of lsdl's own sources, names and bytes, in git or outside."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(p for p in package.rglob("*") if p.suffix in (".py", ".toml")):
        text = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()} {len(text)}\n".encode())
        digest.update(text)
    return digest.hexdigest()


def program() -> dict[str, str]:
    """What else than the config makes a run's numbers: code, versions, settings, by name."""
    told = {name: os.environ.get(name, "") for name in SETTINGS}
    python = {"Python": platform.python_version()}
    return {"lsdl's code": code_digest()[:16]} | python | versions() | told


def commit() -> str | None:
    """The git commit of the source tree, marked `+` if the tree differs; None outside git."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        dirty = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if dirty else "")


def named(error: OSError) -> str:
    """The error as a sentence has it: [EROFS] Read-only file system."""
    return f"[{errno.errorcode.get(error.errno, error.errno)}] {error.strerror}"


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))
