"""What a rule table, a parameter's own rule and the moments' further split do to any array."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lsdl import experiment
from lsdl.config import compare, from_json, to_json
from lsdl.errors import UserError
from lsdl.sharding import inspect, placement, rules
from lsdl.sharding.mesh import AXES, make_mesh, parse_mesh

LAW = settings(max_examples=200, derandomize=True, database=None, deadline=None)
ROLES = ("embed", "mlp", "heads", "vocab", "conv_in", "conv_out", "layers", "experts", "classes")
ACTIVATIONS = ("batch", "length", "conv_batch", "residual_length")
OURS = st.sampled_from(sorted(rules.TABLES)).map(rules.table)


def grid(text):
    number = math.prod(int(part.split("=")[1]) for part in text.split(","))
    return make_mesh(parse_mesh(text, number), number)


@st.composite
def meshes(draw):
    sizes = {axis: draw(st.sampled_from([1, 1, 2, 3, 4])) for axis in AXES}
    return make_mesh(sizes, math.prod(sizes.values()))


@st.composite
def own(draw):
    """A user's table: some roles, to some mesh axes, in some order, some of them twice."""
    some = st.lists(st.sampled_from(AXES), min_size=1, max_size=3, unique=True).map(tuple)
    axes = st.none() | st.sampled_from(AXES) | some
    roles = st.sampled_from([r for r in (*ROLES, *ACTIVATIONS) if r != rules.UNSPLIT])
    return rules.table(tuple(draw(st.lists(st.tuples(roles, axes), max_size=12))))


@st.composite
def arrays(draw, sizes=(1, 2, 3, 4, 6, 8, 12, 48)):
    names = draw(st.lists(st.sampled_from([*ROLES, *ACTIVATIONS]), max_size=4, unique=True))
    return names, tuple(draw(st.sampled_from(sizes)) for _ in names)


def boxed(shape, names):
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(tuple(shape), jnp.float32), tuple(names))


def used(spec):
    return [axis for axes in spec for axis in rules.axes_of(axes)]


def state(**params):
    """A state of boxed parameters and of Adam's moments for them."""
    return {"params": params, "opt_state": jax.eval_shape(optax.adam(1.0).init, params)}


# The laws of every table


@LAW
@given(OURS | own(), meshes(), arrays())
def test_every_split_divides_and_takes_a_mesh_axis_once(table, mesh, array):
    names, shape = array
    spec, missed, won = rules.resolve(names, shape, table, mesh)
    assert len(spec) == len(won) == len(shape)
    assert len(used(spec)) == len(set(used(spec)))
    jax.sharding.NamedSharding(mesh, spec).shard_shape(shape)  # raises unless it divides
    for size, axes, why, name in zip(shape, spec, won, names, strict=True):
        assert size % rules.parts(axes, mesh) == 0
        assert bool(why) or rules.parts(axes, mesh) == 1
        assert not why or why == rules.label(name, axes)
    if math.prod(mesh.shape.values()) == 1:
        assert missed == ""


@LAW
@given(OURS | own(), meshes(), arrays(sizes=(4096 * 729,)))
def test_flax_agrees_where_everything_divides(table, mesh, array):
    spec, missed, _ = rules.resolve(*array, table, mesh)
    assert missed == ""
    theirs = nn.logical_to_mesh_axes(array[0], table)
    assert [rules.axes_of(axes) for axes in spec] == [rules.axes_of(axes) for axes in theirs]


@LAW
@given(own(), meshes(), arrays())
def test_a_shadowed_rule_changes_nothing(table, mesh, array):
    spec, _, won = rules.resolve(*array, table, mesh)
    for i in inspect.shadowed(table):
        fewer, _, same = rules.resolve(*array, (*table[:i], *table[i + 1 :]), mesh)
        assert (fewer, same) == (spec, won)


@pytest.mark.parametrize("name", sorted(rules.TABLES))
def test_no_rule_of_ours_is_shadowed_or_splits_conv_in(name):
    assert not [
        line
        for line in inspect.lint([], rules.TABLES[name], mesh=grid("data=8"))
        if "shadowed" in line
    ]
    assert rules.UNSPLIT not in dict(rules.TABLES[name])
    assert {"batch", "conv_batch"} <= dict(rules.TABLES[name]).keys()


# What the tables say of a transformer's kernels and activations

UP, DOWN, TABLE, CONV = (
    ("embed", "mlp"),
    ("mlp", "embed"),
    ("vocab", "embed"),
    ("conv_in", "conv_out"),
)
BETWEEN = ("batch", "residual_length", "embed")
ALL = "data=2,fsdp=2,tensor=2,sequence=2,stage=2"
SAID = {
    "dp": ["P(None, None)"] * 4 + ["P(('data', 'fsdp'), 'sequence', None)"],
    "zero1": ["P(None, None)"] * 4 + ["P(('data', 'fsdp'), 'sequence', None)"],
    "fsdp": [
        *("P('fsdp', None)", "P(None, 'fsdp')", "P(None, 'fsdp')", "P(None, 'fsdp')"),
        "P(('data', 'fsdp'), 'sequence', None)",
    ],
    "tp": [
        *("P(None, 'tensor')", "P('tensor', None)", "P('tensor', None)", "P(None, 'tensor')"),
        "P(('data', 'fsdp'), 'sequence', None)",
    ],
    "tp_sp": [
        *("P(None, 'tensor')", "P('tensor', None)", "P('tensor', None)", "P(None, 'tensor')"),
        "P(('data', 'fsdp'), ('sequence', 'tensor'), None)",
    ],
    "fsdp_tp": [
        *("P('fsdp', 'tensor')", "P('tensor', 'fsdp')", "P('tensor', 'fsdp')"),
        *("P(None, ('tensor', 'fsdp'))", "P(('data', 'fsdp'), 'sequence', None)"),
    ],
    "one_weird_trick": [
        *("P(None, 'tensor')", "P('tensor', None)", "P('tensor', None)", "P(None, None)"),
        "P(('data', 'fsdp'), 'sequence', None)",
    ],
    "pp": ["P(None, None)"] * 4 + ["P(('data', 'fsdp'), 'sequence', None)"],
}


@pytest.mark.parametrize("name", sorted(rules.TABLES))
def test_each_table_does_what_its_name_says(name):
    mesh = grid(ALL)
    found = [
        inspect.show(rules.resolve(roles, (48,) * len(roles), rules.table(name), mesh)[0], mesh)
        for roles in (UP, DOWN, TABLE, CONV, BETWEEN)
    ]
    assert found == SAID[name]
    layers = rules.resolve(("layers", *UP), (48,) * 3, rules.table(name), mesh)[0]
    assert layers[0] == "stage"


def test_convolutions_of_one_weird_trick_see_the_batch_split_by_all_devices():
    mesh, table = grid("data=2,tensor=4"), rules.table("one_weird_trick")
    spec, *_ = rules.resolve(("conv_batch", None, None, None), (48,) * 4, table, mesh)
    assert rules.parts(spec[0], mesh) == 8
    spec, *_ = rules.resolve(("batch", "mlp"), (48, 48), table, mesh)
    assert [rules.parts(axes, mesh) for axes in spec] == [2, 4]


def test_an_axis_that_splits_activations_alone_is_used_by_models_that_have_them():
    attention = state(w=boxed((8, 8), ("embed", "heads")))
    plain = state(w=boxed((8, 8), ("embed", "mlp")))
    for name in ("dp", "tp", "fsdp_tp"):
        mesh, table = grid("data=2,sequence=2"), rules.table(name)
        placement.check_used(mesh, placement.tree_shardings(attention, mesh, table)[1], table)
        with pytest.raises(UserError, match="sequence=2 splits nothing"):
            placement.check_used(mesh, placement.tree_shardings(plain, mesh, table)[1], table)


# The user's own table


def test_an_own_table_says_what_it_leaves_out():
    assert dict(rules.table((("embed", "fsdp"),))) == {
        "embed": "fsdp",
        "batch": ("data", "fsdp"),
        "conv_batch": ("data", "fsdp"),
    }
    own = rules.table((("batch", "data"), ("length", "sequence")))
    assert dict(own)["conv_batch"] == "data"
    assert dict(own)["residual_length"] == "sequence"


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ("fdsp", "did you mean 'fsdp'"),
        (3, "pair 3"),
        ((("embed",),), r"pair \('embed',\)"),
        (("embed", "fsdp"), "pair 'embed'"),
        ((("embed", "fdsp"),), "did you mean 'fsdp'"),
        ((("embed", 3),), "3 is no mesh axis"),
        ((("embed", ("fsdp", "data", "fsdp")),), "names 'fsdp' twice"),
        ((("conv_in", "fsdp"),), "conv_in stays whole"),
    ],
)
def test_a_wrong_table_is_one_sentence(pairs, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        rules.table(pairs)
    assert str(error.value).startswith("rules")
    assert str(error.value)[-1] in ".?"


# Moments


def test_moments_of_zero1_are_split_on_the_first_dim_that_divides():
    mesh = grid("data=4,fsdp=2")
    tree = state(
        odd=boxed((3, 16), ("embed", "mlp")),
        conv=boxed((3, 3, 16, 32), (None, None, "conv_in", "conv_out")),
        small=boxed((3,), ("embed",)),
    )
    table, moments = rules.table("zero1"), rules.moment_axes("zero1")
    _, placements = placement.tree_shardings(tree, mesh, table, moments=moments)
    shown = {p.path: inspect.show(p.spec, mesh) for p in placements}
    both = "('data', 'fsdp')"
    assert {path: spec for path, spec in shown.items() if path.startswith("params/")} == {
        "params/odd": "P(None, None)",
        "params/conv": "P(None, None, None, None)",
        "params/small": "P(None)",
    }
    for moment in ("mu", "nu"):
        assert shown[f"opt_state/0/{moment}/odd"] == f"P(None, {both})"
        assert shown[f"opt_state/0/{moment}/conv"] == f"P(None, None, None, {both})"
        assert shown[f"opt_state/0/{moment}/small"] == "P(None)"
    assert shown["opt_state/0/count"] == "P()"


def test_a_large_moment_that_cannot_be_split_is_an_error():
    mesh, table = grid("data=8"), rules.table("zero1")
    tree = state(w=boxed((1023, 1025), UP))
    with pytest.raises(UserError, match=r"no dim of .* is divisible by 8"):
        placement.tree_shardings(tree, mesh, table, moments=rules.moment_axes("zero1"))
    placement.tree_shardings(tree, mesh, table)


@LAW
@given(
    OURS | own(),
    meshes(),
    arrays(sizes=(1, 2, 3, 4, 6, 8, 12, 16)),  # none large enough to be refused
    st.sampled_from([(), ("data",), ("data", "fsdp")]),
)
def test_a_moment_is_split_like_its_parameter_and_more(table, mesh, array, moments):
    names, shape = array
    tree = {"params": {"w": boxed(shape, names)}, "opt_state": {"mu": {"w": boxed(shape, names)}}}
    _, (moment, param) = placement.tree_shardings(tree, mesh, table, moments=moments)
    held = [inspect.device_bytes(p, mesh) for p in (moment, param)]
    assert held[0] <= held[1]
    assert len(used(moment.spec)) == len(set(used(moment.spec)))
    for name, size, more, less in zip(names, shape, moment.spec, param.spec, strict=True):
        assert size % rules.parts(more, mesh) == 0
        assert more == less or not rules.axes_of(less)
        assert name != rules.UNSPLIT or not rules.axes_of(more)
    gradients = placement.gradient_shardings(tree["params"], mesh, table, moments=moments)
    assert gradients["w"].spec == moment.spec


# A parameter's own rule


def shown(tree, mesh, param_rules, name="fsdp_tp"):
    _, placements = placement.tree_shardings(
        tree, mesh, rules.table(name), param_rules=rules.check_param_rules(param_rules)
    )
    return {p.path: (inspect.show(p.spec, mesh), p.rule) for p in placements}


def test_the_first_own_rule_that_matches_wins_for_parameter_and_moments():
    tree = state(a={"kernel": boxed((8, 8), UP)}, b={"kernel": boxed((8, 8), UP)})
    given = ((r"a/.*", (None, ("fsdp", "tensor"))), (r".*/kernel", ("tensor", None)))
    found = shown(tree, grid("fsdp=2,tensor=2"), given)
    for part in ("params", "opt_state/0/mu", "opt_state/0/nu"):
        assert found[f"{part}/a/kernel"] == ("P(None, ('fsdp', 'tensor'))", "param_rules[0]")
        assert found[f"{part}/b/kernel"] == ("P('tensor', None)", "param_rules[1]")


def test_an_own_rule_leaves_a_teacher_and_what_has_no_names_alone():
    tree = state(w=boxed((8, 8), UP))
    tree["model_state"] = {"teacher": {"params": {"w": boxed((8, 8), UP)}}, "mean": jnp.zeros(8)}
    found = shown(tree, grid("fsdp=2,tensor=2"), ((r".*", (None, None)),))
    assert found["params/w"] == ("P(None, None)", "param_rules[0]")
    assert found["model_state/teacher/params/w"][0] == "P('fsdp', 'tensor')"
    assert found["model_state/mean"] == ("P(None)", "replicated: no rule splits it")


@pytest.mark.parametrize(
    ("pair", "sentence"),
    [
        ((r"c/kernel", ("fsdp", None)), r"'c/kernel' must match a whole path such as 'a/kernel'"),
        ((r"kernel", ("fsdp", None)), "matches no parameter"),
        ((r"a/kernel", ("fsdp",)), "one entry for each of its 2 dims"),
        ((r"a/kernel", ("fsdp", None, None)), "one entry for each of its 2 dims"),
        ((r"a/kernel", (("fsdp", "tensor"), None)), "6 is not divisible by 4"),
        ((r"a/kernel", ("fsdp", "fsdp")), "names 'fsdp' twice"),
        ((r"a/kernel", ("fdsp", None)), "did you mean 'fsdp'"),
        ((r"a/kernel", (2, None)), "2 is no mesh axis"),
        ((r"a/kernel", "fsdp"), "for each dim"),
        ((r"a/(kernel", ("fsdp", None)), "for each dim"),
        ((r"conv", (None, None, "fsdp", None)), "conv_in stays whole"),
        ("ab", "for each dim"),
        (7, "for each dim"),
    ],
)
def test_a_wrong_own_rule_is_one_sentence(pair, sentence):
    names = (None, None, "conv_in", "conv_out")
    tree = state(a={"kernel": boxed((6, 8), UP)}, conv=boxed((3, 3, 4, 4), names))
    with pytest.raises(UserError, match=sentence) as error:
        shown(tree, grid("fsdp=2,tensor=2"), (pair,))
    assert str(error.value).startswith("param_rules")
    assert str(error.value)[-1] in ".?"


# In a config


TABLE_OF_MINE = (("embed", ("fsdp", "tensor")), ("mlp", None))
MINE = ((r"head/kernel", (("data", "fsdp"), None)),)


def test_own_rules_go_from_the_config_to_the_arrays_and_through_json(load):
    config = load("digits_mlp:smoke", "mesh=data=2,fsdp=2,tensor=2")
    fields = to_json(config) | {"rules": TABLE_OF_MINE, "param_rules": MINE}
    again = from_json(to_json(from_json(fields)))
    assert (again.rules, again.param_rules) == (TABLE_OF_MINE, MINE)
    built = experiment.build(again)
    rule = {p.path: p.rule for p in built.placements}
    assert rule["params/head/kernel"] == "param_rules[0]"
    assert rule["params/hidden_0/dense/kernel"] == "embed -> fsdp x tensor, mlp -> whole"
    for field in ("rules", "param_rules", "dcn_mesh"):
        changed = compare(to_json(config), to_json(config) | {field: "x"})
        assert list(changed) == [field]


def test_what_the_rules_did_not_do_is_listed():
    mesh = grid("fsdp=2,tensor=2")
    given = (("mlp", "tensor"), ("mlp", ("tensor", "fsdp")), ("heads", "fsdp"), ("embed", "fsdp"))
    tree = state(w=boxed((3, 8), UP), b=boxed((5,), ("classes",)))
    table, own = rules.table(given), ((r"w|b", (None,)), (r"b", (None,)))
    _, placements = placement.tree_shardings(tree, mesh, table)
    lines = list(inspect.lint(placements, table, mesh=mesh))
    assert lines[0] == "shadowed: the rule mlp -> tensor x fsdp, by mlp -> tensor"
    assert lines[1] == "unused: heads -> fsdp; embed -> fsdp"
    assert "params/w (3, 8) is split by mlp -> tensor alone: embed=3 is not divisible by 2" in (
        "\n".join(lines)
    )
    assert lines[-1].startswith("replicated, no rule names their roles: 1 parameters of 20 bytes")
    tree = {"params": {"b": tree["params"]["b"]}}
    _, placements = placement.tree_shardings(tree, mesh, table, param_rules=own)
    lines = list(inspect.lint(placements, table, own, mesh=mesh))
    assert "shadowed: param_rules[1], 'b', by those before it" in lines
    assert not any(line.startswith("replicated") for line in lines)  # a rule of its own names it
