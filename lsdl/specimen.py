"""A run's checkpoint, opened for analysis: its weights, examples of one split, and its loss.

The loss is what evaluation computes: without dropout and augmentation, with running statistics.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsdl import commits
from lsdl import step as steps
from lsdl.analysis import batch_statistics, curvature, landscape
from lsdl.checkpoint import Checkpoints
from lsdl.errors import UserError
from lsdl.experiment import Experiment, reopen, stored_weights
from lsdl.rundir import RunDir
from lsdl.runs import Run, read_run
from lsdl.sharding import partition, sequence
from lsdl.state import Batch

MATRICES = ("hessian", "ggn", "fisher")


@dataclass(frozen=True)
class Specimen:
    """The state of one run at one step, and what it is looked at with."""

    run: Run
    step: int
    experiment: Experiment
    variables: dict[str, Any]  # {"params", other collections}, as evaluation reads them
    split: str
    batches: list[Batch]
    examples: int
    whole: bool  # the examples are all that the split's evaluation takes
    tokenizer: str  # a name or a file, as `data.text.tokenizer` takes it

    @property
    def params(self) -> Any:
        return self.variables["params"]

    @property
    def program(self) -> Callable:
        """`jax.jit` in the contexts of the run's own programs."""
        experiment, precision = self.experiment, self.run.fields["precision"]
        placed = dict(mesh=experiment.mesh, rules=experiment.rules, precision=precision)
        return functools.partial(partition.program, **placed)

    @property
    def program_of_rows(self) -> Callable:
        """`program` for what maps over rows: in the model a batch of one row is not split."""
        rules = tuple(r for r in self.experiment.rules if r[0] not in ("batch", "conv_batch"))
        return functools.partial(self.program, rules=rules)

    @property
    def peak_rate(self) -> float:
        """The highest learning rate of the schedule."""
        rates = jax.vmap(lambda step: 0.0 * step + self.experiment.schedule(step))
        return float(rates(jnp.arange(self.experiment.total_steps)).max())

    def sums(self, variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        """Evaluation's sums over a batch."""
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        evaluate = steps.make_eval_step(self.experiment.module.apply, self.experiment.task)
        # Without averages of its own: `variables` are what is evaluated.
        state = self.experiment.abstract_state.replace(opt_state=())
        return dict(evaluate(state.replace(params=variables["params"], model_state=rest), batch))

    def loss(self, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        found = self.sums(self.variables | {"params": params}, batch)
        return found["loss"], found["weight"]

    def outputs(self, params: Any, batch: Batch) -> Any:
        """What the model makes of a batch."""
        variables = self.variables | {"params": params}
        inputs = self.experiment.task.inputs(batch)
        return self.experiment.module.apply(variables, *inputs, train=False)

    def each(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Evaluation's sums of each example alone, `(B,)`; see `apart`."""

        def weighted(weight_B):
            return self.sums(self.variables | {"params": params}, batch | {"weight": weight_B})

        # Each sum is linear in the examples' weights.
        return jax.jacrev(weighted)(batch["weight"])

    def apart(self, what: str) -> None:
        """`UserError` if the loss is no sum over examples, which `what` needs."""
        if self.run.fields["task"] == "contrastive":
            raise UserError(
                f"{what} needs a loss of each example alone, and a contrastive loss compares them."
            )

    @property
    def smooth(self) -> "Specimen":
        """The same with attention in a form that has second derivatives, which no kernel has.

        Where the mesh splits the length, each device gathers all keys and values.
        """
        module, mesh = self.experiment.module, self.experiment.mesh
        if getattr(module, "attention", None) is None:
            return self
        split = mesh.shape["sequence"] > 1
        plain = sequence.make_attention(mesh, "gather") if split else None
        experiment = dataclasses.replace(self.experiment, module=module.clone(attention=plain))
        return dataclasses.replace(self, experiment=experiment)

    @property
    def stacked(self) -> set[str]:
        """The paths of the parameters whose first dim is their layers'."""
        paths = (p.path for p in self.experiment.placements if "layers" in p.names[:1])
        return {path.removeprefix("params/") for path in paths}

    def product(self, matrix: str) -> curvature.BatchProduct:
        """Of the loss's Hessian, Gauss-Newton's matrix (`ggn`) or the empirical Fisher matrix."""
        task, smooth = self.experiment.task, self.smooth
        if matrix == "hessian":
            return curvature.hessian(smooth.loss)
        if matrix not in MATRICES:
            raise UserError(f"--of={matrix} is unknown: choose from {', '.join(MATRICES)}.")
        name = self.run.fields["task"]
        if matrix == "fisher":
            self.apart("--of=fisher")
            return curvature.empirical_fisher(smooth.loss)
        if name not in ("classification", "regression"):
            raise UserError(
                f"--of=ggn needs a model whose outputs its loss is convex in; with task={name} "
                "they hold parameters: use --of=hessian."
            )
        return curvature.gauss_newton(
            smooth.outputs, lambda found, batch: task.loss(found, batch)[:2]
        )

    def recalibrate(self, variables: dict[str, Any]) -> dict[str, Any]:
        """`variables` with BatchNorm's statistics of the first batch, at these parameters."""
        inputs = self.experiment.task.inputs(self.batches[0])
        return batch_statistics.recalibrated(self.experiment.module.apply, variables, inputs)

    @property
    def filter_dims(self) -> landscape.Dims:
        """Which dims of each parameter number its filters."""
        return {
            placed.path.removeprefix("params/"): landscape.filter_dims(placed.names)
            for placed in self.experiment.placements
            if placed.path.startswith("params/")
        }

    def at(self, step: int) -> Any:
        """The parameters of another step."""
        _check_step(self.run, step)
        return _variables(self.experiment, self.run, step)["params"]

    def before_training(self) -> "Specimen":
        """The same run before its first step."""
        variables = steps.variables_of(self.experiment.init())
        return dataclasses.replace(self, step=0, variables=variables)

    def steps(self) -> list[int]:
        """Whose checkpoints there are."""
        return _steps(self.run)


def opened(path: Path, *, step: int | None, split: str, examples: int, mesh: str = "") -> Specimen:
    """The run in the folder `path`, at `step` (its newest), with the first `examples` of `split`.

    On one device, or with a `mesh` on all there are. 0 examples: all that evaluation takes.
    """
    run = read_run(path)
    if not _steps(run):
        raise UserError(f"{path} holds no checkpoint: give a folder of lsdl.train.")
    if step is not None:
        _check_step(run, step)
    tokenizer = RunDir(path).own_tokenizer(run.fields["data.tokenizer"])
    fields = {**run.fields, "data.tokenizer": tokenizer}
    experiment = reopen(fields, mesh=mesh)
    experiment.check_data()
    batches = list(_batches(experiment, split, examples))
    number = int(sum(np.asarray(batch["weight"]).sum() for batch in batches))
    whole = number == experiment.eval_loader(split).num_examples
    if step is None:
        with Checkpoints(RunDir(path).checkpoints) as checkpoints:
            step = checkpoints.latest_step()
    variables = _variables(experiment, run, step)
    return Specimen(
        run, step, experiment, variables, split, batches, number, whole=whole, tokenizer=tokenizer
    )


def _steps(run: Run) -> list[int]:
    return sorted(commits.steps(RunDir(run.path).checkpoints))


def _check_step(run: Run, step: int) -> None:
    there = _steps(run)
    if step not in there:
        shown = ", ".join(map(str, there[-8:]))
        raise UserError(f"Step {step} is not there: {run.path} has checkpoints of {shown}.")


def _variables(experiment: Experiment, run: Run, step: int) -> dict[str, Any]:
    found = stored_weights(experiment, RunDir(run.path).checkpoints, step=step)
    return {"params": found["params"], **found["model_state"]}


def _batches(experiment: Experiment, split: str, examples: int) -> Iterator[Batch]:
    """Evaluation's batches, rows after the first `examples` without weight."""
    loader, size = experiment.eval_loader(split), experiment.batch_size
    count = min(examples or loader.num_examples, loader.num_examples)
    for i, batch in enumerate(loader.batches(0, -(-count // size))):
        kept = np.arange(size) < count - i * size
        if not kept.all():
            sharding = batch["weight"].sharding
            weight = np.asarray(batch["weight"]) * kept
            batch = batch | {"weight": jax.device_put(weight.astype(np.float32), sharding)}
        yield batch
