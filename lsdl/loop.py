"""The host loop.

The order within a step is part of the contract; do not change it:

1. take the batch, which the loader made and sent ahead
2. dispatch the step
3. write the metrics of the step before: the host never waits for the step it has just sent
4. evaluate on valid, if due
5. save, if due (so that the save knows the step's valid loss), or if the save before has failed
6. stop, if asked to
"""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from lsdl import interruption, prediction, processes
from lsdl.auditing import Auditor
from lsdl.checkpoint import Checkpoints
from lsdl.course import Course, initial
from lsdl.data.dataset import SPLITS
from lsdl.experiment import Experiment
from lsdl.guard import IN_A_ROW, SPIKED, Verdicts
from lsdl.interruption import StopRequest
from lsdl.metrics import JsonLines, TensorBoard, Writers, fetched, means
from lsdl.processes import is_main, same_on_all
from lsdl.progress import Progress, end_bars
from lsdl.rundir import RunDir
from lsdl.state import TrainState
from lsdl.summary import FINAL, Outcome, best_step, results
from lsdl.watchdog import Watchdog


def run(experiment: Experiment, folder: RunDir) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end; then evaluate."""
    keep = {"keep_latest": experiment.keep_latest, "keep_best": experiment.keep_best}
    with Checkpoints(folder.checkpoints, **keep, owner=folder) as checkpoints:
        return _run(experiment, folder, checkpoints)


def _run(experiment: Experiment, folder: RunDir, checkpoints: Checkpoints) -> Outcome:
    started = time.perf_counter()
    writers = None
    watch = Watchdog(experiment.stuck_after_s, processes.stuck)
    processes.tell_step(lambda: watch.step)
    try:
        first = checkpoints.latest_step() or 0
        done = results(folder, experiment) if first == experiment.total_steps else {}
        if same_on_all(bool(done)):
            return Outcome(first, results=done, best_step=best_step(folder), trained=False)
        with interruption.owner() as stop, watch:
            course = Course(experiment, checkpoints, folder, first)
            while True:
                with watch.phase("restoring"):
                    state = initial(experiment, checkpoints, first)
                writers = _writers(folder, experiment, after_step=first)
                outcome = _train(course, state, first, writers, stop, watch)
                if outcome.spike is None:
                    break
                writers.close()
                with watch.phase("restoring"):
                    first = course.rewind(outcome.spike)
            if outcome.signal is None:
                stop.saved()
                # The last step has evaluated valid already, unless a run before this one took it.
                splits = [split for split in FINAL if split != "valid" or first == outcome.step]
                with watch.phase("evaluating"):
                    _final(experiment, outcome.state, writers, splits, alive=watch.alive)
        if outcome.signal is None:
            outcome.results = results(folder, experiment) if is_main() else {}
            outcome.best_step = best_step(folder)
        outcome.wall_s = time.perf_counter() - started
        return outcome
    finally:
        end_bars()
        if writers:
            writers.close()


def evaluate_run(experiment: Experiment, folder: RunDir) -> Outcome | None:
    """Evaluate the newest checkpoint on every split; None if there is none. Writes nothing."""
    with Checkpoints(folder.checkpoints) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return None
        state = initial(experiment, checkpoints, step)
        results = {split: evaluate(experiment, state, split, final=True) for split in SPLITS}
        return Outcome(step, results=results, trained=False)


def evaluate(
    experiment: Experiment,
    state: TrainState,
    split: str,
    *,
    final: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Means over all of the split's examples, each counted once; and how many they were.

    What the evaluators measure comes with it; some only do in the `final` evaluation. `alive` is
    called whenever something more is done.
    """
    loader = experiment.eval_loader(split)
    batches = loader.batches(0, loader.num_batches)
    sums = []
    for found in fetched(experiment.eval_step(state, batch) for batch in batches):
        sums.append(found)
        alive()
    total = jax.tree.map(lambda *parts: float(np.sum(parts, dtype=np.float64)), *sums)
    weight = total.pop("weight")
    values = means(total, weight)
    values |= experiment.task.derive(values)
    for evaluator in experiment.evaluators:
        if final or evaluator.every_time:
            values |= evaluator(state, experiment.eval_loader, split)
            alive()
    return values | {experiment.task.unit: round(weight)}


def _train(
    course: Course,
    state: TrainState,
    first: int,
    writers: Writers,
    stop: StopRequest,
    watch: Watchdog,
) -> Outcome:
    experiment, checkpoints = course.experiment, course.checkpoints
    last = experiment.total_steps
    if first >= last:
        return Outcome(first, state=state)
    with watch.phase("compiling"):
        (programs, predicted), ramp = course.compiled(first), experiment.ramp
    loader = experiment.train_loader(course.skips)
    batches = loader.batches(first, last)
    audit = Auditor(experiment, course.folder.audit, loader, first=first, main=is_main())
    counted = dict(size=ramp.examples_before, unit="example") if len(ramp.phases) > 1 else {}
    progress = Progress(first, last, experiment.name, silent=not is_main(), **counted)
    due = lambda step, every: step % every == 0 or step == last  # noqa: E731
    rows = _Rows(experiment, writers, progress, predicted, first)
    verdicts, step = Verdicts(experiment.guard), first
    with contextlib.closing(progress), contextlib.closing(audit):
        for step in range(first + 1, last + 1):
            batch = next(batches)
            state, metrics = programs[ramp.phase_at(step - 1).first_step](state, batch)
            stop.began()
            watch.sent(step, metrics["loss"])
            rows.flush()
            audit.sent(step, state, metrics)
            spike = verdicts.sent(step, metrics)
            if due(step, experiment.log_every_steps):
                rows.pending = (step, metrics)
            progress.advance()
            valid = None
            if due(step, experiment.eval_every_steps):
                rows.flush()
                with progress.pause(state), watch.phase("evaluating"):
                    final = step == last
                    valid = evaluate(experiment, state, "valid", final=final, alive=watch.alive)
                writers.write(step, "valid", valid)
            stopping = stop.after(step) and step < last
            if stopping or due(step, experiment.checkpoint_every_steps) or checkpoints.check():
                rows.flush()
                audit.flush()
                writers.sync()
                spike = spike or verdicts.settle()
                if not spike:
                    with progress.pause(state), watch.phase("saving"):
                        course.save(step, state, metrics=valid)
            if spike:
                return Outcome(step, spike=spike)
            if stopping:
                break
        jax.block_until_ready(state)
        with watch.phase("saving"):
            course.settle(step, state)
        rate = (ramp.examples_before(step) - ramp.examples_before(first)) / progress.running_s()
    stopped = stop.signal if step < last else None
    return Outcome(step, signal=stopped, state=state, examples_per_s=rate)


class _Rows:
    """The rows of the train split: each is written when the step after it has been sent."""

    def __init__(
        self,
        experiment: Experiment,
        writers: Writers,
        progress: Progress,
        predicted: dict,
        first: int,
    ):
        self._experiment, self._writers = experiment, writers
        self._progress, self._predicted = progress, predicted
        self._written = first
        self.pending: tuple[int, dict] | None = None  # (step, metrics) sent and not yet written

    def flush(self) -> None:
        if self.pending is None:
            return
        (number, metrics), self.pending = self.pending, None
        values = jax.device_get(metrics)
        del values[IN_A_ROW], values[SPIKED]
        task, examples_before = self._experiment.task, self._experiment.ramp.examples_before
        rate = self._progress.lap(number)
        taken = examples_before(number) - examples_before(self._written)
        batch_size = taken / (number - self._written)
        self._written = number
        row = values | _pace(task, examples_before(number), batch_size, rate)
        row |= task.derive(values)
        row |= prediction.measured(self._predicted, row["examples_per_s"])
        self._writers.write(number, "train", row)
        self._progress.show(loss=f"{values['loss']:.4f}")


def _pace(task: Any, examples_seen: int, batch_size: float, step_time_s: float) -> dict:
    """How far a run is and how fast it goes, in examples and in the units of its task."""
    rate = batch_size / step_time_s
    row = {"examples_seen": examples_seen, "step_time_s": step_time_s, "examples_per_s": rate}
    if task.unit != "examples":
        row[f"{task.unit}_seen"] = examples_seen * task.units_per_example
        row[f"{task.unit}_per_s"] = rate * task.units_per_example
    return row


def _final(
    experiment: Experiment,
    state: TrainState,
    writers: Writers,
    splits: Sequence[str],
    *,
    alive: Callable[[], None],
) -> None:
    """The one time that training reads the test split."""
    for split in splits:
        values = evaluate(experiment, state, split, final=True, alive=alive)
        writers.write(experiment.total_steps, FINAL[split], values)


def _writers(folder: RunDir, experiment: Experiment, *, after_step: int) -> Writers:
    if not is_main():
        return Writers([])
    writers = [JsonLines(folder.metrics, after_step=after_step)]
    if experiment.tensorboard:
        writers.append(TensorBoard(folder.tensorboard, after_step=after_step))
    return Writers(writers)
