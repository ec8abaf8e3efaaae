"""Small programs on several processes of this machine, with a limit: what a lesson may let hang.

In the program: `join()` the other processes, `tell(...)` what was found, `mark(...)` a moment.
"""

import copy
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lsdl.files import read_json, write_json
from lsdl.launcher import spawn_local
from lsdl.rollcall import LISTENER

FOLDER = "LSDL_REHEARSAL"  # where each process leaves what it tells
POLL_S = 0.02
LAST = "from lsdl import rehearsal\n\nrehearsal.finish()"
SILENT: dict[str, Any] = {"told": {}, "marks": [], "finished": False}


class Ended(NamedTuple):
    """One process after its program."""

    finished: bool  # its program came to its end
    code: int | None  # None: it had to be killed, in its program or on its way out
    told: dict[str, Any]
    marks: list[tuple[str, float]]  # what it marked, and when: seconds since all had joined
    error: str  # what it wrote to stderr


def rehearse(
    text: str, *, processes: int = 2, devices: int = 1, limit_s: float, join_s: float = 120
) -> list[Ended]:
    """Run the program `text` as that many processes, each with `devices` virtual CPU devices.

    `limit_s` counts from when all have joined, for which they have `join_s`: a slow start is no
    hang. Then those that still run are killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "rehearsed.py").write_text(f"{text}\n\n{LAST}\n")
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        children = spawn_local(
            ("rehearsed",),
            num_processes=processes,
            devices_per_process=devices,
            env={"PYTHONPATH": path, FOLDER: folder},
            capture=True,
        )
        files = [Path(folder, f"{i}.json") for i in range(processes)]

        def said() -> list[dict[str, Any]]:
            return [read_json(file) if file.exists() else SILENT for file in files]

        codes, errors = watched(
            children,
            limit_s=limit_s,
            join_s=join_s,
            joined=lambda: all(file.exists() for file in files),
            over=lambda: all(found["finished"] for found in said()),
        )
        found = said()
    began = max((f["marks"][0][1] for f in found if f["marks"]), default=0)
    return [
        Ended(f["finished"], code, f["told"], [(w, at - began) for w, at in f["marks"]], error)
        for code, f, error in zip(codes, found, errors, strict=True)
    ]


def watched(
    children: Sequence[subprocess.Popen],
    *,
    limit_s: float,
    join_s: float = 0,
    joined: Callable[[], bool] = lambda: True,
    over: Callable[[], bool] = lambda: False,
    during: Callable[[], None] = lambda: None,
) -> tuple[list[int | None], list[str]]:
    """(exit codes, stderr) of `children`, None of those that had to be killed.

    They are left alone until all have ended, or `over()`, or the time is up. `during` is called
    all the time, and may do harm.
    """
    try:
        _wait(children, join_s, joined, during)
        _wait(children, limit_s, over, during)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
        errors = [child.communicate()[1] for child in children]
    return codes, errors


def _wait(children: Sequence, within_s: float, true: Callable[[], bool], during: Callable) -> None:
    until = time.monotonic() + within_s
    while any(child.poll() is None for child in children) and not true():
        if time.monotonic() > until:
            return
        during()
        time.sleep(POLL_S)


# In the program

_said: dict[str, Any] = copy.deepcopy(SILENT)


def join(*, lines: bool = True) -> int:
    """Join the other processes; returns this one's number.

    Without `lines` by jax alone, which notices the end of another process later, or never.
    """
    flags = _flags()
    address = flags["coordinator"]
    total, number = int(flags["num-processes"]), int(flags["process-id"])
    if lines:
        from lsdl import processes

        processes.initialise(coordinator=address, num_processes=total, process_id=number)
    else:
        import jax

        if LISTENER in os.environ:  # the launcher's socket holds the port for the lines
            os.close(int(os.environ[LISTENER]))
        jax.distributed.initialize(address, total, number)
    mark("joined")
    return number


def tell(**facts: Any) -> None:
    """Hand `facts`, JSON values, to whoever started the program; what is told before stays."""
    _said["told"] |= facts
    _write()


def mark(word: str) -> None:
    """Keep the moment, under this name."""
    _said["marks"].append((word, time.time()))
    _write()


def finish() -> None:
    """The program has come to its end: `rehearse` adds this as its last line."""
    _said["finished"] = True
    mark("end")


def _write() -> None:
    write_json(Path(os.environ[FOLDER], f"{_flags()['process-id']}.json"), _said)


def _flags() -> dict[str, str]:
    """What `spawn_local` says to each process."""
    return dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
