"""Many short runs on one device, each one compiled program: what a study's grid is made of.

The steps are those of `lsdl.train`, scanned; left out is what the host does between them (logging,
evaluations on the way, checkpoints). Runs that differ in seed and schedule alone share a program,
unless they wait for a plateau; those of one seed and batch their data.
"""

import functools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsdl.analysis.batch_statistics import recalibrated
from lsdl.errors import UserError
from lsdl.experiment import Experiment, opened
from lsdl.loop import evaluate
from lsdl.optim.wrappers import waits
from lsdl.state import Batch, TrainState
from lsdl.step import variables_of

SCHEDULE = "optim.schedule."


class Run(NamedTuple):
    """A finished training. Shape letter: T steps."""

    experiment: Experiment
    state: TrainState
    metrics_T: dict[str, np.ndarray]  # as in metrics.jsonl, of every step
    valid: dict[str, float]  # after the last step
    run_s: float  # of the steps alone


def train(
    path: str,
    overrides: Mapping[str, Any],
    *,
    whole_statistics: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Run:
    """Train the config file `path` with {field: value} overrides from the start to the end.

    `whole_statistics`: evaluate with BatchNorm's statistics of the whole training split.
    `options`: of the compiler.
    Raises `UserError` for a batch ramp.
    """
    own = opened(path, overrides)
    if len(own.phases) > 1:
        raise UserError(
            f"batch_ramp changes the batch size at step {own.phases[1].first_step + 1}, and a run "
            "as one program has a single one: leave it (), or use lsdl.train."
        )
    items = tuple(sorted(overrides.items()))
    shared = {k: v for k, v in items if k != "seed"}
    if not waits(own.abstract_state.opt_state):  # the schedule is in the rates alone
        shared = {k: v for k, v in shared.items() if not k.startswith(SCHEDULE)}
        shared[f"{SCHEDULE}name"] = "constant"
    shared = tuple(sorted(shared.items()))
    experiment = _experiment(path, shared)
    data = tuple((k, v) for k, v in items if not k.startswith("optim."))
    batches_T = _batches(path, data)
    rates_T = jnp.asarray(np.array([own.schedule(s) for s in range(own.total_steps)], np.float32))
    arguments = (jax.random.key(own.seed), rates_T, batches_T)
    program = _program(path, shared, options, arguments)
    started = time.perf_counter()
    state, metrics_T = jax.block_until_ready(program(*arguments))
    run_s = time.perf_counter() - started
    if whole_statistics:
        state = _recalibrated(path, shared)(state, _whole(path, shared))
    valid = evaluate(experiment, state, "valid")
    return Run(own, state, jax.device_get(metrics_T), valid, run_s)


@functools.lru_cache(maxsize=2)
def _experiment(path: str, shared: tuple) -> Experiment:
    return opened(path, dict(shared))


_programs: dict[tuple, Any] = {}  # the last one compiled, by what it was compiled for


def _program(path: str, shared: tuple, options: Mapping[str, Any] | None, arguments: tuple):
    key = path, shared, tuple(sorted((options or {}).items()))
    if key not in _programs:
        _programs.clear()
        lowered = _experiment(path, shared).whole_run.lower(*arguments)
        _programs[key] = lowered.compile(options)
    return _programs[key]


@functools.lru_cache(maxsize=16)
def _batches(path: str, data: tuple) -> Batch:
    """All batches of a run, stacked."""
    experiment = opened(path, dict(data))
    loader, rows = experiment.train_loader(), np.arange(experiment.batch_size)
    found = [loader.rows(step, rows) for step in range(experiment.total_steps)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *found)


@functools.lru_cache(maxsize=2)
def _whole(path: str, shared: tuple) -> Batch:
    """The whole training split as one batch."""
    experiment = _experiment(path, shared)
    loader = experiment.eval_loader("train")
    found = [loader.rows(i, np.arange(experiment.batch_size)) for i in range(loader.num_batches)]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    return jax.tree.map(lambda x: x[whole["weight"] > 0], whole)


@functools.lru_cache(maxsize=2)
def _recalibrated(path: str, shared: tuple):
    experiment = _experiment(path, shared)

    @jax.jit
    def of(state: TrainState, whole: Batch) -> TrainState:
        inputs = experiment.task.inputs(whole)
        variables = recalibrated(experiment.module.apply, variables_of(state), inputs)
        return state.replace(model_state={"batch_stats": variables["batch_stats"]})

    return of
