"""The mesh's text form has one meaning per valid string, and every other string is refused."""

import itertools
import json
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from lsdl.errors import UserError
from lsdl.launcher import spawn_local
from lsdl.sharding.mesh import AXES, batch_shards, make_mesh, parse_dcn, parse_mesh
from tests.conftest import ROOT

LAW = settings(max_examples=300, derandomize=True, database=None, deadline=None)
OLDEST = ("data", "fsdp", "tensor")
ONES = dict.fromkeys(AXES, 1)
LAYOUTS = [
    sizes for sizes in itertools.product((1, 2, 3, 4, 6, 8, 12), repeat=3) if math.prod(sizes) <= 24
]


def text(sizes: dict) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@pytest.mark.parametrize("order", list(itertools.permutations(OLDEST)))
def test_sizes_and_order_are_those_given(order):
    for layout in LAYOUTS:
        sizes = dict(zip(order, layout, strict=True))
        parsed = parse_mesh(text(sizes), math.prod(layout))
        assert list(parsed.items()) == list((sizes | ONES | sizes).items())


@pytest.mark.parametrize("free", OLDEST)
def test_minus_one_takes_what_is_left(free):
    for layout in LAYOUTS:
        sizes = dict(zip(OLDEST, layout, strict=True))
        assert parse_mesh(text(sizes | {free: -1}), math.prod(layout)) == ONES | sizes


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("data=8", "data=8,fsdp=1,tensor=1"),
        ("fsdp=8", "fsdp=8,data=1,tensor=1"),
        ("tensor=-1", "tensor=8,data=1,fsdp=1"),
        ("tensor=4,data=2", "tensor=4,data=2,fsdp=1"),
        ("fsdp=-1,data=4", "fsdp=2,data=4,tensor=1"),
        ("data=8,tensor=-1", "data=8,tensor=1,fsdp=1"),
        ("data=1,fsdp=1,tensor=-1", "data=1,fsdp=1,tensor=8"),
        (" data = 2 , tensor = 4 ", "data=2,tensor=4,fsdp=1"),
        ("data=08", "data=8,fsdp=1,tensor=1"),
    ],
)
def test_axes_left_out_have_size_one_and_come_last(words, expected):
    assert text(parse_mesh(words, 8)) == f"{expected},sequence=1,expert=1,stage=1"


@pytest.mark.threat(26)
@pytest.mark.parametrize("devices", [1, 2, 8, 12])
def test_a_product_other_than_the_devices_is_refused(devices):
    for layout in LAYOUTS:
        words = text(dict(zip(OLDEST, layout, strict=True)))
        if math.prod(layout) != devices:
            with pytest.raises(UserError, match=f" {devices}[ .]"):
                parse_mesh(words, devices)


INVALID = {
    "": "empty",
    "   ": "empty",
    "\n": "empty",
    ",": "part ''",
    "data=8,": "part ''",
    ",data=8": "part ''",
    "data=4,,tensor=2": "part ''",
    "data": "part 'data'",
    "data=": "part 'data='",
    "=8": "no such axis as ''",
    "8": "part '8'",
    "data:8": "part 'data:8'",
    "data==8": "part 'data==8'",
    "data=2=4": "part 'data=2=4'",
    "data=2 tensor=4": "part 'data=2 tensor=4'",
    "data=2;tensor=4": "part 'data=2;tensor=4'",
    "data=8.0": "part 'data=8.0'",
    "data=1e1": "part 'data=1e1'",
    "data=0x8": "part 'data=0x8'",
    "data=1_0": "part 'data=1_0'",
    "data=+8": "part 'data=+8'",
    "data=eight": "part 'data=eight'",
    "data=None": "part 'data=None'",
    "data=-2": "part 'data=-2'",
    "data=--1": "part 'data=--1'",
    "data=- 1": "part 'data=- 1'",
    "data=-0": "part 'data=-0'",
    "data=\u0668": "part 'data=\u0668'",  # Arabic-Indic eight: int() would take it
    "data=\uff18": "part 'data=\uff18'",  # full-width eight
    "data=\u00b2": "part 'data=\u00b2'",  # superscript two: isdigit() takes it
    "dat=8": "did you mean 'data'",
    "Data=8": "did you mean 'data'",
    "tensors=8": "did you mean 'tensor'",
    "fdsp=8": "did you mean 'fsdp'",
    "pipeline=8": "'pipeline'",
    "data=8,experts=1": "did you mean 'expert'",
    "data=2,data=4": "'data' twice",
    "data=8,tensor=1,data=1": "'data' twice",
    "data=-1,data=-1": "'data' twice",
    "data=0": "data the size 0",
    "data=8,tensor=0": "tensor the size 0",
    "data=00": "data the size 00",
    "data=-1,tensor=0": "tensor the size 0",
    "data=-1,tensor=-1": "data and tensor",
    "fsdp=-1,data=-1,tensor=8": "fsdp and data",
    "data=-1,fsdp=-1,tensor=-1": "data and fsdp and tensor",
    "data=99999999999999999999": "size 99999999999999999999",
    "data=" + "9" * 5000: "the size 9999",
    "data=999999999,fsdp=999999999,tensor=999999999": "8 devices",
    "data=3": "product is 3; make it 8, or export JAX_NUM_CPU_DEVICES=3.",
    "data=16": "product is 16; make it 8",
    "data=2,fsdp=2": "product is 4; make it 8",
    "data=2,fsdp=2,tensor=4": "product is 16; make it 8",
    "data=-1,tensor=3": "divides 8, or export JAX_NUM_CPU_DEVICES=3.",
    "data=-1,tensor=16": "divides 8",
    "data=-1,fsdp=2,tensor=8": "divides 8",
}


@pytest.mark.parametrize("words", INVALID, ids=lambda words: repr(words[:40]))
def test_invalid_is_one_sentence(words):
    with pytest.raises(UserError) as error:
        parse_mesh(words, 8)
    sentence = str(error.value)
    assert INVALID[words] in sentence
    assert sentence.startswith("mesh")
    assert sentence[-1] in ".?"
    assert len(sentence.splitlines()) == 1


def test_of_devices_elsewhere_there_are_as_many_as_there_are():
    with pytest.raises(UserError, match=r"fill the 1 device there is.*; make it 1\.$"):
        parse_mesh("data=8", 1)


@pytest.mark.parametrize(
    "layout", ["data=8", "fsdp=2,tensor=2,data=2", "tensor=4,data=2", "data=2,tensor=1,fsdp=4"]
)
def test_mesh_has_the_axes_in_order_and_lets_the_compiler_choose(layout):
    sizes = parse_mesh(layout, 8)
    mesh = make_mesh(sizes)
    assert list(mesh.shape.items()) == list(sizes.items())
    assert mesh.axis_names == tuple(sizes)
    assert set(mesh.axis_types) == {AxisType.Auto}
    # the last axis varies fastest
    expected = [device.id for device in jax.devices()]
    assert [device.id for device in mesh.devices.ravel()] == expected


def test_mesh_takes_the_devices_given():
    devices = jax.devices()[4:]
    mesh = make_mesh({"data": 2, "tensor": 2, "fsdp": 1}, devices)
    assert mesh.devices.shape == (2, 2, 1)
    assert list(mesh.devices.ravel()) == devices


@pytest.mark.parametrize(
    ("layout", "shards"),
    [("data=8", 8), ("fsdp=8", 8), ("tensor=8", 1), ("data=2,fsdp=2,tensor=2", 4)],
)
def test_batch_is_split_over_data_and_fsdp(layout, shards):
    assert batch_shards(make_mesh(parse_mesh(layout, 8))) == shards


# --- properties -----------------------------------------------------------------------------------


@st.composite
def meshes(draw):
    """Sizes of some axes in some order."""
    axes = draw(st.lists(st.sampled_from(AXES), min_size=1, unique=True))
    return {axis: draw(st.integers(1, 9)) for axis in axes}


@pytest.mark.threat(26)
@LAW
@given(meshes(), st.data())
def test_every_valid_string_round_trips(sizes, data):
    number, space = math.prod(sizes.values()), st.sampled_from(["", " ", "\t"])
    spaced = lambda word: data.draw(space) + word + data.draw(space)  # noqa: E731
    free = data.draw(st.sampled_from([None, *sizes]))
    words = {axis: "-1" if axis == free else str(size) for axis, size in sizes.items()}
    given = ",".join(f"{spaced(axis)}={spaced(size)}" for axis, size in words.items())
    parsed = parse_mesh(given, number)
    assert list(parsed.items()) == list((sizes | ONES | sizes).items())
    assert parse_mesh(text(parsed), number) == parsed
    grid = make_mesh(parsed, number)
    assert isinstance(grid, AbstractMesh)
    assert list(grid.shape.items()) == list(parsed.items())


WORDS = (*AXES, "=", ",", "-1", "-", "0", "1", "2", "08", " ", "\n", "dat", "x", "9" * 12)
ALMOST = st.lists(st.sampled_from(WORDS), max_size=16).map("".join)


@pytest.mark.threat(26)
@LAW
@given(st.text(max_size=200) | ALMOST, st.integers(1, 64))
def test_any_other_string_is_one_sentence(words, number):
    try:
        sizes = parse_mesh(words, number)
    except UserError as error:
        sentence = str(error)
        assert sentence.startswith("mesh")
        assert sentence[-1] in ".?"
        assert len(sentence.splitlines()) == 1
    else:
        assert math.prod(sizes.values()) == number
        assert sizes.keys() == set(AXES)
        assert min(sizes.values()) >= 1


# --- slices and nodes -----------------------------------------------------------------------------


@LAW
@given(meshes(), st.data())
def test_the_part_that_crosses_divides(sizes, data):
    sizes = ONES | sizes
    dcn = {axis: data.draw(st.integers(1, 9)) for axis in data.draw(st.sets(st.sampled_from(AXES)))}
    if all(sizes[axis] % part == 0 for axis, part in dcn.items()):
        assert parse_dcn(text(dcn), sizes) == dcn
    else:
        with pytest.raises(UserError, match=r"^dcn_mesh='.*must divide the"):
            parse_dcn(text(dcn), sizes)


@LAW
@given(st.text(min_size=1, max_size=200) | ALMOST.filter(bool))
def test_a_wrong_part_is_one_sentence(words):
    try:
        parse_dcn(words, dict.fromkeys(AXES, 12))
    except UserError as error:
        sentence = str(error)
    else:
        return
    assert sentence.startswith("dcn_mesh")
    assert sentence[-1] in ".?"
    assert len(sentence.splitlines()) == 1


def test_one_process_has_nothing_to_cross():
    sizes = parse_mesh("data=8", 8)
    with pytest.raises(UserError, match="is for 2 slices or nodes and there is 1"):
        make_mesh(sizes, dcn={"data": 2})
    for dcn in ({}, {"data": 1}, None):
        assert make_mesh(sizes, dcn=dcn) == make_mesh(sizes)
    assert make_mesh(sizes, 8, dcn={"data": 2}).shape == make_mesh(sizes).shape


def test_the_axis_given_crosses_two_processes(tmp_path):
    """What `mesh` puts last, and so within a process, is what `dcn_mesh` takes across."""
    mesh, dcn = "tensor=2,fsdp=2,data=2", "data=2"
    found = crossed(tmp_path, mesh, dcn)
    assert found[0] == found[1]
    assert found[0]["shape"] == [2, 2, 2, 1, 1, 1]
    assert found[0]["processes"] == [[[0, 1], [0, 1]], [[0, 1], [0, 1]]]
    assert found[0]["sums"] == [4.0, 12.0]  # each process has one row of two, of ones or of threes


def crossed(folder, *arguments):
    spawned = spawn_local(
        ("tests.crossing", str(folder), *arguments),
        num_processes=2,
        devices_per_process=4,
        env={"PYTHONPATH": str(ROOT)},
    )
    try:
        outputs = [process.communicate(timeout=120) for process in spawned]
    finally:
        for process in spawned:
            process.kill()
    assert [process.returncode for process in spawned] == [0, 0], outputs
    return [json.loads((folder / f"{i}.json").read_text()) for i in range(2)]
