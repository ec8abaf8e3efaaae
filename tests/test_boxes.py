"""Figures of boxes: lengths are the values, colours are the names, and nothing else is needed."""

import re
import xml.etree.ElementTree as ET

import pytest

from lsdl import boxes, marks
from tests.test_plots import SVG, words

BARS = {"dp": {"params": 4, "moments": 8, "gradients": 4}, "fsdp": {"params": 1, "moments": 2}}
SPANS = {"host": [("call", 0, 1), ("read", 1, 4)], "device": [("step", 0.5, 4)]}
WORDS = [["fsdp", "tensor"], ["whole", ""]]
FIGURES = {
    "stacks": boxes.stacks(BARS, title="s", x="GiB", levels={"there is": 6}),
    "timeline": boxes.timeline(SPANS, title="t", x="ms"),
    "cells": boxes.cells(WORDS, title="c", columns="ab", rows=["up", "down"], plain=["whole"]),
}


def drawn(figure, colour):
    """(left, width) of the boxes in that colour, in the order in which they were drawn."""
    found = []
    for node in ET.fromstring(figure.svg()).iter(f"{SVG}path"):
        if f"fill: {colour}" in node.get("style", "") and node.get("clip-path"):
            xs = [float(x) for x in re.findall(r"[ML] (\S+)", node.get("d"))]
            if max(xs) > min(xs):
                found.append((min(xs), max(xs) - min(xs)))
    return found


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_boxes_is_the_same_each_time_and_names_its_boxes(name):
    figure = FIGURES[name]
    assert figure.svg() == figure.svg()
    names = {
        "stacks": {"dp", "fsdp", "params", "moments", "gradients", "16", "3", "there is 6", "GiB"},
        "timeline": {"host", "device", "call", "read", "step", "ms"},
        "cells": {"a", "b", "up", "down", "fsdp", "tensor", "whole"},
    }
    assert names[name] <= set(words(figure.svg()))


def test_a_part_is_as_long_as_its_value_and_starts_where_the_one_before_it_ends():
    (params, few), (moments, half), (gradients,) = (
        drawn(FIGURES["stacks"], marks.PALETTE[i]) for i in range(3)
    )
    assert moments[1] == pytest.approx(2 * params[1], rel=1e-4)
    assert few[1] == pytest.approx(params[1] / 4, rel=1e-4)
    for before, after in ((params, moments), (moments, gradients), (few, half)):
        assert after[0] == pytest.approx(sum(before), rel=1e-4)


def test_a_span_lies_where_its_time_is():
    (call,), (read,), (step,) = (drawn(FIGURES["timeline"], marks.PALETTE[i]) for i in range(3))
    assert read[0] == pytest.approx(sum(call), rel=1e-4)
    assert step[0] == pytest.approx(call[0] + call[1] / 2, rel=1e-4)
    assert sum(step) == pytest.approx(sum(read), rel=1e-4)


def test_equal_words_have_one_colour_and_an_empty_one_has_no_cell():
    assert len(drawn(FIGURES["cells"], marks.FAINT)) == 1
    assert len(drawn(FIGURES["cells"], marks.PALETTE[0])) == 1
    four = boxes.cells([["x", "y"], ["y", "x"]], title="c", columns="ab", rows="ab")
    assert [len(drawn(four, marks.PALETTE[i])) for i in (0, 1, 2)] == [2, 2, 0]
