"""Weights by themselves: a round trip onto any mesh, a run that starts from another's, refusals."""

import jax
import numpy as np
import pytest

from lsdl import course
from lsdl.checkpoint import Checkpoints, check_weights, load_weights, save_weights
from lsdl.errors import BAD_INPUT, UserError
from lsdl.experiment import build
from lsdl.metrics import read_rows
from lsdl.step import as_weights, evaluated, variables_of
from tests.curves import drawn_state

MLP = ("model.hidden=(16, 16)", "model.dropout=0.0", "log.tensorboard=false")
RESNET = ("model.width=4", "model.depths=(1, 1)")


def weights_of(experiment):
    """Random values for all that a model is applied with."""
    return as_weights(variables_of(drawn_state(experiment)))


def abstract_of(experiment):
    return as_weights(variables_of(experiment.abstract_state))


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


@pytest.mark.parametrize(("name", "fields"), [("mlp", MLP), ("resnet", RESNET)])
def test_weights_come_back_on_any_mesh(load, tmp_path, name, fields):
    experiment = build(load(f"digits_{name}:smoke", *fields))
    weights = weights_of(experiment)
    assert bool(weights["model_state"]) == (name == "resnet")
    save_weights(tmp_path / "w", weights)
    for mesh in ("fsdp=8", "data=2,fsdp=2,tensor=2"):
        abstract = abstract_of(build(load(f"digits_{name}:smoke", *fields, f"mesh={mesh}")))
        check_weights(tmp_path / "w", abstract)
        loaded = load_weights(tmp_path / "w", abstract)
        same(loaded, weights)
        shardings = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)  # noqa: E731
        assert shardings(loaded) == shardings(abstract)


def test_weights_of_a_run_are_those_of_its_newest_checkpoint(load, tmp_path):
    experiment = build(load("digits_mlp:smoke", *MLP))
    state = jax.device_put(drawn_state(experiment), experiment.shardings)
    checkpoints = Checkpoints(tmp_path / "c", keep_latest=2)
    newer = state.replace(params=jax.tree.map(lambda leaf: leaf + 1, state.params))
    checkpoints.save(1, state, metrics=None)
    checkpoints.save(2, newer, metrics=None)
    checkpoints.close()
    same(load_weights(tmp_path / "c", abstract_of(experiment))["params"], newer.params)


def refusal(folder, abstract):
    """The sentence of both, which is the same."""
    with pytest.raises(UserError) as error:
        load_weights(folder, abstract)
    with pytest.raises(UserError) as other:
        check_weights(folder, abstract)
    assert str(error.value) == str(other.value)
    return str(error.value)


def test_weights_that_do_not_fit_are_refused(load, tmp_path):
    build_ = lambda *fields: build(load("digits_mlp:smoke", *MLP, *fields))  # noqa: E731
    save_weights(tmp_path / "w", weights_of(build_()))
    wide = refusal(tmp_path / "w", abstract_of(build_("model.hidden=(16, 32)")))
    for words in ("3 of 6 arrays", "params/head/kernel (32, 10), there (16, 10)"):
        assert words in wide
    deep = refusal(tmp_path / "w", abstract_of(build_("model.hidden=(16, 16, 16)")))
    assert "params/hidden_2/dense/bias (16,), there missing" in deep
    shallow = abstract_of(build_("model.hidden=(16,)"))  # the rest is not asked for
    assert load_weights(tmp_path / "w", shallow)["params"].keys() == {"hidden_0", "head"}


def test_a_folder_without_a_checkpoint_is_refused(load, tmp_path):
    (tmp_path / "empty").mkdir()
    abstract = abstract_of(build(load("digits_mlp:smoke", *MLP)))
    assert "holds no checkpoint" in refusal(tmp_path / "empty", abstract)


# --- init_from ------------------------------------------------------------------------------------


def arguments(workdir, *overrides):
    return (f"--workdir={workdir}", *(f"--config.{override}" for override in (*MLP, *overrides)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run of two steps."""
    from lsdl.train import main
    from tests.conftest import CONFIGS

    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    assert main(["--config", config, *arguments(workdir, "total_steps=2")]) == 0
    return workdir


def test_a_run_starts_from_the_parameters_of_another(load, train, finished, tmp_path):
    """And from nothing else: its first loss is that of these parameters on its own first batch."""
    own = ("seed=5", "total_steps=1", "mesh=data=2,fsdp=2,tensor=2", f"init_from={finished}")
    assert train("digits_mlp:smoke", *arguments(tmp_path / "run", *own))[0] == 0
    before = build(load("digits_mlp:smoke", *MLP, "total_steps=2"))
    checkpoints = Checkpoints(finished / "checkpoints")
    stored = checkpoints.restore(2, before.abstract_state)
    checkpoints.close()
    after = build(load("digits_mlp:smoke", *MLP, *own))
    checkpoints = Checkpoints(tmp_path / "none")
    start = course.initial(after, checkpoints, 0)
    checkpoints.close()
    same(start.params, stored.params)
    assert start.step == 0
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(start.opt_state))
    batch = jax.device_get(after.train_loader().batch(0))
    (pixels,) = after.task.inputs(batch)
    logits = after.module.apply({"params": jax.device_get(stored.params)}, pixels, train=False)
    total, weight, _ = after.task.loss(logits, batch)
    row = read_rows(tmp_path / "run" / "metrics.jsonl")[0]
    assert (row["split"], row["step"]) == ("train", 1)
    assert row["loss"] == pytest.approx(float(total / weight), rel=1e-5)


@pytest.mark.parametrize(
    "optimiser", [("ema_decay=0.9",), ("name=schedule_free",)], ids=["ema", "free"]
)
def test_averages_start_from_the_parameters_of_the_other_run(load, finished, tmp_path, optimiser):
    """Of the initial ones, which training never sees, nothing may stay in what is evaluated."""
    own = (*(f"optim.{field}" for field in optimiser), f"init_from={finished}", "mesh=fsdp=8")
    experiment = build(load("digits_mlp:smoke", *MLP, *own))
    checkpoints = Checkpoints(tmp_path / "none")
    start = course.initial(experiment, checkpoints, 0)
    checkpoints.close()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        jax.device_get(evaluated(start)["params"]),
        jax.device_get(start.params),
    )
    shardings = lambda tree: jax.tree.map(lambda leaf: leaf.sharding, tree)  # noqa: E731
    assert shardings(start.opt_state) == experiment.shardings.opt_state
    jax.jit(lambda state: state, donate_argnums=0)(start)  # no buffer is there twice


def test_running_statistics_are_weights_too(load, tmp_path):
    experiment = build(load("digits_resnet:smoke", *RESNET))
    weights = weights_of(experiment)
    save_weights(tmp_path / "other" / "checkpoints", weights)
    experiment = build(load("digits_resnet:smoke", *RESNET, f"init_from={tmp_path / 'other'}"))
    checkpoints = Checkpoints(tmp_path / "none")
    start = course.initial(experiment, checkpoints, 0)
    checkpoints.close()
    same(start.model_state, weights["model_state"])
    same(start.params, weights["params"])


def started(load, tmp_path, *fields):
    """The first state of a run that starts from `other`, and what it would be without."""
    fields = (*RESNET, f"init_from={tmp_path / 'other'}", *fields)
    experiment = build(load("digits_resnet:smoke", *fields))
    checkpoints = Checkpoints(tmp_path / "none")
    state = course.initial(experiment, checkpoints, 0)
    checkpoints.close()
    return state, experiment.init()


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_a_fresh_head_starts_anew_and_all_else_does_not(load, tmp_path, mesh):
    """From a network of two classes: what `init_fresh` matches may have another shape there."""
    weights = weights_of(build(load("digits_resnet:smoke", *RESNET)))
    head = weights["params"].pop("head")
    weights["params"]["head"] = jax.tree.map(lambda leaf: leaf[..., :2], head)
    save_weights(tmp_path / "other" / "checkpoints", weights)
    start, anew = started(load, tmp_path, f"mesh={mesh}", "init_fresh=head/.*")
    same(start.params.pop("head"), anew.params["head"])
    weights["params"].pop("head")
    same(start.params, weights["params"])
    same(start.model_state, weights["model_state"])


def test_running_statistics_may_start_anew(load, tmp_path):
    weights = weights_of(build(load("digits_resnet:smoke", *RESNET)))
    save_weights(tmp_path / "other" / "checkpoints", weights)
    start, anew = started(load, tmp_path, "init_fresh=batch_stats/.*")
    same(start.params, weights["params"])
    same(start.model_state, anew.model_state)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("init_from={empty}",), ["no run folder", "checkpoints is not there"]),
        (("init_from={run}", "model.hidden=(16, 32)"), ["of 6 arrays", "there (16, 10)"]),
        (("init_from={run}", "model.hidden=(16, 16, 16)"), ["there missing", "init_fresh"]),
        (("init_from={run}", "init_fresh=haed/.*"), ["'haed/.*' matches nothing", "head/.*"]),
        (("init_from={run}", "init_fresh=head/["), ["'head/[' is no regex"]),
        (("init_fresh=head/.*",), ["needs an init_from"]),
    ],
)
def test_a_start_that_cannot_be_is_refused_and_leaves_no_folder(
    train, finished, tmp_path, overrides, words
):
    overrides = [o.format(run=finished, empty=tmp_path) for o in overrides]
    code, out, error = train("digits_mlp:smoke", *arguments(tmp_path / "run", *overrides))
    assert (code, out) == (BAD_INPUT, "")
    assert len(error.splitlines()) == 1
    for word in words:
        assert word in error
    assert not (tmp_path / "run").exists()
