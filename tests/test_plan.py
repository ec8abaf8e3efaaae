"""The plan says what the run is, without running or allocating any of it."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from lsdl import experiment
from lsdl.errors import BAD_INPUT, FINISHED
from lsdl.plan import main
from lsdl.planner import tree
from lsdl.sharding import mesh as meshes
from lsdl.sharding import placement, rules
from tests.conftest import CONFIGS

DIGITS = ("digits_mlp", "digits_resnet", "digits_vit")


@pytest.fixture
def plan(tmp_path, capsys):
    """`plan("digits_vit:smoke", "mesh=data=8", ...)`: the plan's JSON and what was printed."""

    def plan(name, *overrides):
        file, _, arg = name.partition(":")
        config = f"{CONFIGS / file}.py" + (f":{arg}" if arg else "")
        overrides = [f"--config.{o}" for o in ("mesh=data=1", *overrides)]
        written = tmp_path / "plan.json"
        code = main(["--config", config, f"--json={written}", *overrides])
        out, err = capsys.readouterr()
        assert (code, err) == (FINISHED, "")
        assert out.endswith(f"\nwritten: {written}\n")
        return json.loads(written.read_text()), out

    return plan


# What the numbers are


@pytest.mark.parametrize("name", DIGITS)
def test_plan_is_complete_and_its_rows_sum_to_the_totals(plan, load, name):
    numbers, out = plan(f"{name}:smoke")
    rows = numbers["modules"]
    for row in rows:
        assert row.keys() == {"path", "parameters", "shapes", "bytes", "forward_flops_per_example"}
        assert row["parameters"] == sum(math.prod(s) for s in row["shapes"].values())
        assert row["bytes"] == 4 * row["parameters"]
    assert len({row["path"] for row in rows}) == len(rows)
    assert sum(row["parameters"] for row in rows) == numbers["parameters"]
    forward = numbers["forward_flops_per_example"]
    assert sum(row["forward_flops_per_example"] for row in rows) == forward
    for key in ("state_bytes_per_device", "batch_bytes_per_device", "total_flops", "parameters"):
        assert isinstance(numbers[key], int)
        assert numbers[key] > 0
    assert 2.5 * forward < numbers["model_flops_per_example"] <= 3 * forward
    assert numbers["step_flops_per_example"] == numbers["model_flops_per_example"]
    examples = numbers["total_steps"] * numbers["batch_size"]
    assert numbers["total_flops"] == numbers["model_flops_per_example"] * examples
    assert numbers["name"] == load(f"{name}:smoke").name
    assert numbers["mesh"] == dict.fromkeys(meshes.AXES, 1)
    assert numbers["versions"]["jax"] == jax.__version__
    assert f"{numbers['parameters']:,}" in out


def test_mlp_counts_by_hand(plan):
    numbers, _ = plan("digits_mlp", "model.hidden=(24, 40)")
    sizes = (64 * 24, 24 * 40, 40 * 10)
    assert numbers["parameters"] == sum(sizes) + 24 + 40 + 10
    assert numbers["forward_flops_per_example"] == 2 * sum(sizes)
    assert numbers["model_flops_per_example"] == 3 * 2 * sum(sizes) - 2 * sizes[0]
    flops = {row["path"]: row["forward_flops_per_example"] for row in numbers["modules"]}
    assert flops == {
        "hidden_0/dense": 2 * sizes[0],
        "hidden_1/dense": 2 * sizes[1],
        "head": 2 * sizes[2],
    }


@pytest.mark.parametrize("scan", ["true", "false"])
def test_vit_counts_by_hand(plan, scan):
    numbers, _ = plan("digits_vit", f"model.scan_layers={scan}")
    tokens, D, F, layers = 16, 96, 192, 4
    kernels = 4 * D * D + 2 * D * F
    block = kernels + (4 * D + F + D) + 4 * D  # biases, norms
    stem, patches, head = 9 * D, 2 * 2 * D * D, D * 10
    outside = stem + D + patches + D + tokens * D + 2 * D + head + 10
    assert numbers["parameters"] == layers * block + outside == 339_754
    stack = layers * (2 * kernels * tokens + 4 * tokens**2 * D)
    flops = {row["path"]: row["forward_flops_per_example"] for row in numbers["modules"]}
    assert sum(n for path, n in flops.items() if "stack/" in path) == stack
    forward = stack + 2 * (64 * stem + tokens * patches + head)
    assert numbers["forward_flops_per_example"] == forward
    assert numbers["model_flops_per_example"] == 3 * forward - 2 * 64 * stem


def test_layout_and_accumulation_change_no_flops(plan):
    plain, _ = plan("digits_mlp:smoke")
    for overrides in (
        ["accum=4"],
        ["mesh=data=2,fsdp=4"],
        ["mesh=data=2,tensor=2", "rules=tp"],
        ["mesh=data=16", "partitioner=shard_map"],
        ["mesh=data=8", "partitioner=pmap"],
        ["batch_size=192"],
    ):
        other, _ = plan("digits_mlp:smoke", *overrides)
        for key in ("forward", "model", "step"):
            assert other[f"{key}_flops_per_example"] == plain[f"{key}_flops_per_example"], overrides


def test_recomputation_is_no_part_of_the_model(plan):
    plain, _ = plan("digits_vit:smoke")
    full, out = plan("digits_vit:smoke", "remat=full")
    scanned, _ = plan("digits_vit:smoke", "remat=full", "model.scan_layers=true")
    for numbers in (full, scanned):
        for key in ("forward_flops_per_example", "model_flops_per_example", "total_flops"):
            assert numbers[key] == plain[key]
    again = full["step_flops_per_example"] - plain["step_flops_per_example"]
    assert again == scanned["step_flops_per_example"] - plain["step_flops_per_example"]
    # All products of a block but the last one, whose result nothing in the backward pass needs.
    tokens, D, F, layers = 16, 96, 192, 2
    assert again == layers * (2 * tokens * (4 * D * D + D * F) + 4 * tokens**2 * D)
    assert f"{tree.decimal(again)} computed again" in out


# Devices


def test_state_bytes_are_what_a_device_holds(load, plan):
    layout = "mesh=data=2,fsdp=2,tensor=2"
    numbers, _ = plan("digits_mlp:smoke", layout)
    state = experiment.build(load("digits_mlp:smoke", layout)).init()
    state = state.replace(key=jax.random.key_data(state.key))
    held = lambda tree: sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    parts = {part: held(getattr(state, part)) for part in ("params", "opt_state", "model_state")}
    assert numbers["state_bytes_per_device_by_part"] == parts
    assert numbers["state_bytes_per_device"] == held(state)
    assert parts["params"] < 4 * numbers["parameters"] / 3


def test_devices_of_the_mesh_need_not_exist(plan):
    one, _ = plan("digits_mlp:smoke", "model.hidden=(1024, 2048)", "batch_size=1024")
    many, _ = plan(
        "digits_mlp:smoke",
        "model.hidden=(1024, 2048)",
        "batch_size=1024",
        "mesh=data=4,fsdp=64,tensor=4",
    )
    assert many["mesh"] == dict.fromkeys(meshes.AXES, 1) | {"data": 4, "fsdp": 64, "tensor": 4}
    assert many["batch_bytes_per_device"] * 256 == one["batch_bytes_per_device"]
    whole, part = (n["state_bytes_per_device_by_part"]["params"] for n in (one, many))
    assert part < whole / 200


def test_devices_take_the_place_of_the_rest(capsys):
    arguments = ["--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", "--config.mesh=data=-1,fsdp=4"]
    assert main([*arguments, "--devices=48"]) == FINISHED
    assert main([*arguments, "--devices=50"]) == BAD_INPUT
    assert "choose one that divides 50" in capsys.readouterr().err


def test_nothing_is_allocated_for_a_hundred_billion_parameters(plan):
    live = len(jax.live_arrays())
    numbers, _ = plan(
        "digits_vit:smoke",
        "model.width=11520",
        "model.num_layers=64",
        "model.num_heads=96",
        "model.mlp_dim=46080",
        "model.scan_layers=true",
        "model.stem=0",
        "remat=full",
        "batch_size=1024",
        "mesh=data=4,fsdp=64,tensor=4",
    )
    assert numbers["parameters"] > 100e9
    assert numbers["state_bytes_per_device"] < 3 * 4 * numbers["parameters"] / 250
    assert len(jax.live_arrays()) <= live + 8  # scalars that tracing makes constants of


# Vocabularies


def test_rows_that_fill_up_a_vocabulary_are_no_parameters():
    box = lambda shape, *names: nn.LogicallyPartitioned(  # noqa: E731
        jax.ShapeDtypeStruct(shape, jnp.float32), names
    )
    boxed = {
        "params": {
            "text": {"embedding": box((64, 64), "vocab", "embed")},
            "head": {"kernel": box((64, 64), "embed", "vocab"), "bias": box((64,), "vocab")},
            "dense": {"kernel": box((64, 64), "embed", "mlp")},
        }
    }
    mesh = meshes.make_mesh({axis: 1 for axis in meshes.AXES}, 1)
    _, placements = placement.tree_shardings(boxed, mesh, rules.TABLES["dp"])
    padding = tree.vocabulary_padding(placements, SimpleNamespace(vocab_size=50))
    assert padding == {
        ("text", "embedding"): 14 * 64,
        ("head", "kernel"): 14 * 64,
        ("head", "bias"): 14,
    }
    model = tree.make_tree("m", nn.unbox(boxed["params"]), flops={}, padding=padding)
    assert model.total("parameters") == 50 * 64 + 50 * 64 + 50 + 64 * 64
    assert model.total("nbytes") == 4 * (3 * 64 * 64 + 64)


# The table


def node(name, parameters, *children):
    return tree.Node(name, {"kernel": (2, 2)}, parameters, 1024, 1_000_000, children)


def test_equal_blocks_are_one_line_with_the_sum_of_all():
    blocks = [node(f"block_{i}", 4, node("dense", 2)) for i in range(9, 12)]
    inner = (*blocks, node("block_12", 5), node("norm", 3), node("head", 3))
    model = tree.Node("model", {"table": (3,), "bias": (1,)}, 4, 1024, 0, inner)
    table = tree.table(model, depth=2).splitlines()
    assert [re.split(r"\s{2,}", line.strip()) for line in table[1:]] == [
        ["model", "33", "10.00 KiB", "9.00 M"],
        ["table, bias", "4", "1.00 KiB", "0"],
        ["block_9 .. block_11 (3 x)", "18", "6.00 KiB", "6.00 M"],
        ["kernel", "12", "3.00 KiB", "3.00 M"],
        ["dense", "6", "3.00 KiB", "3.00 M"],
        ["block_12", "5", "1.00 KiB", "1.00 M"],
        ["norm", "3", "1.00 KiB", "1.00 M"],
        ["head", "3", "1.00 KiB", "1.00 M"],
    ]
    assert len({len(line) for line in table}) == 1


def test_depth_cuts_the_table(capsys):
    arguments = ["--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", "--config.mesh=data=1"]
    tables = []
    for depth in range(3):
        assert main([*arguments, f"--depth={depth}"]) == FINISHED
        tables.append(capsys.readouterr().out.splitlines())
    assert len(tables[0]) < len(tables[1]) < len(tables[2])
    assert tables[0][1].split()[0] == "digits_mlp_smoke"
    totals = lambda table: table[1].split()[1:]  # noqa: E731
    assert totals(tables[0]) == totals(tables[1]) == totals(tables[2])


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (8_178_368_512, "8.18 G"), (10**27, "1,000.00 Y")],
)
def test_numbers_are_shortened(number, text):
    assert tree.decimal(number) == text


def test_bytes_are_shortened():
    assert [tree.binary(n) for n in (0, 1023, 1024, 3 * 2**29)] == [
        "0 B",
        "1,023 B",
        "1.00 KiB",
        "1.50 GiB",
    ]


# The command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.batchsize=8"], ["'batchsize'", "'batch_size'"]),
        (["--config.model.width=90"], ["model.width=90", "88 and 96"]),
        (["--config.mesh=data=5"], ["batch_size=96", "divisible by 5"]),
        (["--config.mesh=data=4", "--devices=8"], ["data=4", "8 devices", "make it 8"]),
        (["--config.partitioner=pmap", "--config.mesh=data=3"], ["8 devices", "make it 8"]),
        (["--config.partitioner=pmap", "--devices=16"], ["partitioner=pmap", "shard_map"]),
        (["--devices=0"], ["--devices=0", "at least 1"]),
        (["--depth=-1"], ["--depth=-1", "at least 0"]),
        (["--json=none/plan.json"], ["--json=none/plan.json", "folder"]),
        (["--json=."], ["--json=.", "folder"]),
        (["--analytic"], ["--analytic needs a --target"]),
        (["--workdir=x"], ["'--workdir=x'"]),
    ],
)
def test_refusal_is_one_sentence(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code = main(["--config", f"{CONFIGS / 'digits_vit.py'}:smoke", *arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (BAD_INPUT, "")
    assert err.startswith("lsdl: ")
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err
    assert list(tmp_path.iterdir()) == []


def test_json_replaces_the_file_at_once(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text("old")
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    before = file.stat().st_ino
    assert main(["--config", config, "--config.mesh=data=1", f"--json={file}"]) == FINISHED
    assert json.loads(file.read_text())["name"] == "digits_mlp_smoke"
    assert file.stat().st_ino != before  # another file in its place, never half of one
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_help_shows_examples_and_exit_codes_without_jax():
    script = """
import sys
from types import SimpleNamespace
from lsdl.plan import main
try:
    main(["--help"])
except SystemExit as leaving:
    print("left with", leaving.code, "jax" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "examples:\n  python -m lsdl.plan --config configs/" in run.stdout
    assert "nothing for all else" in run.stdout
    assert run.stdout.endswith("left with 0 False\n")


# The schedule


def test_the_schedule_is_told_without_a_step_being_traced(capsys, tmp_path, monkeypatch):
    """Rate, batch size and SGD's conditions; the page has two figures."""
    monkeypatch.setattr(experiment.partition.Program, "trace", None)
    files = [f"--html={tmp_path / 'plan.html'}", f"--json={tmp_path / 'plan.json'}"]
    fields = ("mesh=data=1", "total_epochs=4", "batch_ramp=((50.0, 4),)")
    fields += ("optim.schedule.name=inverse_time", "optim.schedule.period_steps=5")
    fields += ("optim.schedule.warmup_steps=0", "optim.schedule.peak=0.5")
    config = ["--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", "--schedule"]
    assert main([*config, *files, *(f"--config.{field}" for field in fields)]) == FINISHED
    found = json.loads((tmp_path / "plan.json").read_text())["schedule"]
    rows, out = found["rows"], capsys.readouterr().out
    for row in rows:
        step = row["step"] - 1
        assert row["learning_rate"] == pytest.approx(0.5 / (1 + step / 5), rel=1e-6)
        assert row["batch_size"] == (96 if step < 26 else 384)
        assert row["examples"] == 96 * min(step, 26) + 384 * max(step - 26, 0)
        assert f"{row['learning_rate']:.4g}" in out
    assert {row["step"] for row in rows} >= {1, 27, 33}
    assert "harmonic" in found["conditions"]["reason"]
    assert "all met" in out
    assert "batch 96 -> 384 from step 27" in out
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<svg ") == 2
    assert out.endswith(f"written: {tmp_path / 'plan.html'}\nwritten: {tmp_path / 'plan.json'}\n")
    assert "#" in out


def test_the_groups_are_told_for_every_parameter(capsys):
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    rules = "(('head/.*',0.0),('hidden_0/.*',0.5))"
    assert main(["--config", config, "--groups", f"--config.optim.rate_rules={rules}"]) == 0
    lines = filter(None, map(str.split, capsys.readouterr().out.splitlines()))
    told = {words[0]: words[-4:] for words in lines}
    assert told["head/kernel"] == ["adamw", "0", "-", "-"]
    assert told["hidden_0/dense/kernel"] == ["adamw", "0.5", "yes", "-"]
    assert told["hidden_0/dense/bias"] == ["adamw", "0.5", "-", "-"]
    assert told["hidden_1/dense/kernel"] == ["adamw", "1", "yes", "-"]
