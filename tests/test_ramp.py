"""A batch that grows: the phases, the examples' order, and a run with it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdl import loop, summary
from lsdl.checkpoint import Checkpoints
from lsdl.config import compare
from lsdl.data.loader import Loader
from lsdl.data.ramp import make_ramp
from lsdl.errors import UserError
from lsdl.experiment import build
from lsdl.metrics import read_rows
from lsdl.optim.wrappers import rate
from lsdl.rundir import RunDir
from tests.test_loader import Reader, in_memory, sharding, spec

RAMP = ((25.0, 2), (50.0, 4))
rules = st.lists(
    st.tuples(st.floats(1, 99), st.integers(1, 5)), max_size=4, unique_by=lambda part: part[0]
).map(sorted)


def ramp(rule=RAMP, *, batch_size=8, examples=320.0):
    return make_ramp(rule, batch_size=batch_size, examples=examples, total_steps=7)


def training(examples, **kwargs):
    shape = dict(spec=spec((1, 1, 1)), batch_size=8, sharding=sharding(("data", "fsdp")))
    reader = in_memory(Reader(examples, shape=(1, 1, 1)))
    return Loader(reader, train=True, **shape, **kwargs)


def labels(loader, step, rows=None):
    rows = np.arange(loader.batch_size_at(step)) if rows is None else rows
    return loader.rows(step, rows)["label"]


# --- the phases -----------------------------------------------------------------------------------


def test_a_phase_has_its_share_of_the_examples():
    found = ramp()
    # A quarter of 320 by 8, a quarter by 16, half by 32.
    assert [(p.first_step, p.first_example, p.batch_size, p.factor) for p in found.phases] == [
        *((0, 0, 8, 1), (10, 80, 16, 2), (15, 160, 32, 4)),
    ]
    assert (found.total_steps, found.total_examples) == (20, 320)


def test_without_a_rule_there_is_one_batch_size():
    found = ramp(())
    assert (len(found.phases), found.total_steps, found.total_examples) == (1, 7, 56)


@given(rules, st.integers(1, 64), st.integers(1, 20_000))
@settings(max_examples=150, deadline=None)
def test_steps_and_examples_agree(rule, batch_size, examples):
    found = ramp(rule, batch_size=batch_size, examples=float(examples))
    if not rule:
        return
    sizes = [found.batch_size_at(step) for step in range(found.total_steps)]
    assert set(sizes) == {batch_size * factor for factor in (1, *(f for _, f in rule))}
    sums = [0, *itertools.accumulate(sizes)]
    assert [found.examples_before(step) for step in range(len(sums))] == sums
    assert [found.step_at(total) for total in sums] == list(range(len(sums)))
    # Every phase is off by half a batch at the most, or has the one step that it must have.
    most = sum(batch_size * f * (1 if examples < batch_size * f * 200 else 0.5) for _, f in rule)
    assert abs(found.total_examples - examples) <= most + batch_size


@pytest.mark.parametrize(
    "bad", [(0.0, 2), (100.0, 2), (50.0, 0), (50.0, 1.5), (50.0,), 4, ("a", 2)]
)
def test_a_part_that_is_none_is_an_error(bad):
    with pytest.raises(UserError, match=r"batch_ramp has the part .*write \(percent, factor\)"):
        ramp((bad,))


@pytest.mark.parametrize("rule", [((50.0, 2), (25.0, 4)), ((50.0, 2), (50.0, 4))])
def test_parts_out_of_order_are_an_error(rule):
    with pytest.raises(UserError, match="its percents have to rise"):
        ramp(rule)


# --- the order of examples ------------------------------------------------------------------------


@pytest.mark.threat(14, 23)
@given(rules, st.integers(20, 90), st.integers(0, 3))
@settings(max_examples=8, deadline=None)
def test_the_run_is_one_permutation_after_another(rule, examples, seed):
    """Whatever the batch sizes, and nothing is left out between two epochs."""
    grown = ramp([*rule, (99.5, 2)], examples=150.0)
    loader = training(examples, ramp=grown, seed=seed)
    order = np.concatenate([labels(loader, step) for step in range(grown.total_steps)])
    assert len(order) == grown.total_examples
    epochs = [order[i : i + examples] for i in range(0, len(order), examples)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch)
    assert len({tuple(epoch[: len(epochs[-1])]) for epoch in epochs}) == len(epochs) or (
        len(epochs[-1]) < 4
    )


@pytest.mark.threat(14)
def test_the_order_does_not_depend_on_the_ramp():
    one, other = (training(50, ramp=ramp(rule)) for rule in (RAMP, ((70.0, 3),)))
    orders = [
        np.concatenate([labels(each, step) for step in range(10)])[:80] for each in (one, other)
    ]
    np.testing.assert_array_equal(*orders)


@pytest.mark.parametrize("sampling", ["epoch", "replace"])
def test_any_rows_are_those_of_the_whole_batch(sampling):
    """So that processes may split the batch as they like, in every phase."""
    loader = training(50, ramp=ramp(), sampling=sampling)
    for step in (0, 9, 10, 14, 15, 19):
        whole = labels(loader, step)
        size = loader.batch_size_at(step)
        for rows in (np.arange(0, size, 2), np.arange(1, size, 2), np.array([size - 1, 0])):
            np.testing.assert_array_equal(labels(loader, step, rows), whole[rows])
        batch = loader.batch(step)
        assert batch["label"].shape == (size,)
        np.testing.assert_array_equal(batch["label"], whole)


def test_a_batch_is_a_function_of_the_step_in_every_phase():
    first, second = (training(50, ramp=ramp(), seed=3) for _ in range(2))
    ahead = [np.asarray(batch["label"]) for batch in first.batches(8, 17)]
    for step in reversed(range(8, 17)):
        np.testing.assert_array_equal(ahead[step - 8], np.asarray(second.batch(step)["label"]))


def test_a_ramp_of_one_size_changes_nothing():
    plain, one = training(50), training(50, ramp=ramp(()))
    for step in (0, 5, 6, 13):
        np.testing.assert_array_equal(labels(plain, step), labels(one, step))


# --- a run ----------------------------------------------------------------------------------------

# 1257 examples: about a quarter by 96, a quarter by 192, half by 384.
FIELDS = (
    *("total_epochs=2.0", "batch_ramp=((25.0, 2), (50.0, 4))"),
    *("eval.every_steps=4", "checkpoint.every_steps=3", "log.every_steps=1"),
    *("log.tensorboard=false", "mesh=data=2", "model.hidden=(16,)"),
)


@pytest.fixture
def made(load):
    return lambda *more: build(load("digits_mlp:smoke", *FIELDS, *more), devices=jax.devices()[:2])


@pytest.fixture
def experiment(made):
    return made()


class Stop:
    """Asks to stop after the step `at`."""

    at = None

    def __init__(self):
        self.signal = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def began(self):
        pass

    saved = began

    def after(self, step):
        self.signal = 15 if step == self.at else None
        return step == self.at


def ran(experiment, folder, monkeypatch, *stops):
    folder = RunDir(folder)
    folder.create()
    for at in (*stops, None):
        monkeypatch.setattr(Stop, "at", at)
        monkeypatch.setattr(loop.interruption, "owner", Stop)
        outcome = loop.run(experiment, folder)
    checkpoints = Checkpoints(folder.checkpoints)
    state = checkpoints.restore(outcome.step, experiment.abstract_state)
    checkpoints.close()
    return state, [row for row in read_rows(folder.metrics) if row["split"] == "train"]


@pytest.mark.threat(12)
def test_a_ramp_stopped_in_its_middle_goes_on_to_the_same_bits(experiment, tmp_path, monkeypatch):
    """Within the second phase, at its end, and within the third."""
    whole, rows = ran(experiment, tmp_path / "whole", monkeypatch)
    firsts = [phase.first_step for phase in experiment.phases]
    state, parts = ran(experiment, tmp_path / "parts", monkeypatch, firsts[1] + 1, firsts[2])
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(state), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = map(jax.random.key_data, (one, other))
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    times = ("step_time_s", "examples_per_s")
    assert [{k: v for k, v in row.items() if k not in times} for row in rows] == [
        {k: v for k, v in row.items() if k not in times} for row in parts
    ]
    assert [row["step"] for row in rows] == list(range(1, 14))
    rates = [experiment.schedule(row["step"] - 1) for row in rows]
    np.testing.assert_allclose([row["learning_rate"] for row in rows], rates, rtol=1e-6)
    kept = Checkpoints(tmp_path / "parts" / "checkpoints")
    assert kept.latest_step() == int(state.step) == 13
    kept.close()
    seen = np.cumsum([experiment.ramp.batch_size_at(step) for step in range(len(rows))])
    assert [row["examples_seen"] for row in rows] == seen.tolist()
    sizes = [row["examples_per_s"] * row["step_time_s"] for row in rows]
    np.testing.assert_allclose(sizes, np.diff(seen, prepend=0), rtol=1e-6)


def test_the_phases_of_a_run(experiment):
    # 2 * 1257 examples: 628.5, 628.5 and 1257 of them.
    assert [(p.first_step, p.batch_size) for p in experiment.phases] == [
        (0, 96),
        (7, 192),
        (10, 384),
    ]
    assert experiment.total_steps == 13
    assert [p.abstract_batch["label"].shape for p in experiment.phases] == [(96,), (192,), (384,)]
    notes = [note for note in experiment.notes if "->" in note]
    assert notes[0].startswith("batch 96 -> 192 from step 8 of 13 on (accum 1 -> 2), after 672")
    assert notes[1].startswith("batch 192 -> 384 from step 11 of 13 on (accum 2 -> 4)")
    assert "note: batch 96 -> 192 from step 8" in summary.heading(experiment)
    assert experiment.eval_loader("valid").batch(0)["label"].shape == (96,)


def test_a_large_batch_is_that_many_microbatches(made):
    """One update on the mean gradient of all its rows, as a step with a plain batch takes."""
    experiment = made("model.dropout=0.0")
    state, last = experiment.init(), experiment.phases[2]
    batch = experiment.train_loader().batch(last.first_step)
    assert batch["label"].shape == (384,)
    params = jax.tree.map(np.array, state.params)  # a copy: the step donates them
    new, metrics = last.train_step(state, batch)
    assert int(new.step) == 1

    def loss(params):
        inputs = experiment.task.inputs(batch)
        logits = experiment.module.apply({"params": params}, *inputs, train=False)
        total, weight, _ = experiment.task.loss(logits, batch | {"row": np.arange(384)})
        return total / weight

    expected = jax.grad(loss)(params)
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(expected)))
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_places_in_the_run_are_those_of_its_examples(made, load):
    """A boundary at 50 percent falls where the third phase begins, in examples and in epochs."""
    fields = ("name=step", "peak=1.0", "warmup_steps=0")
    fields = [f"optim.schedule.{field}" for field in fields]
    for place in ("boundaries_percent=(50.0,)", "boundaries_epochs=(1.0,)"):
        schedule = made(*fields, f"optim.schedule.{place}").schedule
        assert [float(schedule(step)) for step in (9, 10)] == pytest.approx([1.0, 0.1])
    fields = [field for field in FIELDS if "eval" not in field and "mesh" not in field]
    every = build(load("digits_mlp:smoke", *fields, "eval.every_epochs=1.0"))
    assert every.eval_every_steps == 7  # 1257 of 2400 examples in 13 steps


def test_batch_norm_keeps_to_the_microbatch_and_says_so(load):
    fields = ("model.width=4", "model.depths=(1,)", "batch_size=64", "total_epochs=2.0")
    notes = build(load("digits_resnet:smoke", *fields, "batch_ramp=((50.0, 2),)"), devices=1).notes
    assert any(note.startswith("BatchNorm with a batch_ramp normalises") for note in notes)


def test_a_switch_comes_where_as_many_examples_are_taken(made):
    name = ("optim.name=adam", "optim.weight_decay=0.0", "optim.switch.name=sgd")
    tx = made(*name, "optim.switch.rate_factor=0.5", "optim.switch.at_percent=50.0").tx
    params = {"kernel": jnp.ones(2)}
    state, rates = tx.init(params), []
    for _ in range(12):
        _, state = tx.update(params, state, params, value=jnp.zeros(()))
        rates.append(float(rate(state, 1.0)))
    assert rates == [1.0] * 10 + [0.5] * 2


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("total_steps=20",), "needs total_epochs, total_examples or total_tokens: total_steps=20"),
        (("total_epochs=2.0", "batch_ramp=((50.0, 16),)"), "reaches batches of 1536, larger than"),
        (("total_epochs=2.0", "batch_ramp=((50.0, 1.5),)"), "write .percent, factor."),
        (("total_epochs=2.0", "batch_ramp=(5,)"), "has the part 5"),
    ],
)
def test_bad_ramps_are_errors(load, given, words):
    with pytest.raises(UserError, match=words):
        build(load("digits_mlp:smoke", "batch_ramp=((50.0, 2),)", *given))


def test_a_contrastive_ramp_is_an_error(load):
    with pytest.raises(UserError, match=r"must be .. for task=contrastive"):
        build(load("digits_clip:smoke", "total_epochs=2.0", "batch_ramp=((50.0, 2),)"))


def test_another_length_would_be_another_order():
    """So it is refused, which it is not without a ramp."""
    stored = {"batch_ramp": [[50.0, 4]], "total_epochs": 2.0}
    with pytest.raises(UserError, match=r"total_epochs=2.0 and a batch_ramp"):
        compare(stored, stored | {"total_epochs": 3.0})
    plain = stored | {"batch_ramp": []}
    assert compare(plain, plain | {"total_epochs": 3.0}) == {"total_epochs": (2.0, 3.0)}
