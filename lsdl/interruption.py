"""SIGTERM and Ctrl-C: one owner of both, and the step after which all processes stop.

A signal is heard by a thread: while a program compiles no Python of the main thread runs. What
follows depends on where the processes are:

    no step taken yet   nothing is to be saved: all leave at once
    training            all stop at the next gate that none has passed, save, and leave
    all is saved        and only the last evaluation is left: all leave at once
"""

import contextlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

from lsdl.errors import INTERRUPTED, SAVED_AND_STOPPED, TERMINATED, end

FRESH, SAVED = -1, sys.maxsize  # places before the first gate and behind the last
AGAIN_S = 0.3  # a launcher may send one signal twice, to the process and to its group

_owners: list["StopRequest"] = []


@contextlib.contextmanager
def owner(*, leaves: bool = False) -> Iterator["StopRequest"]:
    """The owner of the signals: the one there is, or one for the time of the body.

    `leaves`: it may end the process, as an entry may; otherwise a stop waits for the next gate,
    and a second Ctrl-C raises `KeyboardInterrupt`. Outside the main thread it hears nothing.
    """
    if _owners:
        yield _owners[-1]
        return
    stop = StopRequest(leaves=leaves)
    _owners.append(stop)
    try:
        stop.install()
        yield stop
    finally:
        stop.uninstall()
        _owners.remove(stop)


def current() -> "StopRequest | None":
    """The owner that there is."""
    return _owners[-1] if _owners else None


class Agreement:
    """Process 0's part in a stop: it asks all where they are, and tells them where to stop."""

    def __init__(self, num_processes: int, tell: Callable[[str], None]):
        """`tell` gives a word to all processes, this one too."""
        self._total, self._tell = num_processes, tell
        self._places: dict[int, int] = {}
        self._number: int | None = None
        self._decided = False

    def stop(self, number: int) -> None:
        """One of the processes got the signal `number`; the first one counts."""
        if self._number is None:
            self._number = number
            self._tell(f"where {number}")

    def at(self, process: int, place: int) -> None:
        """`process` is at `place`; if that is a gate it waits at the next one."""
        self._places[process] = place
        if len(self._places) < self._total:
            return
        places = self._places.values()
        # A step needs all processes: without one of them none has been completed.
        if min(places) in (FRESH, SAVED):
            self._tell(f"leave {self._number}")
        elif not self._decided:
            self._decided = True
            self._tell(f"gate {1 + max(place for place in places if place != SAVED)}")


class StopRequest:
    """Signals as a question that the loop asks between steps: each time a gate.

    Several processes have to stop at the same gate, whichever of them got the signal. They learn
    of it by words (`told`), which `say` sends to process 0's `Agreement`.
    """

    def __init__(self, *, leaves: bool = False):
        self.signal: int | None = None  # that all stop for
        self.place = FRESH  # or how many gates it has passed, or SAVED
        self.say: Callable[[str], None] = self._alone
        self.silent = False  # another process tells the user
        self.farewell: Callable[[int], None] = lambda code: None  # to whom `say` does not reach
        self._agreement = Agreement(1, self.told)
        self.leaves = leaves  # may end the process
        self._leaving = False
        self._gate: int | None = None
        self._changed = threading.Condition(threading.RLock())
        self._asked = False
        self._first_at: float | None = None
        self._previous: dict[int, object] = {}
        self._ends: tuple[socket.socket, ...] = ()

    def wait_if_leaving(self) -> None:
        """For ever, where this process is about to leave: nobody is to count on it any more."""
        while self._leaving:
            time.sleep(1)

    # The loop's side.

    def began(self) -> None:
        """From here on there is something to save: a step is on its way."""
        with self._changed:
            self.place = max(self.place, 0)

    def after(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer for the same step."""
        with self._changed:
            while self._asked and self._gate is None:  # until all have said where they are
                self._changed.wait(0.1)
            self.place = max(self.place, 0) + 1
            return self._gate is not None and self.place >= self._gate

    def saved(self) -> None:
        """The last step is saved: what is left can be done again."""
        with self._changed:
            self.place = SAVED
            asked = self._asked
        if asked:
            self.say(f"at {SAVED}")

    # The other processes' side.

    def told(self, word: str) -> None:
        """A word of the agreement: where NUMBER, gate PLACE or leave NUMBER."""
        verb, value = word.split()
        if verb == "leave":
            self.signal = self.signal or int(value)
            self._leave()
            return
        with self._changed:
            if verb == "where":
                self.signal, self._asked = int(value), True
                place = self.place
            else:
                self._gate = int(value)
                self._changed.notify_all()
        if verb == "where":
            self.say(f"at {place}")

    def _alone(self, word: str) -> None:
        verb, value = word.split()
        if verb == "stop":
            self._agreement.stop(int(value))
        elif verb == "at":
            self._agreement.at(0, int(value))

    def _leave(self) -> None:
        if not self.leaves:
            with self._changed:
                self._gate = 1
            return
        sentence = (
            "Stopped in the last evaluation, saved: the same command goes on from there."
            if self.place == SAVED
            else "Stopped before a step was taken: the same command starts again."
        )
        code = INTERRUPTED if self.signal == signal.SIGINT else SAVED_AND_STOPPED

        farewell = self.farewell  # the one of now: this process may meet the others meanwhile

        def leave():
            farewell(code)
            end(code, "" if self.silent else sentence)

        self._leaving = True
        # Not in the thread that hears: a second signal does not wait for a farewell.
        threading.Thread(target=leave, daemon=True).start()

    # The signals' side.

    def install(self) -> None:
        """Take the signals; again after jax has taken them."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self.leaves and not self._ends:
            self._ends = socket.socketpair()
            self._ends[1].setblocking(False)
            self._wakeup = signal.set_wakeup_fd(self._ends[1].fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._hear, args=(self._ends[0],), daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.signal(number, self._handle)
            self._previous.setdefault(number, handler)

    def uninstall(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
        if self._ends:
            signal.set_wakeup_fd(self._wakeup)
            self._ends[1].close()  # ends the thread
            self._ends = ()

    def _handle(self, number, frame) -> None:
        if not self.leaves:  # else the thread has heard it
            self._got(number)

    def _hear(self, line: socket.socket) -> None:
        with line:
            while numbers := line.recv(64):
                for number in numbers:
                    if number in self._previous:
                        self._got(number)

    def _got(self, number: int) -> None:
        previous = self._previous[number]
        if callable(previous) and previous is not signal.default_int_handler:
            with contextlib.suppress(Exception):
                previous(number, None)
        now = time.monotonic()
        if self._first_at is None:
            self._first_at = now
            self.say(f"stop {number}")
        elif now - self._first_at >= AGAIN_S:
            if not self.leaves:
                raise KeyboardInterrupt
            code = INTERRUPTED if number == signal.SIGINT else TERMINATED
            self.say(f"gone {code}")
            end(
                code,
                "A second signal: gone. The same command goes on from the newest save.",
            )
