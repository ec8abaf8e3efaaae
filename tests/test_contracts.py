"""What every model, task, optimizer, schedule, config and rule table has to keep."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lsdl import config, experiment, tasks
from lsdl.optim import chain, schedules
from lsdl.sharding import mesh, partition, rules
from tests.conftest import CONFIGS

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.py"))
TASK = tasks.Classification((8, 8, 1), 10, (4.9,), (6.0,))
NEVER_SPLIT = {"length", "head_dim", "classes", "layers", "conv_in", None}


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("variant", ["", ":smoke"])
def test_every_config_is_built_and_traced_without_allocation(load, name, variant):
    built = experiment.build(load(name + variant))
    live = len(jax.live_arrays())
    lowered = built.train_step.lower(built.abstract_state, built.abstract_batch)
    state, metrics = lowered.out_info
    assert jax.tree.structure(state) == jax.tree.structure(built.abstract_state)
    assert {"loss", "accuracy", "grad_norm", "update_norm", "learning_rate"} <= metrics.keys()
    assert len(jax.live_arrays()) <= live + 8  # scalars that tracing makes constants of
    assert built.total_steps >= built.eval_every_steps


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_says_what_it_is(name):
    lines = (CONFIGS / f"{name}.py").read_text().split('"""')[1].splitlines()
    assert lines[0].endswith(").") or lines[0].endswith(".")
    for word in ("Command: ", "Hardware and time: ", "Expected: ", "Measured: "):
        assert any(line.startswith(word) for line in lines), word
    assert any(
        line == f"Command: python -m lsdl.train --config configs/{name}.py" for line in lines
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_smoke_is_short_and_logs_every_step(load, name):
    smoke = experiment.build(load(f"{name}:smoke"))
    assert smoke.total_steps <= 50
    assert smoke.log_every_steps == 1


@pytest.mark.parametrize("name", sorted(experiment.MODELS))
def test_a_model_leaves_no_default_to_the_code(load, name):
    filled = {"num_classes", "dtype", "remat", "axis_name", "parent", "name"}
    fields = set(inspect.signature(experiment.MODELS[name]).parameters) - filled
    shipped = [load(c) for c in SHIPPED]
    assert any(set(c.model.keys()) - {"name"} == fields for c in shipped if c.model.name == name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_parameter_says_its_roles_and_every_role_is_known(load, name):
    built = experiment.build(load(f"{name}:smoke"))
    (inputs,) = TASK.inputs({"image": jnp.zeros((1, 8, 8, 1))})
    make = lambda: built.module.init(jax.random.key(0), inputs, train=False)  # noqa: E731
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
        spec, missed = rules.resolve(names, (64,) * len(names), rules.TABLES[table], grid)
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
        spec, _ = rules.resolve(roles, shape, rules.TABLES[table], grid)
        used = [a for axes in spec for a in ((axes,) if isinstance(axes, str) else axes or ())]
        assert len(used) == len(set(used))
        jax.sharding.NamedSharding(grid, spec).shard_shape(shape)  # raises unless it divides


def test_a_large_array_that_cannot_be_split_is_an_error():
    grid = mesh.make_mesh(mesh.parse_mesh("fsdp=8", 8))
    box = lambda n: nn.LogicallyPartitioned(  # noqa: E731
        jax.ShapeDtypeStruct((n, 300_000), jnp.float32), ("embed", None)
    )
    with pytest.raises(ValueError, match="embed=3 is not divisible by 8"):
        rules.tree_shardings({"w": box(3)}, grid, rules.TABLES["fsdp"])
    _, (placement,) = rules.tree_shardings({"w": box(8)}, grid, rules.TABLES["fsdp"])
    assert placement.missed == ""


@pytest.mark.parametrize("name", chain.NAMES)
def test_every_optimizer_accepts_the_loss_and_keeps_dtypes(name):
    optim = config.template().optim
    schedule = schedules.make_schedule(
        "constant",
        peak=0.1,
        total_steps=10,
        warmup_steps=0,
        end_factor=0.0,
        boundaries_percent=(),
        step_factor=0.1,
    )
    fields = "momentum nesterov b1 b2 eps trust_coefficient decay_mask trust_mask"
    tx = chain.make_optimizer(
        name, schedule, clip_norm=1.0, weight_decay=0.0, **{f: optim[f] for f in fields.split()}
    )
    params = {"a": {"kernel": jnp.ones((4, 4)), "bias": jnp.zeros(4)}}
    updates, _ = tx.update(params, tx.init(params), params, value=jnp.float32(1.0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(updates))
    assert float(updates["a"]["kernel"][0, 0]) < 0


@pytest.mark.parametrize("name", partition.NAMES)
def test_every_partitioner_offers_data_parallelism(name):
    partition.check(name, mesh.make_mesh(mesh.parse_mesh("data=8", 8)))
