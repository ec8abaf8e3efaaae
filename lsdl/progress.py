"""The progress bar of a long job, and its clock: both leave pauses out."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from tqdm import tqdm


def tell(sentence: str) -> None:
    """A line of its own on stderr, whatever bar is there, in the form of what a run ends with."""
    tqdm.write(f"lsdl: {sentence}", file=sys.stderr)
    sys.stderr.flush()


def end_bars() -> None:
    """Close the bars that an error left open, so that what is told of it begins a line."""
    while _shown:
        _shown.pop().close()


_shown: list[tqdm] = []


class Progress:
    """Steps `first` to `last` of the job `name`, shown on stderr unless `silent`.

    With `size`, `size(step)` units being done after `step` steps, the bar and its ETA are in these.
    What happens within `pause` counts neither as time spent nor in the bar's rate and ETA.
    """

    def __init__(
        self,
        first: int,
        last: int,
        name: str,
        *,
        silent: bool,
        size: Callable[[int], int] | None = None,
        unit: str = "step",
    ):
        self._size = size or (lambda step: step)
        self._step = first
        self._bar = tqdm(
            total=self._size(last),
            initial=self._size(first),
            desc=name,
            unit=unit,
            disable=silent,
            file=sys.stderr,
            mininterval=0.2 if sys.stderr.isatty() else 5.0,
            dynamic_ncols=True,
        )
        _shown.append(self._bar)
        self._first = self._lap_step = first
        self._start = self._lap_start = time.perf_counter()

    def advance(self) -> None:
        self._step += 1
        self._bar.update(self._size(self._step) - self._size(self._step - 1))

    def show(self, **values: str) -> None:
        """Put `values` behind the bar when it is drawn next."""
        self._bar.set_postfix(**values, refresh=False)

    def lap(self, step: int) -> float:
        """Seconds per step since the last call, at `step`."""
        now = time.perf_counter()
        seconds = (now - self._lap_start) / max(step - self._lap_step, 1)
        self._lap_start, self._lap_step = now, step
        return max(seconds, 1e-9)

    def running_s(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    @contextlib.contextmanager
    def pause(self, state: Any) -> Iterator[None]:
        """Stop the clock, once the steps that make `state` are done: they count as running."""
        jax.block_until_ready(state)
        began = time.perf_counter()
        try:
            yield
        finally:
            paused = time.perf_counter() - began
            self._start += paused
            self._lap_start += paused
            if not self._bar.disable:
                self._bar.start_t += paused
                self._bar.last_print_t += paused

    def complete(self) -> None:
        """All is done, in fewer steps than there might have been: the bar ends full."""
        self._bar.total = self._bar.n
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()
