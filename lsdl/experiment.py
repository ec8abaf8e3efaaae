"""From a config to a program; allocates nothing. `components` and `recipe` read fields as well.

`train`, and later `plan` and `analyze`, see the same frozen `Experiment`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lsdl import checks, components, evaluation, measures, notes, recipe
from lsdl import step as steps
from lsdl.checkpoint import Checkpoints, check_weights, holds, load_weights, with_shardings
from lsdl.config import duration_steps, from_json, load
from lsdl.data.dataset import Dataset
from lsdl.data.loader import Loader
from lsdl.data.ramp import Ramp
from lsdl.data.shards import Shard
from lsdl.data.skip import Skips
from lsdl.errors import UserError
from lsdl.guard import Rule
from lsdl.models import remat
from lsdl.optim.conditions import Conditions
from lsdl.optim.wrappers import averages
from lsdl.planner import tree
from lsdl.sharding import inspect, partition, placement, rules
from lsdl.sharding import mesh as meshes
from lsdl.state import Batch, TrainState


@dataclass(frozen=True)
class Phase:
    """The steps of one batch size, and their program."""

    first_step: int
    batch_size: int
    train_step: partition.Program  # (state, batch) -> (state, metrics)
    abstract_batch: Batch  # with shardings


@dataclass(frozen=True)
class Experiment:
    """A run, ready to be traced: programs and numbers, no arrays and no settings."""

    name: str
    seed: int
    mesh: Mesh | AbstractMesh
    dcn: Mapping[str, int]  # of its axes, the part that crosses slices or nodes
    module: nn.Module
    task: Any
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    conditions: Conditions  # of SGD, that the schedule meets
    abstract_state: TrainState  # with shardings: what to restore into
    abstract_gradients: Any  # likewise, of one step
    shardings: TrainState
    placements: list[placement.Placement]
    rules: rules.Rules  # of the activations too
    lint: tuple[str, ...]  # what the rules did not do
    parameter_groups: list[dict[str, Any]]  # of each parameter: its optimiser, rate, masks
    num_parameters: int  # without the padding of vocabularies
    init: Callable[[], TrainState]  # jitted; each device makes its own shards
    init_from: Path | None  # checkpoints whose weights replace the initial ones
    init_fresh: str  # regex of the leaves that they do not replace; "": none
    teacher: Path | None  # checkpoints of the model whose outputs are distilled
    phases: tuple[Phase, ...]  # one, but for a batch ramp
    ramp: Ramp  # the batch sizes that they have
    eval_step: partition.Program  # (state, batch) -> sums
    residuals: partition.Program  # (state, batch) -> what the loss of a microbatch keeps
    whole_run: partition.Program  # (key, rates_T, batches_T) -> (state, metrics_T), on one device
    skip_batches: Skips  # that the config leaves out
    train_loader: Callable[..., Loader]  # (skip = skip_batches)
    eval_loader: Callable[[str], Loader]  # of a split: train | valid | test
    evaluators: tuple[Callable, ...]  # (state, eval_loader, split) -> metrics
    check_data: Callable[[], None]  # UserError unless all splits and weights can be read
    check_digests: Callable[[], list[Shard]]  # of the prepared files; DataError for a wrong one
    identify_data: Callable[[], str]  # see `data_fingerprint`
    guard: Rule  # what a step has to keep to
    audit_every_steps: int
    layout: str  # digest of what decides the bits beside the config's mathematics: where it runs
    batch_size: int
    accum: int  # microbatches of a step
    remat: str  # what the model's blocks keep for their backward pass
    activation_names: tuple[str, ...]  # what they could keep by name
    microbatches: int  # of a pipeline
    total_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    log_every_steps: int
    stuck_after_s: float  # without a step; 0: never
    keep_latest: int
    keep_best: int
    tensorboard: bool
    notes: tuple[str, ...]  # what the user should know before the run starts

    @property
    def train_step(self) -> partition.Program:
        """The first phase's."""
        return self.phases[0].train_step

    @property
    def data_fingerprint(self) -> str:
        """Of what determines the records: equal in all processes, and in a run that goes on.

        Names, splits, counts and files, as they lie on disk: raises `UserError` as `check_data`.
        """
        return self.identify_data()

    @property
    def abstract_batch(self) -> Batch:
        """Of the first phase, with shardings."""
        return self.phases[0].abstract_batch


def build(config: ConfigDict, *, devices: Sequence[jax.Device] | int | None = None) -> Experiment:
    """The experiment that `config` describes, on `devices` (all there are).

    A number stands for that many devices, which need not exist: what is built on them can be
    traced, not run.

    Raises `UserError` for whatever does not fit together, before any compilation.
    """
    components.check_fields(config.model)
    devices = jax.devices() if devices is None else devices
    number = devices if isinstance(devices, int) else len(devices)
    sizes = meshes.parse_mesh(config.mesh, number)
    dcn = meshes.parse_dcn(config.dcn_mesh, sizes)
    mesh = meshes.make_mesh(sizes, devices, dcn=dcn)
    partition.check(config.partitioner, mesh)
    table = rules.table(config.rules)
    own = rules.check_param_rules(config.param_rules)

    data = components.make_data(config)
    counts = data.counts
    batch_size = config.batch_size
    steps_per_epoch = counts["train"] // batch_size
    if not steps_per_epoch:
        raise UserError(
            f"batch_size={batch_size} is larger than the {counts['train']} training examples."
        )
    for split, count in counts.items():
        if count < 1:
            raise UserError(
                f"data.{split}_split={config.data[f'{split}_split']!r} holds no examples."
            )
    task = components.make_task(config, data)
    transfer = evaluation.make_transfer(config, data)
    units = dict(
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
        tokens_per_example=task.units_per_example if task.unit == "tokens" else 0,
    )
    units["total_steps"] = duration_steps(config, "total", **units)
    ramp = recipe.make_ramp(config, examples=counts["train"], units=units)
    total_steps = ramp.total_steps
    if total_steps >= 2**31:
        raise UserError(f"The run would have {total_steps} steps: 2^31 is where their count ends.")
    units["total_steps"] = total_steps
    if len(ramp.phases) > 1:
        units |= dict(ramp=ramp, epoch_examples=counts["train"])

    checks.check_ranges(config.model)
    checks.check_measures(config)
    checks.check_divides(config, mesh, data)
    module = components.make_module(config, data, mesh=mesh)
    teacher = components.make_teacher(config, data)
    schedule, conditions = recipe.make_schedule(config, units=units)
    make_tx = functools.partial(recipe.make_optimizer, config, units=units, mesh=mesh)
    tx = make_tx(schedule)

    skip_batches, rule = recipe.make_skips(config), recipe.make_guard(config, mesh)
    every_steps = {
        group: duration_steps(config[group], "every", **units)
        for group in ("eval", "checkpoint", "log")
    }
    recipe.check_rewind(config, every_steps=every_steps["checkpoint"])
    initial = dict(batch_size=batch_size, rule=rule, teacher=teacher)
    make_init = steps.make_init(module, task, tx, **initial)
    with remat.recording() as activations:
        boxed = jax.eval_shape(lambda: make_init(jax.random.key(0)))
    remat.check_names(config.remat, activations)
    further = dict(param_rules=own, moments=rules.moment_axes(config.rules))
    shardings, placements = placement.tree_shardings(boxed, mesh, table, **further)
    gradients = placement.gradient_shardings(boxed.params, mesh, table, **further)
    placement.check_used(mesh, placements, table)
    abstract_state = with_shardings(nn.unbox(boxed), shardings)
    init_from, teacher_weights = map(components.checkpoints_of, (config.init_from, config.teacher))
    batch_sharding = NamedSharding(mesh, partition.BATCH_SPEC)
    placed = dict(mesh=mesh, rules=table, precision=config.precision)
    seed = config.seed

    init = jax.jit(lambda: nn.unbox(make_init(jax.random.key(seed))), out_shardings=shardings)
    prepare = steps.make_prepare(task)
    measured = config.log.measure
    loss = steps.make_loss(module.apply, task, teacher=teacher and teacher.apply)
    make_grads = functools.partial(
        steps.make_grads,
        loss,
        measured=[word for word in measured if word in measures.OF_MICROBATCHES],
    )
    stacked = {p.path.removeprefix("params/") for p in placements if "layers" in p.names[:1]}
    make_measure = functools.partial(measures.make, measured, stacked=stacked)
    gauss_newton = None
    if config.optim.name == "ggn_cg":
        gauss_newton = steps.make_gauss_newton(module.apply, task)

    def make_phase(part) -> Phase:
        """Its microbatches are those of the first phase, and more of them: so is its memory."""
        accum = config.accum * part.factor
        measure = make_measure(accum=accum)
        train_step = partition.partition(
            config.partitioner,
            prepare,
            make_grads(accum=accum),
            steps.make_update(tx, schedule, rule=rule, gauss_newton=gauss_newton, measure=measure),
            shardings=shardings,
            gradients=gradients,
            **placed,
        )
        abstract_batch = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding)
            for name, leaf in task.spec(part.batch_size).items()
        }
        return Phase(part.first_step, part.batch_size, train_step, abstract_batch)

    # Evaluation runs under jit whatever the partitioner: it has no gradients to reduce.
    eval_step = partition.program(
        steps.make_eval_step(module.apply, task),
        out_shardings=NamedSharding(mesh, P()),
        **placed,
    )
    whole_run = steps.make_run(
        prepare,
        make_grads(accum=config.accum),
        make_tx,
        lambda tx, key: nn.unbox(steps.make_init(module, task, tx, **initial)(key)),
        rule=rule,
        gauss_newton=gauss_newton,
        measure=make_measure(accum=config.accum),
    )
    residuals = partition.program(steps.make_residuals(loss, prepare, accum=config.accum), **placed)
    spec = task.spec(batch_size)
    loader = functools.partial(Loader, spec=spec, batch_size=batch_size, sharding=batch_sharding)
    train_data = dict(
        seed=seed,
        sampling=checks.choice("data.sampling", config.data.sampling, ("epoch", "replace")),
        prefetch=config.data.prefetch,
        ramp=ramp,
    )

    return Experiment(
        name=config.name,
        seed=seed,
        mesh=mesh,
        dcn=dcn,
        module=module,
        task=task,
        tx=tx,
        schedule=schedule,
        conditions=conditions,
        abstract_state=abstract_state,
        abstract_gradients=with_shardings(nn.unbox(boxed.params), gradients),
        shardings=shardings,
        placements=placements,
        rules=table,
        lint=tuple(inspect.lint(placements, table, own, mesh=mesh)),
        parameter_groups=recipe.parameter_groups(config, abstract_state.params),
        num_parameters=_num_parameters(placements, module),
        init=init,
        init_from=init_from,
        init_fresh=config.init_fresh,
        teacher=teacher_weights,
        phases=tuple(map(make_phase, ramp.phases)),
        ramp=ramp,
        eval_step=eval_step,
        residuals=residuals,
        whole_run=partition.program(whole_run, mesh=None, rules=(), precision=config.precision),
        skip_batches=skip_batches,
        train_loader=lambda skip=skip_batches: loader(
            data.reader("train"),
            transforms=data.transforms("train"),
            train=True,
            skip=skip,
            **train_data,
        ),
        # The training split is evaluated on a part of it where it is large. What evaluation draws
        # at random does not depend on the run's seed.
        eval_loader=lambda split: loader(
            data.reader(split),
            transforms=data.transforms("valid"),
            train=False,
            limit=max(2_000, counts["valid"], counts["test"]),
        ),
        evaluators=evaluation.make_evaluators(
            config,
            data,
            task,
            module,
            placed=placed,
            transfer=transfer,
            transfer_loaders=lambda split: loader(
                transfer.reader(split),
                spec={
                    name: jax.ShapeDtypeStruct((batch_size, *leaf.shape), leaf.dtype)
                    for name, leaf in transfer.features.items()
                },
                transforms=transfer.transforms("valid"),
                train=False,
            ),
        ),
        check_data=lambda: _check_data(
            [data, transfer], init_from, config.init_fresh, teacher_weights, abstract_state
        ),
        check_digests=data.shards,
        identify_data=data.identity,
        guard=rule,
        audit_every_steps=config.guard.audit_every_steps,
        layout=components.layout(config, mesh),
        batch_size=batch_size,
        accum=config.accum,
        remat=config.remat,
        activation_names=tuple(sorted(activations)),
        microbatches=config.pipeline_microbatches or mesh.shape["stage"],
        total_steps=total_steps,
        eval_every_steps=every_steps["eval"],
        checkpoint_every_steps=every_steps["checkpoint"],
        log_every_steps=every_steps["log"],
        stuck_after_s=config.stuck_after_s,
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        tensorboard=config.log.tensorboard,
        notes=notes.of_run(config, ramp, boxed.model_state, placements),
    )


# A stored config's model alone, on whatever machine and for whatever run it was written.
ALONE = {
    "mesh": "data=1",
    "dcn_mesh": "",
    "partitioner": "jit",
    "accum": 1,
    "batch_ramp": (),
    "log.measure": (),
    "init_from": "",
    "init_fresh": "",
    "teacher": "",
    "loss.distill_weight": 0.0,
    "eval.probes": (),
    "eval.transfer_source": "",
}


def opened(path: str, overrides: Mapping[str, Any], *, devices: int = 1) -> Experiment:
    """The experiment of the config file `path` with {field: value} overrides, on `devices`."""
    given = [f"--config.{field}={value}" for field, value in overrides.items()]
    return build(load(path, given)[0], devices=jax.devices()[:devices])


def reopen(fields: dict, *, mesh: str = "") -> Experiment:
    """The experiment of a run folder's stored fields, for the use of its model.

    On one device, or with a `mesh` on all there are.
    """
    layout = {"mesh": mesh} if mesh else {}
    devices = jax.devices() if mesh else jax.devices()[:1]
    return build(from_json(fields | ALONE | layout), devices=devices)


def stored_weights(
    experiment: Experiment, folder: Path, *, step: int | None = None
) -> dict[str, Any]:
    """A checkpoint's {"params", "model_state"}, as evaluation reads them; the newest, or `step`'s.

    These are the averages of the parameters where the run's optimiser kept them.
    """
    state = experiment.abstract_state
    if not (averages(state.opt_state) and holds(folder, "opt_state")):
        return load_weights(folder, steps.as_weights(steps.variables_of(state)), step=step)
    with Checkpoints(folder) as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step() if step is None else step, state)
        return steps.as_weights(steps.evaluated(state))


def _check_data(
    sets: Sequence[Dataset | None],
    init_from: Path | None,
    init_fresh: str,
    teacher: Path | None,
    state: TrainState,
) -> None:
    for data in filter(None, sets):
        data.check()
    if init_from:
        weights = steps.as_weights(steps.variables_of(state))
        check_weights(init_from, weights, fresh=init_fresh)
    if teacher:
        check_weights(teacher, steps.as_weights(state.model_state[steps.TEACHER]))


def _num_parameters(placements: Sequence[placement.Placement], module: nn.Module) -> int:
    """Parameters without the rows that only pad the vocabulary."""
    sizes = [math.prod(p.shape) for p in placements if p.path.startswith("params/")]
    padding = tree.vocabulary_padding(placements, module)
    return sum(sizes) - sum(padding.values())
