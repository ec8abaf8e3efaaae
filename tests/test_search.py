"""The search for a layout: on the target's own compiler, against layouts written by hand."""

import pytest

from lsdl import search
from lsdl.planner import compiled, hardware
from lsdl.source import Source
from tests.conftest import CONFIGS

SEVEN_B = Source(f"{CONFIGS / 'lm_llama.py'}:7b")
# What people would try first for 7 B parameters on 8 nodes of 8 GPUs.
BY_HAND = [
    ("fsdp=64", "fsdp_tp", "full", 1),
    ("fsdp=64", "fsdp_tp", "dots_no_batch", 2),
    ("fsdp=64", "fsdp_tp", "none", 8),
    ("data=8,fsdp=8", "fsdp_tp", "full", 1),
    ("data=8,fsdp=8", "fsdp_tp", "dots_no_batch", 2),
    ("data=4,fsdp=16", "fsdp_tp", "full", 1),
    ("data=2,fsdp=32", "fsdp_tp", "full", 1),
    ("fsdp=32,tensor=2", "fsdp_tp", "full", 1),
    ("data=8,fsdp=4,tensor=2", "tp_sp", "full", 1),
    ("fsdp=16,tensor=4", "tp_sp", "full", 1),
    ("fsdp=8,tensor=8", "tp_sp", "full", 1),
    ("data=8,tensor=8", "tp_sp", "full", 1),
]


@pytest.mark.slow
def test_nothing_written_by_hand_is_better_than_what_is_found():
    """By the compiled bytes, traffic and FLOPs: 7 B parameters on 64 H100."""
    target = hardware.parse("gpu:h100:8x8")
    best, *rest = search.run(SEVEN_B, target)
    assert best["fits"]
    assert all(row["reason"] for row in rest)
    variants = [
        SEVEN_B.varied(mesh=mesh, rules=rules, remat=remat, accum=accum)
        for mesh, rules, remat, accum in BY_HAND
    ]
    answers = compiled.ask_all([(v.file, v.overrides) for v in variants], target.text)
    found = {}
    for layout, variant, answer in zip(BY_HAND, variants, answers, strict=True):
        row = search.judged(answer, variant.build(target.count), target)
        if row["fits"]:
            found[layout] = search.middle_s(row)
    assert found, "none of the layouts written by hand fits"
    assert search.middle_s(best) <= min(found.values()), (best, found)
