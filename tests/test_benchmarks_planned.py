"""Benchmarks of what the planner says, and of saves: their logic, without a GPU."""

import json
import sys
import types

import jax
import numpy as np
import pytest

from benchmarks import bracket, capacity, record, save, table
from benchmarks.matches import MATCHES
from lsdl.planner import compiled, present
from lsdl.source import Source

GPU = [name for name, match in MATCHES.items() if match.kind == "gpu"]
H200 = bracket.on("1 NVIDIA H200")


@pytest.fixture(autouse=True)
def origin(monkeypatch):
    monkeypatch.setattr(record, "origin", lambda: {"commit": "abc", "date": "2026-01-01"})


# --- the bracket ----------------------------------------------------------------------------------


def test_a_result_s_device_is_a_row_of_the_hardware_table():
    assert H200.text == "gpu:h200:1x1"
    assert bracket.on("2 cores, x86_64") is None


@pytest.mark.parametrize("name", GPU)
def test_every_match_of_a_gpu_has_a_bracket_and_the_batch_that_its_peers_are_told(name):
    match = MATCHES[name]
    least, most = bracket.planned(match, H200)["step_s"]
    assert 0 < least < most
    flags = tuple(f"--config.{flag}" for flag in match.overrides)
    experiment = Source(match.config, flags).build(1)
    assert experiment.batch_size == match.fixed["batch"]
    assert float(experiment.schedule(0)) == pytest.approx(match.fixed["rate"])
    if match.unit == "tokens":
        assert experiment.task.units_per_example == match.fixed["length"]


@pytest.mark.parametrize(
    ("took", "said"),
    [
        (0.03, "inside: 1.50 of the least"),
        (0.05, "outside: 1.25 of the most"),
        (0.01, "outside: 0.50 of the least"),
    ],
)
def test_a_step_is_inside_or_outside(took, said):
    one = {"device": "d", "commit": "c", "lsdl": {"step_s": took}}
    found = bracket.compared("vit_b16", one, {"step_s": [0.02, 0.04], "binds": "compute"})
    assert bracket.cells(found) == ("20.0 .. 40.0 ms", f"{1000 * took:.1f} ms", said)
    assert found["match"] in bracket.titles()


# --- the capacity ---------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [4, 5, 17, 99, 1000, 12_345])
@pytest.mark.parametrize(
    "needed",
    [
        lambda n: 3 + 2 * n,
        lambda n: 5 * n,
        lambda n: max(60 + n, 7 * n),  # another moment of the step becomes the fullest
        lambda n: 3 + 2 * n if n < 50 else None,  # does not compile
        lambda n: 4,  # for a while
    ],
)
def test_the_largest_that_fits_is_found_with_few_compilations(needed, limit):
    asked = []

    def ask(n):
        asked.append(n)
        return needed(n) if n < 5_000 else None

    fits = [n for n in range(1, 5_000) if needed(n) is not None and needed(n) <= limit]
    assert capacity.largest(ask, limit) == max(fits, default=0)
    assert len(asked) == len(set(asked)) <= 30


def test_on_a_line_four_compilations_are_enough():
    asked = []
    assert capacity.largest(lambda n: asked.append(n) or 1_493 + 868 * n, 143_828) == 163
    assert asked == [1, 2, 163, 164]


@pytest.mark.parametrize("real", [0, 6, 7, 9, 10, 11, 13, 20])
def test_of_the_neighbours_the_largest_that_runs(real):
    assert capacity.nearest(lambda n: n <= real, 10) == (min(real, 13) if real >= 7 else 0)
    # Of many the neighbours are 1, 2 and 3 % away.
    there = [970, 980, 990, 1000, 1010, 1020, 1030]
    found = capacity.nearest(lambda n: n <= 100 * real, 1000)
    assert found == max((n for n in there if n <= 100 * real), default=0)
    assert capacity.nearest(lambda n: n < 1, 1) == 0


CASE = capacity.Case("GPT: rows", "configs/x.py", "batch_size", 4, flags=())


def device(*, peak=1.01, room=1000):
    """A GPU on which the number of rows needs 10 bytes each, or `peak` times as much."""

    def attempt(file, flags):
        rows = int(flags[-1].removeprefix("--config.batch_size="))
        assert (file, flags[0], rows % 4) == ("configs/x.py", "--config.remat=full", 0)
        told = {"device": "NVIDIA H200", "limit_bytes": 1000, "needed_bytes": 10 * rows}
        return told | {"peak_bytes": 10 * rows * peak if 10 * rows * peak <= room else None}

    return attempt


def test_what_was_planned_is_told_beside_what_ran():
    found = capacity.measured(CASE, "full", attempt=device())
    assert found["match"] == "GPT: rows, remat=full"
    assert found["planned"] == {"largest": 100, "needed_bytes": 1000, "limit_bytes": 1000}
    assert found["measured"] == {"largest": 96, "peak_bytes": pytest.approx(969.6)}
    assert found["ratio"] == pytest.approx(1.01)
    assert capacity.cells(found)[2] == "0.960, bytes 1.010"
    found = capacity.measured(CASE, "full", attempt=device(peak=2))
    assert found["measured"]["largest"] == 0
    assert capacity.cells(found)[1] == "out of memory"
    found = capacity.measured(CASE, "full", attempt=device(), target="gpu:h200:1x1")
    assert "measured" not in found
    assert capacity.cells(found)[1] == "not yet run"


def test_a_cpu_is_told_to_be_none(monkeypatch, capsys):
    capacity.work("configs/digits_mlp.py", [])
    told = json.loads(capsys.readouterr().out)
    assert told["limit_bytes"] is None
    monkeypatch.setattr(capacity, "tried", lambda file, flags: told)
    monkeypatch.setattr("sys.argv", ["capacity", "batch"])
    assert capacity.main() == 2
    assert "benchmarks.capacity needs a GPU, or --target" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["capacity", "height"])
    assert capacity.main() == 2
    assert "There is no case 'height': choose from batch, layers." in capsys.readouterr().err


@pytest.mark.parametrize("words", ["RESOURCE_EXHAUSTED: out of memory", "INTERNAL: a bug"])
def test_that_memory_runs_out_is_an_answer_and_nothing_else_is(monkeypatch, capsys, words):
    def step(file, flags):
        yield {"needed_bytes": 7}
        raise jax.errors.JaxRuntimeError(words)

    monkeypatch.setattr(present, "memory_bytes", lambda: 9)
    monkeypatch.setattr(capacity, "step", step)
    if words.startswith("RESOURCE"):
        capacity.work("f", [])
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
            capacity.work("f", [])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert told == [{"limit_bytes": 9, "device": "cpu"}, {"needed_bytes": 7}]


def test_a_step_is_taken_of_what_was_compiled():
    flags = ["--config.batch_size=16", "--config.mesh=data=-1"]
    needed, peak = capacity.step("configs/digits_mlp.py", flags)
    experiment = Source("configs/digits_mlp.py", tuple(flags)).build()
    state, batch = experiment.abstract_state, experiment.abstract_batch
    program = experiment.train_step.lower(state, batch).compile()
    assert needed["needed_bytes"] == compiled.memory(program)["needed_bytes"]
    assert peak == {"peak_bytes": None}  # a CPU does not tell


@pytest.mark.parametrize("name", table.PLANS)
def test_what_was_planned_says_where_it_comes_from(name):
    for one in table.read(table.RESULTS / "planned").get(name, []):
        assert one["match"] in table.PLANS[name].titles()
        assert one["command"].startswith(f"python -m benchmarks.{name}")
        for field in ("device", "versions", "commit", "date"):
            assert one[field], field


def test_what_was_not_measured_says_so():
    lines = table.planned({}).splitlines()[2:]
    assert len(lines) == len(GPU) + len(capacity.CASES) * len(capacity.POLICIES)
    assert all("not yet run" in line for line in lines)


# --- the save -------------------------------------------------------------------------------------


def test_a_save_is_told_until_it_returns_and_with_a_step(monkeypatch):
    kept = []
    torch = types.SimpleNamespace(__version__="0", from_numpy=np.array)
    torch.save = lambda arrays, path: kept.append(arrays) or path.write_bytes(b"0")
    monkeypatch.setitem(sys.modules, "torch", torch)
    state = {"a": jax.numpy.arange(6.0), "key": jax.random.key(0)}
    found = save.measured(state, 2, match="tiny")
    assert [one["match"] for one in found] == [f"tiny, 32B of state, {what}" for what in save.SEEN]
    for one in found:
        assert one["n"] == 2
        assert one["lsdl"]["held_s"] < one["lsdl"]["committed_s"]
    assert len(kept) == 3
    assert kept[0][0].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_without_torch_a_save_has_no_peer(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["save"])
    assert save.main() == 2
    assert "There is no torch here" in capsys.readouterr().err
