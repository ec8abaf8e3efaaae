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
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from lsdl import interruption, prediction, processes
from lsdl.auditing import Auditor
from lsdl.checkpoint import Checkpoints, load_weights, merged
from lsdl.data import skip
from lsdl.data.dataset import SPLITS
from lsdl.errors import NotFiniteError
from lsdl.experiment import Experiment
from lsdl.guard import IN_A_ROW, SPIKED, Verdicts
from lsdl.interruption import StopRequest
from lsdl.metrics import JsonLines, TensorBoard, Writers, fetched, means, read_rows
from lsdl.processes import is_main, same_on_all
from lsdl.progress import Progress, end_bars, tell
from lsdl.rundir import RunDir, write_json
from lsdl.state import TrainState
from lsdl.step import TEACHER, as_weights, variables_of
from lsdl.watchdog import Watchdog

SKIPS = "skip_batches"  # in a checkpoint's notes, and in the history of config.json


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
    spike: int | None = None  # a step to rewind from


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
        done = _results(folder, experiment) if first == experiment.total_steps else {}
        if same_on_all(bool(done)):
            return Outcome(first, results=done, best_step=_best_step(folder), trained=False)
        with interruption.owner() as stop, watch:
            course = _Course(experiment, checkpoints, folder, first)
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
            outcome.results = _results(folder, experiment) if is_main() else {}
            outcome.best_step = _best_step(folder)
        outcome.wall_s = time.perf_counter() - started
        return outcome
    finally:
        end_bars()
        if writers:
            writers.close()


def initial(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    if step:
        return checkpoints.restore(step, experiment.abstract_state)
    state = experiment.init()
    abstract = experiment.abstract_state
    if experiment.teacher:
        variables = load_weights(experiment.teacher, as_weights(abstract.model_state[TEACHER]))
        taught = {"params": variables["params"], **variables["model_state"]}
        state = state.replace(model_state={**state.model_state, TEACHER: taught})
    if experiment.init_from:
        wanted = as_weights(variables_of(abstract))
        weights = load_weights(experiment.init_from, wanted, fresh=experiment.init_fresh)
        params = merged(state.params, weights["params"])
        # Averages of the parameters start from these as well.
        start = jax.jit(experiment.tx.init, out_shardings=experiment.shardings.opt_state)
        state = state.replace(
            params=params,
            model_state=merged(state.model_state, weights.get("model_state", {})),
            opt_state=start(params),
        )
    return state


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


class _Course:
    """What a run goes by: its programs, the batches it leaves out, and where it can go back to."""

    def __init__(
        self, experiment: Experiment, checkpoints: Checkpoints, folder: RunDir, first: int
    ):
        self.experiment, self.checkpoints, self.folder = experiment, checkpoints, folder
        noted = checkpoints.notes(first).get(SKIPS, ()) if first else ()
        self.skips = skip.joined(experiment.skip_batches, noted)
        self._compiled: tuple[dict, dict] | None = None
        self._rewinds: list[int] = []  # where to, without a newer checkpoint since

    def compiled(self, first: int) -> tuple[dict[int, Callable], dict]:
        """(the programs from `first` on, what is predicted of them), compiled once."""
        if self._compiled is None:
            programs = _compiled(self.experiment, first)
            self._compiled = programs, _predicted(self.experiment, programs, self.folder)
        return self._compiled

    def save(self, step: int, state: TrainState, *, metrics: dict | None) -> None:
        notes = {SKIPS: self.skips} if self.skips else None
        self.checkpoints.save(step, state, metrics=metrics, notes=notes)

    def rewind(self, spike: int) -> int:
        """Back from the step `spike`: returns the step to go on from.

        The newest checkpoint at least `rewind_steps` before it, or the start of the run. The
        batches from there to the spike are left out from now on.
        Source: Chowdhery et al. 2022, section 5.1.
        """
        rule = self.experiment.guard
        wanted = spike - rule.rewind_steps
        first = self.checkpoints.newest(at_most=wanted) if wanted > 0 else None
        if first is None and wanted >= self.experiment.checkpoint_every_steps:
            first = self.checkpoints.newest(at_most=spike - 1)  # an older one is not kept
        first = first or 0
        self._rewinds = [step for step in self._rewinds if step == first] + [first]
        if len(self._rewinds) > rule.limit:
            raise NotFiniteError(
                f"A spike at step {spike:,}, for the {len(self._rewinds)}th time after step "
                f"{first:,}: guard.limit={rule.limit}; lower optim.schedule.peak, or raise "
                "guard.sigmas, in another --workdir."
            )
        pair = skip.place(first, self.skips), skip.place(spike - 1, self.skips) + 1
        self.checkpoints.drop_after(first)
        self.skips = skip.joined(self.skips, [pair])
        if is_main():
            self.folder.note({"spike": spike, "rewound_to": first, SKIPS: self.skips})
            tell(
                f"Step {spike:,} is a spike: back to step {first:,}, and on without the batches "
                f"{pair[0]:,} to {pair[1] - 1:,}."
            )
        return first


def _train(
    course: _Course,
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
            _committed(course, step, state)
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


def _committed(course: _Course, step: int, state: TrainState) -> None:
    """Wait for the last save; if it fails, there is no next step whose save makes it good."""
    if course.checkpoints.check(wait=True):
        course.save(step, state, metrics=None)
        course.checkpoints.check(wait=True)


def _pace(task: Any, examples_seen: int, batch_size: float, step_time_s: float) -> dict:
    """How far a run is and how fast it goes, in examples and in the units of its task."""
    rate = batch_size / step_time_s
    row = {"examples_seen": examples_seen, "step_time_s": step_time_s, "examples_per_s": rate}
    if task.unit != "examples":
        row[f"{task.unit}_seen"] = examples_seen * task.units_per_example
        row[f"{task.unit}_per_s"] = rate * task.units_per_example
    return row


def _compiled(experiment: Experiment, first: int) -> dict[int, Callable]:
    """{first step of a phase: its program}, of the phases that are not over.

    All before the first step: what does not compile says so now, not days later, and no step of
    the run is slower than its neighbours.
    """
    state, now = experiment.abstract_state, experiment.ramp.phase_at(first).first_step
    programs = {
        phase.first_step: phase.train_step.lower(state, phase.abstract_batch).compile()
        for phase in experiment.phases
        if phase.first_step >= now
    }
    processes.meet()
    return programs


def _predicted(experiment: Experiment, programs: dict[int, Callable], folder: RunDir) -> dict:
    predicted = prediction.make(experiment, programs)
    if is_main():
        write_json(folder.plan, predicted)
    return predicted


# The last rows of a complete run: the final state on every split.
FINAL = {"train": "train_eval", "valid": "valid", "test": "test"}


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


def heading(experiment: Experiment) -> str:
    """What is about to run, in a line, and what the user should know about it."""
    axes = ",".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items() if size > 1)
    device = experiment.mesh.devices.flat[0].device_kind
    line = (
        f"{experiment.name}: {experiment.num_parameters:,} parameters, "
        f"{experiment.total_steps:,} steps of {experiment.batch_size:,} examples on "
        f"{experiment.mesh.size} {device} ({axes or 'one device'})"
    )
    return "\n".join([line, *(f"note: {note}" for note in experiment.notes)])


def table(outcome: Outcome, experiment: Experiment) -> str:
    """The few lines that a run ends with."""
    columns = ["loss", *experiment.task.shown]
    probes = [name for name in outcome.results["test"] if name not in columns]
    columns += [name for name in probes if name.endswith("_accuracy")]
    unit = experiment.task.unit
    width = [max(10, len(name) + 2) for name in columns]
    named = "".join(f"{name:>{w}}" for name, w in zip(columns, width, strict=True))
    lines = [f"{'split':8}{unit:>10}{named}"]
    for split, metrics in outcome.results.items():
        cells = [
            f"{metrics[n]:>{w}.4f}" if n in metrics else " " * w
            for n, w in zip(columns, width, strict=True)
        ]
        lines.append(f"{split:8}{metrics[unit]:>10,}{''.join(cells)}".rstrip())
    train, test = outcome.results["train"], outcome.results["test"]
    gaps = [
        f"{test[n] - train[n]:>+{w}.4f}" if n in train else " " * w
        for n, w in zip(columns, width, strict=True)
    ]
    lines.append(f"{'gap':8}{'':>10}{''.join(gaps)}  test - train")
    facts = [f"{outcome.step:,} steps"]
    if outcome.examples_per_s:
        facts += [f"{outcome.examples_per_s:,.0f} examples/s", f"{outcome.wall_s:.1f} s in all"]
    if outcome.best_step is not None:
        facts.append(f"lowest valid loss at step {outcome.best_step:,}")
    return "\n".join([*lines, ", ".join(facts)])
