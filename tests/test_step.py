"""The step: pure, donated, compiled once, its state sharded as told and created so."""

import jax
import numpy as np
import pytest

from lsdl import loop
from lsdl.experiment import build

VIT = "digits_vit:smoke"


@pytest.fixture
def compiles():
    """The list of backend compilations since the test began."""
    seen = []

    def listen(name, *_, **__):
        if "backend_compile" in name:
            seen.append(name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("layout", ["mesh=data=2,fsdp=2,tensor=2", "partitioner=shard_map"])
def test_the_step_compiles_once(load, compiles, layout):
    experiment = build(load(VIT, layout, "model.num_layers=1"))
    loader = experiment.train_loader()
    batches = [loader.batch(i) for i in range(4)]
    state = experiment.init()
    before = len(compiles)
    state, _ = experiment.train_step(state, batches[0])
    assert len(compiles) == before + 1
    for batch in batches[1:]:
        state, _ = experiment.train_step(state, batch)
    assert len(compiles) == before + 1


@pytest.mark.parametrize("layout", ["mesh=fsdp=8", "partitioner=shard_map", "partitioner=pmap"])
def test_the_whole_state_is_donated(load, layout):
    experiment = build(load(VIT, layout, "model.num_layers=1"))
    lowered = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    compiled = lowered.compile()
    before = experiment.init()
    per_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(before))
    assert compiled.memory_analysis().alias_size_in_bytes == per_device
    compiled(before, experiment.train_loader().batch(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))


@pytest.mark.parametrize("layout", ["mesh=data=2,fsdp=2,tensor=2", "partitioner=shard_map"])
def test_the_host_never_waits_for_a_step(load, layout):
    experiment = build(load("digits_mlp:smoke", layout))
    lowered = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    compiled = lowered.compile()
    state = experiment.init()
    batches = list(experiment.train_loader().batches(0, 3))
    with jax.transfer_guard("disallow"):
        for batch in batches:
            state, metrics = compiled(state, batch)
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_fsdp_holds_an_eighth_of_the_state_on_each_device(load, optimizer):
    experiment = build(load(VIT, "mesh=fsdp=8", f"optim.name={optimizer}"))
    state = experiment.init()
    trees = (state.params, state.opt_state)
    total = nbytes(trees)
    for device in jax.devices():
        own = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(trees)
            for shard in leaf.addressable_shards
            if shard.device == device
        )
        assert own == pytest.approx(total / 8, rel=0.02)


def test_no_device_ever_makes_the_whole_state_under_fsdp(load):
    experiment = build(load(VIT, "mesh=fsdp=8"))
    memory = experiment.init.lower().compile().memory_analysis()
    total = nbytes((experiment.abstract_state.params, experiment.abstract_state.opt_state))
    assert memory.output_size_in_bytes == pytest.approx(total / 8, rel=0.02)
    assert memory.temp_size_in_bytes < total / 8


def test_the_compiled_step_takes_an_eighth_of_the_state_under_fsdp(load):
    experiment = build(load(VIT, "mesh=fsdp=8"))
    state, batch = experiment.abstract_state, experiment.abstract_batch
    compiled = experiment.train_step.lower(state, batch).compile()
    rest = nbytes(batch) / 8
    rest += nbytes([leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0])
    total = nbytes((state.params, state.opt_state))
    own = compiled.memory_analysis().argument_size_in_bytes - rest
    assert own == pytest.approx(total / 8, rel=0.02)


@pytest.mark.threat(15)
def test_parameters_start_bitwise_equal_on_every_mesh(load):
    def parameters(mesh):
        return jax.device_get(build(load(VIT, f"mesh={mesh}")).init().params)

    one = parameters("data=8")
    for mesh in ("fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"):
        jax.tree.map(np.testing.assert_array_equal, parameters(mesh), one)


@pytest.mark.threat(15)
def test_the_seed_decides_the_parameters(load):
    def kernel(seed):
        params = build(load("digits_mlp:smoke", f"seed={seed}")).init().params
        return np.array(params["head"]["kernel"])

    np.testing.assert_array_equal(kernel(3), kernel(3))
    assert np.abs(kernel(3) - kernel(4)).max() > 1e-3


@pytest.mark.parametrize("batch_size", [8, 96, 264])
def test_evaluation_counts_every_example_once(load, batch_size):
    experiment = build(load("digits_mlp:smoke", f"batch_size={batch_size}", "mesh=data=8"))
    state = experiment.init()
    loader = experiment.eval_loader("valid")
    metrics = loop.evaluate(experiment, state, "valid")
    rows = [loader.rows(i, np.arange(batch_size)) for i in range(loader.num_batches)]
    images = np.concatenate([r["image"][r["weight"] > 0] for r in rows])
    labels = np.concatenate([r["label"][r["weight"] > 0] for r in rows])
    (pixels,) = experiment.task.inputs({"image": images})
    logits = np.asarray(experiment.module.apply({"params": state.params}, pixels, train=False))
    assert metrics["examples"] == len(labels) == 270
    assert metrics["accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean(), abs=1e-9)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert metrics["loss"] == pytest.approx(-log_p[np.arange(270), labels].mean(), rel=1e-5)


def test_the_step_reports_the_rate_that_it_applied(load):
    config = load(
        "digits_mlp:smoke",
        *("optim.name=sgd", "optim.momentum=0.0", "optim.weight_decay=0.0"),
        *("optim.schedule.warmup_steps=3", "optim.schedule.peak=0.1"),
    )
    experiment = build(config)
    state = experiment.init()
    for batch in experiment.train_loader().batches(0, 5):
        state, metrics = experiment.train_step(state, batch)
        ratio = float(metrics["update_norm"]) / float(metrics["grad_norm"])
        assert ratio == pytest.approx(float(metrics["learning_rate"]), rel=1e-5, abs=1e-9)


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(load):
    experiment = build(load(VIT, "precision=bfloat16", "model.num_layers=1"))
    state = experiment.init()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    text = experiment.train_step.lower(state, experiment.abstract_batch).as_text()
    products = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    assert products
    assert all("xbf16" in line for line in products)
    _, metrics = experiment.train_step(state, experiment.train_loader().batch(0))
    assert metrics["loss"].dtype == np.float32
