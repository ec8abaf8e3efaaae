"""What the processes of a job tell one another over their lines, and what follows from it.

To process 0: stop NUMBER, at PLACE (lsdl.interruption), leave CODE; from it: where NUMBER, gate
PLACE, leave NUMBER, lost SENTENCE. Both ways: gone CODE (a second signal), stuck SENTENCE, done
CODE. A process that learns of a fault ends, with a sentence, whatever its main thread does.
"""

import atexit
import ctypes
import faulthandler
import signal
import threading
import time
from collections.abc import Callable

from lsdl.errors import FINISHED, INTERRUPTED, SAVED_AND_STOPPED, STUCK, UNREACHABLE, end
from lsdl.interruption import SAVED, Agreement, StopRequest
from lsdl.lines import BEAT, Lines

ORDERLY = (FINISHED, SAVED_AND_STOPPED, INTERRUPTED)
GRACE_S = 3  # that a process has to end by itself, with its own words, when another has ended
GO_ON = "The same command goes on from the newest save."


class Peers:
    """One process among the others of its job."""

    def __init__(self, process_id: int, num_processes: int, stop: StopRequest):
        self._id, self._total, self._stop = process_id, num_processes, stop
        self._done: dict[int, int] = {}
        self._places: dict[int, tuple[int, int]] = {}  # (step, turn) of the others
        self._changed = threading.Condition()
        self._over, self._code = False, FINISHED
        self._ending = threading.Lock()
        self.step: Callable[[], int] = lambda: 0  # the newest step that this process has sent
        self.turn = 0  # the newest meeting that it has come to

    def join(self, sockets: dict, *, silence_s: float) -> None:
        """Listen to the others from here on."""
        if self._id == 0:
            self._agreement = Agreement(self._total, self._tell_all)
        self._stop.silent = self._id > 0
        self._lines = Lines(
            sockets,
            silence_s=silence_s,
            heard=self._heard,
            lost=self._lost,
            beat=lambda: f"{self.step()} {self.turn}",
        )
        self._stop.say = self._say
        self._stop.farewell = lambda code: None
        self._lines.start()
        atexit.register(self._bye)  # of an entry that does not leave by `leave`
        # jax aborts when it loses process 0: while this handler sleeps (6 s: a signal's number is
        # its argument) the lines end the process in words. It needs no Python.
        libc = ctypes.CDLL(None)
        libc.signal(ctypes.c_int(signal.SIGABRT), libc.sleep)

    def leave(self, code: int) -> None:
        """End this process with `code`, process 0 after all others: they may still need it."""
        with self._changed:
            self._over, self._code = True, code
        self._lines.send_all(f"done {code}")
        if self._id == 0:
            until = time.monotonic() + 60
            with self._changed:
                while len(self._done) < self._total - 1 and time.monotonic() < until:
                    self._changed.wait(0.2)
        end(code)

    def explain(self) -> None:
        """Give the lines time to say who is lost, which ends this process: that is the cause."""
        time.sleep(GRACE_S)

    def stuck(self, sentence: str) -> None:
        """Nothing comes here: all are to end."""
        if self._id == 0:
            self._all_stuck(sentence)
        else:
            self._lines.send(0, f"stuck {sentence}")
            threading.Timer(GRACE_S, self._end, (STUCK, sentence)).start()  # 0 may not answer

    def _bye(self) -> None:
        with self._changed:
            self._over = True
        self._lines.send_all("done 0")

    def _say(self, word: str) -> None:
        """A word of this process's `StopRequest`."""
        verb, value = word.split()
        if verb == "gone":
            with self._changed:  # whoever hears it closes its line: that is no loss
                self._over, self._code = True, int(value)
            self._lines.send_all(word)
            time.sleep(0.1)
        elif self._id:
            self._lines.send(0, word)
        elif verb == "stop":
            self._agreement.stop(int(value))
        else:
            self._agreement.at(0, int(value))

    def _tell_all(self, word: str) -> None:
        if word.startswith("leave "):
            self._leaving()
        self._lines.send_all(word)
        self._stop.told(word)

    def _leaving(self) -> None:
        """All leave now: whoever has closed its line is not lost."""
        if self._stop.leaves:
            with self._changed:
                self._over, self._code = True, SAVED_AND_STOPPED

    def _heard(self, process: int, word: str) -> None:
        verb, _, rest = word.partition(" ")
        if verb == BEAT:
            step, turn = map(int, rest.split())
            self._places[process] = step, turn
        elif verb == "stop":
            self._agreement.stop(int(rest))
        elif verb == "at":
            self._agreement.at(process, int(rest))
        elif verb == "leave" and self._id == 0:  # said with a code by one that had not met all
            number = signal.SIGINT if int(rest) == INTERRUPTED else signal.SIGTERM
            self._tell_all(f"leave {int(number)}")
        elif verb in ("where", "gate", "leave"):
            if verb == "leave":
                self._leaving()
            self._stop.told(word)
        elif verb == "gone":
            if self._id == 0:
                self._lines.send_all(word)
            self._end(int(rest), "")
        elif verb == "stuck":
            self._all_stuck(rest) if self._id == 0 else self._end(STUCK, rest)
        elif verb == "lost":
            self._end(UNREACHABLE, rest)
        elif verb == "done":
            self._has_ended(process, int(rest))

    def _has_ended(self, process: int, code: int) -> None:
        with self._changed:
            self._done[process] = code
            self._changed.notify_all()
        if code in ORDERLY and self._stop.place == SAVED:
            return
        threading.Timer(GRACE_S, self._missed, (process, code)).start()

    def _missed(self, process: int, code: int) -> None:
        """`process` has ended, and this one goes on as if it had not."""
        with self._changed:
            if self._over or (code in ORDERLY and self._stop.place == SAVED):
                return
        why = "before the run was over" if code in ORDERLY else "see its output"
        self._miss(f"Process {process} of {self._total} has ended with {code}: {why}. {GO_ON}")

    def _lost(self, process: int, why: str) -> None:
        with self._changed:
            if process in self._done:
                return
            if self._over and (process == 0 or self._code != FINISHED):
                self._done[process] = self._code  # what ends this one has ended it as well
                self._changed.notify_all()
                return
        self._miss(f"Process {process} of {self._total} is lost: {why}. {GO_ON}")

    def _miss(self, sentence: str) -> None:
        if self._id == 0:
            self._lines.send_all(f"lost {sentence}")
        self._end(UNREACHABLE, sentence)

    def _all_stuck(self, sentence: str) -> None:
        """Process 0 names who is behind, ends the others and itself.

        After the same step too: of those that save, all but one may wait for that one.
        """
        places = self._places | {0: (self.step(), self.turn)}
        last = min(places.values())
        behind = sorted(i for i, place in places.items() if place == last)
        if len(behind) < self._total:
            named = ", ".join(map(str, behind[:8]))
            sentence += f" Behind the others: process {named}, after step {last[0]}."
        self._lines.send_all(f"stuck {sentence}")
        self._end(STUCK, sentence)

    def _end(self, code: int, sentence: str) -> None:
        """Once: the first cause is the one that is told."""
        self._ending.acquire()
        if self._id == 0:  # jax in the others aborts once this process is gone
            self._lines.outlast(1.5)
        if code == STUCK:
            faulthandler.dump_traceback(file=2, all_threads=True)
        end(code, sentence)
