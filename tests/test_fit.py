"""Under- and overfitting: the lectures' rules, on canned curves and on a run's metrics."""

import json
import shutil

import numpy as np
import pytest

from lsdl import analyze
from lsdl.analysis.fit import diagnose
from tests.analyzing import analyzed

STEPS = np.arange(1, 101)
LEARNT = 2.3 * np.exp(-STEPS / 15) + 0.02
FLAT = 2.3 * np.exp(-STEPS / 10) + 1.6
SLOW = 2.3 - 0.006 * STEPS
TURNED = np.where(STEPS < 40, LEARNT, LEARNT[39] + 0.004 * (STEPS - 40))
CURVES = {
    "a good run": (LEARNT, LEARNT + 0.05, "ok", "nothing"),
    "it has stagnated high": (FLAT, FLAT + 0.1, "under", "more capacity"),
    "it still falls": (SLOW, SLOW, "under", "train longer"),
    "validation stays above": (LEARNT, LEARNT + 0.5, "over", "regularise first"),
    "validation has turned up": (LEARNT, TURNED, "over", "regularise first"),
    # Both losses are large, so the optimisation comes first, whatever the gap.
    "both": (FLAT, FLAT + 0.9, "under", "more capacity"),
}


@pytest.mark.parametrize("name", CURVES)
def test_a_canned_curve(name):
    train, valid, verdict, advice = CURVES[name]
    found = diagnose((STEPS, train), (STEPS[9::10], valid[9::10]))
    assert found.verdict == verdict
    assert advice in found.advice


def test_the_scale_of_the_loss_does_not_matter_and_the_target_does():
    for name, (train, valid, verdict, _) in CURVES.items():
        found = diagnose((STEPS, 7 * train), (STEPS, 7 * valid))
        assert found.verdict == verdict, name
    assert diagnose((STEPS, FLAT), (STEPS, FLAT), target=2.0).verdict == "ok"
    assert diagnose((STEPS, LEARNT), (STEPS, LEARNT), target=0.01).verdict == "under"


def test_the_lowest_validation_loss_is_not_where_the_gap_is_smallest():
    valid = TURNED + 0.1 * (STEPS > 20)
    found = diagnose((STEPS, LEARNT), (STEPS, valid))
    assert found.best_step == STEPS[valid.argmin()] > 30
    assert found.closest_step <= 20
    assert found.risen == pytest.approx(valid[-1] - valid.min())


def test_the_gap_is_that_of_the_last_state_where_it_was_evaluated():
    noisy = LEARNT + 0.6  # dropout
    assert diagnose((STEPS, noisy), (STEPS, LEARNT + 0.5)).gap < 0
    found = diagnose((STEPS, noisy), (STEPS, LEARNT + 0.5), of_state=0.02)
    assert found.gap == pytest.approx(0.5, abs=0.01)
    assert found.verdict == "over"


def test_a_run_is_diagnosed_from_its_metrics_alone(tmp_path, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"config": {"name": "canned"}, "history": []}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [dict(step=int(s), split="train", loss=v) for s, v in zip(STEPS, LEARNT, strict=True)]
    rows += [
        dict(step=int(s), split="valid", loss=v)
        for s, v in zip(STEPS[9::10], TURNED[9::10], strict=True)
    ]
    rows.append(dict(step=100, split="train_eval", loss=0.02))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, page = analyzed("diagnose", folder, tmp_path)
    assert found["verdict"] == "over"
    assert found["gap"] == pytest.approx(TURNED[-1] - 0.02)
    assert "Overfitting" in page
    assert "regularise first" in capfd.readouterr().out
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    assert analyze.main(["diagnose", "--run", str(folder)]) == 2
    assert "no train loss" in capfd.readouterr().err
