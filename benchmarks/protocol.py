"""What the commit protocol costs: `python -m benchmarks.protocol [--config FILE] [--pairs N]`.

The same steps of one experiment, saved at the config's own interval: once by `lsdl.checkpoint`
(a check at every step; digests, manifest, fsync, rename and retention behind the steps), once by
orbax's AsyncCheckpointer alone, which keeps as many. The two alternate in order. Time is wall time
from the first step until the last save is on the disk: nothing hides in the background. Prints
JSON: ratio = lsdl's time / orbax's of each pair, below 1 is better; cpu_ratio: of the seconds that
the cores were busy, which a machine with other work on it changes less.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from benchmarks import record
from lsdl.checkpoint import Checkpoints
from lsdl.experiment import Experiment
from lsdl.rundir import RunDir, versions
from lsdl.source import Source

INTERVALS = 2  # between checkpoints, in one measurement


class Protocol:
    """lsdl's own, as its loop calls it."""

    def __init__(self, folder: Path, keep: int):
        self._run = RunDir(folder)
        self._run.acquire()
        self._checkpoints = Checkpoints(self._run.checkpoints, keep_latest=keep, owner=self._run)

    def after(self, step: int, state, *, due: bool) -> None:
        if due or self._checkpoints.check():
            self._checkpoints.save(step, state, metrics=None)

    def end(self) -> None:
        self._checkpoints.close()
        self._run.release()


class Orbax:
    """Its writer alone: no digest, no manifest, deletion in place."""

    def __init__(self, folder: Path, keep: int):
        self._folder, self._keep, self._saved = folder, keep, []
        self._writer = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())

    def after(self, step: int, state, *, due: bool) -> None:
        if due:
            self._writer.save(self._folder / str(step), args=ocp.args.StandardSave(state))
            self._saved.append(step)
            if len(self._saved) > self._keep:
                shutil.rmtree(self._folder / str(self._saved.pop(0)))

    def end(self) -> None:
        self._writer.close()


def main() -> int:
    parser = record.parser("protocol", pairs=10)
    parser.add_argument("--config", default="configs/digits_vit.py", metavar="FILE[:VARIANT]")
    arguments, overrides = parser.parse_known_args()
    experiment = Source(arguments.config, tuple(overrides)).build()
    found = measured(experiment, arguments.pairs, match=arguments.config)
    return record.tell(found, arguments.out)


def measured(experiment: Experiment, pairs: int, *, match: str) -> dict:
    """The benchmark's JSON; one pair more is run first and not counted."""
    times = {Protocol: [], Orbax: []}
    for i in range(pairs + 1):
        for way in (Protocol, Orbax) if i % 2 else (Orbax, Protocol):
            times[way].append(timed(experiment, way))
    pair = [values[1:] for values in times.values()]
    every = experiment.checkpoint_every_steps
    return {
        "match": f"{match}, {INTERVALS} saves, one every {every} steps",
        "device": record.device(),
        "peer": "orbax.checkpoint.AsyncCheckpointer alone",
        "peer_commit": f"orbax-checkpoint {versions()['orbax-checkpoint']}",
        "lsdl": {"step_s": statistics.median(wall for wall, _ in pair[0]) / (INTERVALS * every)},
        **record.ratios(list(zip(*pair, strict=True))),
        "n": pairs,
        **record.origin(),
    }


def timed(experiment: Experiment, way: type) -> tuple[float, float]:
    """(wall, CPU) seconds from the first step until the last save is on the disk."""
    every = experiment.checkpoint_every_steps
    batches = list(experiment.train_loader().batches(0, every))
    program, state = experiment.phases[0].train_step, experiment.init()
    jax.block_until_ready((state, batches))
    with tempfile.TemporaryDirectory() as folder:
        saver = way(Path(folder), experiment.keep_latest)
        began = time.perf_counter(), time.process_time()
        for step in range(1, INTERVALS * every + 1):
            state, metrics = program(state, batches[step % every])
            float(metrics["loss"])  # the host reads each step, as a log does
            saver.after(step, state, due=step % every == 0)
        saver.end()
        return time.perf_counter() - began[0], time.process_time() - began[1]


if __name__ == "__main__":
    sys.exit(main())
