"""Scaling on paper: the scaling book's thresholds, and published curves with nothing fitted."""

import dataclasses
import math
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from lsdl.errors import UserError
from lsdl.planner import hardware, published, scaling
from lsdl.planner.devices import find

WORK = scaling.Work(parameters=10**9, model_flops=6e9, gradient_bytes=2, units_per_example=1024)
H100, V5E, V5P = (find(*words) for words in (("gpu", "h100"), ("tpu", "v5e"), ("tpu", "v5p")))


@pytest.mark.parametrize(
    ("device", "count", "text"),
    [
        (H100, 4, "gpu:h100:1x4"),
        (H100, 65_536, "gpu:h100:8192x8"),
        (V5E, 8, "tpu:v5e:2x4"),
        (V5E, 256, "tpu:v5e:16x16"),
        (V5E, 65_536, "tpu:v5e:16x16:256"),
        (V5P, 8, "tpu:v5p:2x2x2"),
        (V5P, 4096, "tpu:v5p:16x16x16"),
        (V5P, 8192, "tpu:v5p:16x16x16:2"),
        (find("tpu", "v3"), 8, "tpu:v3:2x2"),
    ],
)
def test_a_number_of_devices_is_whole_nodes_or_the_squarest_slice(device, count, text):
    own = scaling.target(device, count)
    assert (own.text, own.count) == (text, count)
    assert hardware.parse(text) == own


@pytest.mark.parametrize(("device", "count"), [(H100, 12), (V5E, 24), (find("tpu", "v3"), 1)])
def test_a_number_that_is_neither_is_told(device, count):
    with pytest.raises(UserError, match=rf"{count} of {device.name} are no"):
        scaling.target(device, count)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("8..64", [8, 16, 32, 64]),
        ("8..65536", [2**i for i in range(3, 17)]),
        ("6..30", [6, 12, 24]),
        ("512,8", [8, 512]),
        ("7", [7]),
    ],
)
def test_numbers_of_devices_are_read(text, found):
    assert scaling.counts(text) == found


@pytest.mark.parametrize("text", ["", "8..4", "0..8", "8...64", "8,,x", "0", "-8"])
def test_other_numbers_of_devices_are_told(text):
    with pytest.raises(UserError, match=r"must be as 8\.\.65536"):
        scaling.counts(text)


# Austin et al. 2025, chapters 5 and 12: tokens on each device below which FSDP is bound by the
# network, in bfloat16: 2 gathers and a scatter of 2 bytes over so many bytes a second.
@pytest.mark.parametrize(
    ("device", "count", "split", "tokens"),
    [
        (V5P, 4096, "inside", 850),  # three rings of 1.8e11
        (V5E, 256, "inside", 197e12 / 1.8e11),
        (H100, 8, "inside", 2_200),  # in a node
        (H100, 65_536, "all", 2_475),  # across nodes
    ],
)
def test_the_thresholds_of_the_scaling_book(device, count, split, tokens):
    own = scaling.point(WORK, scaling.target(device, count), 4096, split=split)
    n = count if split == "all" else min(count, 8 if device is H100 else count)
    assert own["least_units_per_device"] == pytest.approx(tokens * (n - 1) / n, rel=2e-3)


def test_a_point_by_hand():
    """2 slices of 256 v5e: all-gathers and reduce-scatters on ICI, an all-reduce on DCN."""
    work = dataclasses.replace(WORK, extra_flops=2e9, gradient_bytes=4)
    own = scaling.point(work, scaling.target(V5E, 512), 4096)
    computing = 8e9 * 4096 / 197e12
    fsdp = (2 * 2e9 + 4e9) * 255 / 256 / 1.8e11
    data = 2 * 1 / 2 * 4e9 / 256 / 3.125e9
    assert own["parts_s"] == pytest.approx({"compute": computing, "fsdp": fsdp, "data": data})
    assert own["networks"] == {"fsdp": "ICI", "data": "DCN"}
    assert own["step_s"] == pytest.approx({"hidden": computing, "exposed": computing + fsdp + data})
    assert own["mfu"]["hidden"] == pytest.approx(0.75)
    assert own["units_per_s"]["exposed"] == pytest.approx(512 * 4096 / (computing + fsdp + data))
    assert own["binds"] == "compute"
    few = scaling.point(work, scaling.target(V5E, 512), own["least_units_per_device"] / 2)
    assert few["binds"] == "ICI (fsdp)"
    assert few["step_s"]["hidden"] == pytest.approx(fsdp)


def test_microbatches_gather_and_reduce_again():
    once, twice = (
        scaling.point(
            dataclasses.replace(WORK, gathers=2 * k, reduces=k), scaling.target(H100, 16), 4096
        )
        for k in (1, 2)
    )
    assert twice["sent_bytes"]["fsdp"] == 2 * once["sent_bytes"]["fsdp"]
    assert twice["sent_bytes"]["data"] == once["sent_bytes"]["data"] > 0  # sums that wait


def test_weak_scaling_keeps_a_devices_batch_and_strong_scaling_the_whole():
    devices = scaling.counts("8..65536")
    found = scaling.make(
        WORK, H100, devices=devices, units_per_device=2_048, units_per_step=2**22, split="all"
    )
    weak, strong = found["weak"], found["strong"]
    assert [row["devices"] for row in weak] == devices
    assert {row["units_per_device"] for row in weak} == {2_048}
    # less than an example of 1,024 on a device is not possible
    assert [row["devices"] for row in strong] == [n for n in devices if n <= 4096]
    assert {row["units_per_device"] * row["devices"] for row in strong} == {2**22}
    # 2,475 (n-1)/n tokens on a device are the least across nodes, 2,200 7/8 in one
    assert found["binds_at"] == {"weak": 16, "strong": 2048}
    for row in (*weak, *strong):
        bound = row["units_per_device"] < row["least_units_per_device"]
        assert (row["binds"] != "compute") == bound
    text = scaling.table(found)
    assert "a network binds from 2,048 devices on" in text
    assert "and no further" in text
    assert scaling.MISSING in text
    drawn = scaling.figure(found, published.overlay(H100))
    assert len(drawn.contents) == 2
    assert drawn.svg().count("torchtitan") >= 1


def test_a_split_that_there_is_not_is_told():
    given = dict(devices=[8], units_per_device=1, units_per_step=1)
    with pytest.raises(UserError, match="split='half'"):
        scaling.make(WORK, H100, **given, split="half")


def test_the_work_of_an_experiment_is_its_plan():
    numbers = {"parameters": 7, "model_flops_per_example": 600, "step_flops_per_example": 800}
    task = SimpleNamespace(unit="tokens", units_per_example=10)
    module = SimpleNamespace(dtype=jnp.bfloat16)
    given = dict(task=task, module=module, accum=3, remat="full")
    found = scaling.work_of(numbers, SimpleNamespace(**given))
    assert (found.model_flops, found.extra_flops) == (60, 20)
    assert (found.gathers, found.reduces) == (6, 3)
    assert (found.weight_bytes, found.gradient_bytes) == (2, 2)
    assert scaling.work_of(numbers, SimpleNamespace(**given | {"remat": "none"})).gathers == 3


# Parameters, in billions, as the runs give them.
PARAMETERS = {"32B": 32, "16B": 16, "Llama 2 7B": 6.738, "Llama 3.1 8B": 8.03, "MPT 13B": 12.85}


@pytest.mark.parametrize("curve", published.CURVES, ids=lambda curve: curve.name)
def test_published_runs_are_of_their_size(curve):
    (expected,) = (n for name, n in PARAMETERS.items() if name in curve.name)
    assert curve.work.parameters / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("curve", published.CURVES, ids=lambda curve: curve.name)
def test_published_curves_are_near_the_bracket_with_nothing_fitted(curve):
    """Within 10%: of the efficiency, and of MFU never above what the peak rates allow."""
    found = published.compare(curve)
    assert found["within"] < 0.10
    for row in found["rows"]:
        assert row["mfu"]["exposed"] <= row["mfu"]["hidden"] <= 1
        assert row["published_mfu"] < row["mfu"]["hidden"]
    assert f"{found['within']:.1%} of the bracket" in published.table(found)


def test_maxtext_32b_from_256_to_8192_chips():
    """The curve is met within 10%; the loss is not explained, and the report says so."""
    (curve,) = (curve for curve in published.CURVES if curve.name == "MaxText 32B, v5e")
    found = published.compare(curve)
    first, last = found["rows"][0], found["rows"][-1]
    assert (first["devices"], last["devices"]) == (256, 8192)
    for row in (first, last):  # MFU itself, everything exposed
        assert row["mfu"]["exposed"] == pytest.approx(row["published_mfu"], rel=0.10)
    assert last["efficiency"]["exposed"] == pytest.approx(0.6040 / 0.6686, rel=0.10)
    # bytes over DCN's peak rate cannot be more than a quarter of what was lost
    assert 0 < max(found["drop"].values()) < 0.3 * found["published_drop"]
    text = published.verdict(found)
    assert "explains 25% of the loss at most" in text
    assert "latency of the network" in text
    assert "From 4,096 to 8,192 devices each sends 0.6% more, and 3.0%" in text


def test_a_loss_within_the_bracket_is_explained():
    (curve,) = (curve for curve in published.CURVES if curve.name.startswith("torchtitan"))
    found = published.compare(curve)
    assert found["within"] == 0
    assert published.verdict(found).endswith("which explains it.")
    assert math.isclose(found["published_drop"], 1 - 6514 / 6667)
