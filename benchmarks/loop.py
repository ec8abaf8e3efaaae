"""What the host loop costs: `python -m benchmarks.loop [--config FILE] [--steps N] [--pairs N]`.

Steps of `lsdl.train`'s loop with all that comes with them (loader, metrics, logging, watchdog,
verdicts, signals) but evaluations and saves, beside as many calls of the same compiled step on
batches that are on the device already, in turn. Prints JSON: ratio = the loop's time / the bare
steps' of each pair; cpu_ratio: of the seconds that the cores were busy.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import jax

from benchmarks import record
from lsdl import course, loop
from lsdl.experiment import Experiment
from lsdl.rundir import RunDir
from lsdl.source import Source

WARM = 10  # steps before the clock starts


def main() -> int:
    parser = record.parser("loop", pairs=7)
    add = parser.add_argument
    add("--config", default="configs/digits_vit.py", metavar="FILE[:VARIANT]")
    add("--steps", type=int, default=100, metavar="N", help="of a measurement (default: 100)")
    arguments, overrides = parser.parse_known_args()
    experiment = shortened(arguments.config, overrides, arguments.steps)
    bare = course._compiled(experiment, 0)
    times = []
    for i in range(arguments.pairs + 1):
        ways = [of_loop, of_steps]
        pair = {way: way(experiment, bare) for way in (ways if i % 2 else ways[::-1])}
        times.append([pair[way] for way in ways])
    step_s = statistics.median(theirs[0] for _, theirs in times[1:]) / arguments.steps
    found = {
        "match": f"{arguments.config}, steps of {1000 * step_s:.3g} ms",
        "device": record.device(),
        "peer": "the same compiled step, called alone",
        "lsdl": {"step_s": statistics.median(o[0] for o, _ in times[1:]) / arguments.steps},
        "theirs": {"step_s": step_s},
        **record.ratios(times[1:]),
        "n": arguments.pairs,
        **record.origin(),
    }
    return record.tell(found, arguments.out)


def shortened(config: str, overrides: list[str], steps: int) -> Experiment:
    """A run of `WARM` and `steps` more, without evaluations and saves before its end."""
    every = ("total_steps", "eval.every_steps", "checkpoint.every_steps")
    lengths = [f"--config.{name}={WARM + steps}" for name in every]
    return Source(config, (*overrides, *lengths)).build()


class Clock:
    """A train step that times its own calls, from the one after `WARM` to the last."""

    def __init__(self, step: Callable, last: int):
        self._step, self._last, self._calls = step, last, 0

    def __call__(self, state, batch):
        self._calls += 1
        if self._calls == WARM + 1:
            jax.block_until_ready((state, batch))
            self._began = time.perf_counter(), time.process_time()
        state, metrics = self._step(state, batch)
        if self._calls == self._last:
            jax.block_until_ready((state, metrics))
            began, now = self._began, (time.perf_counter(), time.process_time())
            self.took = now[0] - began[0], now[1] - began[1]
        return state, metrics


def of_loop(experiment: Experiment, programs: dict[int, Callable]) -> tuple[float, float]:
    """(wall, CPU) seconds of a run's steps."""
    clock = Clock(programs[0], experiment.total_steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(course, "_compiled", return_value={0: clock}),
        mock.patch.object(course.prediction, "make", return_value={}),
    ):
        run = RunDir(Path(folder))
        run.acquire()
        loop.run(experiment, run)
        run.release()
    return clock.took


def of_steps(experiment: Experiment, programs: dict[int, Callable]) -> tuple[float, float]:
    """(wall, CPU) seconds of as many calls."""
    clock = Clock(programs[0], experiment.total_steps)
    state, batches = experiment.init(), list(experiment.train_loader().batches(0, WARM))
    for i in range(experiment.total_steps):
        state, _ = clock(state, batches[i % WARM])
    return clock.took


if __name__ == "__main__":
    sys.exit(main())
