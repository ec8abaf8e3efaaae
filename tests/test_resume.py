"""A run that was stopped, killed or moved ends as the one that was not."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from lsdl.checkpoint import Checkpoints
from lsdl.experiment import build
from lsdl.metrics import read_rows
from tests.conftest import CONFIGS

STEPS = 60
RUN = (
    "--config.model.num_layers=1",
    "--config.model.dropout=0.1",
    f"--config.total_steps={STEPS}",
    "--config.checkpoint.every_steps=10",
    "--config.eval.every_steps=20",
    "--config.log.tensorboard=false",
)
CONFIG = f"{CONFIGS / 'digits_vit.py'}:smoke"
TIMES = ("step_time_s", "examples_per_s")


def command(workdir, *more):
    return [
        sys.executable,
        "-m",
        "lsdl.train",
        "--config",
        CONFIG,
        f"--workdir={workdir}",
        *RUN,
        *more,
    ]


def start(workdir, *more):
    return subprocess.Popen(
        command(workdir, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(workdir, *more):
    done = subprocess.run(command(workdir, *more), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(row["step"] >= step for row in read_rows(workdir / "metrics.jsonl")):
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} never came: {process.communicate()[0]}")


def state_of(load, workdir, mesh="data=8"):
    overrides = [o.removeprefix("--config.") for o in RUN]
    experiment = build(load("digits_vit:smoke", *overrides, f"mesh={mesh}"))
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore(STEPS, experiment.abstract_state)
    checkpoints.close()
    return state


def rows_of(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_bits(a, b):
    def same(x, y):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "uninterrupted"
    finish(workdir)
    return workdir


@pytest.mark.threat(1, 12)
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75), (signal.SIGINT, 130)],
)
def test_a_stopped_run_goes_on_to_the_same_bits(load, tmp_path, uninterrupted, number, code):
    process = start(tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 12)
    os.kill(process.pid, number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == code, output
    if number != signal.SIGKILL:
        assert "saved. The same command goes on from there." in output
    assert "Traceback" not in output
    finish(tmp_path / "run")
    assert_same_bits(state_of(load, tmp_path / "run"), state_of(load, uninterrupted))
    assert rows_of(tmp_path / "run") == rows_of(uninterrupted)


@pytest.mark.threat(13)
def test_a_run_moves_to_another_mesh(load, tmp_path, uninterrupted):
    process = start(tmp_path / "run", "--config.mesh=fsdp=8")
    wait_for_step(process, tmp_path / "run", 12)
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    output = finish(tmp_path / "run", "--config.mesh=data=2,fsdp=2,tensor=2")
    assert "resuming with mesh: fsdp=8 -> data=2,fsdp=2,tensor=2" in output
    history = json.loads((tmp_path / "run" / "config.json").read_text())["history"]
    assert [entry.get("changes") for entry in history] == [
        None,
        {"mesh": ["fsdp=8", "data=2,fsdp=2,tensor=2"]},
    ]
    for row, expected in zip(rows_of(tmp_path / "run"), rows_of(uninterrupted), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-6)


def test_a_complete_run_says_so_and_changes_nothing(uninterrupted):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    output = finish(uninterrupted)
    assert "is complete" in output
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_a_longer_run_goes_on_from_the_shorter_one(load, tmp_path, train):
    short = ("--config.total_steps=4", f"--workdir={tmp_path / 'run'}")
    assert train("digits_mlp:smoke", *short)[0] == 0
    longer = ("--config.total_steps=6", f"--workdir={tmp_path / 'run'}")
    code, output, _ = train("digits_mlp:smoke", *longer)
    assert code == 0
    assert "resuming with total_steps: 4 -> 6" in output
    steps = [
        r["step"] for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.threat(12)
def test_a_shorter_run_than_the_stored_one_is_refused(tmp_path, train):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert train("digits_mlp:smoke", "--config.total_steps=4", workdir)[0] == 0
    code, _, error = train("digits_mlp:smoke", "--config.total_steps=2", workdir)
    assert code == 2
    assert "has 4 steps already" in error


def test_the_newest_and_the_best_checkpoint_are_kept(load, tmp_path):
    experiment = build(load("digits_mlp:smoke"))
    state = experiment.init()
    checkpoints = Checkpoints(tmp_path / "c", keep_latest=1, keep_best=1)
    for step, loss in enumerate((0.5, 0.2, float("nan"), None, 0.7), start=1):
        metrics = None if loss is None else {"loss": loss}
        checkpoints.save(step, state, metrics=metrics)
    checkpoints.close()
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir()) == [2, 5]


def test_what_is_saved_is_the_state_at_the_time_of_the_save(load, tmp_path):
    # The next steps donate the saved arrays while the files are still being written.
    experiment = build(load("digits_mlp:smoke", "mesh=fsdp=8"))
    state = experiment.init()
    batches = list(experiment.train_loader().batches(0, 6))
    checkpoints = Checkpoints(tmp_path / "c", keep_latest=9)
    copies = {}
    for step, batch in enumerate(batches, start=1):
        state, _ = experiment.train_step(state, batch)
        copies[step] = jax.tree.map(np.array, state.params)
        checkpoints.save(step, state, metrics=None)
    for step, copy in copies.items():
        for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2"):
            target = build(load("digits_mlp:smoke", f"mesh={mesh}")).abstract_state
            restored = checkpoints.restore(step, target)
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), copy)
    checkpoints.close()
