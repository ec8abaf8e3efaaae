"""What the guard costs in a step: `python -m benchmarks.guard [--config FILE] [--pairs N]`.

The train step of one experiment, compiled as it is and with nothing that judges or undoes it. The
two take the same few steps in turn, in alternating order. Prints JSON: ratio = the wall time of the
first over that of the second, the median of all pairs with its 95 % interval (bootstrap): a share
below 1 % is not seen otherwise; cpu_ratio: of the seconds that the cores were busy, which a machine
with other work on it changes less.
"""

import contextlib
import statistics
import sys
import time
from unittest import mock

import jax
import jax.numpy as jnp

from benchmarks import record
from lsdl import guard
from lsdl.source import Source

STEPS = 5  # of each, in one pair


def main() -> int:
    parser = record.parser("guard", pairs=200)
    parser.add_argument("--config", default="configs/digits_vit.py", metavar="FILE[:VARIANT]")
    arguments, overrides = parser.parse_known_args()
    source = Source(arguments.config, tuple(overrides))
    runs = [Run(source, watched=True), Run(source, watched=False)]
    times = []
    for i in range(arguments.pairs + 1):
        pair = {run: run.timed() for run in (runs if i % 2 else runs[::-1])}
        times.append([pair[run] for run in runs])
    wall = [ours[0] for ours, _ in times[1:]]
    found = {
        "match": f"{arguments.config}, {STEPS} steps a measurement",
        "device": record.device(),
        "peer": "the same step without the guard",
        "lsdl": {"step_s": statistics.median(wall) / STEPS},
        **record.ratios(times[1:], of=record.bootstrapped),
        "n": arguments.pairs,
        **record.origin(),
    }
    return record.tell(found, arguments.out)


class Run:
    """A train step and the state that it has come to."""

    def __init__(self, source: Source, *, watched: bool):
        with contextlib.nullcontext() if watched else blind():
            experiment = source.build()
            lowered = experiment.phases[0].train_step.lower(
                experiment.abstract_state, experiment.abstract_batch
            )
            self._step = lowered.compile()
        self._state = experiment.init()
        self._batches = list(experiment.train_loader().batches(0, STEPS))

    def timed(self) -> tuple[float, float]:
        """(wall, CPU) seconds of the next steps."""
        jax.block_until_ready((self._state, self._batches))
        began = time.perf_counter(), time.process_time()
        for batch in self._batches:
            self._state, metrics = self._step(self._state, batch)
        jax.block_until_ready((self._state, metrics))
        return time.perf_counter() - began[0], time.process_time() - began[1]


def blind():
    """Every step counts, and nothing looks at it."""

    def judge(state, loss, grad_norm, *, model_state, rule):
        return guard.Verdict(True, jnp.zeros((), bool), state)

    def told(verdict, update_norm):
        return {}

    return mock.patch.multiple(
        guard,
        judge=judge,
        unless_bad=lambda good, move, gradient, *old, rule: move(gradient, *old),
        chosen=lambda good, new, old: new,
        told=told,
    )


if __name__ == "__main__":
    sys.exit(main())
