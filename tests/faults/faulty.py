"""`python -m tests.faults.faulty FLAGS of lsdl.train`: train, with a fault at a place.

The environment's FAULT is JSON: {"phase", "process", "action", "marks", "at"}. Every process that
comes to a phase leaves the file MARKS/PHASE-PROCESS; the one named does what it is told there. The
same process has further "flags", another "token", other "code" or "data" and a "clock" that is so
many seconds ahead, where these are given. All processes see the batch "spoilt" as a spike.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from lsdl import entry, train

FAULT = json.loads(os.environ["FAULT"])
PROCESS = next((int(a.split("=")[1]) for a in sys.argv if a.startswith("--process-id=")), 0)


def reached(phase, at=None):
    """Called by the run where `phase` begins, at step `at`."""
    elsewhere = None not in (at, FAULT["at"]) and at != FAULT["at"]
    if phase != FAULT["phase"] or elsewhere:
        return
    mark = Path(FAULT["marks"], f"{phase}-{PROCESS}")
    if mark.exists():  # once
        return
    mark.touch()
    if FAULT["process"] == PROCESS:
        act(FAULT["action"])


def act(action):
    name, _, seconds = action.partition(":")
    until = time.monotonic() + float(seconds or 600)
    if name == "hold":  # in C, which no signal wakes, as a compiler is
        while (left_s := until - time.monotonic()) > 0:
            hashlib.pbkdf2_hmac("sha256", b"", b"", round(1e6 * left_s) + 1)
    elif name == "loop":
        while time.monotonic() < until:
            pass
    elif name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif name == "exit":
        sys.exit(0)


class Imports:
    """Sees the import of lsdl.experiment, which brings jax and the rest."""

    def find_spec(self, name, path=None, target=None):
        if name == "lsdl.experiment":
            reached("importing")


def before(owner, name, phase, at=lambda *arguments: None):
    inner = getattr(owner, name)

    def outer(*arguments, **keywords):
        reached(phase, at(*arguments))
        return inner(*arguments, **keywords)

    setattr(owner, name, outer)


def behind(owner, name, phase, at):
    inner = getattr(owner, name)

    def outer(*arguments, **keywords):
        result = inner(*arguments, **keywords)
        reached(phase, at(*arguments))
        return result

    setattr(owner, name, outer)


def wrapped(arguments, overrides):
    from lsdl import checkpoint, commits, course, loop, processes, watchdog

    before(processes, "initialise", "meeting")
    before(loop, "initial", "restoring")
    before(course, "_compiled", "compiling")
    behind(watchdog.Watchdog, "sent", "stepping", at=lambda watch, step, result: step)
    before(loop, "evaluate", "evaluating")
    behind(checkpoint.Checkpoints, "save", "saving", at=lambda self, step, *_: step)
    before(commits, "commit", "committing", at=lambda folder, manifest: manifest.step)
    behind(commits, "commit", "committed", at=lambda folder, manifest: manifest.step)
    before(loop, "_final", "ending")
    if "spoilt" in FAULT:
        import pytest

        from tests.faults import poison

        poison.batch(pytest.MonkeyPatch(), FAULT["spoilt"])
    return train.train(arguments, overrides)


def differ():
    """Start not as the others do."""
    sys.argv += FAULT.get("flags", [])
    if "token" in FAULT:
        os.environ["LSDL_RUN_TOKEN"] = FAULT["token"]
    if "clock" in FAULT:
        right = time.time
        time.time = lambda: right() + FAULT["clock"]
    if "data" in FAULT:
        from lsdl.experiment import Experiment

        Experiment.data_fingerprint = FAULT["data"]
    if "code" in FAULT:
        from lsdl import rundir

        rundir.code_digest = lambda: FAULT["code"]


if __name__ == "__main__":
    if FAULT["process"] == PROCESS:
        differ()
    sys.meta_path.insert(0, Imports())
    entry.leave(entry.framed(wrapped, train.parser(), None))
