"""The watchdog: a step, a save or an evaluation that does not come ends the run, with all stacks.

A collective waits for ever for a process that is alive and stuck, without an exception.
"""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

STEP = "a step"
# How much longer than a step's least limit each other phase may take: a first step sets up what the
# others use, the rest grows with the model, the data and the disk.
TIMES = {"the first step": 10, "restoring": 60, "compiling": 240, "saving": 60, "evaluating": 60}
MEDIANS = 20  # of a step's duration, that it may take
KEPT = 101  # durations that the median is of
ASLEEP_S = 5.0  # between two looks: this process, or the machine, was stopped, and no step is late


class Watchdog:
    """A thread that calls `stuck(sentence)` once nothing has come for longer than it may take.

    A step may take `step_s` seconds, or 20 of the median step if that is longer; 0: for ever. What
    counts is the end of a step on the device, not its dispatch, which runs ahead.
    """

    def __init__(
        self,
        step_s: float,
        stuck: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.step = 0  # the newest that was sent
        self._step_s, self._stuck, self._clock = step_s, stuck, clock
        self._phases: list[str] = []
        self._sent: deque = deque()  # (step, result) in flight
        self._ended: int | None = None  # the newest step that has
        self._durations_s: deque[float] = deque(maxlen=KEPT)
        self._since = self._looked = clock()
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __enter__(self):
        if self._step_s:
            threading.Thread(target=self._run, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self._closed.set()

    def sent(self, step: int, result: Any) -> None:
        """`step` is on its way, and over once `result`, an array, is there."""
        with self._lock:
            self.step = step
            self._sent.append((step, result))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The body is no step but one of `TIMES`, with its own limit."""
        self._begin(name)
        try:
            yield
        finally:
            with self._lock:
                self._phases.pop()
                self._since = self._clock()

    def _begin(self, name: str) -> None:
        assert name in TIMES, name
        with self._lock:
            self._phases.append(name)
            self._since = self._clock()

    def alive(self) -> None:
        """A part of a long phase is done: its time starts again."""
        with self._lock:
            self._since = self._clock()

    def look(self) -> str | None:
        """What takes too long, as a sentence; None: nothing."""
        with self._lock:
            now = self._clock()
            if now - self._looked > ASLEEP_S:
                self._since += now - self._looked
            self._looked = now
            ended = 0
            while self._sent and _is_there(self._sent[0][1]):
                self._ended = self._sent.popleft()[0]
                ended += 1
            if ended and not self._phases:
                # Each of them counts: one look may see many, and the first step is slow.
                self._durations_s.extend([(now - self._since) / ended] * min(ended, KEPT))
                self._since = now
            name = self._phases[-1] if self._phases else STEP
            if name == STEP and self._ended is None:
                name = "the first step"
            limit_s = self._limit_s(name)
            if now - self._since <= limit_s:
                return None
            after = "" if self._ended is None else f" after step {self._ended:,}"
            return (
                f"Stuck: {name}{after} has taken more than {limit_s:,.0f} s "
                f"(stuck_after_s={self._step_s:g}). The same command goes on from the newest save."
            )

    def _limit_s(self, name: str) -> float:
        if name != STEP:
            return TIMES[name] * self._step_s
        typical = statistics.median_low(self._durations_s) if self._durations_s else 0.0
        return max(self._step_s, MEDIANS * typical)

    def _run(self) -> None:
        while not self._closed.wait(min(1.0, self._step_s / 10)):
            if sentence := self.look():
                self._stuck(sentence)
                return


def _is_there(result: Any) -> bool:
    return not hasattr(result, "is_ready") or result.is_ready()
