"""A process that dies, stops, hangs, leaves, comes late or differs: the others end, and say who."""

import signal
import time

import pytest

from lsdl.errors import DISAGREE, STUCK, UNREACHABLE
from tests.faults.jobs import Job, complete, rows

HEARTBEAT_S = 4
STUCK_S = 3
LIMITS = (f"--heartbeat={HEARTBEAT_S}", f"--config.stuck_after_s={STUCK_S}", "--wait=20")


def ended(tmp_path, *more, within_s, processes=2, await_s=120, **fault):
    """(exit codes, stderr of each) of a job with a fault, all gone `within_s` after it came."""
    with Job(tmp_path / "run", *LIMITS, *more, processes=processes, fault=fault) as job:
        if "phase" in fault:
            job.await_mark(fault["phase"], fault["process"], within_s=await_s)
        if fault.get("action") == "stop":
            job.end_with_the_others(fault["process"])
        codes, errors, _ = job.ended(within_s=within_s)
    return codes, errors


def assert_named(errors, victim, sentence):
    """Each of the others says it once, in a line; none shows a stack of C++."""
    for process, error in enumerate(errors):
        if process != victim:
            lines = [line for line in error.splitlines() if line.startswith("lsdl: ")]
            assert len(lines) == 1, error
            assert sentence in lines[0], error


@pytest.mark.threat(28, 44)
@pytest.mark.parametrize(
    ("phase", "at", "victim"),
    [
        ("stepping", 10, 1),
        *(
            pytest.param(phase, at, victim, marks=pytest.mark.faults)
            for phase, at in (
                *(("compiling", None), ("stepping", 10), ("evaluating", None)),
                *(("saving", 12), ("ending", None)),
            )
            for victim in (0, 1)
        ),
    ],
)
def test_a_process_that_dies_is_named_and_ends_the_others(tmp_path, phase, at, victim):
    codes, errors = ended(
        *(tmp_path,), phase=phase, at=at, process=victim, action="kill", within_s=15 + HEARTBEAT_S
    )
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == UNREACHABLE, errors
    assert_named(errors, victim, f"Process {victim} of 2 is lost: its connection has closed.")


@pytest.mark.threat(28, 44)
@pytest.mark.parametrize(
    ("phase", "victim"),
    [
        ("stepping", 0),
        *(
            pytest.param(phase, victim, marks=pytest.mark.faults)
            for phase in ("compiling", "stepping", "evaluating", "ending")
            for victim in (0, 1)
        ),
    ],
)
def test_a_process_that_is_stopped_is_named_and_ends_the_others(tmp_path, phase, victim):
    at = 10 if phase == "stepping" else None
    codes, errors = ended(
        *(tmp_path, "--config.stuck_after_s=60"),
        **dict(phase=phase, at=at, process=victim, action="stop"),
        within_s=HEARTBEAT_S + 5,
    )
    assert codes[victim] == -signal.SIGKILL  # by the test, once the others had ended
    assert codes[1 - victim] == UNREACHABLE, errors
    silent = f"Process {victim} of 2 is lost: nothing came from it for {HEARTBEAT_S} s."
    assert_named(errors, victim, silent)


@pytest.mark.threat(29, 44)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.faults)])
def test_a_process_that_hangs_ends_all_with_their_stacks(tmp_path, victim):
    codes, errors = ended(
        *(tmp_path,), phase="stepping", at=10, process=victim, action="loop", within_s=STUCK_S + 8
    )
    assert codes == [STUCK, STUCK], errors
    for error in errors:
        line = error.strip().splitlines()[-1]  # the bar may end its own line behind it
        assert line.startswith("lsdl: Stuck: a step after step "), error
        assert f"Behind the others: process {victim}, after step 10." in line, error
        assert "(most recent call first)" in error
    assert "in act" in errors[victim]  # where it hangs


@pytest.mark.faults
@pytest.mark.threat(23, 28, 44)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["compiling", "stepping"])
def test_a_process_that_leaves_early_has_not_finished_the_job(tmp_path, phase, victim):
    at = 10 if phase == "stepping" else None
    codes, errors = ended(
        *(tmp_path,), phase=phase, at=at, process=victim, action="exit", within_s=20
    )
    assert codes[1 - victim] == UNREACHABLE, errors
    assert_named(errors, victim, f"Process {victim} of 2 ")


@pytest.mark.faults
@pytest.mark.threat(30, 44)
def test_a_process_that_starts_late_is_waited_for(tmp_path):
    codes, errors = ended(
        *(tmp_path,), phase="meeting", process=1, action="hold:8", at=None, within_s=60
    )
    assert codes == [0, 0], errors


@pytest.mark.faults
@pytest.mark.threat(30, 44)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_starts_too_late_ends_all(tmp_path, victim):
    flags = ("--wait=3",)
    codes, errors = ended(
        *(tmp_path, *flags), phase="meeting", process=victim, action="hold:20", at=None, within_s=60
    )
    assert codes == [UNREACHABLE] * 2, errors


@pytest.mark.threat(31, 44)
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.faults)])
def test_a_process_of_another_job_is_not_let_in(tmp_path, victim):
    began = time.monotonic()
    codes, errors = ended(tmp_path, "--wait=8", process=victim, token="stale", within_s=60)
    assert codes == [UNREACHABLE] * 2, errors
    assert "Process 1 has another run token than process 0 at 127.0.0.1:" in errors[1]
    assert "Only 1 of 2 processes have met" in errors[0]
    assert "a process with another run token called from 127.0.0.1" in errors[0]
    assert time.monotonic() - began < 40


DIFFERENT = {
    "seed": ({"flags": ["--config.seed=7"]}, "Process 1 has seed=7 and process 0 has 0."),
    "field": (
        {"flags": ["--config.optim.weight_decay=0.5", "--config.total_steps=30"]},
        "Process 1 has optim.weight_decay=0.5 and process 0 has 0.05 (and 1 more).",
    ),
    "code": ({"code": "0" * 64}, "Process 1 has lsdl's code=0000000000000000 and process 0 has "),
    "data": ({"data": "0" * 64}, "Process 1 has data=0000"),
    "workdir": ({"flags": ["--workdir=elsewhere"]}, "Process 1 has --workdir="),
}


@pytest.mark.threat(15, 32, 44)
@pytest.mark.parametrize(
    "what", ["seed", *(pytest.param(w, marks=pytest.mark.faults) for w in list(DIFFERENT)[1:])]
)
def test_a_process_that_differs_is_named_before_anything_is_computed(tmp_path, what):
    difference, sentence = DIFFERENT[what]
    codes, errors = ended(tmp_path, process=1, within_s=60, **difference)
    assert codes == [DISAGREE] * 2, errors
    assert_named(errors, 1, sentence)
    assert "lsdl" not in errors[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.threat(31)
def test_two_jobs_at_one_time_both_finish(tmp_path):
    with Job(tmp_path / "a", processes=2) as one, Job(tmp_path / "b", processes=2) as two:
        for job in (one, two):
            codes, errors, _ = job.ended(within_s=120)
            assert codes == [0, 0], errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of two processes that were left alone, and what each of them wrote: (out, err)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Job(workdir, processes=2) as job:
        codes, errors, _ = job.ended(within_s=180)
    assert codes == [0, 0], errors
    return rows(workdir), list(zip(job.printed, errors, strict=True))


@pytest.mark.threat(43)
def test_process_0_speaks_and_the_others_are_silent(whole):
    (out, err), (other_out, other_err) = whole[1]
    assert "lowest valid loss" in out
    assert len(out + err) < 10_000
    assert len((out + err).splitlines()) < 60  # of 24 steps, 4 saves and 3 evaluations
    assert other_err == ""
    assert len(other_out.splitlines()) < 20  # gloo's own, of its connections
    assert len(other_out) < 2_000


@pytest.mark.faults
@pytest.mark.threat(11)
@pytest.mark.parametrize("ahead_s", [-3600, 3600])
def test_clocks_that_differ_change_nothing(tmp_path, whole, ahead_s):
    codes, errors = ended(
        *(tmp_path,), phase="saving", at=12, process=1, clock=ahead_s, action="kill", within_s=30
    )
    assert codes == [UNREACHABLE, -signal.SIGKILL], errors
    codes, errors = ended(tmp_path, process=0, clock=ahead_s, within_s=120)
    assert codes == [0, 0], errors
    assert rows(tmp_path / "run") == whole[0]


@pytest.mark.faults
@pytest.mark.threat(2, 28)
@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_goes_on_to_the_same_rows_after_a_death(tmp_path, whole, victim):
    ended(tmp_path, phase="saving", at=12, process=victim, action="kill", within_s=30)
    assert complete(tmp_path / "run", processes=2) == whole[0]
