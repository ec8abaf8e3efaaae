"""Start, kill at a drawn instant, look from outside, start again: until it is done."""

import ctypes
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from tests.conftest import CONFIGS

STEPS, KEEP = 40, 2
FIELDS = (
    *("mesh=fsdp=2", "model.hidden=(700,700)", "model.dropout=0.1", f"total_steps={STEPS}"),
    *("checkpoint.every_steps=2", "eval.every_steps=20", "log.every_steps=1"),
    *("log.tensorboard=false", "checkpoint.keep_best=0"),
)
SAMPLERS = ("time", "save", "delete")
CREATED = 0x100 | 0x80  # IN_CREATE | IN_MOVED_TO


def start(run, *fields, module=("lsdl.train",), **env):
    """A trainer of `run`, in a process of its own."""
    command = [sys.executable, "-m", *module, "--config", f"{CONFIGS / 'digits_mlp.py'}:smoke"]
    command += [f"--workdir={run}", *(f"--config.{field}" for field in (*FIELDS, *fields))]
    told = run.with_name(f"{run.name}.txt")
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "2", **env}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    with open(told, "w") as output:
        return subprocess.Popen(command, stdout=output, stderr=output, env=environment)


def finish(run, *fields, **env):
    """Run to the end; returns the exit code and all that was said."""
    code = start(run, *fields, **env).wait(300)
    return code, run.with_name(f"{run.name}.txt").read_text()


class Watch:
    """The names that appear in a folder, as soon as they do."""

    def __init__(self, folder: Path):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(os.O_NONBLOCK)
        number = self._libc.inotify_add_watch(self._file, os.fsencode(folder), CREATED)
        assert self._file >= 0 <= number, os.strerror(ctypes.get_errno())

    def names(self, timeout: float):
        if not select.select([self._file], [], [], timeout)[0]:
            return
        data = os.read(self._file, 1 << 16)
        while data:
            length = struct.unpack_from("iIII", data)[3]
            yield data[16 : 16 + length].rstrip(b"\0").decode()
            data = data[16 + length :]

    def close(self):
        os.close(self._file)


def wait_for(process, run, sampler, draw, *, took_s):
    """Until the drawn instant, or the process's end. `sampler`:

    time: anything between the start and the end of an undisturbed run, which took `took_s`;
    save: 0 to 150 ms after one of the next saves has begun; delete: 0 to 5 ms after a delete has.
    """
    deadline = time.monotonic() + 120
    if sampler == "time":
        try:
            process.wait(draw.uniform(0, took_s))
        except subprocess.TimeoutExpired:
            return
    root, prefix = run / "checkpoints", {"save": ".saving-", "delete": ".trash"}.get(sampler)
    while process.poll() is None and not root.exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    if process.poll() is not None:
        return
    watch, left = Watch(root), draw.randint(1, 5)
    while process.poll() is None and left:
        assert time.monotonic() < deadline
        left -= sum(name.startswith(prefix) for name in watch.names(0.1))
    watch.close()
    time.sleep(draw.uniform(0, 0.15 if sampler == "save" else 0.005))


def kill_until(inspector, folder, *, kills, seed, module=("lsdl.train",)):
    """`kills` kills or a few more, over as many runs as it takes; returns what was met.

    The last run is let go on to its end.
    """
    draw, counts, number = random.Random(seed), Counter(), 0
    while counts["kills"] < kills:
        run, number, times = folder / f"run{number}", number + 1, 0
        while True:
            sampler = SAMPLERS[(counts["kills"] + seed) % 3]
            said = f"seed {seed}, run {number}, kill {counts['kills']} ({sampler})"
            before = inspector.before(run)
            process = start(run, module=module)
            try:
                if counts["kills"] < kills:
                    wait_for(process, run, sampler, draw, took_s=inspector.took_s)
                else:
                    process.wait(300)
            finally:
                process.kill()
                code = process.wait()
            try:
                if code == 0:
                    inspector.ended(run)
                    break
                told = run.with_name(f"{run.name}.txt").read_text()
                assert code == -signal.SIGKILL, f"C0 exit code {code}: {told}"
                doing = inspector.after(run, before)
            except AssertionError as error:
                error.add_note(said)
                raise
            times += 1
            counts["kills"] += 1
            counts.update(f"kills_mid_{what}" for what in doing)
            counts["kills_mid_save_or_delete"] += bool(doing)
        counts["runs_killed_and_completed"] += bool(times)
    return counts
