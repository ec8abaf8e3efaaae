"""A spike is skipped or rewound from; healthy noise is not taken for one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import guard
from lsdl.experiment import build
from lsdl.metrics import read_rows
from tests.faults import poison
from tests.faults.test_guard import bits, final_bits

WATCHED = guard.Rule("skip")
QUICK = ("data.label_noise=0.0", "guard.window=8", "log.tensorboard=false", "eval.every_steps=20")


def judged(losses, norms, rule=WATCHED):
    """Whether each of the steps counts."""

    def one(state, seen):
        verdict = guard.judge(state, *seen, model_state={}, rule=rule)
        return verdict.guard, verdict.good

    seen = jnp.float32(losses), jnp.float32(norms)
    return np.array(jax.jit(lambda: jax.lax.scan(one, guard.init(rule), seen)[1])())


def healthy(seed, steps=10_000, rows=64):
    """A decaying curve: batch means of losses with a heavy tail, and lognormal gradient norms."""
    draw = np.random.default_rng(seed)
    curve = 2.0 + 6.0 / (1 + np.arange(steps) / 50)
    examples = np.exp(draw.standard_normal((steps, rows)))
    losses = curve * (1 + 0.05 * (examples.mean(1) - np.exp(0.5)))
    return losses, 0.3 * curve * np.exp(0.3 * draw.standard_normal(steps))


@pytest.mark.threat(18)
def test_ten_thousand_healthy_steps_are_no_spikes(record_property):
    record_property("healthy_steps", 10_000)
    assert judged(*healthy(0)).all()


@pytest.mark.faults
@pytest.mark.threat(18)
def test_a_hundred_thousand_healthy_steps_have_hardly_a_spike(record_property):
    """Noise with so heavy a tail has one in some 100,000."""
    wrong = [int(np.count_nonzero(~judged(*healthy(seed)))) for seed in range(1, 11)]
    record_property("healthy_steps", 100_000)
    record_property("false_skips", sum(wrong))
    assert sum(wrong) <= 2


@pytest.mark.threat(18)
@pytest.mark.parametrize("which", [0, 1])
def test_a_spike_is_seen_at_its_own_step(which):
    seen = healthy(0, steps=1_000)
    seen[which][700] *= 20
    (left_out,) = np.flatnonzero(~judged(*seen))
    assert left_out == 700


def test_half_a_window_comes_before_the_first_verdict():
    losses, norms = np.full(200, 1.0), np.full(200, 1.0)
    losses[[63, 64]] = 50.0
    assert np.flatnonzero(~judged(losses, norms)).tolist() == [64]
    losses[[62, 63]] = 1.0, 1.0
    assert judged(np.where(np.arange(200) == 63, 50.0, 1.0), norms).all()


def test_nearly_equal_losses_are_no_spikes():
    assert judged(1 + 1e-4 * np.arange(500) % 7, np.ones(500)).all()


@pytest.mark.threat(18)
def test_a_skipped_spike_changes_nothing(load, monkeypatch):
    poison.gradients(monkeypatch, "x1e6", lambda step: step == 6)
    fields = ("digits_mlp:smoke", "guard.spike=skip", *QUICK, "guard.sigmas=20.0")
    experiment = build(load(*fields), devices=jax.devices()[:1])
    state = experiment.init()
    for batch in experiment.train_loader().batches(0, 6):
        state, metrics = experiment.train_step(state, batch)
    assert int(metrics["skipped_steps"]) == 0
    before = bits(state)
    state, metrics = experiment.train_step(state, experiment.train_loader().batch(6))
    assert bool(metrics[guard.SPIKED])
    assert bits(state) == before
    assert int(state.guard.window.count) == 6


# Rewinding


REWIND = (*QUICK, "guard.spike=rewind", "guard.sigmas=20.0", "guard.rewind_steps=3")
REWIND += ("checkpoint.every_steps=4", "checkpoint.keep_latest=3", "total_steps=16")
TIMES = ("step_time_s", "examples_per_s")


def rows(workdir):
    found = read_rows(workdir / "metrics.jsonl")
    drop = lambda row: {k: v for k, v in row.items() if k not in TIMES and "mfu" not in k}  # noqa: E731
    return [drop(row) for row in found]


@pytest.mark.threat(12, 18)
def test_a_rewound_run_is_the_one_that_was_given_the_list(train, load, monkeypatch, tmp_path):
    """The batch of step 11, whose labels are spoilt, is left out with those since step 8."""
    flags = [f"--config.{field}" for field in REWIND]
    poison.batch(monkeypatch, 10)
    code, _, error = train("digits_mlp:smoke", *flags, f"--workdir={tmp_path / 'rewound'}")
    assert code == 0, error
    assert "Step 11 is a spike: back to step 8, and on without the batches 8 to 10." in error
    history = json.loads((tmp_path / "rewound" / "config.json").read_text())["history"]
    assert history[-1]["skip_batches"] == [[8, 11]]
    given = (*flags, "--config.data.skip_batches=((8,11),)")
    code, _, error = train("digits_mlp:smoke", *given, f"--workdir={tmp_path / 'given'}")
    assert code == 0, error
    assert "spike" not in error
    assert rows(tmp_path / "rewound") == rows(tmp_path / "given")
    fields = [flag.removeprefix("--config.") for flag in flags]
    experiment = build(load("digits_mlp:smoke", *fields))
    assert final_bits(experiment, tmp_path / "rewound", 16) == final_bits(
        experiment, tmp_path / "given", 16
    )


@pytest.mark.faults
@pytest.mark.threat(12, 18)
def test_a_run_goes_on_within_a_window(train, load, monkeypatch, tmp_path):
    """Stopped at step 7 of a window of 8, with the spike at step 10."""
    fields = (*QUICK, "guard.spike=skip", "guard.sigmas=20.0", "optim.schedule.name=constant")
    flags = [f"--config.{field}" for field in fields]
    poison.gradients(monkeypatch, "x1e6", lambda step: step == 9)
    for workdir, totals in (("whole", (12,)), ("halves", (7, 12))):
        for total in totals:
            more = (f"--config.total_steps={total}", f"--workdir={tmp_path / workdir}")
            assert train("digits_mlp:smoke", *flags, *more)[0] == 0
    experiment = build(load("digits_mlp:smoke", *fields, "total_steps=12"))
    found = {name: final_bits(experiment, tmp_path / name, 12) for name in ("whole", "halves")}
    assert found["whole"] == found["halves"]
    taught = [[r for r in rows(tmp_path / name) if r["split"] == "train"] for name in found]
    assert taught[0] == taught[1]
    assert taught[0][-1]["skipped_steps"] == 1
