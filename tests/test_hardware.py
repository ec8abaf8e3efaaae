"""The hardware table: every figure has its source, and a mesh axis its network."""

import re

import pytest

from lsdl.errors import UserError
from lsdl.planner import devices, hardware
from lsdl.planner.hlo import WIRE

ROWS = devices.devices()
WANTED = [
    *("v100-16", "v100-32", "a100-40", "a100-80", "h100", "h200", "b200"),
    *("v3", "v4", "v5e", "v5p", "v6e", "7x"),
]


def rates(target, sizes, axis, **dcn):
    found = hardware.link(hardware.parse(target), sizes, axis, dcn=dcn)
    per_s = found.bytes_per_s
    return found.network, *(
        round(per_s[kind] / 1e9, 3) for kind in ("all-gather", "all-to-all", "collective-permute")
    )


# The table


def test_the_devices_of_the_issue_are_there():
    assert [key for kind, key in ROWS if kind != "cpu"] == WANTED


@pytest.mark.parametrize("key", ROWS, ids=":".join)
def test_every_figure_has_a_source_with_a_year(key):
    row = ROWS[key]
    for name, figure in row.figures().items():
        assert figure.value > 0, name
        assert re.search(r"\b20\d\d\b|libtpu \d", figure.source), (name, figure.source)
        assert figure.source in hardware.table()
    if row.kind != "cpu":
        assert {"memory_bytes", "memory_bytes_per_s", "network_bytes_per_s"} <= set(row.figures())


@pytest.mark.parametrize("key", [key for key in ROWS if key[0] == "gpu"], ids=":".join)
def test_what_the_compiler_is_told_agrees_with_the_figures(key):
    row = ROWS[key]
    told, figures = row.compiler, row.figures()
    assert told["device_memory_size"] == figures["memory_bytes"].value
    assert told["memory_bandwidth"] == pytest.approx(figures["memory_bytes_per_s"].value, rel=0.01)
    # Two FLOPs of each unit in each cycle of the boost clock.
    peak = 2 * told["core_count"] * told["fpus_per_core"] * told["clock_rate_ghz"] * 1e9
    assert peak == pytest.approx(figures["float32_flops_per_s"].value, rel=0.02)
    assert len(told) == len(ROWS["gpu", "h100"].compiler)


def test_peaks_are_dense():
    """Half of what data sheets print with sparsity: 1,979 TFLOP/s of H100, 4.5 PFLOP/s of B200."""
    peak = lambda key: ROWS["gpu", key].flops_per_s["bfloat16"].value / 1e12  # noqa: E731
    assert [peak(key) for key in ("a100-80", "h100", "h200", "b200")] == [312, 989.5, 989.5, 2250]
    v100 = ROWS["gpu", "v100-16"]
    assert v100.peak("bfloat16") == ("float16", v100.flops_per_s["float16"])
    assert ROWS["tpu", "v5p"].peak("float32") == ("float32", None)


# Targets


@pytest.mark.parametrize(
    ("text", "name", "shape", "count"),
    [
        ("tpu:v5p:8x8x16", "TPU v5p", (8, 8, 16), 1024),
        ("tpu:v5e:16x16:32", "TPU v5e", (16, 16), 8192),
        ("tpu:7x:4x4x4", "TPU7x (Ironwood)", (4, 4, 4), 128),
        ("gpu:h100:4x8", "NVIDIA H100 SXM 80 GB", (4, 8), 32),
        ("gpu:v100-16:1x1", "NVIDIA V100 SXM2 16 GB", (1, 1), 1),
        ("cpu:64", "CPU", (64,), 64),
    ],
)
def test_targets_are_read_and_written(text, name, shape, count):
    target = hardware.parse(text)
    assert (target.text, target.device.name, target.shape, target.count) == (
        *(text, name, shape, count),
    )


def test_a_device_may_have_other_names():
    assert hardware.parse("gpu:a100:2x4").text == "gpu:a100-80:2x4"
    assert hardware.parse("tpu:ironwood:2x2x1").text == "tpu:7x:2x2x1"


def test_two_devices_of_a_chip_share_its_figures():
    chip = ROWS["tpu", "7x"]
    target = hardware.parse("tpu:7x:2x2x1")
    assert 2 * target.memory_bytes == chip.memory_bytes.value
    assert 2 * target.memory_bytes_per_s == chip.memory_bytes_per_s.value
    assert 2 * target.flops_per_s("bfloat16") == 2307e12
    assert hardware.parse("cpu:8").flops_per_s("float32") is None
    assert hardware.parse("cpu:8").memory_bytes is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpu:v5:2x2x2", "choose v5p or v5e"),
        ("gpu:h10:1x8", "choose h100"),
        ("gpu:mi300:1x8", "--hardware FILE"),
        ("npu:v5p:8", "did you mean 'tpu'"),
        ("tpu:v5p:8x8", "must have 3 sizes"),
        ("tpu:v5e:16x16x2", "must have 2 sizes"),
        ("gpu:h100:1x16", "nodes of up to 8"),
        ("gpu:h100:1x8:2", "slices are of TPUs"),
        ("tpu:v5e:32x16", "larger than a pod of TPU v5e, 16x16"),
        ("gpu:h100", "no target: write"),
        ("gpu:h100:0x8", "'0x8'"),
        ("gpu:h100:1x8x", "'1x8x'"),
        ("cpu", "no target"),
        ("", "no target"),
    ],
)
def test_what_is_no_target_is_told(text, words):
    with pytest.raises(UserError, match=re.escape(words)):
        hardware.parse(text)


# A user's own rows

OWN = """
[sources]
sheet = "Vendor, Model X data sheet, 2027"
[gpu.x]
name = "Model X"
memory_bytes = [100e9, "sheet"]
memory_bytes_per_s = [1e12, "sheet"]
node_devices = [4, "sheet"]
node_bytes_per_s = [100e9, "sheet"]
network_bytes_per_s = [10e9, "sheet"]
flops_per_s = { bfloat16 = [1e15, "sheet"] }
[gpu.h100]
like = "h100"
name = "our H100"
memory_bytes = [94e9, "sheet"]
"""


def test_a_row_of_the_users_own(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text(OWN)
    target = hardware.parse("gpu:x:3x4", file)
    assert (target.count, target.flops_per_s("bfloat16")) == (12, 1e15)
    assert target.device.memory_bytes.source == "Vendor, Model X data sheet, 2027"
    ours = hardware.parse("gpu:h100:1x8", file)
    assert (ours.device.name, ours.memory_bytes) == ("our H100", 94_000_000_000)
    assert ours.flops_per_s("bfloat16") == 989.5e12
    assert ours.device.memory_bytes_per_s == ROWS["gpu", "h100"].memory_bytes_per_s
    assert "Model X" in hardware.table(file)
    assert hardware.parse("gpu:h100:1x8").device.name == "NVIDIA H100 SXM 80 GB"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('network_bytes_per_s = [10e9, "sheet"]\n', "", "[gpu.x] lacks network_bytes_per_s"),
        ("network_bytes_per_s = [10e9", "network_bytes = [10e9", "'network_bytes_per_s'"),
        ('[1e12, "sheet"]', "1e12", "write [a positive number, a key of [sources]]"),
        ('[1e12, "sheet"]', '[-1, "sheet"]', "write [a positive number"),
        ('[1e12, "sheet"]', '[1e12, "leaflet"]', "'leaflet', which [sources] does not have"),
        ("bfloat16 =", "bf16 =", "did you mean 'bfloat16'"),
        ('like = "h100"', 'like = "h101"', "did you mean 'h100'"),
        ("[gpu.x]", "[gpus.x]", "did you mean 'gpu'"),
        ("[sources]", "[sources", "cannot be read"),
    ],
)
def test_faults_of_such_a_file_are_told(tmp_path, old, new, words):
    file = tmp_path / "own.toml"
    assert old in OWN
    file.write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=re.escape(words)):
        hardware.parse("gpu:x:3x4", file)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        hardware.parse("gpu:x:3x4", tmp_path / "none.toml")


# Networks


@pytest.mark.parametrize(
    ("sizes", "axis", "expected"),
    [
        # How to Scale Your Model, chapter 12: 450 GB/s in a node, 400 GB/s out of one.
        ({"data": 4, "tensor": 8}, "tensor", ("NVLink", 450, 450, 450)),
        ({"fsdp": 32}, "fsdp", ("network", 400, 50 * 31 / 24, 50)),
        ({"data": 4, "fsdp": 4, "tensor": 2}, "fsdp", ("NVLink", 450, 450, 450)),
        ({"data": 4, "tensor": 8}, "data", ("network", 50, 50, 50)),
        ({"data": 16, "tensor": 2}, "data", ("network", 200, 50 * 15 / 12, 50)),
        ({"data": 4, "fsdp": 2, "tensor": 4}, "data+fsdp", ("network", 100, 50 * 7 / 6, 50)),
        ({"data": 4, "fsdp": 2, "tensor": 4}, "fsdp+tensor", ("NVLink", 450, 450, 450)),
    ],
)
def test_gpu_axes(sizes, axis, expected):
    network, *numbers = expected
    assert rates("gpu:h100:4x8", sizes, axis) == (network, *(round(n, 3) for n in numbers))


def test_dcn_mesh_says_which_part_of_an_axis_leaves_the_node():
    sizes = {"tensor": 8, "data": 4}
    assert rates("gpu:h100:4x8", sizes, "tensor")[0] == "network"
    assert rates("gpu:h100:4x8", sizes, "tensor", data=4)[0] == "NVLink"
    assert rates("gpu:h100:4x8", sizes, "data", data=4) == ("network", 50, 50, 50)


@pytest.mark.parametrize(
    ("target", "sizes", "axis", "expected"),
    [
        # Chapter 3: bytes / (both ways x dims) on rings, half on lines; an all-to-all a quarter.
        ("tpu:v5p:4x4x4", {"data": 4, "fsdp": 16}, "data", ("ICI", 180, 8 * 90 * 3 / 16, 90)),
        ("tpu:v5p:4x4x4", {"fsdp": 64}, "fsdp", ("ICI", 540, 8 * 90 * 63 / 64 / 4, 90)),
        ("tpu:v5p:2x2x2", {"fsdp": 8}, "fsdp", ("ICI", 270, 4 * 90 * 7 / 8 / 2, 90)),
        ("tpu:v5p:2x2x4", {"data": 4, "fsdp": 4}, "fsdp", ("ICI", 180, 4 * 90 * 3 / 8, 90)),
        ("tpu:v5e:8x16", {"data": 8, "fsdp": 16}, "fsdp", ("ICI", 90, 8 * 45 * 15 / 256, 45)),
        ("tpu:v5e:8x16", {"data": 8, "fsdp": 16}, "data", ("ICI", 45, 4 * 45 * 7 / 64, 45)),
        # The 16 of the torus shared: tensor next to one another, data four apart.
        (
            "tpu:v5p:8x8x16",
            {"data": 4, "fsdp": 64, "tensor": 4},
            "tensor",
            ("ICI", 90, 4 * 90 * 3 / 16, 90),
        ),
        (
            "tpu:v5p:8x8x16",
            {"data": 4, "fsdp": 64, "tensor": 4},
            "data",
            ("ICI", 45, 8 * 90 * 3 / 16 / 4, 22.5),
        ),
        (
            "tpu:v5p:8x8x16",
            {"data": 4, "fsdp": 64, "tensor": 4},
            "data+tensor",
            ("ICI", 180, 8 * 90 * 15 / 256, 90),
        ),
        # Two devices of a chip share its links, unless both take part.
        ("tpu:7x:4x4x4", {"data": 64, "tensor": 2}, "data", ("ICI", 300, 8 * 50 * 63 / 256, 50)),
        ("tpu:7x:4x4x4", {"fsdp": 128}, "fsdp", ("ICI", 600, 8 * 100 * 127 / 128 / 4, 100)),
    ],
)
def test_tpu_axes(target, sizes, axis, expected):
    network, gather, travel, hop = expected
    assert rates(target, sizes, axis) == (network, gather, round(travel, 3), hop)


def test_slices_meet_over_the_data_centre_network():
    sizes, target = {"data": 4, "fsdp": 256}, "tpu:v5e:16x16:4"
    assert rates(target, sizes, "fsdp", data=4)[:2] == ("ICI", 180)
    assert rates(target, sizes, "data", data=4) == ("DCN", 3.125, 3.125, 3.125)
    # The chips of a slice bring what they have, 2 x 3.125 GB/s.
    sizes = {"data": 8, "fsdp": 128}
    assert rates(target, sizes, "data", data=4) == (
        "ICI + DCN",
        6.25,
        round(3.125 * 7 / 6, 3),
        3.125,
    )
    with pytest.raises(UserError, match=r"config\.dcn_mesh must say"):
        hardware.link(hardware.parse(target), sizes, "data")


def test_devices_of_one_chip_have_no_published_rate():
    found = hardware.link(hardware.parse("tpu:7x:4x4x4"), {"data": 64, "tensor": 2}, "tensor")
    assert (found.network, found.bytes_per_s) == ("chip", None)


def test_one_device_and_cpus():
    target = hardware.parse("cpu:8")
    assert hardware.link(target, {"data": 8, "fsdp": 1}, "fsdp").network == "none"
    assert hardware.link(target, {"data": 8, "fsdp": 1}, "data").bytes_per_s is None


def test_a_mesh_that_does_not_lie_on_the_target_is_told():
    with pytest.raises(UserError, match="make them equal"):
        hardware.link(hardware.parse("gpu:h100:1x8"), {"data": 4}, "data")


def test_all_kinds_of_collectives_have_a_rate():
    for target, sizes in (("gpu:h100:2x8", {"fsdp": 16}), ("tpu:v4:4x4x4", {"fsdp": 64})):
        assert (
            hardware.link(hardware.parse(target), sizes, "fsdp").bytes_per_s.keys() == WIRE.keys()
        )


def test_thresholds_of_the_book():
    """Chapters 5 and 12: tokens per device from which data parallelism is compute bound."""
    v5p = hardware.parse("tpu:v5p:4x4x4")
    for sizes, expected in (({"data": 4, "fsdp": 16}, 2550), ({"data": 64}, 850)):
        rate = hardware.link(v5p, sizes, "data").bytes_per_s["all-gather"]
        assert v5p.flops_per_s("bfloat16") / rate == pytest.approx(expected, rel=0.005)
    h100 = hardware.parse("gpu:h100:4x8")
    for sizes, expected in (({"data": 4, "fsdp": 8}, 2200), ({"fsdp": 32}, 2475)):
        rate = hardware.link(h100, sizes, "fsdp").bytes_per_s["all-gather"]
        assert h100.flops_per_s("bfloat16") / rate == pytest.approx(expected, rel=0.005)
