"""A disk that is full, broken or not ours: the last good step stays, and a line says what lacks."""

import errno
import os
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lsdl import commits, saving
from lsdl.checkpoint import Checkpoints
from lsdl.errors import LOCKED, STORAGE, LockedError, StorageError
from lsdl.rundir import RunDir
from tests.faults import kills
from tests.faults.outside import damage, steps
from tests.faults.steps import tree

MIB = 1 << 20
STATE_BYTES = MIB


def state_of(step):
    draw = np.random.default_rng(step)  # random, so that no compression makes it smaller
    return {"x": jax.device_put(draw.integers(0, 2**32, STATE_BYTES // 4, np.uint32))}


@pytest.fixture
def disk(tmp_path):
    """`disk(mib)`: a small file system of its own."""
    mounted = []

    def disk(mib):
        place = tmp_path / f"disk{len(mounted)}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", place]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a tmpfs here")
        mounted.append(place)
        return place

    yield disk
    for place in mounted:
        subprocess.run(["umount", "-l", place], check=True)


def filled(place, *, leave):
    """A file that leaves `leave` bytes of the file system."""
    free = shutil.disk_usage(place).free
    path = place / "other"
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - leave, 1))
    return path


@pytest.fixture
def run(tmp_path):
    folder = RunDir(tmp_path / "run")
    folder.create()
    folder.acquire()
    yield folder
    folder.release()


# Full


@pytest.mark.threat(8)
def test_without_room_nothing_is_begun_and_the_sentence_says_how_much_is_missing(disk, capfd):
    place = disk(8)
    with Checkpoints(place / "c") as checkpoints:
        checkpoints.save(1, state_of(1), metrics=None)
        checkpoints.save(2, state_of(2), metrics=None)
        assert not checkpoints.check(wait=True)
        other = filled(place, leave=MIB // 2)
        checkpoints.save(3, state_of(3), metrics=None)
        assert checkpoints.check()  # known before the next step
        assert sorted(path.name for path in (place / "c").iterdir()) == ["1", "2"]
        [line] = capfd.readouterr().err.splitlines()
        needed, free = 1.1 * STATE_BYTES, shutil.disk_usage(place).free
        for words in ("Step 3", str(place / "c"), "[ENOSPC]", f"needs {needed / 1e6:.1f} MB"):
            assert words in line
        assert f"{free / 1e6:.1f} MB are free, {(needed - free) / 1e6:.1f} MB missing" in line
        other.unlink()
        checkpoints.save(4, state_of(4), metrics=None)
        assert not checkpoints.check(wait=True)
    assert commits.steps(place / "c") == [4, 2]


@pytest.mark.threat(5, 8)
@pytest.mark.parametrize("part", [0, *(pytest.param(i, marks=pytest.mark.faults) for i in (1, 2))])
def test_a_disk_that_fills_up_within_a_save_loses_nothing(
    disk, capfd, monkeypatch, record_property, part
):
    """Wherever it is full: the room that is left is swept over the whole of a save."""
    monkeypatch.setattr(saving, "SPARE", 0.0)  # as if another program took the room meanwhile
    place = disk(10)
    with Checkpoints(place / "c") as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), metrics=None)
    sweep = np.linspace(0, 1.02 * STATE_BYTES, 4 if part == 0 else 20)
    failed = 0
    for leave in sweep if part < 2 else STATE_BYTES + np.arange(0, 40_000, 2048):
        other = filled(place, leave=int(leave))
        checkpoints = Checkpoints(place / "c", keep_latest=2)
        before = commits.steps(place / "c")
        checkpoints.save(before[0] + 1, state_of(before[0] + 1), metrics=None)
        full = checkpoints.check(wait=True)
        failed += full
        if full:
            assert commits.steps(place / "c") == before
            said = [x for x in capfd.readouterr().err.splitlines() if x.startswith("lsdl: ")]
            assert len(said) == 1
            assert "[ENOSPC] No space left on device" in said[0]
        other.unlink()
        checkpoints.save(before[0] + 2, state_of(before[0] + 2), metrics=None)
        assert not checkpoints.check(wait=True)
        checkpoints.close()
        names = {path.name for path in (place / "c").iterdir()}
        assert len(names) == 2
        assert not any(damage(place / "c" / name) for name in names)
    assert failed >= 3
    record_property("disks_full", failed)


@pytest.mark.threat(5, 8, 44)
def test_a_run_on_a_full_disk_ends_with_74_and_goes_on_once_there_is_room(disk):
    place = disk(40)
    run = place / "run"
    fields = ("total_steps=6", "eval.every_steps=6")
    code, told = kills.finish(run, *fields, "total_steps=4")
    assert code == 0, told
    other = filled(place, leave=MIB)
    code, told = kills.finish(run, *fields)
    assert code == STORAGE, told
    [first, second] = [line for line in told.splitlines() if line.startswith("lsdl: ")]
    assert "Step 6 could not be saved" in first
    assert "MB missing" in second
    assert "Traceback" not in told
    assert steps(run) == [2, 4]
    other.unlink()
    code, told = kills.finish(run, *fields)
    assert code == 0, told
    assert steps(run) == [4, 6]


# A save that fails


class Failing:
    """`commits.commit` that fails the first `times`."""

    def __init__(self, times, error):
        self.times, self.error, self.real = times, error, commits.commit

    def __call__(self, folder, manifest, *, fence):
        if self.times:
            self.times -= 1
            raise self.error
        self.real(folder, manifest, fence=fence)


@pytest.fixture
def failing(monkeypatch):
    def failing(times, error=None):
        error = error or OSError(errno.EIO, os.strerror(errno.EIO))
        monkeypatch.setattr(commits, "commit", Failing(times, error))

    return failing


SMALL = {"x": np.arange(10)}


def until_known(checkpoints):
    deadline = time.monotonic() + 30
    while not checkpoints.check():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.threat(5)
def test_a_failure_in_the_background_is_known_at_a_next_step_without_waiting(run, failing, capfd):
    failing(1)
    with Checkpoints(run.checkpoints, owner=run) as checkpoints:
        checkpoints.save(1, SMALL, metrics=None)
        until_known(checkpoints)
        assert "[EIO] Input/output error" in capfd.readouterr().err
        assert checkpoints.check()  # until it is made good
        late = commits.staging(run.checkpoints, 1, run.token, 1)
        late.mkdir()  # as threads of tensorstore do that nobody waited for
        checkpoints.save(2, SMALL, metrics=None)
        assert not late.exists()
        assert not checkpoints.check(wait=True)
        assert not checkpoints.check()
    assert commits.steps(run.checkpoints) == [2]


@pytest.mark.threat(5)
def test_two_failures_in_a_row_end_the_run_and_others_do_not(run, failing):
    checkpoints = Checkpoints(run.checkpoints, owner=run)
    for step in (1, 3):  # one, a good one, one
        failing(1)
        checkpoints.save(step, SMALL, metrics=None)
        assert checkpoints.check(wait=True)
        checkpoints.save(step + 1, SMALL, metrics=None)
        assert not checkpoints.check(wait=True)
    failing(2)
    checkpoints.save(5, SMALL, metrics=None)
    checkpoints.save(6, SMALL, metrics=None)
    with pytest.raises(StorageError, match="Step 6 could not be saved"):
        checkpoints.check(wait=True)
    assert StorageError.exit_code == STORAGE == 74
    assert commits.steps(run.checkpoints) == [4, 2]


@pytest.mark.threat(5)
def test_a_failure_that_no_step_follows_is_an_error_at_once(run, failing, capfd):
    failing(1)
    checkpoints = Checkpoints(run.checkpoints, owner=run)
    checkpoints.save(1, SMALL, metrics=None)
    with pytest.raises(StorageError, match="Step 1 could not be saved"):
        checkpoints.close()
    assert capfd.readouterr().err == ""  # nobody is told that it is tried once more


def test_a_mistake_of_ours_is_not_taken_for_a_bad_disk(run, failing):
    failing(1, TypeError("a mistake"))
    with Checkpoints(run.checkpoints, owner=run) as checkpoints:
        checkpoints.save(1, SMALL, metrics=None)
        with pytest.raises(TypeError, match="a mistake"):
            checkpoints.check(wait=True)


@pytest.mark.threat(5)
def test_the_loop_saves_the_next_step_in_the_place_of_one_that_failed(
    train, tmp_path, failing, monkeypatch
):
    """Also the last one, which has no next step."""
    fields = ("total_steps=4", "checkpoint.every_steps=2", "eval.every_steps=4")
    fields = (*(f"--config.{f}" for f in fields), "--config.log.tensorboard=false")
    failing(1)
    code, _, err = train("digits_mlp:smoke", f"--workdir={tmp_path / 'a'}", *fields)
    assert code == 0
    assert [line for line in err.splitlines() if line.startswith("lsdl: ")]
    assert commits.steps(tmp_path / "a" / "checkpoints")[0] == 4
    failing(0)
    real, met = commits.commit, []

    def commit(folder, manifest, *, fence):
        if manifest.step == 4 and not met:
            met.append(4)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(folder, manifest, fence=fence)

    monkeypatch.setattr(commits, "commit", commit)
    code, _, err = train("digits_mlp:smoke", f"--workdir={tmp_path / 'b'}", *fields)
    assert (code, met) == (0, [4])
    assert "Step 4 could not be saved" in err
    assert commits.steps(tmp_path / "b" / "checkpoints") == [4, 2]


# Not ours


@pytest.mark.threat(9)
def test_a_read_only_workdir_is_refused_before_jax_is_there(disk):
    place = disk(1)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    code, told, took_s, jax_there = refused(place / "run")
    assert code == LOCKED, told
    assert f"{place / 'run'} is not writable: [EROFS] Read-only file system at {place}" in told
    assert took_s < 2
    assert not jax_there


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.threat(9)
def test_a_workdir_of_somebody_else_is_refused(tmp_path):
    """Root may write anywhere, so this asks as nobody."""
    code = """
import os, sys
from lsdl.rundir import RunDir
os.setuid(65534)
try:
    RunDir(sys.argv[1]).check_usable()
except ValueError as error:
    print(error.exit_code, error)
"""
    place = "/proc" if not os.path.isdir("/root") else "/"
    done = subprocess.run(
        [sys.executable, "-c", code, f"{place}run"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("73 ")
    assert "[EACCES] Permission denied at /" in done.stdout


REFUSED = """
import sys, time
from lsdl.rundir import RunDir
from lsdl.train import main
seen = []
check, began = RunDir.check_usable, time.monotonic()

def timed(folder):
    try:
        check(folder)
    finally:
        seen.append((time.monotonic() - began, "jax" in sys.modules))

RunDir.check_usable = timed
code = main(sys.argv[1:])
print(code, *seen[0])
"""


def refused(workdir):
    """(exit code, what was said, seconds, whether jax was loaded) of a start on `workdir`."""
    config = f"{kills.CONFIGS / 'digits_mlp.py'}:smoke"
    command = [sys.executable, "-c", REFUSED, "--config", config, f"--workdir={workdir}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    code, took_s, jax_there = done.stdout.split()
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return int(code), done.stderr, float(took_s), jax_there == "True"


# Another trainer


@pytest.mark.threat(10)
def test_a_second_trainer_is_refused_at_once_and_changes_nothing(run):
    before = tree(run.path)
    code, told, took_s, jax_there = refused(run.path)
    assert code == LOCKED
    assert f"in use by process {os.getpid()} on " in told
    assert took_s < 2
    assert not jax_there
    assert tree(run.path) == before


@pytest.mark.threat(10)
@pytest.mark.parametrize("how", ["deleted", "replaced", "overwritten"])
def test_whoever_lost_the_lock_commits_nothing_more(run, how, capfd):
    """The file that is locked is not the file that is there: another trainer may have that one."""
    with Checkpoints(run.checkpoints, owner=run) as checkpoints:
        checkpoints.save(1, SMALL, metrics=None)
        checkpoints.check(wait=True)
        lock = run.path / ".lock"
        if how == "overwritten":  # where flock does nothing, as on some network file systems
            lock.write_text("process 1 on other\n0123456789ab\n")
        else:
            lock.unlink()
        if how == "replaced":
            other = RunDir(run.path)
            other.acquire()
        with pytest.raises(LockedError, match="has another owner now"):
            checkpoints.save(2, SMALL, metrics=None)
        if how == "replaced":
            other.release()
    assert commits.steps(run.checkpoints) == [1]
    assert LockedError.exit_code == LOCKED == 73


@pytest.mark.threat(10)
def test_a_save_in_flight_is_fenced_too(run, monkeypatch):
    settled = commits._settled

    def meanwhile(folder):
        (run.path / ".lock").unlink()
        return settled(folder)

    monkeypatch.setattr(commits, "_settled", meanwhile)
    with Checkpoints(run.checkpoints, owner=run) as checkpoints:
        checkpoints.save(1, SMALL, metrics=None)
        with pytest.raises(LockedError):
            checkpoints.check(wait=True)
    assert commits.steps(run.checkpoints) == []


CLAIM = """
import sys
from lsdl.errors import LockedError
from lsdl.rundir import RunDir
for name in sys.argv[2:]:
    folder = RunDir(f"{sys.argv[1]}/{name}")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        folder.check_usable()
        folder.create()
        folder.acquire()
        print("won", flush=True)
    except LockedError as error:
        print("lost", "in use by process" in str(error), flush=True)
    sys.stdin.readline()
"""


@pytest.mark.threat(10)
@pytest.mark.parametrize("races", [5, pytest.param(100, marks=pytest.mark.faults)])
def test_of_two_simultaneous_starts_exactly_one_wins(tmp_path, races, record_property):
    names = [str(i) for i in range(races)]
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, tmp_path, *names],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    say = lambda p: (p.stdin.write("\n"), p.stdin.flush())  # noqa: E731
    for name in names:
        assert [p.stdout.readline() for p in pair] == ["ready\n"] * 2
        for p in pair:
            say(p)
        assert sorted(p.stdout.readline() for p in pair) == ["lost True\n", "won\n"], name
        for p in pair:
            say(p)
    for p in pair:
        p.communicate()
    record_property("races", races)


@pytest.mark.threat(10)
@pytest.mark.faults
def test_a_killed_trainers_folder_is_taken_over_at_once(tmp_path):
    """Start, SIGKILL while it trains, start another: refused before, owner after."""
    run = tmp_path / "run"
    first = kills.start(run)
    while not steps(run):
        assert first.poll() is None
        time.sleep(0.02)
    before = tree(run)["config.json"]
    code, told, took_s, _ = refused(run)
    assert (code, took_s < 2) == (LOCKED, True)
    assert f"in use by process {first.pid} on " in told
    assert tree(run)["config.json"] == before
    first.kill()
    first.wait()
    taken = RunDir(run)
    began = time.monotonic()
    taken.acquire()
    assert time.monotonic() - began < 1
    taken.release()
