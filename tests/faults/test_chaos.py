"""Rounds of kill, stop, stall and late start: no hang, the right code and culprit each time."""

import random
import re
import shutil
import threading
import time

import pytest

from lsdl.errors import STUCK, UNREACHABLE
from lsdl.launcher import watch
from lsdl.metrics import read_rows
from lsdl.watchdog import MEDIANS
from tests.faults.jobs import STEPS, Job, complete, rows, saved
from tests.faults.test_job import HEARTBEAT_S, STUCK_S

ROUNDS, CASES = 4, 56  # of a case
FEW = 3  # steps of a session, of which the median says little
HUNG_S = 100  # a job that has not ended
# What the launcher says, its code, and how long after the fault it may take to say so: a stopped
# process is given 3 s to end by itself.
ENDS = {
    "kill": (137, "process {0} of {1} was killed by SIGKILL", 15),
    "stop": (UNREACHABLE, "Process {0} of {1} is lost: nothing came from it", HEARTBEAT_S + 10),
    "loop": (STUCK, "Behind the others: process {0}, after step", 15),  # and the watchdog's limit
    "late": (0, "", None),
}


def drawn(draw, newest, processes):
    """(fault, what the job ends with)."""
    how = draw.choice(["kill", "kill", "stop", "loop", "late"])
    victim = draw.randrange(processes)
    phase = draw.choice(["meeting", "restoring", "compiling", "stepping", "evaluating", "saving"])
    if how == "loop" or (how == "stop" and phase == "meeting"):
        phase = "stepping"  # what stands where all wait for it, and has told how far it is
    step = min(newest + draw.randint(1, 7), STEPS - 1)
    at = {"stepping": step, "saving": 6 * (newest // 6 + 1)}.get(phase)
    action = {"late": f"hold:{draw.randint(1, 8)}"}.get(how, how)
    phase = "meeting" if how == "late" else phase
    return {"phase": phase, "process": victim, "at": at, "action": action}, how


def played(workdir, draw, processes, capfd):
    """One round: the step it began after, the fault, the job's code, what it said, and how long.

    The last in seconds from the fault to the end; None if the run was over before.
    """
    newest = max(saved(workdir), default=0)
    fault, how = drawn(draw, newest, processes)
    stuck_s = STUCK_S if how == "loop" else 60  # otherwise it may be the first to see the fault
    limits = (f"--heartbeat={HEARTBEAT_S}", f"--config.stuck_after_s={stuck_s}", "--wait=30")
    capfd.readouterr()
    hung = threading.Event()
    with Job(workdir, *limits, processes=processes, fault=fault, capture=False) as job:

        def end():
            hung.set()
            for child in job.children:
                child.kill()

        timer = threading.Timer(HUNG_S, end)
        timer.start()
        code = watch(job.children)
        timer.cancel()
        ended = time.time()
        assert all(child.poll() is not None for child in job.children)
    said = capfd.readouterr().err
    mark = job.marks / f"{fault['phase']}-{fault['process']}"
    began = mark.stat().st_mtime if mark.exists() else None
    shutil.rmtree(job.marks)
    assert not hung.is_set(), (fault, said)
    return newest, fault, how, code, said, began and ended - began


def limit_s(workdir, said, begun):
    """What the watchdog allowed a step, as it says: no more than 20 of the session's own."""
    told = re.search(r"Stuck: a step after step (\d+) has taken more than (\d+) s", said)
    step, told_s = map(int, told.groups())
    found = [row for row in read_rows(workdir / "metrics.jsonl") if row["step"] > begun]
    times_s = [row.get("step_time_s", 0) for row in found]
    look_s = STUCK_S / 10  # between two looks, by which it may be late to see a step's end
    if step - begun >= FEW:  # a session's first step is slow
        assert told_s <= max(STUCK_S, MEDIANS * (max(times_s) + look_s)), (said, times_s)
    return told_s


@pytest.mark.faults
@pytest.mark.threat(28, 29, 30, 44)
@pytest.mark.parametrize("case", range(CASES))
def test_no_fault_hangs_a_job(tmp_path, case, capfd, record_property):
    draw = random.Random(case)
    processes = 2 + case % 3
    workdir, whole = tmp_path / "run", []
    slowest_s, rounds = 0.0, 0
    for _ in range(ROUNDS):
        begun, fault, how, code, said, took_s = played(workdir, draw, processes, capfd)
        told = (case, processes, fault, code, said[-3000:])
        expected, sentence, within_s = ENDS[how]
        if took_s is None:  # the run was over before it came to the fault
            expected, sentence, within_s = ENDS["late"]
        assert code == expected, told
        assert sentence.format(fault["process"], processes) in said, told
        if how == "loop" and within_s:
            within_s += limit_s(workdir, said, begun)
        if within_s:
            assert took_s < within_s, (took_s, told)
            slowest_s = max(slowest_s, took_s)
        rounds += took_s is not None
        if code == 0:
            whole = whole or complete(tmp_path / "whole", processes=processes)
            assert rows(workdir) == whole, told
            shutil.rmtree(workdir)
    record_property("chaos_rounds", rounds)
    record_property("max_chaos_seconds_to_end", round(slowest_s, 1))
