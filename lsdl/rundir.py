"""The run folder: what lies in it, who owns it, and writes that are whole or absent.

config.json env.json metrics.jsonl tensorboard/ checkpoints/
"""

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from lsdl.config import compare
from lsdl.errors import LockedError, UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets")


class RunDir:
    """One run's folder: paths, and the lock that keeps a second trainer out."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).expanduser().absolute()
        self.config = self.path / "config.json"
        self.env = self.path / "env.json"
        self.plan = self.path / "plan.json"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self._lock = None

    def claim(
        self, *, source: str, overrides: dict, fields: dict, devices: dict, total_steps: int
    ) -> dict:
        """Make the folder this run's: create, lock, compare with what it holds, record.

        Returns {field: (stored, current)} of what a resume changes. Raises `UserError` rather
        than mix two experiments in one folder.
        """
        self.create()
        self.acquire()
        try:
            changes = self.check(fields=fields, total_steps=total_steps)
        except UserError:
            self.release()
            raise
        self.write_config(source=source, overrides=overrides, fields=fields, changes=changes)
        if self.newest_step() < total_steps:  # a complete run leaves the record as it is
            self.write_env(devices=devices)
        return changes

    def check(self, *, fields: dict, total_steps: int | None = None) -> dict:
        """What a run of `fields` changes here; `UserError` if it may not. Writes nothing."""
        stored = self.read_config()
        changes = compare(stored["config"], fields) if stored else {}
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
            raise UserError(
                f"The workdir {self.path} cannot be created: {error.strerror}; "
                "choose another --workdir."
            ) from error
        if not os.access(self.path, os.W_OK | os.X_OK):
            raise UserError(f"The workdir {self.path} is not writable: choose another --workdir.")

    def acquire(self) -> None:
        """Lock the folder until this process ends, however it ends.

        Raises `LockedError` naming the holder. The kernel drops the lock of a dead process.
        """
        lock = open(self.path / ".lock", "a+")  # noqa: SIM115  (held open for the process's life)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            lock.close()
            raise LockedError(
                f"The workdir {self.path} is in use by {holder}: wait for it, or choose another."
            ) from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {platform.node()}")
        lock.flush()
        self._lock = lock

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def read_config(self) -> dict | None:
        """The stored `config.json`, or None in a new folder."""
        if not self.config.exists():
            return None
        try:
            stored = json.loads(self.config.read_text())
            stored["config"], stored["history"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.config} is not what lsdl writes ({error!r}): mend it, or choose another "
                "--workdir."
            ) from error
        return stored

    def write_config(self, *, source: str, overrides: dict, fields: dict, changes: dict) -> None:
        """Store the resolved config; a resume that changes fields appends to its history."""
        stored = self.read_config() or {"history": []}
        entry = {"time": now(), "overrides": overrides}
        if changes:
            entry["changes"] = {field: list(pair) for field, pair in changes.items()}
        if changes or not stored["history"]:
            stored["history"].append(entry)
        write_json(
            self.config,
            {
                "source": source,
                "overrides": overrides,
                "config": fields,
                "history": stored["history"],
            },
        )

    def write_env(self, *, devices: dict) -> None:
        """Record the versions, machine, devices and commit; a resume's go below `resumed`."""
        env = {
            "time": now(),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "python": platform.python_version(),
            "versions": versions(),
            "platform": platform.platform(),
            "cpu_count": os.cpu_count(),
            "devices": devices,
            "commit": commit(),
        }
        if self.env.exists():
            first = json.loads(self.env.read_text())
            env = first | {"resumed": [*first["resumed"], env]}
        write_json(self.env, env | {"resumed": env.get("resumed", [])})


def versions() -> dict[str, str]:
    """{package: version} of what the numbers depend on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


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


def write_json(path: Path, value: dict) -> None:
    """Write `value` so that a reader or a crash sees the old file or the new one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def now() -> str:
    """The time in UTC."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time()))
