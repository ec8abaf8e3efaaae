"""Every call of one save-and-retain cycle that changes the disk: killed there, or failed there.

Of all that writes: Python, orbax, and tensorstore's threads.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.outside import damage, steps

KILL_PARTS = 8
ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


class Cycles:
    """Cycles under the shim, each in a process of its own that is forked off one."""

    def __init__(self, folder):
        shim, compiler = folder / "shim.so", shutil.which("cc") or shutil.which("gcc")
        if not compiler or sys.platform != "linux":
            pytest.skip("needs Linux and a C compiler: the shim counts what libc is asked for")
        source = Path(__file__).with_name("shim.c")
        command = [compiler, "-shared", "-fPIC", "-O1", "-w", "-o", shim, source, "-ldl"]
        subprocess.run(command, check=True)
        self.folder, self.said, self.number = folder, folder / "said", 0
        environment = os.environ | {"LD_PRELOAD": str(shim), "JAX_NUM_CPU_DEVICES": "1"}
        with open(self.said, "w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.cycle"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                env=environment,
            )
        assert self.process.stdout.readline() == "ready\n", self.said.read_text()
        self.template = folder / "template"
        self("fill", self.template)
        log = folder / "log"
        self("save", self.fresh(), log=str(log))
        self.calls = [line.split("\t") for line in log.read_text().splitlines()]

    def __call__(self, do, run, **how):
        self.process.stdin.write(json.dumps({"do": do, "run": str(run), **how}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def fresh(self):
        """A run with the steps 1 and 2."""
        self.number += 1
        return Path(shutil.copytree(self.template, self.folder / f"run{self.number}"))

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(30) == 0


@pytest.fixture(scope="module")
def cycles(tmp_path_factory):
    cycles = Cycles(tmp_path_factory.mktemp("cycles"))
    yield cycles
    cycles.close()


def killed_at(cycles, n):
    """Kill at the n-th call; returns whether it came to that."""
    run = cycles.fresh()
    ended = cycles("save", run, n=n)
    assert ended["signal"] in (0, signal.SIGKILL), ended
    if not ended["signal"]:
        assert ended["answer"]["calls"] < n
        return False
    there = steps(run)
    for step in there:
        assert not damage(run / "checkpoints" / str(step)), (n, step)
    assert there in ([1, 2], [1, 2, 3], [2, 3]), n
    again = cycles("recover", run)
    expected = {"step": there[-1], "same": True, "names": [str(there[-1]), "9"]}
    assert again["answer"] == expected, (n, again, cycles.said.read_text())
    shutil.rmtree(run)
    return True


@pytest.mark.threat(2, 3)
def test_killed_at_the_calls_that_matter_most_all_is_there(cycles, record_property):
    """Each rename, and some of all kinds; all of them in the long tier."""
    renames = [int(n) for n, call, *_ in cycles.calls if call == "rename"]
    some = {*renames, *range(1, len(cycles.calls), 12), *(r + 1 for r in renames[-2:])}
    record_property("crash_points", sum(killed_at(cycles, n) for n in sorted(some)))


@pytest.mark.faults
@pytest.mark.threat(2, 3)
@pytest.mark.parametrize("part", range(KILL_PARTS))
def test_killed_at_every_call_all_is_there(cycles, record_property, part):
    met, n = 0, part + 1
    while killed_at(cycles, n):  # their number varies: no two runs of the threads are alike
        met, n = met + 1, n + KILL_PARTS
    assert n > len(cycles.calls) - KILL_PARTS
    record_property("crash_points_of_all", met)


@pytest.mark.threat(4)
def test_the_files_are_on_the_disk_before_their_names_and_these_before_the_commit(cycles):
    """By inode, over the calls of Python, orbax and tensorstore alike."""
    calls = [(call, int(own), int(parent), *p) for _, call, own, parent, *p in cycles.calls]
    [commit] = [i for i, c in enumerate(calls) if c[0] == "rename" and c[-1].endswith("/3")]
    synced, dirty, seen = {}, {}, set()
    for i, (call, own, parent, path, other) in enumerate(calls[:commit]):
        if call == "fsync":
            synced[own] = i
        elif call == "write":
            dirty[own] = i
            seen.add(path.rpartition("/")[2])
        elif "/.saving-" in path:
            dirty[parent] = i
            if call == "rename" and os.path.dirname(other) != os.path.dirname(path):
                dirty[parent] = i
    assert {"manifest.json", "_METADATA", "_sharding.__lock"} <= seen
    late = {inode for inode, i in dirty.items() if synced.get(inode, -1) < i}
    root = int(cycles.calls[commit][3])
    assert late <= {root}  # the name of the staging folder itself, which is synced after the rename
    after = calls[commit + 1]
    assert (after[0], after[1]) == ("fsync", root)
    assert not any("/.trash" in path for _, _, _, path, _ in calls[: commit + 2])


def failed_at(cycles, n, number):
    """The n-th call fails: known at once, tidy, and the next save works."""
    run, before = cycles.fresh(), len(cycles.said.read_text())
    answer = cycles("fail", run, n=n, errno=number)["answer"]
    said = cycles.said.read_text()[before:]
    assert answer is not None, (n, said)
    assert answer["said"] is None
    names = [name for name in answer["left"] if name.isdigit()]
    if answer["failed"]:
        # After the rename only the sync of its name can fail: whole, and told as not sure.
        assert names in (["1", "2"], ["1", "2", "3"]), n
        told = [line for line in said.splitlines() if line.startswith("lsdl: ")]
        assert len(told) == 1, said
        for words in (f"Step 3 could not be saved in {run}", errno.errorcode[number], "free"):
            assert words in told[0]
        assert "Traceback" not in said
    else:
        assert names[-1] == "3", n
    assert set(os.listdir(run / "checkpoints")) <= {"2", "3", "5"}, (n, answer)
    assert steps(run)[-1] == 5
    assert not any(damage(run / "checkpoints" / str(step)) for step in steps(run)), n
    shutil.rmtree(run)
    return answer["failed"]


@pytest.mark.threat(5, 8)
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_a_call_that_fails_is_told_in_a_line_and_the_next_save_works(
    cycles, number, record_property
):
    some = range(1 + ERRNOS.index(number), len(cycles.calls), 25)
    failed = sum(failed_at(cycles, n, number) for n in some)
    assert failed >= 2
    record_property("failed_calls", failed)


@pytest.mark.faults
@pytest.mark.threat(5, 8)
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
def test_each_call_that_fails_is_told_in_a_line(cycles, number, part, record_property):
    points = range(1 + part, len(cycles.calls) + 1, 4)
    record_property("failed_calls", sum(failed_at(cycles, n, number) for n in points))


@pytest.mark.threat(5, 8)
def test_a_disk_that_stays_broken_ends_the_run_with_the_last_good_step(cycles):
    run = cycles.fresh()
    answer = cycles("fail", run, n=30, errno=errno.ENOSPC, sticky=1)["answer"]
    assert answer["failed"]
    assert "Step 4 could not be saved" in answer["said"]
    assert "[ENOSPC]" in answer["said"]
    assert steps(run) == [1, 2]
    assert not any(damage(run / "checkpoints" / str(step)) for step in (1, 2))
