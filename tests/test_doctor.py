"""The doctor: what it finds in reports, in folders, on devices, and of several processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from lsdl import checkup
from lsdl.diagnosis import findings, table
from lsdl.doctor import main
from lsdl.launcher import spawn_local
from lsdl.sharding import mesh as meshes
from tests.conftest import CONFIGS, ROOT

SMOKE = f"{CONFIGS / 'digits_mlp.py'}:smoke"


def job(*changes, **common):
    """Reports of a healthy job, of as many processes as there are `changes`."""
    report = {
        **{"processes": len(changes), "host": "node1", "devices": 1, "kind": "A100"},
        **{"platform": "gpu", "asked_platform": "", "gpus_visible": 0, "gpus_on_node": 0},
        **{"mesh": None, "mode": "auto", "launcher": "", "expected_processes": None},
        **{"expected_id": None, "free": 10**12, "problems": []},
        "versions": {name: "1.0" for name in ("Python", "jax", "jaxlib", "flax", "lsdl")},
    }
    return [report | {"process": i} | common | change for i, change in enumerate(changes)]


SLURM = {"launcher": "slurm", "expected_id": 0}
FOUR = {"gpus_visible": 4, "gpus_on_node": 4}
ALONE = {"processes": 1, "expected_processes": 4}


@pytest.mark.parametrize(
    "reports",
    [
        job({}),
        job({}, {}),
        job({"host": "a"}, {"host": "b"}, devices=4, **SLURM, **FOUR, expected_processes=2),
        job(*[{}] * 4, **SLURM, **FOUR, expected_processes=4),  # one GPU for each
        # Slurm shows each process its own.
        job(*[{}] * 4, **SLURM, gpus_visible=1, gpus_on_node=4, expected_processes=4),
        job({}, platform="cpu", asked_platform="cpu", **SLURM, **FOUR, expected_processes=1),
        job({}, gpus_visible=1, gpus_on_node=8),  # a workstation's user chose one
        job({}, {}, mode="explicit", **SLURM, expected_processes=1),  # launch/local.py in a job
        job({}, launcher="kubernetes", expected_id=0),
    ],
)
def test_nothing_is_wrong_with_a_healthy_job(reports):
    assert findings(reports) == []


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        (
            job({"host": "a"}, {"host": "b"}, **SLURM, **FOUR, expected_processes=2),
            [
                "a has 4 GPUs, of which the job's 1 process there see 1: under Slurm jax takes one "
                "for each process",
                "b has 4 GPUs",
            ],
        ),
        (
            job({}, **SLURM, gpus_visible=1, gpus_on_node=4, expected_processes=1),
            ["CUDA_VISIBLE_DEVICES shows 1 to each. Start one process for each GPU (srun "
             "--ntasks-per-node=4), or export CUDA_VISIBLE_DEVICES=0,1,2,3 before srun."],
        ),
        (job({}, platform="cpu", **FOUR), ["see none: install lsdl[cuda]"]),
        (job({}, **FOUR), ["of which the job's 1 process there see 1: unset JAX_LOCAL_DEVICE_IDS"]),
        (
            job({}, **SLURM, **ALONE, mode="off"),
            ["The slurm job has 4 processes and this one sees 1: give --distributed=auto."],
        ),
        (job({}, launcher="slurm", **ALONE), ["this one sees 1: put srun before the command."]),
        (job({}, launcher="tpu", expected_id=1, **ALONE), ["The tpu job has 4 processes"]),
        (job({}, launcher="kubernetes", expected_id=2), ["this process 2 and it is alone: give"]),
        (
            job({}, {"versions": dict(job({})[0]["versions"], jaxlib="1.1")}),
            ["jaxlib differs: 1.0 in process 0; 1.1 in process 1: start all from the same"],
        ),
        (
            job({}, {"devices": 2}, {}),
            ["not have the same devices: 1 A100 in process 0, 2; 2 A100 in process 1."],
        ),
        (job({}, {"problems": ["No."]}, {"problems": ["No."]}), ["No. (process 1, 2)"]),
        (job({"problems": ["No."]}), ["No."]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_job_is_named(reports, said):
    found = findings(reports)
    assert len(found) == len(said), found
    for sentence, words in zip(found, said, strict=True):
        assert words in sentence


def test_every_process_has_a_line_until_there_are_too_many():
    text = table(job({}, {"host": "node2", "problems": ["No."]}))
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["0", "node1", "1", "A100", "1,000.0", "GB", "ok"],
        ["1", "node2", "1", "A100", "1,000.0", "GB", "1", "problem"],
    ]
    assert "processes: 2, devices: 2" in text
    lines = table(job(*[{}] * 500)).splitlines()
    assert "... and 468 more" in lines
    assert len(lines) < 40
    assert "processes: 500, devices: 500" in lines


@pytest.mark.threat(19)
@pytest.mark.parametrize("axis", ["data", "tensor"])
def test_a_collective_is_checked_to_the_bit(axis, monkeypatch):
    mesh = meshes.make_mesh(meshes.parse_mesh("data=2,fsdp=2,tensor=2", 8))
    seconds, right = checkup.time_collective(mesh, axis)
    assert right
    assert seconds > 0
    psum = jax.lax.psum
    monkeypatch.setattr(jax.lax, "psum", lambda x, axis: psum(x.at[..., 77].add(1), axis))
    assert not checkup.time_collective(mesh, axis)[1]


def test_a_clocks_offset_lies_within_its_bound(monkeypatch):
    """Two processes by turns: the second one's clock is 5 s ahead, and it is late for a gather."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    clock = iter(np.arange(0, 1000, 0.01).tolist())
    monkeypatch.setattr(checkup.time, "time", lambda: next(clock))

    def gather(mine):
        entered, left = mine.view(np.float64)
        return np.stack([mine, np.array([entered + 5.004, left + 5.001]).view(np.uint8)])

    monkeypatch.setattr(checkup.multihost_utils, "process_allgather", gather)
    zero, one = checkup.clock_offsets()
    assert zero[0] == 0
    assert abs(one[0] - 5.0) <= one[1] < 0.02


def test_a_folder_that_is_fit_keeps_no_trace(tmp_path):
    assert checkup.check_folder(tmp_path / "runs" / "a") is None
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    assert "choose another --workdir" in checkup.check_folder(file / "run")
    assert "choose another --workdir" in checkup.check_folder(Path("/proc/self/run"))


def test_what_takes_too_long_ends_with_a_sentence():
    code = (
        "import time; from lsdl.checkup import deadline\n"
        "with deadline(30, 'nothing'): pass\n"
        "with deadline(0.2, 'an all-reduce'): time.sleep(60)"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=50)
    assert done.returncode == 71
    assert done.stderr.endswith("an all-reduce took more than 0.2 s.\n")


def test_the_doctor_is_content_with_this_machine(capfd, tmp_path):
    began = time.monotonic()
    code = main(
        ["--config", SMOKE, f"--workdir={tmp_path / 'run'}", "--config.mesh=data=4,tensor=2"]
    )
    out, err = capfd.readouterr()
    assert (code, err) == (0, "")
    assert time.monotonic() - began < 30
    assert "data=4: all-reduce of 1 MiB per device in" in out
    assert "tensor=2: all-reduce of 1 MiB per device in" in out
    assert "fsdp=" not in out
    assert out.endswith("All is well.\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.data.source=folder:/no/such"], "/no/such"),
        (["--config.mesh=data=3"], "does not fill the 8 devices"),
    ],
)
def test_the_doctor_names_what_does_not_fit(flags, said, capfd, tmp_path):
    assert main(["--config", SMOKE, f"--workdir={tmp_path}", *flags]) == 2
    out, err = capfd.readouterr()
    assert said in err
    assert err.startswith("lsdl: ")
    assert "1 finding." in out
    assert "data=8: all-reduce" in out  # looked at all the same


def test_too_little_space_is_found(capfd, tmp_path, monkeypatch):
    usage = checkup.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkup.shutil, "disk_usage", lambda folder: usage)
    assert main(["--config", SMOKE, f"--workdir={tmp_path}"]) == 2
    assert "GB free and the run's checkpoints may need" in capfd.readouterr().err


def test_the_doctor_measures_the_loader_alone(capfd):
    assert main(["--data", SMOKE, "--batches=3"]) == 0
    out = capfd.readouterr().out
    assert "examples/s from the loader alone, 3 batches of 96" in out
    assert out.endswith("Nothing was trained.\n")


@pytest.mark.parametrize("flag", ["--batches=0", "--wait=0"])
def test_the_doctor_refuses_what_is_not_positive(flag, capfd):
    assert main([flag]) == 2
    assert "must be positive" in capfd.readouterr().err


def two(*command, path=ROOT):
    """[(exit code, stdout, stderr)] of two processes of `python -m COMMAND`."""
    started = spawn_local(
        command,
        num_processes=2,
        devices_per_process=1,
        env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(path)])},
        capture=True,
    )
    outputs = [process.communicate(timeout=120) for process in started]
    return [(p.returncode, *o) for p, o in zip(started, outputs, strict=True)]


def test_two_processes_give_one_summary(tmp_path):
    zero, one = two("lsdl.doctor", "--config", SMOKE, f"--workdir={tmp_path}")
    assert (zero[0], one[0]) == (0, 0), (zero, one)
    assert "processes: 2, devices: 2" in zero[1]
    assert "data=2: all-reduce of 1 MiB per device" in zero[1]
    assert "clocks: process" in zero[1]
    assert "All is well." in zero[1]
    for word in ("process ", "all-reduce", "well"):
        assert word not in one[1]
    assert list(tmp_path.iterdir()) == []


def test_a_finding_of_one_process_is_that_of_all(tmp_path):
    """Processes whose devices and versions differ, so that no collective could say so."""
    program = """import os, sys
i = sys.argv[-1][-1]
os.environ["JAX_NUM_CPU_DEVICES"] = "12"[int(i)]
from lsdl import checkup, doctor
versions = checkup.versions
checkup.versions = lambda: versions() | {"jaxlib": "0." + i}
sys.exit(doctor.main(sys.argv[1:]))"""
    (tmp_path / "uneven.py").write_text(program)
    zero, one = two("uneven", f"--workdir={tmp_path / 'run'}", path=tmp_path)
    assert (zero[0], one[0]) == (2, 2), (zero, one)
    lines = [line for line in zero[2].splitlines() if line.startswith("lsdl: ")]
    assert lines == [
        "lsdl: The processes do not have the same devices: 1 cpu in process 0; 2 cpu in process 1.",
        "lsdl: jaxlib differs: 0.0 in process 0; 0.1 in process 1: start all from the same "
        "environment.",
    ]
    assert "lsdl:" not in one[2]


@pytest.mark.threat(21)
def test_digests_of_the_data_are_compared(capsys):
    assert main(["--data", f"{CONFIGS / 'digits_mlp.py'}:smoke", "--digests"]) == 0
    assert capsys.readouterr().out.startswith("3 files of ")
