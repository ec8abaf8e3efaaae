"""Jobs of several processes: killed all at once around a commit, rewound, audited."""

import json
import signal

import pytest

from lsdl.errors import BAD_INPUT, FINISHED, STUCK, UNREACHABLE
from lsdl.launcher import spawn_local
from tests.conftest import ROOT
from tests.faults.jobs import Job, complete, rows, saved
from tests.faults.test_spikes import REWIND

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of jobs that were left alone, by the number of their processes."""
    folder = tmp_path_factory.mktemp("whole")
    return {n: complete(folder / str(n), processes=n) for n in (2, 3)}


@pytest.mark.threat(2, 28)
@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize(("phase", "newest"), [("committing", 6), ("committed", 12)])
def test_all_killed_around_a_commit(tmp_path, whole, record_property, phase, newest, processes):
    """Before it all files are written and none is named; after it the step is there for good."""
    workdir = tmp_path / "run"
    fault = {"phase": phase, "at": 12, "process": 0, "action": "hold:60"}
    with Job(workdir, processes=processes, fault=fault) as job:
        job.await_mark(phase, 0)
        for process in range(processes):
            job.send(process, signal.SIGKILL)
        codes, errors, _ = job.ended()
    assert codes == [-signal.SIGKILL] * processes, errors
    assert max(saved(workdir)) == newest
    assert complete(workdir, processes=processes) == whole[processes]
    assert not list((workdir / "checkpoints").glob(".*"))
    record_property("kills", processes)


@pytest.mark.threat(2, 28, 44)
@pytest.mark.parametrize("phase", ["committing", "committed"])
@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_around_a_commit(tmp_path, whole, record_property, phase, victim):
    workdir = tmp_path / "run"
    fault = {"phase": phase, "at": 12, "process": 0}
    fault["action"] = "kill" if victim == 0 else "hold:3"
    with Job(workdir, "--heartbeat=4", processes=2, fault=fault) as job:
        job.await_mark(phase, 0)
        if victim == 1:
            job.send(1, signal.SIGKILL)
        codes, errors, _ = job.ended()
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == UNREACHABLE, errors
    assert complete(workdir, processes=2) == whole[2]
    record_property("kills", 1)


@pytest.mark.threat(12, 18)
def test_two_processes_rewind_as_one_that_was_given_the_list(tmp_path):
    flags = [f"--config.{field}" for field in REWIND]
    given = "--config.data.skip_batches=((8,11),)"
    for name, more in (("rewound", ()), ("given", (given,))):
        with Job(tmp_path / name, *flags, *more, processes=2, fault={"spoilt": 10}) as job:
            codes, errors, _ = job.ended(within_s=180)
        assert codes == [FINISHED, FINISHED], errors
        assert ("Step 11 is a spike: back to step 8" in errors[0]) == (name == "rewound")
        assert "spike" not in errors[1]
    assert rows(tmp_path / "rewound") == rows(tmp_path / "given")


@pytest.mark.threat(19, 44)
def test_what_two_processes_did_is_replayed_by_two(tmp_path):
    workdir = tmp_path / "run"
    with Job(workdir, "--config.guard.audit_every_steps=3", processes=2) as job:
        codes, errors, _ = job.ended(within_s=180)
    assert codes == [FINISHED, FINISHED], errors
    rows = (workdir / "audit.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [3, 6, 9, 12, 15, 18, 21, 24]
    codes, said = replayed(workdir, 2)
    assert codes == [FINISHED, FINISHED], said
    assert [out for out, _ in said] == ["5 audited steps, 6 to 18: the same bits.\n", ""]
    codes, said = replayed(workdir, 1)
    assert codes == [BAD_INPUT], said
    assert "with other processes, devices or versions than these" in said[0][1]
    changed = json.loads(rows[3]) | {"loss": "00000000"}
    (workdir / "audit.jsonl").write_text("\n".join([*rows[:3], json.dumps(changed), ""]))
    codes, said = replayed(workdir, 2)
    assert codes == [STUCK, STUCK], said
    assert [error.count("is not what was written") for _, error in said] == [1, 1]


def replayed(workdir, processes):
    """(exit codes, (stdout, stderr) of each) of a replay of the steps 5 to 20."""
    children = spawn_local(
        ("lsdl.audit", str(workdir), "--steps=5:20"),
        **dict(num_processes=processes, devices_per_process=1, capture=True),
        env={"PYTHONPATH": str(ROOT)},
    )
    said = [child.communicate(timeout=180) for child in children]
    own = [
        ("".join(line for line in out.splitlines(True) if "Gloo" not in line), error)
        for out, error in said
    ]
    return [child.returncode for child in children], own
