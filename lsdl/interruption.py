"""Signals as a question that the loop asks between steps."""

import os
import signal
import threading

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Ctrl-C and SIGTERM as a question the loop asks between steps. A second Ctrl-C interrupts.

    Several processes must stop after the same step, whichever of them got the signal: jax's own
    SIGTERM handler tells the others, so a Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self):
        self.signal: int | None = None
        self._alone = jax.process_count() == 1
        self._previous: dict = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc):
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
        if not self._alone:
            os.kill(os.getpid(), signal.SIGTERM)

    def after(self, step: int) -> bool:
        """Whether to stop after `step`; all processes get the same answer for the same step."""
        if self._alone:
            return self.signal is not None
        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False
