"""What every model, task, optimizer, schedule, config and rule table has to keep."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lsdl import components, config, experiment
from lsdl.models import bert, clip, gpt
from lsdl.optim import chain
from lsdl.sharding import mesh, partition, placement, rules
from tests.conftest import CONFIGS

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.py"))
VARIANTS = dict.fromkeys(SHIPPED, ("", ":smoke")) | {
    "lm_gpt2": [f":{size}" for size in gpt.GPT2_SIZES] + [":smoke"],
    "lm_llama": [f":{size}" for size in gpt.LLAMA_SIZES] + [":smoke"],
    "gpt3": [f":{size}" for size in gpt.GPT3_SIZES] + [":smoke"],
    "lm_bert": [f":{size}" for size in bert.SIZES] + [":smoke"],
    "clip": [f":{size}" for size in clip.SIZES] + [":b32,sigmoid", ":smoke"],
    "digits_clip": ["", ":sigmoid", ":smoke"],
    "cifar10_resnet": ["", ":56,plain", ":preact18", ":smoke", ":preact18,smoke"],
    "cifar10_c1": ["", ":5k", ":smoke"],
    "cifar10_wrn": [":16-4", ":28-10,dropout", ":smoke"],
    "imagenet_alexnet": ["", ":bn,lars,32k", ":smoke"],
    "imagenet_msra": [":14", ":22,inverse", ":30", ":smoke"],
    "imagenet_vit": [":b16", ":s16", ":ti16", ":b16,distill", ":smoke"],
    "modular_transformer": ["", ":paper", ":smoke"],
    "stdlib_gpt": ["", ":experts", ":smoke"],
}
NEVER_SPLIT = {"length", "head_dim", "classes", "layers", "conv_in", None}


@pytest.mark.parametrize("name", [f"{n}{v}" for n in SHIPPED for v in VARIANTS[n]])
def test_every_config_is_built_and_traced_without_allocation(load, name):
    built = experiment.build(load(name))
    live = len(jax.live_arrays())
    state, metrics = built.train_step.eval_shape(built.abstract_state, built.abstract_batch)
    assert jax.tree.structure(state) == jax.tree.structure(built.abstract_state)
    assert {"loss", "grad_norm", "update_norm", "learning_rate"} <= metrics.keys()
    assert set(built.task.shown) - {"perplexity", "bits_per_byte"} <= metrics.keys()
    assert len(jax.live_arrays()) <= live + 8  # scalars that tracing makes constants of
    assert built.total_steps >= built.eval_every_steps


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_says_what_it_is(name):
    lines = (CONFIGS / f"{name}.py").read_text().split('"""')[1].splitlines()
    assert lines[0].endswith(").") or lines[0].endswith(".")
    for word in ("Command: ", "Hardware and time: ", "Expected: ", "Measured: "):
        assert any(line.startswith(word) for line in lines), word
    assert any(
        re.match(rf"Command: python -m lsdl\.\w+ --config configs/{name}\.py\b", line)
        for line in lines
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_smoke_is_short_and_logs_every_step(load, name):
    smoke = experiment.build(load(f"{name}:smoke"))
    assert smoke.total_steps <= 50
    assert smoke.log_every_steps == 1


@pytest.mark.parametrize("name", sorted(components.MODELS))
def test_a_model_leaves_no_default_to_the_code(load, name):
    filled = {"num_classes", "dtype", "remat", "axis_name", "attention", "pipe", "parent", "name"}
    fields = set(inspect.signature(components.model_class(name)).parameters) - filled
    shipped = [load(c) for c in SHIPPED]
    assert any(set(c.model.keys()) - {"name"} == fields for c in shipped if c.model.name == name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_says_its_roles_and_every_role_is_known(load, name):
    built = experiment.build(load(f"{name}:smoke"))

    def make():
        zeros = {n: jnp.zeros(s.shape, s.dtype) for n, s in built.task.spec(1).items()}
        return built.module.init(jax.random.key(0), *built.task.inputs(zeros), train=False)

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    known = {role for table in rules.TABLES.values() for role, _ in table} | NEVER_SPLIT
    for leaf in jax.tree.leaves(jax.eval_shape(make)["params"], is_leaf=is_box):
        assert is_box(leaf)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= known


@pytest.mark.parametrize("table", sorted(rules.TABLES))
@pytest.mark.parametrize("axes", ["data=2,fsdp=2,tensor=2", "fsdp=8", "tensor=8", "data=8"])
def test_our_rules_agree_with_flax_where_everything_divides(table, axes):
    grid = mesh.make_mesh(mesh.parse_mesh(axes, 8))
    for names in (
        ("embed", "mlp"),
        ("mlp", "embed"),
        ("embed", "heads"),
        ("heads",),
        (None, None, "conv_in", "conv_out"),
        ("layers", "embed", "mlp"),
        ("length", "embed"),
        ("vocab", "embed"),
        ("batch", "length", "mlp"),
        ("batch", "length", "heads", "head_dim"),
    ):
        spec, missed, _ = rules.resolve(names, (64,) * len(names), rules.TABLES[table], grid)
        assert missed == ""
        assert spec == nn.logical_to_mesh_axes(names, rules.TABLES[table])


@pytest.mark.parametrize("table", sorted(rules.TABLES))
def test_no_two_dims_share_a_mesh_axis_and_every_split_divides(table):
    grid = mesh.make_mesh(mesh.parse_mesh("data=2,fsdp=2,tensor=2", 8))
    names = ["embed", "mlp", "heads", "vocab", "conv_in", "conv_out", "batch", "length", None]
    draw = np.random.default_rng(0)
    for _ in range(200):
        rank = draw.integers(1, 5)
        roles = [names[i] for i in draw.choice(len(names), rank, replace=False)]
        shape = tuple(int(n) for n in draw.choice([1, 2, 3, 4, 6, 8], rank))
        spec, *_ = rules.resolve(roles, shape, rules.TABLES[table], grid)
        used = [a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())]
        assert len(used) == len(set(used))
        jax.sharding.NamedSharding(grid, spec).shard_shape(shape)  # raises unless it divides


def test_a_large_array_that_cannot_be_split_is_an_error():
    grid = mesh.make_mesh(mesh.parse_mesh("fsdp=8", 8))
    box = lambda n: nn.LogicallyPartitioned(  # noqa: E731
        jax.ShapeDtypeStruct((n, 300_000), jnp.float32), ("embed", None)
    )
    with pytest.raises(ValueError, match="embed=3 is not divisible by 8"):
        placement.tree_shardings({"w": box(3)}, grid, rules.TABLES["fsdp"])
    _, (placed,) = placement.tree_shardings({"w": box(8)}, grid, rules.TABLES["fsdp"])
    assert placed.missed == ""


@pytest.mark.parametrize("name", chain.NAMES)
def test_every_optimizer_accepts_the_loss_and_keeps_dtypes(name):
    optim = config.template().optim
    fields = chain.fields_of({**optim, "name": name})
    tx = chain.make_optimizer(fields, lambda step: 0.1)
    params = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}
    value_fn = lambda params: optax.tree.norm(params, squared=True) / 2  # noqa: E731
    functions = dict(
        grad=params,
        value_fn=value_fn,
        grad_fn=jax.grad(value_fn),
        gauss_newton_fn=lambda params, vector: vector,
    )
    update = jax.jit(lambda *args: tx.update(*args, value=jnp.float32(8.0), **functions))
    updates, _ = update(params, tx.init(params), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
    moved = updates["a"]["kernel"].sum()  # coordinate descent starts with the bias, which is 0
    assert moved < 0 or (name == "coordinate_descent" and moved == 0)


@pytest.mark.parametrize("name", partition.NAMES)
def test_every_partitioner_offers_data_parallelism(name):
    partition.check(name, mesh.make_mesh(mesh.parse_mesh("data=8", 8)))
