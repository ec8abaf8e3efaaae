"""Lines between the processes of a job: a socket from process 0 to each of the others.

They carry words, need no device and no collective, and tell who is lost: a process that dies closes
its line at once, one that is stopped falls silent.
"""

import contextlib
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping

BEAT = "beat"
LONGEST = 2000  # of a word


class Lines:
    """The lines of this process: to all others in process 0, to process 0 in the others."""

    def __init__(
        self,
        sockets: Mapping[int, socket.socket],
        *,
        silence_s: float,
        heard: Callable[[int, str], None],
        lost: Callable[[int, str], None],
        beat: Callable[[], str] = lambda: "",
    ):
        """`heard(process, word)` and `lost(process, why)` run in the thread of the lines.

        A process is lost once nothing has come from it for `silence_s`; `beat()` is said behind
        each beat.
        """
        self._sockets = dict(sockets)
        self._silence_s, self._beat_s = silence_s, min(1.0, silence_s / 5)
        self._heard, self._lost, self._beat = heard, lost, beat
        self._texts = dict.fromkeys(self._sockets, b"")
        self._heard_at = dict.fromkeys(self._sockets, time.monotonic())
        self._lock = threading.Lock()

    def start(self) -> None:
        """Listen from here on: a word may be there already."""
        threading.Thread(target=self._run, daemon=True).start()

    def send(self, process: int, word: str) -> None:
        """Say `word` to `process`; nothing if it is lost."""
        # Never blocks: a stopped process takes no more once its buffer is full.
        with self._lock, contextlib.suppress(OSError):
            self._sockets[process].send(f"{word[:LONGEST]}\n".encode())

    def send_all(self, word: str) -> None:
        for process in self._sockets:
            self.send(process, word)

    def outlast(self, seconds: float) -> None:
        """Wait until the other ends have closed, at most `seconds`."""
        until = time.monotonic() + seconds
        while not all(map(_is_closed, self._sockets.values())) and time.monotonic() < until:
            time.sleep(0.02)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, line in self._sockets.items():
                line.setblocking(False)
                selector.register(line, selectors.EVENT_READ, process)
            beaten_at = 0.0
            while self._heard_at:
                if time.monotonic() - beaten_at >= self._beat_s:
                    beaten_at = time.monotonic()
                    self.send_all(f"{BEAT} {self._beat()}")
                for key, _ in selector.select(self._beat_s):
                    if not self._read(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                for process, at in list(self._heard_at.items()):
                    if now - at > self._silence_s:
                        self._miss(process, f"nothing came from it for {self._silence_s:g} s")

    def _read(self, process: int) -> bool:
        """Whether the line is still open."""
        try:
            got = self._sockets[process].recv(65536)
        except BlockingIOError:
            return True
        except OSError:
            got = b""
        if not got:
            self._miss(process, "its connection has closed")
            return False
        if process in self._heard_at:
            self._heard_at[process] = time.monotonic()
        *words, rest = (self._texts[process] + got).split(b"\n")
        self._texts[process] = rest
        for word in words:
            self._heard(process, word.decode(errors="replace"))
        return True

    def _miss(self, process: int, why: str) -> None:
        if self._heard_at.pop(process, None) is not None:
            self._lost(process, why)


def _is_closed(line: socket.socket) -> bool:
    try:
        while got := line.recv(4096, socket.MSG_DONTWAIT):
            pass
    except BlockingIOError:
        return False
    except OSError:
        got = b""
    return not got
