"""Real processes on loopback: the same curve as one, and one voice."""

import signal
import subprocess
import sys
import time

import pytest

from lsdl.metrics import read_rows
from lsdl.processes import spawn_local
from tests.conftest import CONFIGS, ROOT
from tests.curves import curve

MESH = "--config.mesh=data=2,fsdp=2,tensor=2"
RUN = (
    "lsdl.train",
    f"--config={CONFIGS / 'digits_vit.py'}:smoke",
    "--config.model.num_layers=1",
    "--config.optim.schedule.warmup_steps=2",
    "--config.log.tensorboard=false",
    MESH,
)


def run(workdir, num_processes, *more, during=None):
    processes = spawn_local(
        (*RUN, f"--workdir={workdir}", *more),
        num_processes=num_processes,
        devices_per_process=8 // num_processes,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        if during:
            during(processes)
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def losses(workdir):
    rows = [r for r in read_rows(workdir / "metrics.jsonl") if r["split"] == "train"]
    return [(row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("processes") / "two"
    codes, outputs = run(workdir, 2)
    assert codes == [0, 0], outputs
    return workdir, outputs


def test_two_processes_give_the_curve_of_one(load, two):
    overrides = [o.removeprefix("--config.") for o in RUN if o.startswith("--config.")]
    expected, _ = curve(load("digits_vit:smoke", *overrides))
    for (loss, norm), one, one_norm in zip(
        losses(two[0]), expected["loss"], expected["grad_norm"], strict=True
    ):
        assert loss == pytest.approx(one, rel=1e-5)
        assert norm == pytest.approx(one_norm, rel=1e-5)


def test_only_process_0_prints(two):
    outputs = two[1]
    assert "lowest valid loss" in outputs[0][0]
    # gloo writes connection lines of its own, torn ones too, to stdout
    for word in ("digits", "step", "example", "accuracy", "written", "lsdl"):
        assert word not in outputs[1][0]
    assert "step" not in outputs[1][1]


@pytest.mark.slow
def test_four_processes_give_the_bits_of_two(two, tmp_path):
    codes, outputs = run(tmp_path / "four", 4)
    assert codes == [0] * 4, outputs
    assert losses(tmp_path / "four") == losses(two[0])


@pytest.mark.slow
def test_sigterm_to_one_process_saves_and_stops_all(tmp_path):
    def terminate(processes):
        deadline = time.monotonic() + 120
        while not losses(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)

    long = ("--config.total_steps=2000", "--config.checkpoint.every_steps=1000")
    codes, outputs = run(tmp_path / "run", 2, *long, during=terminate)
    assert codes == [75, 75], outputs
    assert "saved. The same command goes on from there." in outputs[0][0]
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1
    assert saved[0] == len(losses(tmp_path / "run"))


def test_what_one_process_cannot_do_ends_them_all(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    codes, outputs = run(file / "run", 2)
    assert codes == [2, 2], outputs
    assert "choose another --workdir" in outputs[0][1]
    assert "choose another --workdir" not in outputs[1][1]


def test_what_no_process_can_do_is_said_once(tmp_path):
    pmap = ("--config.partitioner=pmap", "--config.mesh=data=8")
    codes, outputs = run(tmp_path / "run", 2, *pmap)
    assert codes == [2, 2], outputs
    assert ["runs in one process alone" in error for _, error in outputs] == [True, False]
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_is_not_there_is_missed(tmp_path):
    command = [sys.executable, "-m", *RUN, f"--workdir={tmp_path / 'run'}", "--distributed=on"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("lsdl: --distributed=on finds no launcher here")
