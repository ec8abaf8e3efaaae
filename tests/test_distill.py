"""Distillation: the teacher is a run's model, goes with the state, and is never trained."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest

from lsdl import course
from lsdl.checkpoint import Checkpoints
from lsdl.errors import BAD_INPUT
from lsdl.experiment import build
from lsdl.step import TEACHER
from lsdl.train import main
from tests.conftest import CONFIGS
from tests.curves import assert_equal_curves, assert_equal_states, curve
from tests.tiny import FAST
from tests.zoo import SAME

TEACHER_FIELDS = ("model.hidden=(16,)", "total_steps=2", "log.tensorboard=false")
SCHEDULE = (
    *("loss.distill_weight=0.5", "optim.schedule.name=constant"),
    *("optim.schedule.warmup_steps=0", "eval.every_steps=9", "checkpoint.every_steps=9"),
)
STUDENT = (
    *("model.pool=distill", "model.stem=0", "model.width=16", "model.num_layers=1"),
    *("model.num_heads=4", "model.mlp_dim=32", "model.dropout=0.1", *SCHEDULE),
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run of an MLP."""
    workdir = tmp_path_factory.mktemp("teacher") / "run"
    overrides = [f"--config.{override}" for override in TEACHER_FIELDS]
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    assert main(["--config", config, f"--workdir={workdir}", *overrides]) == 0
    return workdir


def restored(experiment, workdir, step):
    checkpoints = Checkpoints(workdir / "checkpoints")
    state = checkpoints.restore(step, experiment.abstract_state)
    checkpoints.close()
    return state


def assert_same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_stopped_student_goes_on_to_the_same_bits_and_its_teacher_never_changes(
    load, train, teacher, tmp_path
):
    """Here the student has one head, for its labels and its teacher alike."""
    same = ("model.hidden=(24,)", "log.tensorboard=false", f"teacher={teacher}", *SCHEDULE)

    def student(name, steps):
        overrides = (f"--config.{override}" for override in (*same, f"total_steps={steps}"))
        return train("digits_mlp:smoke", f"--workdir={tmp_path / name}", *overrides)

    assert student("whole", 3)[0] == 0
    assert student("parts", 2)[0] == 0
    code, out, _ = student("parts", 3)
    assert code == 0
    assert "resuming with total_steps: 2 -> 3" in out
    experiment = build(load("digits_mlp:smoke", *same))
    whole, parts = (restored(experiment, tmp_path / name, 3) for name in ("whole", "parts"))
    for name in ("params", "opt_state", "model_state"):
        assert_same_bits(getattr(parts, name), getattr(whole, name))
    taught = build(load("digits_mlp:smoke", *TEACHER_FIELDS))
    params = restored(taught, teacher, 2).params
    assert_same_bits(whole.model_state[TEACHER]["params"], params)


def test_the_first_loss_is_half_the_teachers(load, teacher, tmp_path):
    """Of the class head with the label, and of the distillation head with the teacher's class."""
    config = load("digits_vit:smoke", *STUDENT, f"teacher={teacher}", "model.dropout=0.0")
    experiment = build(config, devices=jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path / "none")
    state = course.initial(experiment, checkpoints, 0)
    checkpoints.close()
    batch = experiment.train_loader().batch(0)
    (x,) = experiment.task.inputs(batch)
    logits, distilled = experiment.module.apply({"params": state.params}, x, train=True)
    kernel, bias = (state.model_state[TEACHER]["params"]["head"][n] for n in ("kernel", "bias"))
    hidden = state.model_state[TEACHER]["params"]["hidden_0"]["dense"]
    hidden = np.maximum(x.reshape(len(x), -1) @ hidden["kernel"] + hidden["bias"][None], 0)
    answer = np.argmax(np.array(hidden @ kernel + bias[None]), axis=1)

    def entropy(logits, label):
        chosen = np.array(jax.nn.log_softmax(logits))[np.arange(len(label)), label]
        return -chosen.mean()

    expected = (entropy(logits, np.array(batch["label"])) + entropy(distilled, answer)) / 2
    assert (answer != np.array(batch["label"])).any()
    step = experiment.train_step.lower(state, batch).compile(compiler_options=FAST)
    _, metrics = step(state, batch)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module")
def one_device():
    return functools.lru_cache(lambda config: curve(config, devices=1, steps=2, noise=True))


@pytest.mark.parametrize(
    "layout",
    [
        ("mesh=data=2,fsdp=2,tensor=2", "accum=2"),
        ("mesh=data=8", "partitioner=shard_map"),
        ("mesh=data=8", "partitioner=pmap"),
    ],
    ids=" ".join,
)
def test_a_student_takes_the_one_device_steps_on_every_layout(load, one_device, teacher, layout):
    soft = ("loss.distill_temperature=3.0", f"teacher={teacher}")
    same = ("digits_vit:smoke", *SAME, *STUDENT, *soft)
    expected = one_device(load(*same))
    actual = curve(load(*same, *layout), steps=2, noise=True)
    assert_equal_curves(actual[0], expected[0])
    assert_equal_states(actual[1], expected[1])


def test_a_teacher_without_statistics_is_no_batch_norm(load, teacher):
    config = load("digits_vit:smoke", *STUDENT, f"teacher={teacher}", "accum=2")
    assert not any("BatchNorm" in note for note in build(config).notes)


# --- refusals -------------------------------------------------------------------------------------


def refusal(train, tmp_path, *overrides):
    overrides = [f"--config.{override}" for override in (*STUDENT, *overrides)]
    code, out, error = train("digits_vit:smoke", f"--workdir={tmp_path / 'run'}", *overrides)
    assert (code, out, len(error.splitlines())) == (BAD_INPUT, "", 1)
    assert not (tmp_path / "run").exists()
    return error


def test_teacher_and_weight_are_given_together(train, teacher, tmp_path):
    alone = refusal(train, tmp_path, f"teacher={teacher}", "loss.distill_weight=0.0")
    assert "loss.distill_weight=0.0 must be given together" in alone
    assert "teacher='' and loss.distill_weight=0.5" in refusal(train, tmp_path)


def test_teacher_has_to_be_a_run(train, tmp_path):
    assert "is no run folder" in refusal(train, tmp_path, f"teacher={tmp_path / 'none'}")


def altered(teacher, tmp_path, **fields):
    """A folder whose stored config is the teacher's but for `fields`; None: without one."""
    folder = tmp_path / "altered"
    folder.mkdir()
    shutil.copytree(teacher / "checkpoints", folder / "checkpoints")
    stored = json.loads((teacher / "config.json").read_text())
    stored["config"] |= fields
    if fields:
        (folder / "config.json").write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ["classification run", "no config.json"]),
        ({"task": "language"}, ["classification run", "task=language"]),
        ({"model.hidden": [32]}, ["params/head/kernel (32, 10), there (16, 10)"]),
    ],
    ids=["no config", "language", "wider"],
)
def test_a_teacher_that_cannot_teach_is_refused(train, teacher, tmp_path, fields, words):
    folder = altered(teacher, tmp_path, **fields)
    sentence = refusal(train, tmp_path, f"teacher={folder}")
    for word in words:
        assert word in sentence
