"""The loop: its order is a contract, and the host never waits for the step it has just sent."""

import dataclasses

import jax
import numpy as np
import pytest

from lsdl import course, loop
from lsdl.experiment import build
from lsdl.guard import IN_A_ROW, SPIKED
from lsdl.metrics import read_rows
from lsdl.rundir import RunDir


class Recorded:
    """A metric whose reading is written down."""

    def __init__(self, step, log):
        self.step, self.log = step, log

    def __array__(self, dtype=None, copy=None):
        self.log.append(f"read {self.step}")
        return np.array(1.0, np.float32)


class Program:
    """A train step that only writes down that it was dispatched."""

    def __init__(self, log):
        self.log, self.step = log, 0

    def lower(self, *_):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        self.step += 1
        self.log.append(f"dispatch {self.step}")
        verdict = {IN_A_ROW: np.int32(0), SPIKED: np.bool_(False)}
        return state, {"loss": Recorded(self.step, self.log), **verdict}


class Checkpoints:
    def __init__(self, log):
        self.log = log

    def save(self, step, state, *, metrics, notes):
        self.log.append(f"save {step} {'after' if metrics else 'without'} eval")

    def check(self, *, wait=False):
        return False


class Stop:
    signal = None

    def __init__(self, step):
        self.step = step

    def began(self):
        pass

    def after(self, step):
        self.signal = 15 if step == self.step else None
        return step == self.step


@pytest.fixture
def record(load, monkeypatch, tmp_path):
    """`record(total, eval_every, save_every, stop)` -> what the loop did, in order."""

    def record(*, stop=None, **every):
        log = []
        fields = {f"{name}_steps": steps for name, steps in every.items()}
        experiment = build(load("digits_mlp:smoke"))
        phase = dataclasses.replace(experiment.phases[0], train_step=Program(log))
        experiment = dataclasses.replace(experiment, phases=(phase,), log_every_steps=1, **fields)
        monkeypatch.setattr(loop.jax, "device_get", lambda tree: jax.tree.map(np.asarray, tree))
        monkeypatch.setattr(loop, "evaluate", lambda *_, **__: log.append("eval") or {"loss": 1.0})
        monkeypatch.setattr(course.prediction, "make", lambda *_: {})  # of a real program
        state, folder = np.zeros(()), RunDir(tmp_path)
        watch = loop.Watchdog(0.0, None)
        writers, checkpoints = loop.Writers([]), Checkpoints(log)
        journey = course.Course(experiment, checkpoints, folder, 0)
        loop._train(journey, state, 0, writers, Stop(stop), watch)
        return log

    return record


def test_a_step_is_read_after_the_next_one_is_sent(record):
    log = record(total=3, eval_every=3, checkpoint_every=3)
    assert log == [
        *("dispatch 1", "dispatch 2", "read 1", "dispatch 3", "read 2"),
        *("read 3", "eval", "save 3 after eval"),
    ]


def test_evaluation_comes_before_the_save_of_its_step(record):
    log = record(total=4, eval_every=2, checkpoint_every=1)
    assert [entry for entry in log if "save" in entry or entry == "eval"] == [
        *("save 1 without eval", "eval", "save 2 after eval"),
        *("save 3 without eval", "eval", "save 4 after eval"),
    ]


def test_a_stop_saves_the_step_and_ends(record):
    log = record(total=9, eval_every=9, checkpoint_every=9, stop=2)
    assert log == ["dispatch 1", "dispatch 2", "read 1", "read 2", "save 2 without eval"]


def test_eval_only_repeats_the_final_table_and_writes_nothing(train, tmp_path):
    arguments = (f"--workdir={tmp_path / 'run'}", "--config.total_steps=4")
    code, trained, _ = train("digits_mlp:smoke", *arguments)
    assert code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")}
    code, evaluated, _ = train("digits_mlp:smoke", *arguments, "--eval-only")
    assert code == 0
    table = [
        line for line in trained.splitlines() if line.startswith(("train ", "valid ", "test "))
    ]
    assert len(table) == 3
    assert [line for line in evaluated.splitlines() if line in table] == table
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "run").rglob("*")} == before


@pytest.mark.threat(42)
def test_every_row_of_a_run_is_there_once(train, tmp_path):
    assert train("digits_mlp:smoke", f"--workdir={tmp_path / 'run'}")[0] == 0
    rows = [(r["split"], r["step"]) for r in read_rows(tmp_path / "run" / "metrics.jsonl")]
    assert len(rows) == len(set(rows))
    assert sorted(rows) == sorted(
        [("train", step) for step in range(1, 21)]
        + [("valid", 10), ("valid", 20), ("train_eval", 20), ("test", 20)]
    )


def test_a_language_run_counts_tokens_and_measures_perplexity(train, tmp_path):
    tiny = ("model.width=16", "model.num_heads=8", "model.num_layers=1", "model.mlp_dim=16")
    tiny += ("data.seq_len=16", "batch_size=16", "total_steps=2", "log.tensorboard=false")
    overrides = (f"--config.{override}" for override in tiny)
    code, out, _ = train("stdlib_gpt:smoke", f"--workdir={tmp_path / 'run'}", *overrides)
    assert code == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    for row in rows:
        assert row["perplexity"] == pytest.approx(np.exp(row["cross_entropy"]), rel=1e-6)
        bits = row["cross_entropy"] / np.log(2) / row["bytes"]
        assert row["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    first, second = (row for row in rows if row["split"] == "train")
    assert (first["examples_seen"], first["tokens_seen"]) == (16, 16 * 16)
    assert (second["examples_seen"], second["tokens_seen"]) == (32, 32 * 16)
    assert second["tokens_per_s"] == pytest.approx(16 * second["examples_per_s"])
    # Of 64 windows of 16 tokens, all but the documents' first ones.
    (valid,) = (row for row in rows if row["split"] == "valid")
    assert 64 * 14 < valid["tokens"] <= 64 * 16
    head, *lines = (line for line in out.splitlines() if line.startswith(("split", "valid")))
    assert head.split() == ["split", "tokens", "loss", "accuracy", "perplexity", "bits_per_byte"]
    assert lines[0].split()[1] == f"{valid['tokens']:,}"
    assert lines[0].split()[-1] == f"{valid['bits_per_byte']:.4f}"
