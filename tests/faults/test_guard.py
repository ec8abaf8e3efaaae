"""A step that is not finite changes nothing; too many in a row end the run."""

import json

import jax
import numpy as np
import pytest

from lsdl import guard
from lsdl.checkpoint import Checkpoints
from lsdl.errors import NOT_FINITE, NotFiniteError
from lsdl.experiment import build
from tests.faults import poison
from tests.tiny import FAST

PARTS = ("params", "model_state", "opt_state")
NET = ("digits_bn_mlp:smoke", "model.hidden=(16,)", "batch_size=32")
LAYOUTS = {
    "one device": (1, ()),
    "fsdp": (8, ("mesh=data=2,fsdp=4",)),
    "by hand": (8, ("mesh=fsdp=8", "partitioner=shard_map")),
    "pmap": (8, ("mesh=data=8", "partitioner=pmap")),
}


def bits(state):
    """{part: the bytes of its arrays}."""
    return {p: [np.asarray(x).tobytes() for x in jax.tree.leaves(getattr(state, p))] for p in PARTS}


def final_bits(experiment, workdir, step):
    """The bytes of a checkpoint."""
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        state = checkpoints.restore(step, experiment.abstract_state)
    return bits(state)


def walk(config, steps, devices=1):
    """The first state and those after each of `steps` steps, as bytes; and the steps' metrics."""
    experiment = build(config, devices=jax.devices()[:devices])
    lowered = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    program = lowered.compile(compiler_options=FAST)
    state = experiment.init()
    states, rows = [bits(state)], []
    for batch in experiment.train_loader().batches(0, steps):
        state, metrics = program(state, batch)
        states.append(bits(state))
        rows.append(jax.device_get(metrics))
    return states, rows, state


@pytest.mark.threat(17)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_finite_changes_nothing(load, monkeypatch, layout):
    devices, more = LAYOUTS[layout]
    poison.gradients(monkeypatch, "nan", lambda step: step % 2 == 1)
    states, rows, state = walk(load(*NET, *more), 4, devices)
    assert states[2] == states[1] != states[0]
    assert states[4] == states[3] != states[2]
    assert [int(row["skipped_steps"]) for row in rows] == [0, 1, 1, 2]
    assert [int(row[guard.IN_A_ROW]) for row in rows] == [0, 1, 0, 1]
    assert int(state.step) == 4


@pytest.mark.threat(17)
@pytest.mark.parametrize("fault", ["inf", "minus inf", "loss"])
def test_whatever_is_not_finite_is_seen(load, monkeypatch, fault):
    poison.gradients(monkeypatch, fault, lambda step: step == 1)
    states, rows, _ = walk(load(*NET), 2)
    assert states[2] == states[1]
    assert int(rows[1]["skipped_steps"]) == 1


@pytest.mark.threat(17, 44)
def test_an_update_that_overflows_ends_the_run_before_a_save(train, tmp_path):
    rate = ("optim.name=sgd", "optim.schedule.name=constant", "optim.schedule.peak=3e38")
    rate += ("optim.schedule.warmup_percent=0.0", "checkpoint.every_steps=1")
    given = [f"--config.{field}" for field in rate]
    code, _, error = train("digits_mlp:smoke", f"--workdir={tmp_path}", *given)
    assert code == NOT_FINITE
    assert "The update of step 1 is not finite (update_norm inf)" in error
    assert not [p for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit()]


@pytest.mark.threat(17)
def test_the_rate_goes_on_where_the_optimiser_is(load, monkeypatch):
    """A skipped step is none of the schedule's: the rate that is told is the one applied."""
    plain = (*("optim.name=sgd", "optim.momentum=0.0", "optim.weight_decay=0.0"),)
    plain += ("optim.clip_norm=0.0", "optim.schedule.warmup_steps=3", "optim.schedule.peak=0.1")
    poison.gradients(monkeypatch, "nan", lambda step: step == 1)
    _, rows, _ = walk(load(*NET, *plain), 4)
    for row in (rows[2], rows[3]):
        ratio = row["update_norm"] / row["grad_norm"]
        assert row["learning_rate"] == pytest.approx(ratio, rel=1e-5)


@pytest.mark.threat(17, 44)
def test_too_many_in_a_row_end_the_run(train, load, monkeypatch, tmp_path):
    poison.gradients(monkeypatch, "nan", lambda step: (step >= 4) | (step == 1))
    every = ("--config.checkpoint.every_steps=2", "--config.checkpoint.keep_latest=9")
    code, _, error = train(
        "digits_mlp:smoke", f"--workdir={tmp_path}", "--config.guard.limit=3", *every
    )
    assert code == NOT_FINITE
    (line,) = [line for line in error.splitlines() if line.startswith("lsdl: ")]
    assert "4 steps in a row up to step 8 were not finite and changed nothing" in line
    assert "(the last: grad_norm nan): lower optim.schedule.peak" in line
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["split"] == "train"]
    assert steps == list(range(1, max(steps) + 1))
    assert 8 <= max(steps) <= 10  # within two steps of the one that was too many
    experiment = build(load("digits_mlp:smoke", "guard.limit=3"))
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert saved
    for step in saved:
        state = checkpoints.restore(step, experiment.abstract_state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((state.params, state.opt_state)))
    checkpoints.close()


def test_a_step_is_read_when_two_more_are_sent():
    watch, read = guard.Verdicts(guard.Rule(limit=0)), []

    class Row(dict):
        def __getitem__(self, name):
            read.append(self["step"]) if name == guard.IN_A_ROW else None
            return super().__getitem__(name)

    for step in range(1, 6):
        watch.sent(step, Row({"step": step, guard.IN_A_ROW: np.int32(0)}))
        assert read == list(range(1, step - 1))
    watch.settle()
    assert read == [1, 2, 3, 4, 5]


def test_the_limit_is_how_many_may_be_left_out():
    row = {"loss": np.float32("nan"), "grad_norm": np.float32(1), guard.SPIKED: np.bool_(False)}
    watch = guard.Verdicts(guard.Rule(limit=2))
    for step in (1, 2):
        watch.sent(step, row | {guard.IN_A_ROW: np.int32(step)})
    watch.settle()
    watch.sent(3, row | {guard.IN_A_ROW: np.int32(3)})
    with pytest.raises(NotFiniteError, match=r"3 steps in a row up to step 3.*as no step was good"):
        watch.settle()


def test_the_guard_takes_no_memory_of_the_step(load, monkeypatch):
    """What the step holds beside its arguments is what it held without the select."""
    block = (*("model.num_layers=2", "model.width=64", "model.mlp_dim=256", "batch_size=8"),)
    small = ("stdlib_gpt:smoke", *block, "data.seq_len=32", "model.max_length=32")

    def temporary():
        experiment = build(load(*small), devices=jax.devices()[:1])
        step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
        return step.compile().memory_analysis().temp_size_in_bytes

    guarded = temporary()
    monkeypatch.setattr(guard, "chosen", lambda good, new, old: new)
    assert guarded <= 1.01 * temporary()
