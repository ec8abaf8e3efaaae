"""SIGKILL at any instant: no commit is lost, nothing is to be mended, the bits are the same."""

import json
import shutil
import time

import pytest

from tests.faults.kills import KEEP, finish, kill_until
from tests.faults.outside import Inspector
from tests.faults.steps import committed

pytestmark = pytest.mark.threat(2, 3, 12, 42)
PARTS, KILLS = 84, 12  # 1,008 in all


@pytest.fixture(scope="module")
def inspector(tmp_path_factory):
    reference = tmp_path_factory.mktemp("kills") / "reference"
    began = time.monotonic()
    code, told = finish(reference, "checkpoint.keep_latest=99")
    assert code == 0, told
    return Inspector(reference, keep=KEEP, took_s=time.monotonic() - began)


def killed(inspector, tmp_path, record_property, seed):
    counts = kill_until(inspector, tmp_path, kills=KILLS, seed=seed)
    for name, count in counts.items():
        record_property(name, count)
    return counts


def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(
    inspector, tmp_path, record_property
):
    counts = killed(inspector, tmp_path, record_property, 0)
    assert counts["kills"] == KILLS
    assert counts["kills_mid_save_or_delete"] > KILLS / 2


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, PARTS))
def test_a_thousand_kills(inspector, tmp_path, record_property, seed):
    killed(inspector, tmp_path, record_property, seed)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("bug", "rules"),
    [("early", {"C1"}), ("greedy", {"C2"}), ("skipping", {"C6"}), ("rotten", {"C0", "C1"})],
)
def test_the_harness_finds_a_bug_within_50_kills(inspector, tmp_path, bug, rules):
    with pytest.raises(AssertionError) as error:
        kill_until(inspector, tmp_path, kills=50, seed=7, module=("tests.faults.broken", bug))
    assert str(error.value)[:2] in rules, error.value


# The harness itself, without a trainer

ROW = {"split": "train", "loss": 0.5, "step_time_s": 0.1}


def made(folder, steps, last_row, *, time_s=0.1):
    """A run folder whose checkpoints have no arrays, and that logged `last_row` steps."""
    shutil.rmtree(folder, ignore_errors=True)
    for step in steps:
        committed(folder / "checkpoints", step)
    rows = [ROW | {"step": i, "step_time_s": time_s} for i in range(1, last_row + 1)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / ".lock").touch()
    return folder


@pytest.fixture
def look(tmp_path, monkeypatch):
    """`look(change, before)`: the rule that a run with steps 2 and 4 breaks after `change`."""
    monkeypatch.setattr("tests.faults.outside.state_digest", lambda run, step: str(step))
    inspector = Inspector(made(tmp_path / "reference", range(1, 9), 8), keep=KEEP)

    def look(change, newest=4, lines=()):
        run = made(tmp_path / "run", [2, 4], 6)
        change(run)
        try:
            inspector.after(run, {"newest": newest, "lines": list(lines)})
        except AssertionError as error:
            return str(error)[:2]
        return ""

    return look


def append(run, text):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(text)


def line(step, time_s):
    return f"{json.dumps(ROW | {'step': step, 'step_time_s': time_s})}\n".encode()


def test_the_harness_sees_each_broken_rule(look, tmp_path):
    root = tmp_path / "run" / "checkpoints"
    assert look(lambda run: None) == ""
    assert look(lambda run: append(run, '{"split": "tr')) == ""  # torn by the kill
    assert look(lambda run: (root / "4" / "state" / "d" / "a1").unlink()) == "C1"
    assert look(lambda run: shutil.rmtree(root / "4")) == "C2"
    assert look(lambda run: None, newest=2, lines=[line(2, 9.9)]) == "C3"  # done again
    kept = [line(2, 0.1), line(3, 9.9), line(4, 0.1)]  # 4 was kept, though it came after 2
    assert look(lambda run: None, newest=2, lines=kept) == "C3"
    assert look(lambda run: [committed(root, step) for step in (6, 8)]) == "C4"
    assert look(lambda run: (root / "4.tmp").mkdir()) == "C5"
    assert look(lambda run: append(run, "torn\n")) == "C6"
    assert look(lambda run: append(run, json.dumps(ROW | {"step": 6}) + "\n")) == "C6"
    assert look(lambda run: append(run, json.dumps(ROW | {"step": 8}) + "\n")) == "C6"
    assert look(lambda run: append(run, json.dumps(ROW | {"step": 7, "loss": 1}) + "\n")) == "C6"
