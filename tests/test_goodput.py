"""Goodput: the closed form against runs played event by event, and against Llama 3's report."""

import math

import numpy as np
import pytest

from lsdl.errors import UserError
from lsdl.planner import goodput

# (d, R, w) in units of the time between failures: from a large healthy cluster to a sick one.
GRID = [
    (0.001, 0.01, 0.0),
    (0.003, 0.05, 0.02),
    (0.003, 0.5, 0.05),
    (0.01, 0.1, 0.1),
    (0.05, 0.3, 0.0),
    (0.1, 0.1, 0.2),
]


def costs(case, mtbf_s=1.0):
    checkpoint, restart, write = case
    return dict(checkpoint_s=checkpoint * mtbf_s, mtbf_s=mtbf_s, restart_s=restart * mtbf_s) | dict(
        write_s=write * mtbf_s
    )


@pytest.mark.parametrize("times", [0.7, 1, 2])
@pytest.mark.parametrize("case", GRID, ids=str)
def test_played_runs_agree_with_the_closed_form(case, times):
    own = costs(case, 10_000.0)
    interval_s = times * goodput.best(own["checkpoint_s"], own["mtbf_s"])
    interval_s = max(interval_s, own["write_s"] - own["checkpoint_s"])
    expected = goodput.goodput(interval_s, **own)
    found, error = goodput.simulate(interval_s, **own, runs=128, failures=64)
    assert error < 0.01 * expected  # else the next line says nothing
    assert found == pytest.approx(expected, rel=0.02)


def test_nothing_is_lost_where_nothing_fails():
    own = dict(checkpoint_s=1.0, mtbf_s=1e9, restart_s=60.0)
    assert goodput.goodput(99.0, **own) == pytest.approx(0.99, rel=1e-5)
    assert goodput.shares(99.0, **own)["saving"] == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_the_shares_are_the_whole_time(case):
    found = goodput.shares(0.2, **costs(case))
    assert sum(found.values()) == pytest.approx(1)
    assert min(found.values()) > 0


def test_the_shares_are_the_first_terms_where_failures_are_rare():
    found = goodput.shares(2e-3, checkpoint_s=1e-5, mtbf_s=1.0, restart_s=3e-3, write_s=1e-3)
    expected = {"saving": 1e-5 / 2e-3, "restart": 3e-3, "lost": 2e-3 / 2 + 1e-3}
    assert {k: found[k] for k in expected} == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("case", GRID, ids=str)
def test_no_interval_is_better_than_the_best(case):
    own = costs(case)
    best = goodput.best(own["checkpoint_s"], 1.0)
    others = best * np.geomspace(0.1, 10, 101)
    top = goodput.goodput(best, **own)
    assert max(goodput.goodput(t, **own) for t in others) <= top
    # and where it is best the derivative is zero
    assert 1 - best == pytest.approx(math.exp(-(best + own["checkpoint_s"])))


def test_the_rules_of_young_and_daly_are_the_expansion_of_the_best_interval():
    assert goodput.young(2.0, 10_000.0) == 200
    assert goodput.daly_first(2.0, 10_000.0, 2_500.0) == pytest.approx(math.sqrt(50_000))
    away = []
    for checkpoint_s in (1e-5, 1e-4, 1e-3, 1e-2):
        best = goodput.best(checkpoint_s, 1.0)
        young = abs(goodput.young(checkpoint_s, 1.0) / best - 1)
        daly = abs(goodput.daly(checkpoint_s, 1.0) / best - 1)
        assert daly < young / 50
        away.append(daly)
    assert away == sorted(away)
    assert away[-1] < 1e-3
    assert goodput.daly(3.0, 1.0) == 1.0  # saves that take as long as a life


def test_llama_3():
    """419 failures in 54 days on 16,384 devices, and more than 90% of the time made good."""
    found = goodput.llama3()
    assert found["mtbf_device_hours"] == pytest.approx(50_677, abs=1)
    assert found["failures_per_day"] == pytest.approx(419 / 54)
    assert found["mtbf_s"] / 3600 == pytest.approx(3.09, abs=0.01)
    assert found["checkpoint_s"] == pytest.approx(405e9 * 12 / 2e12)
    assert found["goodput"] > 0.9
    # the restart that leaves the reported 90%, put in, gives it
    own = {k: found[k] for k in ("checkpoint_s", "mtbf_s", "write_s")}
    longest_s = found["longest_restart_s"]
    assert goodput.goodput(found["interval_s"], restart_s=longest_s, **own) == pytest.approx(0.9)
    assert 600 < longest_s < 1200
    text = goodput.llama3_table()
    assert "7.76 a day" in text
    assert "50,677 device-hours" in text


def test_the_copy_stops_the_run_and_the_write_delays_what_counts():
    state = dict(devices=1024, mtbf_device_hours=50_000.0, state_bytes=12 * 10**12)
    own = goodput.make(**state)
    assert own["checkpoint_s"] == pytest.approx(12e12 / 1024 / 32e9)
    assert own["write_s"] == pytest.approx(6.0)
    whole = goodput.make(**state, asynchronous=False)
    assert (whole["checkpoint_s"], whole["write_s"]) == (pytest.approx(6.0), 0)
    assert own["goodput"] > whole["goodput"]
    given = goodput.make(**state, checkpoint_s=2.0, step_s=7.0)
    assert (given["checkpoint_s"], given["write_s"]) == (2.0, 0)
    assert given["interval_steps"] == round(given["interval_s"] / 7)


def test_a_save_waits_until_the_last_one_is_written():
    state = dict(devices=16_384, mtbf_device_hours=50_000.0, checkpoint_s=0.1)
    slow = goodput.make(**state, write_s=1_000.0)
    assert slow["interval_s"] == pytest.approx(999.9)
    assert goodput.make(**state, write_s=1.0)["interval_s"] < 100


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (dict(mtbf_device_hours=0.0), "mtbf_device_hours=0.0 must be a positive number"),
        (dict(devices=-1), "devices=-1"),
        (dict(checkpoint_s=math.nan), "checkpoint_s=nan"),
        (dict(checkpoint_s=None), "state_bytes=0"),
        (dict(step_s=0.0), "step_s=0.0"),
    ],
)
def test_what_is_not_positive_is_told(wrong, told):
    given = dict(devices=8, mtbf_device_hours=50_000.0, checkpoint_s=1.0)
    with pytest.raises(UserError, match=told):
        goodput.make(**given | wrong)


def test_the_table_says_each_number():
    found = goodput.make(devices=4096, mtbf_device_hours=50_000.0, state_bytes=12 * 70 * 10**9)
    text = goodput.table(found)
    assert "4,096 devices, one failure in 50,000 device-hours, every 12.2 h" in text
    assert "782.31 GiB" in text
    assert f"{found['goodput']:.2%}" in text
