"""State bytes per device, as the compiled step has them, against the theory of each layout.

Source: Rajbhandari et al. 2020, section 3.1 and figure 1, with all numbers in float32.
"""

import jax
import pytest

from lsdl.experiment import build
from lsdl.planner import totals, tree
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


def cases():
    for table in LAYOUTS:
        for partitioner in ("jit", "shard_map"):
            for n in (2, 4, 8):
                # Of the rest, what differs is how many devices share.
                marks = () if n == 8 or (table, partitioner, n) == () else pytest.mark.slow
                yield pytest.param(table, partitioner, n, marks=marks)


@pytest.mark.parametrize(("table", "partitioner", "n"), list(cases()))
def test_state_bytes_per_device_are_those_of_theory(load, table, partitioner, n):
    axis, state_bytes, gradient_bytes = LAYOUTS[table]
    config = load(*GPT, f"rules={table}", f"mesh={axis}={n}", f"partitioner={partitioner}")
    built = build(config, devices=jax.devices()[:n])
    state, batch = built.abstract_state, built.abstract_batch
    memory = built.train_step.lower(state, batch).compile(FAST).memory_analysis()
    number = built.num_parameters
    assert number > 10_000_000
    seen = memory.argument_size_in_bytes - tree.device_bytes(batch)
    print(seen/number, memory.alias_size_in_bytes, tree.device_bytes(state), memory.temp_size_in_bytes/number, tree.device_bytes(built.abstract_gradients)/number, memory.argument_size_in_bytes-tree.device_bytes(batch)-tree.device_bytes(state))
    assert seen == pytest.approx(state_bytes(n) * number, rel=0.01)
