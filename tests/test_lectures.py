"""The lectures' numbers come out of the planner, and where they err both figures are printed."""

import pytest

from lsdl.planner import lectures

ROWS = {one.what: one for one in lectures.numbers()}
# What comes out, to the digits that the lectures and the papers print.
GOLDEN = {
    "AlexNet": 60_965_224,
    "ResNet-50": 25_557_032,
    "CLIP ViT-L/14": 427_616_513,
    "GPT-3": 174_604_259_328,
    "ImageNet-1k": 0.2107e12,
    "ImageNet-1k, images": 1_431_167,
    "FFHQ": 0.2202e12,
    "LAION-400M": 413e6,
    "LAION-5B": 5.85e9,
    "Big Fantastic Database": 2_204_359_010,
    "GPT-3, half-precision weights": 349.2e9,
    "V100 of 16 GB that hold them": 22,
    "GPT-3, memory for training": 2.8e12,
    "V100 of 16 GB for training": 175,
    "GPT-3, a training": 3.143e23,
    "on one V100": 355.7,
    "on one A100": 90.04,
    "the rate that 90 A100-years stand for": 110.66e12,
    "on one A100 at its peak": 31.92,
    "on 2,000 A100": 16.44,
    "openCLIP ViT-g/14, 34.5 G pairs on 1,480 A100": 4.2525,
    "its MFU in 8 days": 0.18853,
    "its GPU-hours": 284_160,
    "its pairs per second and GPU": 33.73,
    "its steps": 388_514,
    "ResNet-50, 90 epochs on one V100": 25.22,
    "AlphaFold 2 on 128 TPU v3 cores": 11,
    "its device-days": 1408,
    "TPU v5p, tokens per device, data over one axis": 2550,
    "TPU v5p, over three axes": 850,
    "H100, within a node": 2199,
    "H100, across nodes": 2474,
    "TPU v5p, tensor parallelism of an MLP of 28,672": 28_672 / 2550,
}
ERR = {  # of more than a fifth, and why the table says so
    "CLIP ViT-L/14": "published model",
    "ImageNet-1k": "raw images",
    "FFHQ": "whole published bundle",
    "GPT-3, memory for training": "weights alone",
    "V100 of 16 GB for training": "hold the weights",
    "openCLIP ViT-g/14, 34.5 G pairs on 1,480 A100": "MFU of 19%",
    "ResNet-50, 90 epochs on one V100": "1,601 images/s",
}


@pytest.mark.parametrize("what", GOLDEN)
def test_a_number(what):
    assert ROWS[what].computed == pytest.approx(GOLDEN[what], rel=3e-4)


def test_no_number_is_left_out():
    assert ROWS.keys() == GOLDEN.keys()


def test_the_lectures_agree_or_the_table_says_what_their_number_is():
    far = {
        what
        for what, one in ROWS.items()
        if isinstance(one.said, int | float) and abs(one.said / one.computed - 1) > 0.2
    }
    assert far == ERR.keys()
    table = lectures.table()
    for what, words in ERR.items():
        assert words in ROWS[what].errs
        assert f"{what}: the lectures' " in table


def test_each_discrepancy_of_the_numbers_is_named():
    named = {one.discrepancy for one in ROWS.values()} - {""}
    assert named == {f"D-0{i}" for i in range(1, 7)}
    assert "the whole published bundle, not the 1,024-pixel images (D-01)" in lectures.table()


def test_both_figures_are_printed():
    lines = lectures.table().splitlines()
    (line,) = (line for line in lines if line.startswith("GPT-3, memory for training"))
    assert "350 GB [" in line
    assert "2.8 TB" in line
    (line,) = (line for line in lines if line.startswith("on one V100"))
    assert "355 years" in line
    assert "at 28 TFLOP/s, 22% of 125 TFLOP/s" in line
    assert any("few weeks" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (350e9, "B", "350 GB"),
        (3.14e23, "FLOPs", "314 Z FLOPs"),
        (110.66e12, "FLOP/s", "110.7 TFLOP/s"),
        (0.1886, "", "18.9%"),
        (16.44, "days", "16.4 days"),
        (22, "GPUs", "22 GPUs"),
        (284_160, "hours", "284,160 hours"),
    ],
)
def test_values_are_shown_in_their_unit(value, unit, text):
    assert lectures.shown(value, unit) == text
