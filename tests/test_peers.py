"""What a process of a job does when another speaks, leaves or is lost: the lines are a list."""

from unittest import mock

import pytest

from lsdl import peers
from lsdl.errors import INTERRUPTED, SAVED_AND_STOPPED, STUCK, TERMINATED, UNREACHABLE
from lsdl.interruption import StopRequest


class Lines:
    """Writes down what was said, in order with the end of the process."""

    waiting = ()

    def __init__(self, sockets, *, silence_s, heard, lost, beat):
        self.heard, self.lost = heard, lost
        self.said = []
        self.hears = lambda word: None  # what the others do at a word

    def start(self):
        """What was said before this process listened is heard at once."""
        for process, word in self.waiting:
            self.heard(process, word)

    def send_all(self, word):
        self.said.append(word)
        self.hears(word)

    def send(self, process, word):
        self.send_all(f"{process}: {word}")

    def outlast(self, seconds):
        self.said.append("outlast")


@pytest.fixture
def join(monkeypatch):
    """`join(process, of) -> (its StopRequest, its lines)`; `end` is written down, and returns."""
    monkeypatch.setattr(peers, "Lines", Lines)
    monkeypatch.setattr(peers.ctypes, "CDLL", lambda name: mock.Mock())
    monkeypatch.setattr(peers.atexit, "register", lambda work: None)
    monkeypatch.setattr(peers.faulthandler, "dump_traceback", lambda **_: None)

    def join(process, of):
        stop = StopRequest()
        member = peers.Peers(process, of, stop)
        member.step = lambda: 4
        member.join({}, silence_s=1)
        lines = member._lines
        end = lambda code, sentence: lines.said.append((code, sentence))  # noqa: E731
        monkeypatch.setattr(peers, "end", end)
        return stop, lines

    return join


@pytest.mark.parametrize("process", [0, 1])
def test_whoever_hears_of_a_second_signal_and_leaves_is_not_lost(join, process):
    stop, lines = join(process, 2)
    lines.hears = lambda word: lines.lost(1 - process, "its connection has closed")
    stop.say(f"gone {TERMINATED}")
    assert lines.said == [f"gone {TERMINATED}"]


@pytest.mark.parametrize("process", [0, 1, 2])
def test_whoever_leaves_as_all_were_told_is_not_lost(join, monkeypatch, process):
    """Also one that had not met all when it was told to stop, and said so to process 0 alone."""
    stop, lines = join(process, 3)
    stop.leaves = True
    monkeypatch.setattr("lsdl.interruption.threading", mock.Mock())  # the end comes later
    other = 1 if process == 0 else 0
    lines.heard(other, f"leave {INTERRUPTED if process == 0 else 2}")
    lines.lost(other, "its connection has closed")
    assert lines.said == (["leave 2"] if process == 0 else [])
    assert stop.signal == 2


def test_a_word_that_is_there_already_is_answered(join, monkeypatch):
    monkeypatch.setattr(Lines, "waiting", [(1, f"leave {SAVED_AND_STOPPED}")])
    stop, lines = join(0, 3)
    assert lines.said == ["leave 15"]
    assert stop.signal == 15


def test_where_nothing_ends_the_process_whoever_leaves_is_lost(join):
    _, lines = join(0, 2)
    lines.heard(1, f"leave {SAVED_AND_STOPPED}")
    lines.lost(1, "its connection has closed")
    assert lines.said[-1][0] == UNREACHABLE


@pytest.mark.parametrize("process", [0, 1])
def test_whoever_closes_its_line_unasked_is_lost(join, process):
    _, lines = join(process, 2)
    lines.lost(1 - process, "its connection has closed")
    code, sentence = lines.said[-1]
    assert code == UNREACHABLE
    assert sentence.startswith(f"Process {1 - process} of 2 is lost: its connection has closed.")


def test_process_0_stays_until_the_others_have_heard_why(join):
    """jax in the others aborts without a word once its service is gone."""
    _, lines = join(0, 3)
    lines.lost(2, "its connection has closed")
    told, outlast, (code, sentence) = lines.said
    assert (told, outlast, code) == (f"lost {sentence}", "outlast", UNREACHABLE)


@pytest.mark.parametrize(
    ("places", "behind"),
    [
        ({1: (4, 0), 2: (4, 0)}, ""),
        ({1: (4, 0), 2: (3, 0)}, "process 2, after step 3."),
        ({1: (5, 0), 2: (6, 0)}, "process 0, after step 4."),
        ({1: (4, 0), 2: (4, 1)}, "process 0, 1, after step 4."),  # 2 is the first at a meeting
        ({1: (3, 7), 2: (4, 0)}, "process 1, after step 3."),
    ],
)
def test_who_is_behind_is_named_unless_all_are(join, places, behind):
    _, lines = join(0, 3)
    for process, (step, turn) in places.items():
        lines.heard(process, f"{peers.BEAT} {step} {turn}")
    lines.heard(1, "stuck Nothing came.")
    code, sentence = lines.said[-1]
    assert code == STUCK
    assert sentence.endswith(f"Behind the others: {behind}" if behind else "Nothing came.")
