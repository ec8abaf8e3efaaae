"""The watchdog, under a clock that the test moves."""

import subprocess
import sys

import numpy as np
import pytest

from lsdl.watchdog import TIMES, Watchdog


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Result:
    """An array that is there from a time on."""

    def __init__(self, clock, at_s):
        self.clock, self.at_s = clock, at_s

    def is_ready(self):
        return self.clock() >= self.at_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def watch(clock):
    return Watchdog(60.0, None, clock=clock)


def pass_time(watch, clock, seconds, *, look_every_s=1.0):
    """The sentences of all looks."""
    until, said = clock.now_s + seconds, []
    while clock.now_s < until:
        clock.now_s += min(look_every_s, until - clock.now_s)
        said.append(watch.look())
    return [sentence for sentence in said if sentence]


@pytest.mark.threat(29)
@pytest.mark.parametrize("ahead", [1, 32])
def test_ten_thousand_healthy_steps_raise_no_alarm(watch, clock, ahead):
    """Their times have a heavy tail, the host runs ahead, and all else takes its time as well."""
    draw = np.random.default_rng(3)
    with watch.phase("restoring"):
        assert pass_time(watch, clock, 3_000, look_every_s=4) == []
    with watch.phase("compiling"):
        assert pass_time(watch, clock, 14_000, look_every_s=4) == []
    done_s = clock.now_s + 500  # the first step, which sets up what the others use
    durations = np.minimum(4.0 * draw.pareto(2.0, 10_000) + 0.5, 55.0)
    ends = []
    for step, duration in enumerate(durations, start=1):
        done_s = max(done_s, clock.now_s) + float(duration)
        watch.sent(step, Result(clock, done_s))
        ends.append(done_s)
        if step > ahead:  # the host waits for a step of some time ago
            wait = max(ends[step - 1 - ahead] - clock.now_s, 0.0)
            assert pass_time(watch, clock, wait) == []
        if step % 1000 == 0:
            assert pass_time(watch, clock, max(done_s - clock.now_s, 0.0)) == []
            for name, seconds in (("evaluating", 1_800), ("saving", 900)):
                with watch.phase(name):
                    assert pass_time(watch, clock, seconds, look_every_s=4) == []


@pytest.mark.threat(29)
def test_a_step_that_does_not_come_is_named_in_time(watch, clock):
    for step in range(1, 8):
        watch.sent(step, Result(clock, clock.now_s + 0.5))
        pass_time(watch, clock, 1)
    watch.sent(8, Result(clock, np.inf))
    assert pass_time(watch, clock, 58) == []
    (sentence,) = pass_time(watch, clock, 4)[:1]
    assert sentence.startswith("Stuck: a step after step 7 has taken more than 60 s ")


def test_a_slow_model_has_twenty_of_its_steps(watch, clock):
    for step in range(1, 8):
        watch.sent(step, Result(clock, clock.now_s + 10))
        assert pass_time(watch, clock, 10) == []
    watch.sent(8, Result(clock, np.inf))
    assert pass_time(watch, clock, 198) == []
    assert "more than 200 s" in pass_time(watch, clock, 4)[0]


def test_steps_that_end_between_two_looks_count_each(watch, clock):
    watch.sent(1, Result(clock, 10))  # a slow first step, as it is
    assert pass_time(watch, clock, 10) == []
    for step in range(2, 10):
        watch.sent(step, Result(clock, clock.now_s + 0.5))
    pass_time(watch, clock, 1)
    watch.sent(10, Result(clock, np.inf))
    assert pass_time(watch, clock, 59) == []
    assert "more than 60 s" in pass_time(watch, clock, 4)[0]


def test_the_slow_first_step_and_one_more_are_no_mean(watch, clock):
    for step, seconds in enumerate((40, 1), start=1):
        watch.sent(step, Result(clock, clock.now_s + seconds))
        assert pass_time(watch, clock, seconds) == []
    watch.sent(3, Result(clock, np.inf))
    assert pass_time(watch, clock, 59) == []
    assert "more than 60 s" in pass_time(watch, clock, 4)[0]


def test_a_host_that_sends_no_step_is_seen_too(watch, clock):
    watch.sent(1, Result(clock, 0))
    pass_time(watch, clock, 1)
    assert pass_time(watch, clock, 59) == []
    assert "after step 1" in pass_time(watch, clock, 4)[0]


@pytest.mark.parametrize("name", TIMES)
def test_what_is_no_step_has_its_own_limit(watch, clock, name):
    limit_s = 60 * TIMES[name]
    if name == "the first step":
        watch.sent(1, Result(clock, np.inf))
        assert pass_time(watch, clock, limit_s) == []
        assert f"Stuck: {name}" in pass_time(watch, clock, 4)[0]
        return
    with watch.phase(name):
        assert pass_time(watch, clock, limit_s, look_every_s=4) == []
        watch.alive()
        assert pass_time(watch, clock, limit_s, look_every_s=4) == []
        assert f"Stuck: {name}" in pass_time(watch, clock, 4)[0]


def test_a_process_that_was_put_to_sleep_is_not_late(watch, clock):
    watch.sent(1, Result(clock, 0))
    pass_time(watch, clock, 1)
    watch.sent(2, Result(clock, 10_000 + 5))
    clock.now_s += 10_000  # Ctrl-Z, or a closed lid
    assert watch.look() is None
    assert pass_time(watch, clock, 20) == []


def test_nothing_limits_a_run_without_a_limit():
    with Watchdog(0.0, None) as watch:
        assert not watch._closed.is_set()
        assert sum("Watchdog" in repr(t) for t in sys.modules["threading"].enumerate()) == 0


@pytest.mark.threat(29, 44)
def test_what_is_stuck_shows_all_stacks_and_ends():
    code = """import threading, time
from lsdl import processes
from lsdl.watchdog import Watchdog

def elsewhere():
    time.sleep(60)

threading.Thread(target=elsewhere, daemon=True).start()
with Watchdog(0.1, processes.stuck) as watch:
    watch.sent(1, None)
    while True:
        pass"""
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=60)
    assert done.returncode == 71
    assert "in elsewhere" in done.stderr
    assert "in <module>" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lsdl: Stuck: a step after step 1 has taken")
