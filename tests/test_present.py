"""The devices that are there are found in the hardware table, or nothing is claimed of them."""

from types import SimpleNamespace

import pytest

from lsdl.planner import devices, present


def chips(kind, count, **attributes):
    return [SimpleNamespace(device_kind=kind, **attributes) for _ in range(count)]


def box(kind, *shape, cores=1):
    return [
        SimpleNamespace(device_kind=kind, coords=(x, y, z), slice_index=0)
        for x in range(shape[0])
        for y in range(shape[1])
        for z in range(shape[2])
        for _ in range(cores)
    ]


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (chips("NVIDIA H100 80GB HBM3", 1), "gpu:h100:1x1"),
        (chips("NVIDIA H100 80GB HBM3", 32), "gpu:h100:4x8"),
        (chips("Tesla V100-SXM2-16GB", 8), "gpu:v100-16:1x8"),
        (chips("NVIDIA A100-SXM4-80GB", 16), "gpu:a100-80:2x8"),
        (box("TPU v4", 2, 2, 2), "tpu:v4:2x2x2"),
        (box("TPU v5 lite", 4, 4, 1), "tpu:v5e:4x4"),
        (box("TPU v5", 2, 2, 1), "tpu:v5p:2x2x1"),
    ],
)
def test_known_devices_become_a_target(found, text):
    target = present.target(found)
    assert (target.text, target.count) == (text, len(found))


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H100 PCIe", "NVIDIA GeForce RTX 3090", "TPU v99"])
def test_of_other_devices_nothing_is_claimed(kind):
    assert present.target(chips(kind, 4)) is None


def test_every_kind_is_a_row_of_the_table():
    for _, kind, key in present.KINDS:
        assert devices.find(kind, key).kind == kind


def test_a_cpu_does_not_tell_its_memory():
    assert present.memory_bytes() is None
