"""The mesh's text form has one meaning per valid string, and every other string is refused."""

import itertools
import math

import jax
import pytest
from jax.sharding import AxisType

from lsdl.errors import UserError
from lsdl.sharding.mesh import AXES, batch_shards, make_mesh, parse_mesh

LAYOUTS = [
    sizes for sizes in itertools.product((1, 2, 3, 4, 6, 8, 12), repeat=3) if math.prod(sizes) <= 24
]


def text(sizes: dict) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())


@pytest.mark.parametrize("order", list(itertools.permutations(AXES)))
def test_sizes_and_order_are_those_given(order):
    for layout in LAYOUTS:
        sizes = dict(zip(order, layout, strict=True))
        parsed = parse_mesh(text(sizes), math.prod(layout))
        assert list(parsed.items()) == list(sizes.items())


@pytest.mark.parametrize("free", AXES)
def test_minus_one_takes_what_is_left(free):
    for layout in LAYOUTS:
        sizes = dict(zip(AXES, layout, strict=True))
        assert parse_mesh(text(sizes | {free: -1}), math.prod(layout)) == sizes


@pytest.mark.parametrize(
    ("given", "expected"),
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
def test_axes_left_out_have_size_one_and_come_last(given, expected):
    assert text(parse_mesh(given, 8)) == expected


@pytest.mark.parametrize("devices", [1, 2, 8, 12])
def test_a_product_other_than_the_devices_is_refused(devices):
    for layout in LAYOUTS:
        given = text(dict(zip(AXES, layout, strict=True)))
        if math.prod(layout) != devices:
            with pytest.raises(UserError, match=f" {devices}[ .]"):
                parse_mesh(given, devices)


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
    "data=8,expert=1": "'expert'",
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
    "data=3": "product is 3; make it 8",
    "data=16": "product is 16; make it 8",
    "data=2,fsdp=2": "product is 4; make it 8",
    "data=2,fsdp=2,tensor=4": "product is 16; make it 8",
    "data=-1,tensor=3": "divides 8",
    "data=-1,tensor=16": "divides 8",
    "data=-1,fsdp=2,tensor=8": "divides 8",
}


@pytest.mark.parametrize("given", INVALID, ids=lambda given: repr(given[:40]))
def test_invalid_is_one_sentence(given):
    with pytest.raises(UserError) as error:
        parse_mesh(given, 8)
    sentence = str(error.value)
    assert INVALID[given] in sentence
    assert sentence.startswith("mesh")
    assert sentence[-1] in ".?"
    assert len(sentence.splitlines()) == 1


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
