"""The host loop.

The order within a step is part of the contract; do not change it:

1. take the batch, which the loader made and sent ahead
2. dispatch the step
3. write the metrics of the step before: the host never waits for the step it has just sent
4. evaluate on valid, if due
5. save, if due (so that the save knows the step's valid loss)
6. stop, if asked to
"""

import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from lsdl.checkpoint import Checkpoints
from lsdl.data.loader import Loader
from lsdl.experiment import SPLITS, Experiment
from lsdl.metrics import JsonLines, TensorBoard, Writers, means, read_rows
from lsdl.processes import is_main, same_on_all
from lsdl.rundir import RunDir
from lsdl.state import TrainState


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    signal: int | None = None  # that asked it to stop; None: it is complete
    state: TrainState | None = None
    results: dict[str, dict] = field(default_factory=dict)  # {split: metrics} of the final state
    examples_per_s: float | None = None  # while training; None if no step was taken
    wall_s: float = 0.0
    best_step: int | None = None
    trained: bool = True


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


def run(experiment: Experiment, folder: RunDir) -> Outcome:
    """Train from the newest checkpoint, or from the start, to the end; then evaluate."""
    started = time.perf_counter()
    checkpoints = Checkpoints(
        folder.checkpoints, keep_latest=experiment.keep_latest, keep_best=experiment.keep_best
    )
    writers = None
    try:
        first = checkpoints.latest_step() or 0
        done = _results(folder, experiment) if first == experiment.total_steps else {}
        if same_on_all(bool(done)):
            return Outcome(first, results=done, best_step=_best_step(folder), trained=False)
        state = _initial(experiment, checkpoints, first)
        writers = _writers(folder, experiment, after_step=first)
        with StopRequest() as stop:
            outcome = _train(experiment, state, first, writers, checkpoints, stop)
        if outcome.signal is None:
            _final(experiment, outcome.state, writers)
            outcome.results = _results(folder, experiment) if is_main() else {}
            outcome.best_step = _best_step(folder)
        outcome.wall_s = time.perf_counter() - started
        return outcome
    finally:
        if writers:
            writers.close()
        checkpoints.close()


def _initial(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    if step:
        return checkpoints.restore(step, experiment.abstract_state)
    return experiment.init()


def evaluate_run(experiment: Experiment, folder: RunDir) -> Outcome | None:
    """Evaluate the newest checkpoint on every split; None if there is none. Writes nothing."""
    checkpoints = Checkpoints(folder.checkpoints)
    try:
        step = checkpoints.latest_step()
        if step is None:
            return None
        state = _initial(experiment, checkpoints, step)
        results = {
            split: evaluate(experiment, state, experiment.eval_loader(split)) for split in SPLITS
        }
        return Outcome(step, results=results, trained=False)
    finally:
        checkpoints.close()


def evaluate(experiment: Experiment, state: TrainState, loader: Loader) -> dict[str, float]:
    """Means over all of the loader's examples, each counted once; and how many they were."""
    sums = [experiment.eval_step(state, b) for b in loader.batches(0, loader.num_batches)]
    total = jax.tree.map(
        lambda *parts: float(np.sum(parts, dtype=np.float64)), *jax.device_get(sums)
    )
    weight = total.pop("weight")
    return means(total, weight) | {"examples": round(weight)}


def _train(
    experiment: Experiment,
    state: TrainState,
    first: int,
    writers: Writers,
    checkpoints: Checkpoints,
    stop: StopRequest,
) -> Outcome:
    last = experiment.total_steps
    if first >= last:
        return Outcome(first, state=state)
    compiled = experiment.train_step.lower(
        experiment.abstract_state, experiment.abstract_batch
    ).compile()
    batches = experiment.train_loader().batches(first, last)
    valid_loader = experiment.eval_loader("valid")
    clock = _Clock()
    bar = _bar(first, last, experiment.name)
    due = lambda step, every: step % every == 0 or step == last  # noqa: E731
    pending = None  # (step, metrics) dispatched and not yet written
    step = first

    def flush():
        nonlocal pending
        if pending is not None:
            number, metrics = pending
            values = jax.device_get(metrics)
            examples_seen = number * experiment.batch_size
            rate = clock.lap(number - first)
            row = values | {"examples_seen": examples_seen, "step_time_s": rate}
            writers.write(number, "train", row | {"examples_per_s": experiment.batch_size / rate})
            bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            pending = None

    for step in range(first + 1, last + 1):
        batch = next(batches)
        state, metrics = compiled(state, batch)
        flush()
        if due(step, experiment.log_every_steps):
            pending = (step, metrics)
        bar.update()
        stopping = stop.after(step) and step < last
        valid = None
        if due(step, experiment.eval_every_steps):
            flush()
            with clock.pause(bar, state):
                valid = evaluate(experiment, state, valid_loader)
            writers.write(step, "valid", valid)
        if stopping or due(step, experiment.checkpoint_every_steps):
            flush()
            with clock.pause(bar, state):
                checkpoints.save(step, state, metrics=valid)
        if stopping:
            break
    jax.block_until_ready(state)
    rate = (step - first) * experiment.batch_size / clock.running()
    bar.close()
    stopped = stop.signal if step < last else None
    return Outcome(step, signal=stopped, state=state, examples_per_s=rate)


# The last rows of a complete run: the final state on every split.
FINAL = {"train": "train_eval", "valid": "valid", "test": "test"}


def _final(experiment: Experiment, state: TrainState, writers: Writers) -> None:
    """The one time that training reads the test split."""
    for split, name in FINAL.items():
        values = evaluate(experiment, state, experiment.eval_loader(split))
        writers.write(experiment.total_steps, name, values)


def _results(folder: RunDir, experiment: Experiment) -> dict[str, dict]:
    """{split: metrics} that a complete run wrote at its end; {} if it is not complete."""
    last = experiment.total_steps
    rows = {row["split"]: row for row in read_rows(folder.metrics) if row["step"] == last}
    if any(name not in rows for name in FINAL.values()):
        return {}
    return {split: rows[name] for split, name in FINAL.items()}


def _best_step(folder: RunDir) -> int | None:
    rows = read_rows(folder.metrics)
    valid = [r for r in rows if r["split"] == "valid" and math.isfinite(r["loss"])]
    return min(valid, key=lambda row: row["loss"])["step"] if valid else None


def _writers(folder: RunDir, experiment: Experiment, *, after_step: int) -> Writers:
    if not is_main():
        return Writers([])
    writers = [JsonLines(folder.metrics, after_step=after_step)]
    if experiment.tensorboard:
        writers.append(TensorBoard(folder.tensorboard, after_step=after_step))
    return Writers(writers)


class _Clock:
    """Time spent training: evaluation and saving are left out, here and in the bar's ETA."""

    def __init__(self):
        self._start = self._lap_start = time.perf_counter()
        self._lap_step = 0

    def lap(self, step: int) -> float:
        """Seconds per step since the last call."""
        now = time.perf_counter()
        seconds = (now - self._lap_start) / max(step - self._lap_step, 1)
        self._lap_start, self._lap_step = now, step
        return max(seconds, 1e-9)

    def running(self) -> float:
        return max(time.perf_counter() - self._start, 1e-9)

    def pause(self, bar, state) -> "_Pause":
        return _Pause(self, bar, state)


class _Pause:
    def __init__(self, clock: _Clock, bar, state):
        self._clock, self._bar, self._state = clock, bar, state

    def __enter__(self):
        jax.block_until_ready(self._state)  # what is still running counts as training
        self._began = time.perf_counter()

    def __exit__(self, *exc):
        pause = time.perf_counter() - self._began
        self._clock._start += pause
        self._clock._lap_start += pause
        if not self._bar.disable:
            self._bar.start_t += pause
            self._bar.last_print_t += pause


def _bar(first: int, last: int, name: str) -> tqdm:
    return tqdm(
        total=last,
        initial=first,
        desc=name,
        unit="step",
        disable=not is_main(),
        file=sys.stderr,
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
        dynamic_ncols=True,
    )


def heading(experiment: Experiment) -> str:
    """What is about to run, in a line, and what the user should know about it."""
    axes = ",".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    device = experiment.mesh.devices.flat[0].device_kind
    line = (
        f"{experiment.name}: {_num_parameters(experiment):,} parameters, "
        f"{experiment.total_steps:,} steps of {experiment.batch_size:,} examples on "
        f"{experiment.mesh.size} {device} ({axes or 'one device'})"
    )
    return "\n".join([line, *(f"note: {note}" for note in experiment.notes)])


def table(outcome: Outcome, experiment: Experiment) -> str:
    """The few lines that a run ends with."""
    lines = [f"{'split':8}{'examples':>10}{'loss':>10}{'accuracy':>10}"]
    for split, metrics in outcome.results.items():
        lines.append(
            f"{split:8}{metrics['examples']:>10,}{metrics['loss']:>10.4f}{metrics['accuracy']:>10.4f}"
        )
    train, test = outcome.results["train"], outcome.results["test"]
    gap = {name: test[name] - train[name] for name in ("loss", "accuracy")}
    lines.append(f"{'gap':8}{'':>10}{gap['loss']:>+10.4f}{gap['accuracy']:>+10.4f}  test - train")
    facts = [f"{outcome.step:,} steps"]
    if outcome.examples_per_s:
        facts += [f"{outcome.examples_per_s:,.0f} examples/s", f"{outcome.wall_s:.1f} s in all"]
    if outcome.best_step is not None:
        facts.append(f"lowest valid loss at step {outcome.best_step:,}")
    return "\n".join([*lines, ", ".join(facts)])


def _num_parameters(experiment: Experiment) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(experiment.abstract_state.params))
