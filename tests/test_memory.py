"""State bytes per device, as the compiled step has them, against the theory of each layout.

Source: Rajbhandari et al. 2020, section 3.1 and figure 1, with all numbers in float32.
"""

import json

import jax
import pytest

from lsdl.errors import FINISHED
from lsdl.experiment import build
from lsdl.plan import main
from lsdl.planner import tree
from tests.conftest import CONFIGS
from tests.tiny import FAST

# Wide and low, so that it is compiled in a moment.
GPT = (
    *("stdlib_gpt", "batch_size=8", "data.seq_len=8", "data.segments=false"),
    *("model.width=512", "model.num_layers=1", "model.num_heads=8", "model.mlp_dim=2048"),
    *("model.max_length=8", "model.vocab_size=16384", "model.vocab_padded=16384"),
)
LAYOUTS = {  # mesh axis, bytes per parameter of the state and of gradients on n devices
    "dp": ("data", lambda n: 12, lambda n: 4),
    "zero1": ("data", lambda n: 4 + 8 / n, lambda n: 4 / n),
    "fsdp": ("fsdp", lambda n: 12 / n, lambda n: 4 / n),
}


CASES = [
    pytest.param(table, partitioner, n, marks=() if n == 8 else pytest.mark.slow)
    for table in LAYOUTS
    for partitioner in ("jit", "shard_map")
    for n in (2, 4, 8)
]


@pytest.mark.parametrize(("table", "partitioner", "n"), CASES)
def test_bytes_per_device_are_those_of_theory(load, table, partitioner, n):
    axis, state_bytes, gradient_bytes = LAYOUTS[table]
    config = load(*GPT, f"rules={table}", f"mesh={axis}={n}", f"partitioner={partitioner}")
    built = build(config, devices=jax.devices()[:n])
    state, batch = built.abstract_state, built.abstract_batch
    memory = built.train_step.lower(state, batch).compile(FAST).memory_analysis()
    assert built.num_parameters > 10_000_000
    # The rest, the batch apart, is a key, a step and a count.
    seen = memory.argument_size_in_bytes - tree.device_bytes(batch)
    assert seen == pytest.approx(state_bytes(n) * built.num_parameters, rel=0.01)
    assert seen == tree.device_bytes(state)  # what the plan says
    assert memory.alias_size_in_bytes == seen  # all of it is donated
    gradients = tree.device_bytes(built.abstract_gradients)
    assert gradients == pytest.approx(gradient_bytes(n) * built.num_parameters, rel=0.01)
    assert memory.temp_size_in_bytes > gradients


@pytest.mark.parametrize(("layout", "parts"), [("mesh=data=8", 1), ("mesh=fsdp=8", 8)])
def test_the_plan_has_gradients_among_the_temporaries(tmp_path, capsys, layout, parts):
    file = tmp_path / "plan.json"
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    sizes = "--config.model.hidden=(512,512)"
    assert main(["--config", config, f"--config.{layout}", sizes, f"--json={file}"]) == FINISHED
    plan = json.loads(file.read_text())
    nbytes = plan["gradient_bytes_per_device"]
    assert nbytes == pytest.approx(4 * plan["parameters"] / parts, rel=0.02)
    assert f"\ntemporaries        {tree.binary(nbytes)} gradients" in capsys.readouterr().out
