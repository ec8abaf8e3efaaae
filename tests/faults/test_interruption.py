"""SIGTERM to any process at any phase: one agreed step is saved, exit code 75, nothing is lost."""

import itertools
import shutil
import signal
import time

import pytest

from lsdl.errors import SAVED_AND_STOPPED, TERMINATED
from tests.faults.jobs import STEPS, Job, complete, rows, saved

# phase -> (the step it is held at, the steps that may be saved; None: what was there before)
PHASES = {
    "importing": (None, None),
    "meeting": (None, None),
    "restoring": (None, None),
    "compiling": (None, None),
    "stepping": (11, (11, 12, 13)),
    "evaluating": (None, (8,)),
    "saving": (12, (13, 14)),
    "ending": (None, (STEPS,)),
}
CELLS = [
    (phase, processes, target, how)
    for phase, (processes, target), how in itertools.product(
        PHASES, ((1, 0), (2, 0), (2, 1)), ("once", "twice", "killed")
    )
    if (phase, processes) != ("meeting", 1)
]
QUICK = [
    ("importing", 1, 0, "once"),
    ("compiling", 2, 1, "once"),
    ("stepping", 2, 1, "once"),
    ("evaluating", 1, 0, "once"),
    ("saving", 1, 0, "twice"),
    ("ending", 2, 0, "once"),
]
HOLD_S = 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """`uninterrupted(processes)`: the rows of a run that was left alone."""
    made = {}

    def uninterrupted(processes):
        if processes not in made:
            workdir = tmp_path_factory.mktemp("whole") / str(processes)
            made[processes] = complete(workdir, processes=processes)
        return made[processes]

    return uninterrupted


def check(tmp_path, uninterrupted, phase, processes, target, how):
    at, steps = PHASES[phase]
    held = 1 - target if phase == "meeting" else target  # the target waits for the other one
    action = f"hold:{HOLD_S if how == 'once' else 8}"
    fault = {"phase": phase, "process": held, "at": at, "action": action}
    workdir = tmp_path / "run"
    with Job(workdir, "--wait=20", processes=processes, fault=fault) as job:
        job.await_mark(phase, held)
        if phase == "meeting":
            job.await_mark(phase, target)
            time.sleep(0.3)
        before = saved(workdir)
        sent = time.monotonic()
        job.send(target, signal.SIGTERM)
        if how != "once":
            time.sleep(0.6)
            job.send(target, signal.SIGTERM if how == "twice" else signal.SIGKILL)
            sent = time.monotonic()
        codes, errors, _ = job.ended(within_s=40)
        took = time.monotonic() - sent
    assert_left(codes, errors, phase, target, how, took)
    if how == "once" and steps:
        newest = max(saved(workdir))
        assert newest in steps
        written = [row["step"] for row in rows(workdir) if row["split"] == "train"]
        assert written == list(range(1, newest + 1))
    elif how == "once":
        assert saved(workdir) == before
    if how == "once" and not steps:
        return  # nothing is left of it
    assert complete(workdir, processes=processes) == uninterrupted(processes)
    shutil.rmtree(workdir)


def assert_left(codes, errors, phase, target, how, took):
    """The codes, and how long it took."""
    told = (codes, took, errors)
    if how == "once":
        lonely = phase == "meeting" and target == 0  # process 1 had not met it
        assert set(codes) <= {SAVED_AND_STOPPED, 69 if lonely else SAVED_AND_STOPPED}, told
        at_once = phase in ("importing", "restoring", "compiling", "ending")
        assert took < (5 if at_once else 30), told
    elif how == "twice":
        assert codes[target] in (SAVED_AND_STOPPED, TERMINATED), told
        assert 0 not in codes, told
    else:
        assert codes[target] in (SAVED_AND_STOPPED, -signal.SIGKILL), told
        assert 0 not in codes, told


@pytest.mark.threat(1)
@pytest.mark.parametrize("cell", QUICK, ids=str)
def test_a_signal_loses_no_step(tmp_path, uninterrupted, cell):
    check(tmp_path, uninterrupted, *cell)


@pytest.mark.faults
@pytest.mark.threat(1)
@pytest.mark.parametrize("cell", [c for c in CELLS if c not in QUICK], ids=str)
def test_a_signal_loses_no_step_in_any_cell(tmp_path, uninterrupted, cell, record_property):
    check(tmp_path, uninterrupted, *cell)
    record_property("signal_cells", 1)
