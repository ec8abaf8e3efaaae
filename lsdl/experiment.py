"""From a config to a program. The only reader of config fields; allocates nothing.

`train`, and later `plan` and `analyze`, see the same frozen `Experiment`.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from lsdl import step as steps
from lsdl.checkpoint import with_shardings
from lsdl.config import duration_steps
from lsdl.data import sources, transforms
from lsdl.data.loader import Loader
from lsdl.errors import UserError, nearest
from lsdl.models import mlp, remat, resnet, vit
from lsdl.optim import chain, schedules
from lsdl.sharding import mesh as meshes
from lsdl.sharding import partition, rules
from lsdl.state import Batch, TrainState
from lsdl.tasks import Classification

MODELS = {"mlp": mlp.Mlp, "vit": vit.Vit, "cifar_resnet": resnet.CifarResNet}
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Experiment:
    """A run, ready to be traced: programs and numbers, no arrays and no settings."""

    name: str
    mesh: Mesh
    module: nn.Module
    task: Any
    tx: optax.GradientTransformationExtraArgs
    schedule: optax.Schedule
    abstract_state: TrainState  # with shardings: what to restore into
    abstract_batch: Batch  # likewise, of training
    shardings: TrainState
    placements: list[rules.Placement]
    init: Callable[[], TrainState]  # jitted; each device makes its own shards
    train_step: partition.Program  # (state, batch) -> (state, metrics)
    eval_step: partition.Program  # (state, batch) -> sums
    train_loader: Callable[[], Loader]
    eval_loader: Callable[[str], Loader]  # of a split: train | valid | test
    check_data: Callable[[], Any]  # raises UserError unless every split can be opened
    batch_size: int
    total_steps: int
    eval_every_steps: int
    checkpoint_every_steps: int
    log_every_steps: int
    keep_latest: int
    keep_best: int
    tensorboard: bool
    notes: tuple[str, ...]  # what the user should know before the run starts


def build(config: ConfigDict, *, devices: Sequence[jax.Device] | None = None) -> Experiment:
    """The experiment that `config` describes, on `devices` (all there are).

    Raises `UserError` for whatever does not fit together, before any compilation.
    """
    devices = jax.devices() if devices is None else devices
    mesh = meshes.make_mesh(meshes.parse_mesh(config.mesh, len(devices)), devices)
    partition.check(config.partitioner, mesh)
    table = rules.table(config.rules)

    counts = _num_examples(config)
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
    units = dict(batch_size=batch_size, steps_per_epoch=steps_per_epoch)
    total_steps = duration_steps(config, "total", **units)
    if total_steps >= 2**31:
        raise UserError(f"The run would have {total_steps} steps: 2^31 is where their count ends.")
    units["total_steps"] = total_steps

    task = _task(config)
    module = _module(config, task)
    _check_ranges(config.model)
    _check_divides(config, mesh, task.image_shape)
    warmup_steps = duration_steps(config.optim.schedule, "warmup", **units)
    schedule = _schedule(config, total_steps=total_steps, warmup_steps=warmup_steps)
    tx = _optimizer(config, schedule)

    make_init = steps.make_init(module, task, tx, batch_size=batch_size)
    boxed = jax.eval_shape(lambda: make_init(jax.random.key(0)))
    shardings, placements = rules.tree_shardings(boxed, mesh, table)
    rules.check_used(mesh, placements)
    batch_sharding = NamedSharding(mesh, partition.BATCH_SPEC)
    placed = dict(mesh=mesh, rules=table, precision=config.precision)
    seed = config.seed

    init = jax.jit(lambda: nn.unbox(make_init(jax.random.key(seed))), out_shardings=shardings)
    train_step = partition.partition(
        config.partitioner,
        steps.make_prepare(task),
        steps.make_grads(module.apply, task, accum=config.accum),
        steps.make_update(tx, schedule),
        shardings=shardings,
        **placed,
    )
    # Evaluation runs under jit whatever the partitioner: it has no gradients to reduce.
    eval_step = partition.program(
        steps.make_eval_step(module.apply, task),
        out_shardings=NamedSharding(mesh, P()),
        **placed,
    )
    spec = task.spec(batch_size)
    data = dict(spec=spec, batch_size=batch_size, sharding=batch_sharding, seed=seed)
    train_data = dict(
        sampling=_choice("data.sampling", config.data.sampling, ("epoch", "replace")),
        transforms=[transforms.parse(t) for t in config.data.transforms],
        prefetch=config.data.prefetch,
    )

    def open_split(split: str):
        name = config.data[f"{split}_split"]
        return sources.open_reader(config.data.source, name, expected=counts[split])

    @functools.cache
    def reader(split: str):
        reader = open_split(split)
        if sources.nbytes(task.spec(1), counts[split]) <= config.data.in_memory_mib * 2**20:
            return sources.InMemory(reader, tuple(n for n in spec if n != "weight"))
        return reader

    return Experiment(
        name=config.name,
        mesh=mesh,
        module=module,
        task=task,
        tx=tx,
        schedule=schedule,
        abstract_state=with_shardings(nn.unbox(boxed), shardings),
        abstract_batch={
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding)
            for name, leaf in spec.items()
        },
        shardings=shardings,
        placements=placements,
        init=init,
        train_step=train_step,
        eval_step=eval_step,
        train_loader=lambda: Loader(reader("train"), train=True, **data, **train_data),
        # The training split is evaluated on a part of it where it is large.
        eval_loader=lambda split: Loader(
            reader(split), train=False, limit=max(10_000, counts["valid"], counts["test"]), **data
        ),
        check_data=lambda: [open_split(split) for split in SPLITS],
        batch_size=batch_size,
        total_steps=total_steps,
        eval_every_steps=duration_steps(config.eval, "every", **units),
        checkpoint_every_steps=duration_steps(config.checkpoint, "every", **units),
        log_every_steps=duration_steps(config.log, "every", **units),
        keep_latest=config.checkpoint.keep_latest,
        keep_best=config.checkpoint.keep_best,
        tensorboard=config.log.tensorboard,
        notes=_notes(config, boxed.model_state, placements),
    )


def _num_examples(config: ConfigDict) -> dict[str, int]:
    return {
        split: sources.num_examples(
            config.data.source,
            config.data[f"{split}_split"],
            declared=config.data[f"{split}_examples"],
        )
        for split in SPLITS
    }


def _task(config: ConfigDict) -> Classification:
    _choice("task", config.task, ("classification",))
    card = sources.card(config.data.source)
    return Classification(card.image_shape, card.num_classes, card.mean, card.std)


def _module(config: ConfigDict, task: Classification) -> nn.Module:
    """The model with the fields of its own from `config.model`, and those that lsdl fills."""
    cls = MODELS[_choice("model.name", config.model.name, MODELS)]
    filled = {
        "num_classes": task.num_classes,
        "dtype": PRECISIONS[_choice("precision", config.precision, PRECISIONS)],
        "remat": _choice("remat", config.remat, remat.POLICIES),
        "axis_name": partition.manual_axis(config.partitioner),
    }
    parameters = inspect.signature(cls).parameters
    own = {name for name in parameters if name not in (*filled, "parent", "name")}
    given = {name: config.model[name] for name in config.model if name != "name"}
    for name in given.keys() - own:
        raise UserError(f"model {config.model.name} has no field {name!r}; {nearest(name, own)}")
    for name in own - given.keys():
        raise UserError(
            f"model {config.model.name} needs model.{name}: a config leaves no default to the code."
        )
    return cls(**given, **{k: v for k, v in filled.items() if k in parameters})


def _schedule(config: ConfigDict, *, total_steps: int, warmup_steps: int) -> optax.Schedule:
    schedule = config.optim.schedule
    return schedules.make_schedule(
        schedule.name,
        peak=schedule.peak,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        end_factor=schedule.end_factor,
        boundaries_percent=schedule.boundaries_percent,
        step_factor=schedule.step_factor,
    )


def _optimizer(config: ConfigDict, schedule: optax.Schedule):
    optim = config.optim
    return chain.make_optimizer(
        optim.name,
        schedule,
        clip_norm=optim.clip_norm,
        weight_decay=optim.weight_decay,
        decay_mask=optim.decay_mask,
        trust_mask=optim.trust_mask,
        momentum=optim.momentum,
        nesterov=optim.nesterov,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        trust_coefficient=optim.trust_coefficient,
    )


def _check_ranges(model: ConfigDict) -> None:
    for name in ("width", "num_layers", "num_heads", "mlp_dim", "patch"):
        if name in model and model[name] < 1:
            raise UserError(f"model.{name}={model[name]} must be at least 1.")
    if "stem" in model and model.stem < 0:
        raise UserError(f"model.stem={model.stem} must not be negative.")
    if "hidden" in model and any(not isinstance(w, int) or w < 1 for w in model.hidden):
        raise UserError(f"model.hidden={model.hidden} must hold widths of at least 1.")
    if "activation" in model:
        _choice("model.activation", model.activation, ("relu", "gelu", "silu", "tanh"))
    if "dropout" in model and not 0 <= model.dropout < 1:
        raise UserError(f"model.dropout={model.dropout} must be within [0, 1).")


def _check_divides(config: ConfigDict, mesh: Mesh, image_shape: tuple[int, int, int]) -> None:
    """The sizes that have to divide one another, in the words of the config."""
    shards, tensor = meshes.batch_shards(mesh), mesh.shape["tensor"]
    _divides("batch_size", config.batch_size, shards * config.accum, "data x fsdp x accum")
    model = config.model
    if "num_heads" in model:
        _divides("model.num_heads", model.num_heads, tensor, "the mesh axis tensor")
        _divides("model.mlp_dim", model.mlp_dim, tensor, "the mesh axis tensor")
        _divides("model.width", model.width, model.num_heads, "model.num_heads")
    if "patch" in model:
        for size in image_shape[:2]:
            _divides("the image's side", size, model.patch, "model.patch")
    if model.name == "cifar_resnet" and (model.depth < 8 or (model.depth - 2) % 6):
        raise UserError(f"model.depth={model.depth} must be 6n + 2: 8, 14, 20, 32, 44, 56, 110.")


def _divides(what: str, value: int, by: int, of: str) -> None:
    if value % by:
        near = max(value // by, 1) * by
        raise UserError(
            f"{what}={value} must be divisible by {by} ({of}): the nearest that are: {near} "
            f"and {near + by}."
        )


def _choice(field: str, value: str, choices) -> str:
    if value not in choices:
        raise UserError(f"{field}={value!r} is unknown; {nearest(value, choices)}")
    return value


def _notes(config: ConfigDict, model_state: dict, placements: list) -> tuple[str, ...]:
    notes = []
    if model_state and config.accum > 1:
        notes.append(
            f"BatchNorm with accum={config.accum} normalises over microbatches of "
            f"{config.batch_size // config.accum}: a different experiment from accum=1."
        )
    stacked = "scan_layers" in config.model and config.model.scan_layers
    if stacked and config.optim.name in ("lars", "lamb"):
        notes.append(
            f"With scan_layers the layers' parameters are stacked, and {config.optim.name} has one "
            "trust ratio for each stack: a different experiment from scan_layers=false."
        )
    missed = [p for p in placements if p.missed and p.path.startswith("params/")]
    if missed:
        notes.append(
            f"{len(missed)} small parameters are replicated where the rules would split them, "
            f"the first: {missed[0].path} {missed[0].shape}, {missed[0].missed}."
        )
    return tuple(notes)
