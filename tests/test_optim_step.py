"""Optimisers in the step of a real experiment: layouts, second evaluations, averages, restarts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import step as steps
from lsdl.checkpoint import Checkpoints
from lsdl.config import flatten, to_json
from lsdl.errors import UserError
from lsdl.experiment import build, reopen, stored_weights
from lsdl.metrics import means
from lsdl.optim import chain
from tests.curves import assert_equal_curves, curve
from tests.tiny import FAST

MLP = (
    *("digits_mlp:smoke", "model.hidden=(16,16)", "batch_size=64"),
    *("optim.schedule.warmup_steps=0", "optim.schedule.peak=0.01"),
)
VIT = (
    *("digits_vit:smoke", "model.width=32", "model.mlp_dim=64", "model.num_layers=1"),
    *("model.scan_layers=true", "batch_size=64", "optim.factored_dim=8"),
    *("optim.schedule.warmup_steps=0", "optim.schedule.peak=0.001"),
)
SPLIT = "mesh=data=2,fsdp=2,tensor=2"
CANCELLED = 4  # entries of the gradient that one order of summing makes exactly zero, another not
SAM = ("optim.sam_rho=0.05", "optim.ema_decay=0.9")


def of(load, base, name, *more):
    """The config `base` with the optimiser `name`, without what means nothing to it."""
    decay = () if name in chain.DECAYED else ("optim.weight_decay=0.0",)
    clip = () if name in chain.FIRST_ORDER else ("optim.clip_norm=0.0",)
    own = [word for word in base if name == "adafactor" or "factored_dim" not in word]
    return load(*own, f"optim.name={name}", *decay, *clip, *more)


def assert_layout_is_silent(load, base, name, layout, *more, rtol=1e-5):
    expected, _ = curve(of(load, base, name, *more), devices=1, steps=3)
    actual, state = curve(of(load, base, name, *more, *layout), steps=3)
    if name == "sign_sgd":  # a gradient that cancels is 0 in one order, and has a sign in another
        entries = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        assert_equal_curves(actual, expected, ("update_norm",), rtol=CANCELLED / (2 * entries))
        assert_equal_curves(actual, expected, ("loss", "grad_norm", "param_norm"), rtol=rtol)
    else:
        assert_equal_curves(actual, expected, rtol=rtol)


@pytest.mark.parametrize(
    ("name", "layout", "more"),
    [
        ("adafactor", (SPLIT,), ()),
        ("adamw", ("mesh=data=8", "partitioner=shard_map"), SAM),
    ],
    ids=["adafactor", "sam"],
)
def test_a_layout_changes_no_number(load, name, layout, more):
    assert_layout_is_silent(load, VIT, name, layout, *more)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [("mesh=data=8", "rules=zero1"), ("mesh=fsdp=8",), (SPLIT,), ("mesh=data=8", "accum=2")],
    ids=" ".join,
)
@pytest.mark.parametrize("name", chain.FIRST_ORDER)
def test_no_layout_changes_a_number(load, name, layout):
    assert_layout_is_silent(load, VIT, name, layout)


@pytest.mark.slow
@pytest.mark.parametrize("partitioner", ["jit", "shard_map", "pmap"])
@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize(
    ("name", "more"),
    [("adamw", SAM), ("lbfgs", ("optim.linesearch_steps=4",))],
    ids=["sam", "lbfgs"],
)
def test_second_evaluations_see_the_global_batch(load, name, more, accum, partitioner):
    layout = ("mesh=data=8", f"partitioner={partitioner}", f"accum={accum}")
    assert_layout_is_silent(load, MLP, name, layout, *more, rtol=1e-4)


def test_lbfgs_searches_by_hand_as_on_one_device(load):
    layout = ("mesh=data=8", "partitioner=shard_map", "accum=2")
    assert_layout_is_silent(load, MLP, "lbfgs", layout, "optim.linesearch_steps=3", rtol=1e-4)


def test_trust_ratios_make_no_array_whole(load):
    def gathers(name):
        experiment = build(of(load, VIT, name, SPLIT))
        given = experiment.abstract_state, experiment.abstract_batch
        text = experiment.train_step.lower(*given).compile(compiler_options=FAST).as_text()
        return text.count(" all-gather(")

    assert gathers("lars") == gathers("sgd") > 0


# --- second evaluations ---------------------------------------------------------------------------


def test_only_who_asks_pays_for_a_second_gradient(load):
    def products(*more):
        experiment = build(of(load, MLP, "adam", *more), devices=jax.devices()[:1])
        text = str(
            experiment.train_step.trace(experiment.abstract_state, experiment.abstract_batch)
        )
        return text.count("dot_general")

    assert products("optim.sam_rho=0.1") == 2 * products() > 0


def test_sam_leaves_the_statistics_to_the_first_pass(load):
    config = ("digits_resnet:smoke", "model.width=4", "model.depths=(1,)", "batch_size=32")

    def statistics(*more):
        experiment = build(load(*config, *more), devices=jax.devices()[:1])
        state, _ = experiment.train_step(experiment.init(), experiment.train_loader().batch(0))
        return state.model_state

    jax.tree.map(np.testing.assert_array_equal, statistics("optim.sam_rho=0.5"), statistics())


@pytest.mark.parametrize("accum", [1, 2])
def test_the_functions_of_the_step_are_its_loss_and_its_gradient(load, accum):
    """`value_fn` has the half-step's gradient, and `grad_fn` the Hessian's products."""
    experiment = build(of(load, MLP, "sgd", "mesh=data=1"), devices=jax.devices()[:1])
    grads = steps.make_grads(steps.make_loss(experiment.module.apply, experiment.task), accum=accum)
    state = experiment.init()
    batch = steps.make_prepare(experiment.task)(experiment.train_loader().batch(0), state)

    @jax.jit
    def found(params, vector):
        given = steps._functions(state, batch, grads)
        value, slope = jax.value_and_grad(given["value_fn"])(params)
        product = jax.jvp(given["grad_fn"], (params,), (vector,))[1]
        return value, slope, given["grad_fn"](params), product

    moved = jax.tree.map(lambda w: w + 0.01, state.params)
    vector = jax.tree.map(jnp.ones_like, moved)
    value, slope, gradient, product = found(moved, vector)
    sums = jax.jit(grads)(state.replace(params=moved), batch)
    loss, expected = means((sums["loss"], sums["grads"]), sums["weight"])
    np.testing.assert_allclose(value, loss, rtol=1e-6)
    for tree in (slope, gradient):
        close(tree, expected)
    along = lambda p: jax.jvp(lambda p: value_of(grads, state, batch, p), (p,), (vector,))[1]  # noqa: E731
    expected = jax.jit(jax.grad(along))(moved)
    close(product, expected)


def value_of(grads, state, batch, params):
    sums = grads(state.replace(params=params), batch)
    return sums["loss"] / sums["weight"]


def close(actual, expected, **given):
    given = dict(rtol=1e-4, atol=1e-6) | given
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **given), actual, expected)


def test_gauss_newton_is_the_hessian_where_the_model_is_linear(load):
    sizes = ("model.hidden=()", "model.dropout=0.0", "batch_size=64", "mesh=data=1")
    experiment = build(load("digits_mlp:smoke", *sizes), devices=jax.devices()[:1])
    task, state = experiment.task, experiment.init()
    batch = steps.make_prepare(task)(experiment.train_loader().batch(0), state)
    grads = steps.make_grads(steps.make_loss(experiment.module.apply, task), accum=1)
    grad_fn = steps._functions(state, batch, grads)["grad_fn"]
    vector = jax.tree.map(lambda w: jnp.cos(jnp.arange(w.size)).reshape(w.shape), state.params)
    hessian = jax.jit(lambda p, v: jax.jvp(grad_fn, (p,), (v,))[1])(state.params, vector)
    product = jax.jit(steps.make_gauss_newton(experiment.module.apply, task)(state, batch))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        product(state.params, vector),
        hessian,
    )


@pytest.mark.parametrize("name", chain.SOLVERS)
@pytest.mark.parametrize("layout", ["mesh=data=8", "partitioner=shard_map"])
def test_solvers_run_on_one_device(load, name, layout):
    with pytest.raises(UserError, match=f"optim.name={name} runs on one device"):
        build(of(load, MLP, name, layout))


# --- averages, plateaus and restarts --------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [("adamw", ("optim.ema_decay=0.5",)), ("schedule_free", ())],
    ids=["ema", "free"],
)
def test_averages_are_what_is_evaluated_and_stored(load, tmp_path, name, more):
    experiment = build(of(load, MLP, name, "mesh=data=1", *more), devices=jax.devices()[:1])
    state = experiment.init()
    for batch in experiment.train_loader().batches(0, 3):
        state, _ = experiment.train_step(state, batch)
    variables = steps.evaluated(state)
    away = jax.tree.map(lambda a, b: float(abs(a - b).max()), variables["params"], state.params)
    assert max(jax.tree.leaves(away)) > 1e-4
    batch = next(iter(experiment.eval_loader("valid").batches(0, 1)))
    plain = state.replace(params=variables["params"], opt_state=())
    plainly = steps.make_eval_step(experiment.module.apply, experiment.task)(plain, batch)
    found = experiment.eval_step(state, batch)
    np.testing.assert_allclose(found["loss"], plainly["loss"], rtol=1e-5)

    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(3, state, metrics=None)
    checkpoints.close()
    stored = stored_weights(experiment, tmp_path / "c")
    close(stored["params"], variables["params"])


def test_a_run_that_measured_microbatches_is_opened_again(load):
    measured = ("accum=2", "log.measure=('noise', 'angle')")
    assert reopen(to_json(of(load, MLP, "adamw", *measured))).num_parameters


@pytest.mark.parametrize("accum", [1, 2, 4])
def test_the_average_moves_once_an_update(load, accum):
    fields = ("mesh=data=1", "optim.ema_decay=0.7", f"accum={accum}")
    experiment = build(of(load, MLP, "adamw", *fields), devices=jax.devices()[:1])
    state = experiment.init()
    average = jax.device_get(state.params)
    for batch in experiment.train_loader().batches(0, 3):
        state, _ = experiment.train_step(state, batch)
        after = jax.device_get(state.params)
        average = jax.tree.map(lambda a, w: 0.7 * a + 0.3 * w, average, after)
    close(steps.evaluated(state)["params"], average, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "more", "words"),
    [
        ("lars", (), "lars has one trust ratio for each stack"),
        ("adafactor", (), "adafactor has one size and one clipping for each stack"),
        ("adam", ("optim.clip_norm=1.0", "optim.clip_form=block_rms"), "clips each stack as one"),
        ("adam", ("optim.clip_norm=1.0", "optim.clip_form=adaptive"), ""),
        ("adam", ("optim.switch.name=lamb", "optim.switch.at_steps=3"), "lamb has one trust"),
    ],
)
def test_a_run_says_where_a_stack_of_layers_is_one(load, name, more, words):
    for scan in ("true", "false"):
        config = of(load, VIT, name, *more, f"model.scan_layers={scan}")
        found = [note for note in build(config, devices=1).notes if "scan_layers" in note]
        assert len(found) == (scan == "true" and bool(words))
        assert all(words in note for note in found)


PLATEAU = (
    *("optim.schedule.name=plateau", "optim.schedule.plateau_patience_steps=2"),
    "optim.schedule.plateau_threshold=10.0",
)
SWITCH = ("optim.switch.name=sgd", "optim.switch.at_steps=3", "optim.switch.rate_factor=0.5")


def test_the_rate_that_is_told_is_the_one_after_a_plateau(load):
    rows, _ = curve(of(load, MLP, "adamw", *PLATEAU), devices=1, steps=7)
    # Means over two steps; the first is the best, and the next ones are no better by 10.
    np.testing.assert_allclose(rows["learning_rate"], 0.01 * 0.1 ** np.array([0, 0, 0, 1, 1, 2, 2]))


@pytest.mark.parametrize(
    ("name", "more"),
    [("adamw", PLATEAU), ("adam", SWITCH), ("adamw", (*SAM, "optim.schedule.warmup_steps=6"))],
    ids=["plateau", "switch", "sam in a warm-up"],
)
def test_a_restart_goes_on_to_the_same_bits(load, tmp_path, name, more):
    experiment = build(of(load, MLP, name, "mesh=data=8", *more))
    batches = list(experiment.train_loader().batches(0, 6))
    state = experiment.init()
    checkpoints = Checkpoints(tmp_path / "c", keep_latest=9)
    for step, batch in enumerate(batches, start=1):
        state, _ = experiment.train_step(state, batch)
        if step == 3:
            checkpoints.save(step, state, metrics=None)
    again = checkpoints.restore(3, experiment.abstract_state)
    checkpoints.close()
    for batch in batches[3:]:
        again, _ = experiment.train_step(again, batch)
    bits = lambda state: [np.asarray(x).tobytes() for x in jax.tree.leaves(state.replace(key=()))]  # noqa: E731
    assert bits(again) == bits(state)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("optim.schedule.name=plateau",), "needs optim.schedule.plateau_patience_"),
        (("optim.schedule.plateau_patience_steps=3",), "nothing waits for a plateau"),
        (("optim.switch.name=sgd",), "optim.switch.name without optim.switch.at_"),
        (("optim.switch.at_steps=3",), "name the optimiser to switch to"),
        (("optim.switch.name=sdg", "optim.switch.at_steps=3"), "'sdg' cannot be switched"),
        ((*PLATEAU, "optim.schedule.plateau_factor=1.0"), "plateau_factor=1.0 must be within"),
        ((*PLATEAU, "optim.schedule.plateau_threshold=0.0"), "plateau_threshold=0.0 must be"),
        ((*SWITCH, "optim.switch.rate_factor=0.0"), "rate_factor=0.0 must be positive"),
        (("optim.muon_rms=0.1",), "optim.muon_rms=0.1 has no meaning for optim.name=adamw"),
        (("optim.rate_rules=(('hed/.*', 0.5),)",), r"rate_rules\[0\] matches no parameter"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(load, more, words):
    with pytest.raises(UserError, match=words):
        build(load(*MLP, *more), devices=jax.devices()[:1])


@pytest.mark.parametrize("rule", ["('a', -1.0)", "('a', 'b')", "('(', 1.0)", "('a', 1e999)"])
def test_a_rate_rule_is_a_regex_and_a_factor(load, rule):
    with pytest.raises(UserError, match="write \\('regex', a factor of at least 0\\)"):
        load(*MLP, f"optim.rate_rules=({rule},)")


def test_every_field_of_an_optimiser_is_one_of_the_config(load):
    config = flatten(to_json(load(*MLP)))
    assert {f"optim.{name}" for name in chain.Fields.__annotations__} <= config.keys()
