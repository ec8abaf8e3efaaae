"""Jobs for fault tests: started with a fault, signalled, waited for, and never left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from lsdl.launcher import spawn_local
from lsdl.metrics import read_rows
from tests.conftest import CONFIGS, ROOT

STEPS = 24
FLAGS = (
    "--config",
    f"{CONFIGS / 'digits_mlp.py'}:smoke",
    f"--config.total_steps={STEPS}",
    "--config.optim.schedule.warmup_steps=2",
    "--config.eval.every_steps=8",
    "--config.checkpoint.every_steps=6",
    "--config.log.every_steps=1",
    "--config.log.tensorboard=false",
)
TIMES = ("step_time_s", "examples_per_s")
NOWHERE = {"phase": "", "process": 0, "action": "", "marks": "", "at": None}


class Job:
    """The processes of one run; kills what is left of them at the end of the body."""

    def __init__(self, workdir, *more, processes=1, fault=None, capture=True):
        self.workdir = Path(workdir)
        self.marks = self.workdir.with_name(f"{self.workdir.name}-marks")
        self.marks.mkdir(exist_ok=True)
        fault = NOWHERE | (fault or {}) | {"marks": str(self.marks)}
        command = ("tests.faults.faulty", *FLAGS, f"--workdir={workdir}", *more)
        env = {"PYTHONPATH": str(ROOT), "FAULT": json.dumps(fault)}
        if processes > 1:
            self.children = spawn_local(
                command, num_processes=processes, devices_per_process=1, env=env, capture=capture
            )
        else:
            alone = subprocess.Popen(
                (sys.executable, "-m", *command),
                env=os.environ | env | {"JAX_NUM_CPU_DEVICES": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            self.children = [alone]

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for child in self.children:
            child.kill()
            child.communicate()

    def await_mark(self, phase, process, *, within_s=120):
        self.until(lambda: (self.marks / f"{phase}-{process}").exists(), within_s)

    def until(self, true, within_s=120):
        deadline = time.monotonic() + within_s
        while not true():
            ended = [child.poll() for child in self.children]
            assert time.monotonic() < deadline, "it never came to the fault"
            assert None in ended, [child.communicate() for child in self.children]
            time.sleep(0.02)

    def send(self, process, number):
        self.children[process].send_signal(number)

    def end_with_the_others(self, process):
        """Kill the stopped `process`, as its launcher does, once the others have ended."""
        others = [child for i, child in enumerate(self.children) if i != process]

        def wait():
            for child in others:
                child.wait()
            self.children[process].kill()

        threading.Thread(target=wait, daemon=True).start()

    def ended(self, *, within_s=60):
        """(exit codes, stderr of each, the seconds until the last had ended)."""
        began = time.monotonic()
        errors, self.printed = [], []
        for child in self.children:
            left = max(began + within_s - time.monotonic(), 0.1)
            try:
                out, error = child.communicate(timeout=left)
                errors.append(error)
                self.printed.append(out)
            except subprocess.TimeoutExpired:
                for other in self.children:
                    other.send_signal(signal.SIGCONT)
                    other.kill()
                seen = [other.communicate() for other in self.children]
                raise AssertionError(f"a process hangs after {within_s} s: {seen}") from None
        return [child.returncode for child in self.children], errors, time.monotonic() - began


def complete(workdir, *, processes=1):
    """The same command again, to its end: the rows of the run."""
    with Job(workdir, processes=processes) as job:
        codes, errors, _ = job.ended(within_s=180)
    assert set(codes) == {0}, errors
    return rows(workdir)


def rows(workdir):
    """The rows of metrics.jsonl without what depends on the clock, in order of step and split."""
    found = read_rows(Path(workdir) / "metrics.jsonl")
    kept = [{k: v for k, v in row.items() if k not in TIMES} for row in found]
    return sorted(kept, key=lambda row: (row["step"], row["split"]))


def saved(workdir):
    """The steps of the checkpoints, by the names of their folders."""
    folder = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
