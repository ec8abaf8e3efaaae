"""The bill of collectives: read to the byte from programs known by hand, and held to its bound."""

import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lsdl import experiment
from lsdl.errors import BAD_INPUT, FINISHED, UserError
from lsdl.plan import main
from lsdl.planner import collectives, hlo
from lsdl.sharding import mesh as meshes
from tests.conftest import CONFIGS
from tests.zoo import small

GRID = {"data": 2, "fsdp": 2, "tensor": 2}
ADD = """
%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}
"""


def program(*lines, others="", partitions=8):
    """A program's text, with `lines` as the entry's instructions."""
    body = "\n".join(f"  {line}" for line in lines)
    head = f"HloModule jit_f, is_scheduled=true, num_partitions={partitions}\n"
    return f"{head}{ADD}{others}\nENTRY %main.1 (p: f32[4]) -> f32[4] {{\n{body}\n}}\n"


def reduce(shape, groups="replica_groups=[1,8]<=[8]", name="all-reduce.1", kind="all-reduce"):
    return (
        f"%{name} = {shape} {kind}(%p), channel_id=1, {groups}, use_global_device_ids=true, "
        'to_apply=%add, metadata={op_name="jit(f)/while/body/all-reduce(x)" stack_frame_id=3}'
    )


def rows(text, sizes=GRID):
    """{(kind, axis): (count, result bytes)} of a program's text."""
    found = {}
    for one in hlo.collectives(text, sizes):
        count, nbytes = found.get((one.kind, one.axis), (0, 0))
        found[one.kind, one.axis] = count + one.times, nbytes + one.nbytes()
    return found


# Who meets: every spelling


@pytest.mark.parametrize(
    ("groups", "axis", "group"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", "tensor", 2),
        ("{{0,2},{1,3},{4,6},{5,7}}", "fsdp", 2),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data", 2),
        ("{{6,0,4,2},{7,5,3,1}}", "data+fsdp", 4),
        ("{{0,1,2,3,4,5,6,7}}", "data+fsdp+tensor", 8),
        ("{}", "data+fsdp+tensor", 8),
        ("{{0,3},{1,2},{4,7},{5,6}}", "part of fsdp+tensor", 2),
        ("[4,2]<=[8]", "tensor", 2),
        ("[2,4]<=[8]", "fsdp+tensor", 4),
        ("[2,4]<=[4,2]T(1,0)", "data+fsdp", 4),
        ("[4,2]<=[2,4]T(1,0)", "data", 2),
        ("[4,2]<=[2,2,2]T(0,2,1)", "fsdp", 2),
        ("[4,2]<=[2,2,2]T(2,1,0)", "data", 2),
        ("mesh['x'=8] {'x'}", "data+fsdp+tensor", 8),
        ("mesh['x'=2,'y'=4] {'x'}", "data", 2),
        ("mesh['x'=2,'y'=2,'z'=2] {'x','z'}", "data+tensor", 4),
        ("mesh['x'=1,'y'=4,'z'=2], device_ids=([2,2,2]T(2,1,0)) {'z'}", "data", 2),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", "data", 2),
        ("mesh['x'=2,'y'=4], device_ids=(0,2,4,6,1,3,5,7) {'y'}", "data+fsdp", 4),
        ("mesh['x'=8] {'x':(1)2}", "data", 2),
        ("mesh['x'=8] {'x':(2)2}", "fsdp", 2),
        ("mesh['x'=8] {'x':(1)2,'x':(4)2}", "data+tensor", 4),
    ],
)
def test_groups_are_found_on_the_mesh(groups, axis, group):
    text = program(reduce("f32[10]{0}", f"replica_groups={groups}"))
    (one,) = hlo.collectives(text, GRID)
    assert (one.axis, one.group, one.nbytes()) == (axis, group, 40)
    assert one.wire_bytes() == 2 * (group - 1) / group * 40
    assert one.op_name == "jit(f)/while/body/all-reduce(x)"


def test_groups_smaller_than_their_axis_are_told_apart():
    text = program(reduce("f32[10]{0}", "replica_groups={{0,1},{2,3},{4,5},{6,7}}"))
    assert rows(text, {"data": 2, "tensor": 4}) == {("all-reduce", "part of tensor"): (1, 40)}


def test_without_global_ids_all_partitions_of_a_replica_meet():
    line = reduce("f32[10]{0}", "replica_groups={{0}}")
    assert rows(program(line)) == {}
    line = line.replace("use_global_device_ids=true, ", "")
    assert rows(program(line)) == {("all-reduce", "data+fsdp+tensor"): (1, 40)}


@pytest.mark.parametrize(
    ("pairs", "found"),
    [
        ("{{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}", "tensor"),
        ("{{0,4},{1,5},{2,6},{3,7}}", "data"),
        ("{{0,0},{1,4},{4,1},{7,7}}", "data+tensor"),
        ("{{0,0},{1,1}}", None),
        ("{}", None),
    ],
)
def test_a_permute_goes_along_the_axes_that_its_pairs_differ_in(pairs, found):
    line = (
        f"%permute = bf16[3,4]{{1,0}} collective-permute(%p), source_target_pairs={pairs}, x={{}}"
    )
    expected = {("collective-permute", found): (1, 24)} if found else {}
    assert rows(program(line), {"data": 2, "tensor": 4}) == expected


# What is sent


@pytest.mark.parametrize(
    ("shape", "nbytes"),
    [
        ("f32[]", 4),
        ("bf16[2,3]{1,0:T(8,128)(2,1)}", 12),
        ("pred[7]{0}", 7),
        ("s4[5]{0}", 3),
        ("f8e4m3fn[16]{0}", 16),
        ("c64[3]{0}", 24),
        ("u64[<=2,3]{1,0}", 48),
        ("(f32[2]{0}, f32[])", 12),
        ("(f32[], f32[], f32[], f32[], f32[], /*index=5*/f32[2,2]{1,0:T(2,2)}, bf16[])", 38),
        ("(token[], f32[0]{0})", 0),
    ],
)
def test_bytes_of_results(shape, nbytes):
    assert rows(program(reduce(shape))) == {("all-reduce", "data+fsdp+tensor"): (1, nbytes)}


@pytest.mark.parametrize(
    ("kind", "wire"),
    [
        ("all-reduce", 2 * 3 / 4 * 400),
        ("all-gather", 3 / 4 * 400),
        ("reduce-scatter", 3 * 400),
        ("all-to-all", 3 / 4 * 400),
        ("collective-broadcast", 400),
    ],
)
def test_bytes_on_the_wire_of_a_ring(kind, wire):
    text = program(reduce("f32[100]{0}", "replica_groups=[2,4]<=[8]", kind=kind))
    (one,) = hlo.collectives(text, GRID)
    assert one.wire_bytes() == wire


def test_small_arrays_of_a_fused_collective_can_be_left_out():
    text = program(reduce("(f32[100]{0}, f32[], f32[99]{0})"))
    (one,) = hlo.collectives(text, GRID)
    assert (one.nbytes(), one.nbytes(5), one.nbytes(400), one.nbytes(401)) == (800, 796, 400, 0)
    none = collectives.Bounds()
    row, total = collectives.bill(text, GRID, bounds=none, least_bytes=400)
    assert (
        (row["count"], row["bytes"], row["wire_bytes"])
        == (1, 400, 700)
        == tuple(total[name] for name in ("count", "bytes", "wire_bytes"))
    )
    (total,) = collectives.bill(text, GRID, bounds=none, least_bytes=401)
    assert (total["count"], total["bytes"], total["wire_bytes"]) == (0, 0, 0)


def test_a_start_counts_once_and_its_done_not_at_all():
    groups = "replica_groups=[1,8]<=[8]"
    text = program(
        reduce("(f32[4]{0}, f32[32]{0})", groups, kind="all-gather-start"),
        "%done.1 = f32[32]{0} all-gather-done((f32[4]{0}, f32[32]{0}) %all-reduce.1)",
        reduce("((f32[4], f32[2]), (f32[32], f32[16]))", groups, kind="all-gather-start"),
        reduce("(f32[5]{0}, f32[6]{0})", groups, kind="all-reduce-start"),
        "%done.3 = f32[5]{0} all-reduce-done(%all-reduce.1)",
        reduce("((f32[64]{0}), f32[8]{0}, u32[], u32[])", groups, kind="reduce-scatter-start"),
        "%start = (f32[9]{0}, f32[9]{0}, u32[], u32[]) collective-permute-start(%p), "
        "source_target_pairs={{0,1},{1,0}}",
        "%done = f32[9]{0} collective-permute-done(%start)",
    )
    assert rows(text) == {
        ("all-gather", "data+fsdp+tensor"): (2, 128 + 192),
        ("all-reduce", "data+fsdp+tensor"): (1, 44),
        ("reduce-scatter", "data+fsdp+tensor"): (1, 32),
        ("collective-permute", "tensor"): (1, 36),
    }


def test_an_asynchronous_wrapper_counts_once():
    wrapped = "%wrapped (q: f32[4]) -> f32[4] {\n  ROOT " + reduce("f32[8]{0}") + "\n}\n"
    text = program(
        "%s = ((f32[4]), f32[8], u32[]) async-start(%p), calls=%wrapped",
        "%u = ((f32[4]), f32[8], u32[]) async-update(%s), calls=%wrapped",
        "ROOT %d = f32[8] async-done(%u), calls=%wrapped",
        others=wrapped,
    )
    assert rows(text) == {("all-reduce", "data+fsdp+tensor"): (1, 32)}


# How often


def loop(name, trips):
    config = f', backend_config={{"known_trip_count":{{"n":"{trips}"}},"x":{{}}}}' if trips else ""
    return f"%while.{name} = (s32[], f32[4]) while(%p), condition=%add, body=%{name}{config}"


def computation(name, *lines):
    return "\n".join((f"%{name} (p: f32[4]) -> f32[4] {{", *(f"  {x}" for x in lines), "}\n"))


def test_loops_in_loops_multiply():
    others = computation("inner", reduce("f32[2]{0}")) + computation(
        "outer", loop("inner", 5), reduce("f32[1]{0}"), "%c = f32[4] call(%p), to_apply=%inner"
    )
    found = rows(program(loop("outer", 3), reduce("f32[4]{0}"), others=others))
    assert found == {("all-reduce", "data+fsdp+tensor"): (15 + 3 + 3 + 1, 15 * 8 + 3 * 4 + 24 + 16)}


def test_of_a_condition_the_larger_branch_counts():
    others = computation("small", reduce("f32[2]{0}")) + computation(
        "large", reduce("f32[9]{0}"), "%f = f32[4] fusion(%p), kind=kLoop, calls=%small"
    )
    for branches in (
        "branch_computations={%small, %large}",
        "true_computation=%large, false_computation=%small",
    ):
        text = program(f"%c = f32[4] conditional(%i, %p, %p), {branches}", others=others)
        assert rows(text) == {("all-reduce", "data+fsdp+tensor"): (2, 44)}


def test_a_loop_of_unknown_length_is_refused_if_it_holds_a_collective():
    with pytest.raises(UserError, match=r"while/body.*lax\.scan"):
        rows(program(loop("body", None), others=computation("body", reduce("f32[2]{0}"))))
    assert rows(program(loop("body", None), others=computation("body", "%a = f32[] x()"))) == {}


# Programs that jax compiles


def test_a_compiled_program_is_read_to_the_byte():
    mesh = meshes.make_mesh({"data": 2, "tensor": 4})
    ring = [(i, (i + 1) % 4) for i in range(4)]

    def inner(x, _):
        x = jnp.tanh(lax.psum(x, "tensor"))
        return lax.pcast(x, "tensor", to="varying"), None

    def outer(x, _):
        x = jnp.tanh(lax.all_gather(x, "data", tiled=True))
        x = jnp.tanh(lax.psum_scatter(x, "data", tiled=True))
        x = jnp.tanh(lax.ppermute(x, "tensor", ring))
        x = jnp.tanh(lax.all_to_all(x, "tensor", 0, 0, tiled=True))
        return lax.scan(inner, x, None, length=5)[0], None

    def f(x):
        x = lax.scan(outer, x, None, length=3)[0]
        return lax.psum(x.sum(), ("data", "tensor"))

    spec = P(("data", "tensor"))
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=P()))
    text = mapped.lower(jnp.zeros((32, 16))).compile().as_text()
    one = 4 * 16 * 4  # of a device: 4 rows of 16 numbers
    assert rows(text, dict(mesh.shape)) == {
        ("all-gather", "data"): (3, 3 * 2 * one),
        ("reduce-scatter", "data"): (3, 3 * one),
        ("collective-permute", "tensor"): (3, 3 * one),
        ("all-to-all", "tensor"): (3, 3 * one),
        ("all-reduce", "tensor"): (15, 15 * one),
        ("all-reduce", "data+tensor"): (1, 4),
    }


# Lower bounds, by hand


def leaf(path, nbytes, *spec, names=(), shape=(8,)):
    return SimpleNamespace(path=path, nbytes=nbytes, spec=P(*spec), names=names, shape=shape)


def test_bound_of_replicated_parameters():
    leaves = [leaf("params/a", 600), leaf("params/b", 200), leaf("model_state/c", 999)]
    bounds = collectives.parameters(leaves, {"data": 4, "fsdp": 1, "tensor": 8}, accum=7)
    assert bounds == {("all-reduce", "data"): 2 * 3 / 4 * 800}


def test_bound_of_split_moments_is_that_of_whole_ones():
    sizes = {"data": 4, "fsdp": 1, "tensor": 1}
    leaves = [
        leaf("params/up/kernel", 800, None),
        leaf("params/up/bias", 40, None, shape=(10,)),
        leaf("opt_state/0/mu/up/kernel", 800, "data"),
        leaf("opt_state/0/mu/up/bias", 40, None, shape=(10,)),
    ]
    bounds = collectives.parameters(leaves, sizes)
    assert bounds == {
        ("reduce-scatter", "data"): 3 / 4 * 800,
        ("all-gather", "data"): 3 / 4 * 800,
        ("all-reduce", "data"): 2 * 3 / 4 * 40,
    }
    assert bounds.total() == collectives.parameters(leaves[:2], sizes).total()


def test_bound_of_split_parameters():
    leaves = [
        leaf("params/stack/blocks/kernel", 1600, None, "fsdp", names=("layers", "embed")),
        leaf("params/stack/block_0/kernel", 800, "fsdp", names=("embed",)),
        leaf("params/table", 400, "fsdp", names=("vocab",)),
        leaf("params/scale", 4, None, names=("embed",)),
    ]
    sizes, scale = {"data": 1, "fsdp": 4}, 2 * 3 / 4 * 4
    gather = lambda **more: collectives.parameters(leaves, sizes, **more)["all-gather", "fsdp"]  # noqa: E731
    bounds = collectives.parameters(leaves, sizes)
    assert bounds["reduce-scatter", "fsdp"] == 3 / 4 * 2800 == gather()
    assert bounds["all-reduce", "fsdp"] == scale
    assert bounds.total() == 2 * 3 / 4 * 2800 + scale
    assert gather(policy="full") == 3 / 4 * (2 * 2400 + 400)
    assert gather(policy="dots") == gather(policy="names:attn_out") == gather(policy="full")
    # Of the scanned stack's 8 layers 2 are the tail of segments of 3; the other stack is one layer.
    assert gather(policy="every:3") == 3 / 4 * ((2 - 2 / 8) * 1600 + 2 * 800 + 400)
    assert gather(policy="sqrt") == 3 / 4 * (3 * 1600 + 2 * 800 + 400)
    assert gather(accum=2) == 3 / 4 * (2 * 1600 + 800 + 400)
    many = collectives.parameters(leaves, sizes, accum=2)
    assert many["reduce-scatter", "fsdp"] == 2 * 3 / 4 * 2800
    assert many["all-reduce", "fsdp"] == scale


def test_bounds_are_of_the_width_that_the_step_computes_in():
    leaves = [
        leaf("params/split", 3200, "fsdp", shape=(800,)),
        leaf("params/whole", 400, None, shape=(100,)),
        leaf("params/kept", 80, None, shape=(20,)),
        leaf("opt_state/0/mu/kept", 80, "data", shape=(20,)),
    ]
    sizes = {"data": 2, "fsdp": 4}
    wide, narrow = (collectives.parameters(leaves, sizes, itemsize=size) for size in (4, 2))
    assert (
        wide
        == collectives.parameters(leaves, sizes)
        == collectives.parameters(leaves, sizes, itemsize=8)
    )
    gathered = ("all-gather", "data")  # the new parameter, as it is kept
    assert narrow[gathered] == wide[gathered] == 1 / 2 * 80
    assert narrow - collectives.Bounds({gathered: 40}) == collectives.Bounds(
        {key: value / 2 for key, value in wide.items() if key != gathered}
    )


def test_bound_of_a_mixed_mesh_is_axis_by_axis():
    leaves = [leaf("params/k", 960, "fsdp", "tensor"), leaf("params/b", 240, None)]
    sizes = {"data": 3, "fsdp": 2, "tensor": 4}
    assert collectives.parameters(leaves, sizes) == {
        ("all-gather", "fsdp"): 1 / 2 * 240,
        ("reduce-scatter", "fsdp"): 1 / 2 * 240,
        ("all-reduce", "data"): 2 * 2 / 3 * 120,
        ("all-reduce", "data+fsdp"): 2 * 5 / 6 * 240,
    }


@pytest.mark.parametrize(
    ("policy", "reduced", "forward"),
    [  # all-reduces of a layer's results; how often its keys and tokens travel forward
        *(("none", 2, 1), ("full", 3, 2), ("names:mlp_up", 3, 2), ("dots", 2, 2)),
        *(("every:4", 4, 2), ("sqrt", 5, 3), ("poor", 2 * 4.5 - 1 / 8, 4.5)),
    ],
)
def test_what_is_computed_again_is_sent_again(policy, reduced, forward):
    own = dict(layers=8, policy=policy)
    assert collectives.tensor_parallel(1, 2, ends=0, **own).total() == 8 * (2 + reduced)
    assert collectives.ring_attention(1, 2, **own).total() == 8 * (1 + forward)
    assert collectives.experts(2, 2, **own).total() == 8 * 2 * (1 + forward)


def test_bounds_of_activations():
    tensor = ("all-reduce", "tensor")
    assert collectives.tensor_parallel(100, 4, layers=3, ends=0) == {tensor: 8 * 3 / 4 * 100 * 3}
    assert collectives.tensor_parallel(100, 4, layers=3)[tensor] == 2 * 3 / 4 * 100 * (4 * 3 + 2)
    of = functools.partial(collectives.tensor_parallel, 100, 4, layers=3, ends=0)
    for policy in ("none", "full", "every:2"):
        halves = (of(policy=policy, **{name: False})[tensor] for name in ("attention", "mlp"))
        assert sum(halves) == of(policy=policy)[tensor]
    assert not of(attention=False, mlp=False).total()
    remat = collectives.tensor_parallel(100, 4, layers=3, policy="full")[tensor]
    assert remat == 2 * 3 / 4 * 100 * (5 * 3 + 2)
    pipeline = collectives.pipeline(10, microbatches=8, stages=4)
    assert pipeline == {("collective-permute", "stage"): 22 * 10}
    ring = collectives.ring_attention(10, 4, layers=5)
    assert ring == {("collective-permute", "sequence"): 2 * 5 * 3 * 10}


def test_a_bill_says_what_its_bound_does_not_know():
    text = program(
        reduce("f32[100]{0}", "replica_groups=[4,2]<=[8]"),
        reduce("f32[100]{0}", "replica_groups=[4,2]<=[2,4]T(1,0)"),
        reduce("f32[100]{0}", "replica_groups=[4,2]<=[2,4]T(1,0)", kind="all-gather"),
    )
    bounds = collectives.Bounds({("all-reduce", "data"): 200.0, ("reduce-scatter", "data"): 8.0})
    found = collectives.bill(text, {"data": 2, "tensor": 4, "fsdp": 1}, bounds=bounds)
    brief = [(r["kind"], r["axis"], r["count"], r["lower_bound_bytes"], r["ratio"]) for r in found]
    assert brief == [
        ("all-gather", "data", 1, 0, None),
        ("all-reduce", "data", 1, 200, 2.0),
        ("reduce-scatter", "data", 0, 8, None),
        ("all-reduce", "part of tensor", 1, None, None),
        ("all", "all", 3, None, None),
    ]
    assert found[-1]["wire_bytes"] == sum(row["wire_bytes"] for row in found[:-1])
    total = collectives.bill(text, {"data": 2, "fsdp": 4}, bounds=bounds)[-1]
    assert total["lower_bound_bytes"] is None
    lines = collectives.table(found).splitlines()
    assert "unknown" in lines[5]
    assert lines[6:] == [  # of rows whose bound is known, what sends more than it
        "all-gather over data: 200 B beyond its bound, most in",
        "        200 B  1 x f32[100] jit(f)/while/body/all-reduce(x)",
        "all-reduce over data: 200 B beyond its bound, most in",
        "        400 B  1 x f32[100] jit(f)/while/body/all-reduce(x)",
    ]


# Layouts against their bounds

GPT = (  # 4 layers of width 128
    *("stdlib_gpt", "batch_size=16", "model.num_heads=8", "model.scan_layers=true"),
    *("data.seq_len=32", "model.max_length=32"),
)
LAYOUTS = {  # mesh axis, wire bytes / lower bound at most, overrides
    "dp by shard_map": ("data", 1.02, ("partitioner=shard_map",)),
    # XLA reduces the two gradients of the tied table apart.
    "dp by jit": ("data", 1.06, ()),
    "zero1 by shard_map": ("data", 1.02, ("rules=zero1", "partitioner=shard_map")),
    "fsdp by shard_map": ("fsdp", 1.02, ("rules=fsdp", "partitioner=shard_map")),
    "tp by jit": ("tensor", 1.02, ("rules=tp",)),
}


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_sends_little_more_than_it_must(load, name, n):
    axis, most, overrides = LAYOUTS[name]
    config = load(*GPT, f"mesh={axis}={n}", *overrides)
    built = experiment.build(config, devices=jax.devices()[:n])
    # Of tensor parallelism what counts is activations: the softmax of the split logits, sums over
    # D numbers for each token, and the norms' scalars are left out.
    least = collectives.activation_bytes(built) if axis == "tensor" else 0
    *found, total = collectives.of_experiment(built, least_bytes=least)
    assert {row["axis"] for row in found if row["count"]} == {axis}
    assert 1 <= total["ratio"] <= most, collectives.table([*found, total])


@pytest.mark.parametrize("partitioner", ["jit", "shard_map"])
@pytest.mark.parametrize(("n", "microbatches"), [(2, 4), (4, 4), (4, 2)])
def test_a_pipeline_sends_an_activation_a_tick_each_way(load, partitioner, n, microbatches):
    own = ("rules=pp", f"partitioner={partitioner}", f"pipeline_microbatches={microbatches}")
    config = load(*GPT, f"mesh=stage={n}", *own, "model.scan_layers=true")
    built = experiment.build(config, devices=jax.devices()[:n])
    *found, _ = collectives.of_experiment(built)
    (permutes,) = (row for row in found if row["kind"] == "collective-permute")
    assert (permutes["axis"], permutes["ratio"]) == ("stage", 1.0)
    assert permutes["count"] == 2 * (microbatches + n - 1)
    # What is not a permute brings the last stage's results to all, and gradients back.
    activation = collectives.activation_bytes(built)
    rest = [row for row in found if row["kind"] != "collective-permute"]
    assert {row["kind"] for row in rest} <= {"all-reduce"}
    assert sum(row["bytes"] for row in rest) <= 3.1 * activation, collectives.table(found)


def test_tokens_travel_to_their_experts_and_back_in_each_layer(load):
    """And so do their gradients; nothing of a batch is gathered."""
    config = load("stdlib_gpt:experts,smoke", *GPT[1:], "mesh=data=2,expert=4")
    built = experiment.build(config, devices=jax.devices())
    *found, _ = collectives.of_experiment(built)
    (travels,) = (row for row in found if row["kind"] == "all-to-all")
    assert (travels["axis"], travels["ratio"]) == ("expert", 1.0), collectives.table(found)
    assert travels["count"] == 4 * config.model.num_layers
    assert not any(row["count"] for row in found if row["kind"] == "all-gather")


def test_dp_by_shard_map_is_one_all_reduce_of_the_parameters(load):
    for accum in (1, 2):
        config = load(*GPT, "mesh=data=4", "partitioner=shard_map", f"accum={accum}")
        built = experiment.build(config, devices=jax.devices()[:4])
        found, _ = collectives.of_experiment(built)
        parameters = sum(leaf.nbytes for leaf in built.placements if "params/" in leaf.path)
        assert found["count"] == 1
        assert found["lower_bound_bytes"] == 2 * 3 / 4 * parameters
        assert 0 <= found["bytes"] - parameters <= 32  # loss, weight and metrics


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_loss_in_many_chunks_sends_what_one_in_two_does(load, name):
    """The gradients of the table and of its bias are summed over devices after the last chunk."""

    def sent(chunk):
        config = small(load, name, "rules=fsdp", "mesh=fsdp=4", f"loss.chunk={chunk}")
        *_, total = collectives.of_experiment(experiment.build(config, devices=jax.devices()[:4]))
        return total["wire_bytes"]

    assert sent(1) == sent(4) > 0


@pytest.mark.parametrize("role", ["heads", "mlp", "vocab"])
def test_what_the_rules_leave_whole_is_in_no_bound(load, role):
    own = (("batch", ("data", "fsdp")), (role, "tensor"))
    config = ConfigDict(load(*GPT, "mesh=data=1,tensor=4"))
    config.rules = own
    built = experiment.build(config, devices=jax.devices()[:4])
    *_, total = collectives.of_experiment(built, least_bytes=collectives.activation_bytes(built))
    assert total["ratio"] >= 1


# The command


def plan(*arguments, config="digits_mlp.py:smoke"):
    return main(["--config", str(CONFIGS / config), "--collectives", *arguments])


def test_the_plan_has_the_bill(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert plan("--config.mesh=data=-1", "--devices=4", f"--json={file}") == FINISHED
    out, err = capsys.readouterr()
    written = json.loads(file.read_text())
    assert err == ""
    assert written["mesh"]["data"] == 4
    keys = {"kind", "axis", "count", "asynchronous", "bytes", "wire_bytes"}
    keys |= {"lower_bound_bytes", "ratio", "largest"}
    assert [row.keys() for row in written["collectives"]] == [keys] * 2
    reduced, total = written["collectives"]
    assert (reduced["kind"], reduced["axis"]) == ("all-reduce", "data")
    assert (total["kind"], total["axis"], total["ratio"]) == ("all", "all", reduced["ratio"])
    assert collectives.table(written["collectives"]) in out


def test_too_few_devices_are_one_sentence(capsys):
    for mesh, words in (("data=16", "16 devices and there are 8"), ("data=128", "up to 64")):
        assert plan(f"--config.mesh={mesh}", "--config.batch_size=128") == BAD_INPUT
        _, err = capsys.readouterr()
        assert words in err
        assert err.count("\n") == 1


def test_devices_that_are_not_there_are_stood_in_for():
    code = (
        "from lsdl.planner.collectives import devices; import jax; "
        "print(len(devices(5)), jax.device_count(), len(devices(3)))"
    )
    rest = {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=rest, check=True
    )
    assert done.stdout.split() == ["5", "5", "3"]
