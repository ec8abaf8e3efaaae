"""Golden shardings: how every parameter and moment of six experiments is split on four layouts.

Rewrite with `python -m pytest tests/test_shardings_golden.py --rewrite-golden`, and say why.
"""

from pathlib import Path

import pytest

from lsdl.experiment import build
from lsdl.sharding import inspect, rules

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = (
    ("zero1", "data=4,fsdp=2"),
    ("fsdp", "fsdp=8"),
    ("fsdp_tp", "data=2,fsdp=2,tensor=2"),
)
# And a fourth of each one's own.
EXPERIMENTS = {
    "imagenet_alexnet": ("one_weird_trick", "data=2,tensor=4"),
    "imagenet_resnet50": ("tp", "data=2,tensor=4"),
    "imagenet_vit:b16": ("tp_sp", "data=2,tensor=4"),
    "lm_gpt2:124m": ("tp", "data=2,tensor=4"),
    "lm_bert:base": ("dp", "data=8"),
    "lm_llama:1b": ("pp", "data=2,stage=4"),
}


def told(experiment, table):
    """The lines of all parameters, and of the moments where the table splits them further."""
    parts = ("params/", "opt_state/") if rules.moment_axes(table) else ("params/",)
    placements = [p for p in experiment.placements if p.path.startswith(parts) and p.shape]
    yield inspect.totals(experiment.placements, experiment.mesh)
    for path, shape, _, rule, spec, nbytes in inspect.rows(placements, experiment.mesh):
        yield f"{path} [{shape}] {spec} {nbytes} <- {rule}"
    yield from experiment.lint


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_shardings_are_the_golden_ones(load, name, request):
    found = []
    for table, mesh in (*LAYOUTS, EXPERIMENTS[name]):
        config = load(name, f"rules={table}", f"mesh={mesh}")
        found += [f"# rules={table} mesh={mesh}", *told(build(config, devices=8), table), ""]
    file = GOLDEN / f"shardings_{name.replace(':', '_')}.txt"
    if request.config.getoption("--rewrite-golden"):
        file.write_text("\n".join(found))
    assert "\n".join(found) == file.read_text()
