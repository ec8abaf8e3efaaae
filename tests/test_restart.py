"""A run that is saved under one layout goes on under any other."""

import jax
import numpy as np
import pytest

from lsdl.checkpoint import Checkpoints
from lsdl.errors import FINISHED
from lsdl.experiment import build
from lsdl.metrics import read_rows
from tests.curves import NAMES, curve
from tests.faults.moved import numbers
from tests.zoo import small

HAND = "partitioner=shard_map"
LAYOUTS = {
    "dp": ("mesh=data=8",),
    "dp by pmap": ("mesh=data=8", "partitioner=pmap"),
    "zero1 by hand": ("rules=zero1", "mesh=data=4,fsdp=2", HAND),
    "fsdp by hand": ("rules=fsdp", "mesh=data=2,fsdp=4", HAND),
    "fsdp_tp": ("rules=fsdp_tp", "mesh=data=2,fsdp=2,tensor=2"),
    "tp_sp": ("rules=tp_sp", "mesh=data=2,tensor=4"),
    "sequence": ("rules=fsdp", "mesh=fsdp=4,sequence=2"),
    "pp": ("rules=pp", "mesh=data=2,stage=4"),
}
EXPERT_LAYOUTS = {
    "dp": ("mesh=data=8",),
    "fsdp by hand": ("rules=fsdp", "mesh=fsdp=8", HAND),
    "expert": ("rules=fsdp", "mesh=data=2,expert=4"),
    "expert and tensor": ("rules=fsdp_tp", "mesh=fsdp=2,expert=2,tensor=2"),
}
STACKED = ("model.scan_layers=true", "model.num_layers=4", "model.dropout=0.0", "optim.name=adamw")
MODELS = {"gpt2": LAYOUTS, "experts": EXPERT_LAYOUTS}


@pytest.fixture(scope="module")
def built():
    """`built(load, model, layout)`: its experiment, made once."""
    made = {}

    def built(load, model, layout):
        if (model, layout) not in made:
            made[model, layout] = build(small(load, model, *STACKED, *MODELS[model][layout]))
        return made[model, layout]

    return built


def bits(leaf):
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


QUICK = {("gpt2", "fsdp by hand"), ("gpt2", "pp"), ("experts", "expert and tensor")}
PAIRS = [
    pytest.param(model, saved, marks=() if (model, saved) in QUICK else pytest.mark.slow)
    for model in MODELS
    for saved in MODELS[model]
]


@pytest.mark.threat(13)
@pytest.mark.parametrize(("model", "saved"), PAIRS)
def test_every_layout_restores_the_bits_of_any_other(load, built, tmp_path, model, saved):
    experiment = built(load, model, saved)
    state = numbers(experiment.abstract_state)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, jax.device_put(state, experiment.shardings), metrics=None)
    for layout in MODELS[model]:
        target = built(load, model, layout).abstract_state
        restored = checkpoints.restore(1, target)
        for x, y, place in zip(*map(jax.tree.leaves, (restored, state, target)), strict=True):
            assert bits(x) == bits(y), layout
            assert x.sharding.is_equivalent_to(place.sharding, x.ndim), layout
    checkpoints.close()


GPT = (
    *("batch_size=8", "data.seq_len=16", "data.valid_examples=8", "data.test_examples=8"),
    *("model.width=16", "model.num_layers=4", "model.num_heads=4", "model.mlp_dim=32"),
    *("model.max_length=16", "model.scan_layers=true", "log.tensorboard=false"),
    *("optim.schedule.name=constant", "optim.schedule.peak=1e-3"),
    *("eval.every_steps=100", "checkpoint.every_steps=100"),
)


@pytest.mark.threat(13)
@pytest.mark.parametrize(
    "journey",
    [
        ("zero1 by hand", "pp"),
        pytest.param(
            ("tp_sp", "fsdp by hand", "sequence", "dp by pmap", "fsdp_tp", "dp", "zero1 by hand"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=" -> ".join,
)
def test_a_run_that_moves_on_gives_the_one_device_curve(load, train, tmp_path, journey):
    flags = [f"--config.{override}" for override in GPT]
    steps = 0
    for layout in journey:
        steps += 3
        there = [f"--config.{override}" for override in LAYOUTS[layout]]
        more = (f"--config.total_steps={steps}", f"--workdir={tmp_path / 'run'}")
        code, _, error = train("stdlib_gpt:smoke", *flags, *there, *more)
        assert code == FINISHED, error
    rows = [r for r in read_rows(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"]
    expected, _ = curve(load("stdlib_gpt:smoke", *GPT), devices=1, steps=steps)
    for name in NAMES:
        assert [row[name] for row in rows] == pytest.approx(list(expected[name]), rel=1e-5), name
