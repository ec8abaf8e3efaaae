"""The course of a run: where it starts, its programs, what it leaves out, and the way back."""

from collections.abc import Callable

import jax

from lsdl import compile_cache, prediction, processes
from lsdl.checkpoint import Checkpoints, load_weights, merged
from lsdl.data import skip
from lsdl.errors import NotFiniteError
from lsdl.experiment import Experiment
from lsdl.processes import is_main
from lsdl.progress import tell
from lsdl.rundir import RunDir, write_json
from lsdl.state import TrainState
from lsdl.step import TEACHER, as_weights, variables_of

SKIPS = "skip_batches"  # in a checkpoint's notes, and in the history of config.json


def initial(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    """The state after `step`: a checkpoint's, or for 0 what seed, `init_from` and teacher give."""
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


class Course:
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
            compile_cache.seal()  # a restart after a kill finds them
            predicted = prediction.make(self.experiment, programs)
            if is_main():
                write_json(self.folder.plan, predicted)
            self._compiled = programs, predicted
        return self._compiled

    def save(self, step: int, state: TrainState, *, metrics: dict | None) -> None:
        notes = {SKIPS: self.skips} if self.skips else None
        self.checkpoints.save(step, state, metrics=metrics, notes=notes)

    def settle(self, step: int, state: TrainState) -> None:
        """Wait for the last save; if it fails, there is no next step whose save makes it good."""
        if self.checkpoints.check(wait=True):
            self.save(step, state, metrics=None)
            self.checkpoints.check(wait=True)

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
