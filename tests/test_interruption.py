"""Stops: the agreement of several processes, the debounce, and the handlers of others."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from lsdl import interruption
from lsdl.interruption import AGAIN_S, FRESH, SAVED, Agreement, StopRequest


class Simulated:
    """Processes whose words travel at random speeds, in the order in which they were sent."""

    def __init__(self, total, *, gates, draw):
        self.draw, self.gates, self.ends = draw, gates, {}
        self.mail = {}  # (from, to): words on their way
        self.stops = [StopRequest() for _ in range(total)]
        self.agreement = Agreement(total, self.tell_all)
        self.places = [FRESH] * total
        for i, stop in enumerate(self.stops):
            stop.say = lambda word, i=i: self.post(i, 0, word)
            stop._leave = lambda i=i: self.ends.setdefault(i, "left")

    def tell_all(self, word):
        for i in range(len(self.stops)):
            self.post(0, i, word)

    def post(self, sender, to, word):
        self.mail.setdefault((sender, to), []).append(word)

    def deliver(self):
        ways = [way for way, words in self.mail.items() if words]
        if not ways:
            return False
        sender, to = way = self.draw.choice(ways)
        word = self.mail[way].pop(0)
        if word.startswith("stop"):
            self.agreement.stop(int(word.split()[1]))
        elif word.startswith("at"):
            self.agreement.at(sender, int(word.split()[1]))
        else:
            self.stops[to].told(word)
        return True

    def advance(self, i):
        """The next gate of process `i`, unless it is to wait there or has ended."""
        stop = self.stops[i]
        if i in self.ends or (stop._asked and stop._gate is None):
            return
        if stop.place == FRESH:
            stop.began()
        elif stop.place == SAVED:
            return
        elif stop.place == self.gates:
            stop.saved()
        elif stop.after(0) and stop.place < self.gates:  # the last step ends by itself
            self.ends[i] = stop.place


@pytest.mark.threat(1)
@pytest.mark.parametrize("part", range(3))
def test_all_processes_stop_at_the_same_gate(part):
    """Or leave, where one of them has nothing to save."""
    for seed in range(100 * part, 100 * part + 100):
        assert_one_end(random.Random(seed))


def assert_one_end(draw):
    job = Simulated(draw.choice([1, 2, 3, 5]), gates=draw.choice([2, 6]), draw=draw)
    numbers = range(len(job.stops))
    signals = sorted(draw.choice(range(60)) for _ in range(draw.choice([1, 2])))
    for turn in itertools.count():
        while signals and signals[0] <= turn:
            signals.pop(0)
            job.post(draw.choice(numbers), 0, f"stop {signal.SIGTERM}")
        if draw.random() < 0.5:
            i = draw.choice(numbers)
            behind = min(max(s.place, -1) for s in job.stops)
            if job.stops[i].place <= behind + 1:  # a step needs all: none is further ahead
                job.advance(i)
        else:
            job.deliver()
        if not signals and len(job.ends) == len(job.stops):
            break
        assert turn < 10_000
    ends = set(job.ends.values())
    assert len(ends) == 1, job.ends
    if ends == {"left"}:
        assert all(s.place in (FRESH, SAVED) or s.place <= 1 for s in job.stops)


@pytest.mark.threat(1)
def test_a_gate_waits_until_all_have_said_where_they_are():
    stop, said = StopRequest(), []
    stop.say = said.append
    stop.began()
    assert not stop.after(1)
    stop.told("where 15")
    assert said == ["at 1"]
    answers = []
    thread = threading.Thread(target=lambda: answers.append(stop.after(2)))
    thread.start()
    time.sleep(0.2)
    assert answers == []
    stop.told("gate 3")
    thread.join()
    assert answers == [False]
    assert stop.after(3)
    assert stop.signal == 15


def test_a_signal_in_a_program_of_ones_own_stops_at_the_next_gate():
    with interruption.owner() as stop:
        assert not stop.after(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.after(2)
        assert stop.signal == signal.SIGTERM
        with interruption.owner() as same:
            assert same is stop
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert interruption.current() is None


def test_a_signal_that_comes_twice_at_once_is_one_signal():
    with interruption.owner() as stop:
        stop.began()
        for _ in range(3):  # as timeout(1) sends it, to the process and to its group
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.after(1)
        time.sleep(AGAIN_S + 0.1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


ENTRY = """import os, signal, sys, time
from lsdl import interruption
signal.signal(signal.SIGTERM, lambda *_: print("mine", flush=True))
with interruption.owner(leaves=True) as stop:
    {0}
    print("ready", flush=True)
    {1}
"""
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"


def signalled(setup, then, *numbers, pause_s=0.6):
    """(exit code, stdout, stderr, seconds since the last signal)."""
    child = subprocess.Popen(
        (sys.executable, "-c", ENTRY.format(setup, then)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout.readline() == "ready\n"
            for i, number in enumerate(numbers):
                time.sleep(pause_s if i else 0)
                child.send_signal(number)
            began = time.monotonic()
            out, err = child.communicate(timeout=30)
            return child.returncode, out, err, time.monotonic() - began
        finally:
            child.kill()


@pytest.mark.threat(1, 44)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_where_nothing_is_to_be_saved_a_signal_ends_also_what_hangs_in_c(number, code):
    ended, out, err, took = signalled("pass", BUSY, number)
    assert (ended, took < 5) == (code, True)
    assert out == ("mine\n" if number == signal.SIGTERM else "")
    assert err.strip() == ("lsdl: Stopped before a step was taken: the same command starts again.")


@pytest.mark.threat(1, 44)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_at_once(number, code):
    ended, _, err, took = signalled("stop.began()", BUSY, number, number)
    assert (ended, took < 2) == (code, True)
    assert err.strip().startswith("lsdl: A second signal: gone.")


def test_in_the_last_evaluation_all_is_saved():
    ended, _, err, _ = signalled("stop.saved()", BUSY, signal.SIGTERM)
    assert ended == 75
    assert "Stopped in the last evaluation, saved" in err
