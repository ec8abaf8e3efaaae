"""The parts of an experiment, each from its fields of the config: data, task, model, optimizer."""

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lsdl import guard, tasks
from lsdl.checks import choice
from lsdl.config import duration_steps, from_json, is_of, template, to_steps
from lsdl.data import dataset, ramp, skip
from lsdl.data.dataset import SPLITS, Dataset
from lsdl.data.ramp import Ramp
from lsdl.data.skip import Skips
from lsdl.errors import UserError, nearest
from lsdl.models import (
    alexnet,
    bert,
    clip,
    efficientnet,
    gpt,
    inception,
    mlp,
    regnet,
    remat,
    resnet,
    vit,
)
from lsdl.optim import chain, schedules, wrappers
from lsdl.optim.conditions import Conditions, conditions
from lsdl.rundir import RunDir
from lsdl.sharding import partition, pipeline, sequence

MODELS = {
    "mlp": mlp.Mlp,
    "alexnet": alexnet.AlexNet,
    "inception": inception.Inception,
    "resnet": resnet.ResNet,
    "efficientnet": efficientnet.EfficientNet,
    "regnet": regnet.RegNet,
    "vit": vit.Vit,
    "gpt": gpt.Gpt,
    "bert": bert.Bert,
    "clip": clip.Clip,
}
CONVEX = ("classification", "regression")  # the loss, in the outputs
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What each task needs of the data, and the models whose outputs it takes.
IMAGE_MODELS = ("mlp", "vit", "resnet", "alexnet", "inception", "efficientnet", "regnet")
TASKS = {
    "classification": ("label", IMAGE_MODELS),
    "regression": ("target", IMAGE_MODELS),
    "language": ("token", ("gpt",)),
    "masked_language": ("loss_weight", ("bert",)),
    "contrastive": ("caption", ("clip",)),
}


def make_data(config: ConfigDict) -> Dataset:
    data = config.data
    return dataset.make(
        data.source,
        splits={split: data[f"{split}_split"] for split in SPLITS},
        declared={split: data[f"{split}_examples"] for split in SPLITS},
        mixture=data.mixture,
        transforms=data.transforms,
        eval_transforms=data.eval_transforms,
        label_noise=data.label_noise,
        tokenizer=data.tokenizer,
        seq_len=data.seq_len,
        segments=data.segments,
        in_memory_mib=data.in_memory_mib,
        seed=config.seed,
    )


def make_task(config: ConfigDict, data: Dataset):
    leaf, models = TASKS[choice("task", config.task, TASKS)]
    if leaf not in data.features:
        raise UserError(
            f"task={config.task} needs data with the leaf {leaf!r}, and {config.data.source} with "
            f"its transforms has {', '.join(data.features)}."
        )
    if config.model.name in MODELS and config.model.name not in models:
        raise UserError(
            f"task={config.task} cannot train model {config.model.name}: it trains "
            f"{', '.join(models)}."
        )
    loss = config.loss
    given = {
        "classification": dict(
            label_smoothing=loss.label_smoothing,
            mixup=loss.mixup,
            distill_weight=loss.distill_weight,
            distill_temperature=loss.distill_temperature,
        ),
        "language": dict(z_loss=loss.z_loss, chunk=loss.chunk, balance=loss.balance),
        "masked_language": dict(z_loss=loss.z_loss, chunk=loss.chunk),
        "contrastive": dict(form=loss.form, chunk=loss.chunk),
        "regression": {},
    }[config.task]
    for name, default in template().loss.items():
        if name not in given and loss[name] != default and name != "form":
            raise UserError(f"loss.{name}={loss[name]} has no meaning for task={config.task}.")
    if "vocab_size" in config.model and config.model.vocab_size < data.vocab_size:
        raise UserError(
            f"model.vocab_size={config.model.vocab_size} is smaller than the {data.vocab_size} "
            f"tokens of data.tokenizer={config.data.tokenizer!r}."
        )
    scaled = dict(features=data.features, mean=data.mean, std=data.std)
    if config.task == "classification":
        return tasks.Classification(num_classes=data.num_classes, **scaled, **given)
    if config.task == "regression":
        return tasks.Regression(**scaled)
    if config.task == "contrastive":
        choice("loss.form", loss.form, ("softmax", "sigmoid"))
        if data.vocab_size and data.separator != data.vocab_size - 1:
            raise UserError(
                f"data.tokenizer={config.data.tokenizer!r} ends a caption with the token "
                f"{data.separator}, and CLIP reads one at its largest token: use a tokenizer whose "
                f"end of text is its last token, {data.vocab_size - 1}."
            )
        return tasks.Contrastive(**scaled, **given)
    kind = tasks.Language if config.task == "language" else tasks.MaskedLanguage
    token_bytes = () if data.token_bytes is None else tuple(map(int, data.token_bytes))
    padding = (0,) * (config.model.vocab_size - len(token_bytes)) if token_bytes else ()
    return kind(data.features, config.model.vocab_size, token_bytes + padding, **given)


def _policy(policy: str) -> str:
    if remat.check(policy).startswith("auto"):
        raise UserError(
            f"remat={policy!r} is chosen by lsdl.train and lsdl.plan, by compiling: name a policy."
        )
    return policy


FILLED = (
    *("num_classes", "dtype", "remat", "axis_name", "attention", "pipe"),
    *("parent", "name"),  # Flax's own
)


def check_fields(model: ConfigDict) -> None:
    """Raise `UserError` unless `model` has the fields of its class, each of its type."""
    cls = MODELS[choice("model.name", model.name, MODELS)]
    parameters = inspect.signature(cls).parameters
    own = {name: p.annotation for name, p in parameters.items() if name not in FILLED}
    for name in sorted(set(model) - own.keys() - {"name"}):
        raise UserError(f"model {model.name} has no field {name!r}; {nearest(name, own)}")
    for name, kind in own.items():
        if name not in model:
            raise UserError(
                f"model {model.name} needs model.{name}: a config leaves no default to the code."
            )
        if not is_of(model[name], kind):
            form = getattr(kind, "__name__", kind) if kind in (bool, int, float, str) else kind
            raise UserError(f"model.{name}={model[name]!r} must be of type {form}.")


def make_module(
    config: ConfigDict, data: Dataset, *, mesh: Mesh | AbstractMesh | None = None
) -> nn.Module:
    """The model with the fields of its own from `config.model`, and those that lsdl fills."""
    check_fields(config.model)
    cls = MODELS[config.model.name]
    outputs = data.features["target"].shape[0] if config.task == "regression" else data.num_classes
    filled = {
        "num_classes": outputs,
        "dtype": PRECISIONS[choice("precision", config.precision, PRECISIONS)],
        "remat": _policy(config.remat),
        "axis_name": mesh and (partition.manual_axes(config.partitioner, mesh) or None),
        "attention": _make_attention(config, mesh),
        "pipe": _make_pipe(config, mesh),
    }
    parameters = inspect.signature(cls).parameters
    if filled["pipe"] and "pipe" not in parameters:
        raise UserError(
            f"mesh={config.mesh!r} has stage={mesh.shape['stage']}, and model {config.model.name} "
            "cannot be cut into stages: give its devices to another axis."
        )
    if filled["attention"] and "attention" not in parameters:
        raise UserError(
            f"mesh={config.mesh!r} has sequence={mesh.shape['sequence']}, and model "
            f"{config.model.name} cannot split one: give its devices to another axis."
        )
    given = {name: config.model[name] for name in config.model if name != "name"}
    return cls(**given, **{k: v for k, v in filled.items() if k in parameters})


def _make_pipe(config: ConfigDict, mesh: Mesh | AbstractMesh | None):
    """What runs the layers in stages; None: one device has them all."""
    stages = mesh.shape["stage"] if mesh is not None else 1
    microbatches = config.pipeline_microbatches or stages
    return pipeline.make_pipe(mesh, microbatches=microbatches) if stages > 1 else None


def _make_attention(config: ConfigDict, mesh: Mesh | AbstractMesh | None):
    """Attention over a length that `mesh` splits; None: the model's own."""
    form = choice("sequence_attention", config.sequence_attention, sequence.FORMS)
    split = mesh is not None and mesh.shape["sequence"] > 1
    return sequence.make_attention(mesh, form) if split else None


def checkpoints_of(run: str) -> Path | None:
    """Where the run folder, or the converted weights, `run` has its checkpoints."""
    if not run:
        return None
    folder = RunDir(run).checkpoints
    if not folder.is_dir():
        raise UserError(
            f"{run!r} is no run folder and no converted weights: {folder} is not there."
        )
    return folder


def make_teacher(config: ConfigDict, data: Dataset) -> nn.Module | None:
    """The model of the run `config.teacher`, whose outputs are distilled."""
    if bool(config.teacher) != bool(config.loss.distill_weight):
        raise UserError(
            f"teacher={config.teacher!r} and loss.distill_weight={config.loss.distill_weight} must "
            "be given together."
        )
    if not config.teacher:
        return None
    stored = RunDir(checkpoints_of(config.teacher).parent).read_config()
    if stored is None or stored["config"]["task"] != "classification":
        raise UserError(
            f"teacher={config.teacher!r} must be the folder of a classification run: it has "
            f"{'no config.json' if stored is None else 'task=' + stored['config']['task']}."
        )
    return make_module(from_json(stored["config"]), data)


def make_ramp(config: ConfigDict, *, examples: int, units: dict) -> Ramp:
    """`examples`: of the training split; `units`: as in `make_schedule`, without the ramp."""
    rule, size = config.batch_ramp, config.batch_size
    if not rule:
        return ramp.make_ramp((), batch_size=size, examples=0, total_steps=units["total_steps"])
    if config.total_steps is not None:
        raise UserError(
            f"batch_ramp={tuple(rule)} needs total_epochs, total_examples or total_tokens: "
            f"total_steps={config.total_steps} does not say how many examples the run takes."
        )
    total = {
        "epochs": (config.total_epochs or 0.0) * examples,
        "examples": config.total_examples or 0,
        "tokens": (config.total_tokens or 0) / max(units["tokens_per_example"], 1),
    }
    made = ramp.make_ramp(rule, batch_size=size, examples=max(total.values()), total_steps=0)
    largest = max(phase.batch_size for phase in made.phases)
    if largest > examples:
        raise UserError(
            f"batch_ramp={tuple(rule)} reaches batches of {largest}, larger than the {examples} "
            "training examples."
        )
    if config.task == "contrastive":
        raise UserError(
            f"batch_ramp={tuple(rule)} must be () for task=contrastive: the larger batches come in "
            "microbatches, and its loss is no sum over them."
        )
    return made


def make_skips(config: ConfigDict) -> Skips:
    """The batches that training leaves out."""
    skips = skip.check(config.data.skip_batches)
    if skips and config.batch_ramp:
        raise UserError(
            f"data.skip_batches={tuple(config.data.skip_batches)} must be () with a batch_ramp, "
            "whose steps take other examples if some are left out."
        )
    return skips


def check_rewind(config: ConfigDict, *, every_steps: int) -> None:
    """Whether the checkpoint that a rewind wants is still there."""
    reach = (config.checkpoint.keep_latest - 1) * every_steps
    if config.guard.spike == "rewind" and config.guard.rewind_steps > reach:
        raise UserError(
            f"guard.rewind_steps={config.guard.rewind_steps} is more than {reach}, how far the "
            f"checkpoints reach back: (checkpoint.keep_latest={config.checkpoint.keep_latest} - 1) "
            f"x {every_steps} steps; keep more of them."
        )


LAYOUT = (
    *("dcn_mesh", "rules", "param_rules", "partitioner", "sequence_attention"),
    *("pipeline_microbatches", "remat"),
)


def layout(config: ConfigDict, mesh: Mesh | AbstractMesh) -> str:
    """A digest of where and how the run is computed: what a resume may change and bits may not."""
    kinds = sorted({d.device_kind for d in mesh.devices.flat}) if isinstance(mesh, Mesh) else []
    said = [[name, config[name]] for name in LAYOUT]
    said += [sorted(mesh.shape.items()), kinds, jax.__version__, jax.process_count()]
    return hashlib.sha256(json.dumps(said, default=str).encode()).hexdigest()[:12]


def make_guard(config: ConfigDict, mesh: Mesh | AbstractMesh) -> guard.Rule:
    """What a step has to keep to."""
    there = isinstance(mesh, Mesh)
    if config.guard.spike == "rewind" and config.batch_ramp:
        raise UserError(
            "guard.spike=rewind must be off or skip with a batch_ramp, whose steps take other "
            "examples if some are left out."
        )
    if config.guard.window < 2:
        raise UserError(f"guard.window={config.guard.window} must be at least 2.")
    if config.guard.sigmas <= 0:
        raise UserError(f"guard.sigmas={config.guard.sigmas} must be positive.")
    return guard.Rule(
        choice("guard.spike", config.guard.spike, guard.SPIKES),
        window=config.guard.window,
        sigmas=config.guard.sigmas,
        limit=config.guard.limit,
        rewind_steps=config.guard.rewind_steps,
        branches=there and mesh.devices.flat[0].platform == "cpu",
    )


def make_schedule(config: ConfigDict, *, units: dict) -> tuple[optax.Schedule, Conditions]:
    """And which of SGD's conditions it meets; `units`: what `config.to_steps` takes."""
    schedule = config.optim.schedule
    peak = scaled_peak(config)
    warmup_steps = duration_steps(schedule, "warmup", **units, place=True)
    shape = schedules.Shape(
        end_factor=schedule.end_factor,
        low_factor=schedule.low_factor,
        power=schedule.power,
        boundaries=_boundaries(schedule, warmup_steps, units),
        step_factor=schedule.step_factor,
        decay_factor=schedule.decay_factor,
        cycle_factor=schedule.cycle_factor,
        rise_percent=schedule.rise_percent,
        period_steps=duration_steps(schedule, "period", **units),
        growth=_growth(config, peak),
    )
    made = schedules.make_schedule(
        schedule.name,
        peak=peak,
        base=schedule.peak,
        total_steps=units["total_steps"],
        warmup_steps=warmup_steps,
        warmup_form=schedule.warmup_form,
        start_factor=schedule.start_factor,
        shape=shape,
    )
    return made, conditions(schedule.name, shape)


def _growth(config: ConfigDict, peak: float) -> float:
    optim = config.optim
    if optim.schedule.name != "exp_growth":
        return 1.0
    if optim.name != "sgd":
        raise UserError(
            f"optim.schedule.name=exp_growth needs optim.name=sgd, not {optim.name}: it stands "
            "for the weight decay of SGD with momentum."
        )
    decay = optim.schedule.growth_decay
    return schedules.growth_root(peak, weight_decay=decay, momentum=optim.momentum)


def _boundaries(schedule: ConfigDict, warmup_steps: int, units: dict) -> tuple[int, ...]:
    """In steps after the warm-up."""
    (unit,) = [u for u in ("steps", "epochs") if schedule[f"boundaries_{u}"]] or ["percent"]
    places = schedule[f"boundaries_{unit}"]
    steps = [to_steps(unit, place, what="boundaries", **units, place=True) for place in places]
    if schedule.name == "step" and min(steps, default=warmup_steps) < warmup_steps:
        raise UserError(
            f"optim.schedule.boundaries_{unit}={tuple(places)} must lie after the warm-up, which "
            f"ends at {100 * warmup_steps / units['total_steps']:.3g} percent of the run."
        )
    return tuple(step - warmup_steps for step in steps)


def scaled_peak(config: ConfigDict) -> float:
    schedule = config.optim.schedule
    return schedules.scaled(
        schedule.peak,
        scaling=schedule.scaling,
        batch_size=config.batch_size,
        base_batch=schedule.base_batch,
    )


def make_optimizer(
    config: ConfigDict,
    schedule: optax.Schedule,
    *,
    units: dict[str, int],
    mesh: Mesh | AbstractMesh,
) -> optax.GradientTransformationExtraArgs:
    """`units`: as of `duration_steps`."""
    optim = config.optim
    fields = chain.fields_of(optim)
    if optim.name in chain.SOLVERS and (mesh.size > 1 or config.partitioner != "jit"):
        raise UserError(
            f"optim.name={optim.name} runs on one device, and mesh={config.mesh!r} has {mesh.size} "
            f"under partitioner={config.partitioner}: give mesh=data=1 and partitioner=jit."
        )
    if optim.name == "ggn_cg" and (config.task not in CONVEX or config.teacher):
        raise UserError(
            f"optim.name=ggn_cg needs a loss that is convex in the model's outputs, without a "
            f"teacher: task={config.task} must be one of {', '.join(CONVEX)}; or use newton_cg."
        )
    detector = _make_plateau(config, units)
    switch = _make_switch(config, units, detector)
    names = (optim.name, switch.name) if switch else (optim.name,)
    plateau = detector if optim.schedule.name == "plateau" else None
    tx = chain.make_optimizer(fields, schedule, plateau=plateau, switch=switch)
    chain.check_meaning(fields, chain.fields_of(template().optim), names)
    return tx


def parameter_groups(config: ConfigDict, params: Any) -> list[dict[str, Any]]:
    """What the optimiser does to each parameter, by the first rule that matches its path."""
    return chain.parameter_table(chain.fields_of(config.optim), params)


def _make_plateau(config: ConfigDict, units: dict[str, int]) -> wrappers.Plateau | None:
    """Of means over an epoch, or over the patience if that is shorter; None: no patience given."""
    schedule = config.optim.schedule
    needed = "optim.schedule.name=plateau" if schedule.name == "plateau" else ""
    if config.optim.switch.name and not duration_steps(config.optim.switch, "at", **units):
        needed = needed or "optim.switch.name without optim.switch.at_*"
    steps = duration_steps(schedule, "plateau_patience", **units)
    if bool(steps) != bool(needed):
        raise UserError(
            f"{needed} needs optim.schedule.plateau_patience_*, as plateau_patience_epochs=5."
            if needed
            else "optim.schedule.plateau_patience_* is given, and nothing waits for a plateau: "
            "leave it out, or choose optim.schedule.name=plateau."
        )
    if not steps:
        return None
    if not 0 < schedule.plateau_factor < 1:
        raise UserError(
            f"optim.schedule.plateau_factor={schedule.plateau_factor} must be within (0, 1)."
        )
    if schedule.plateau_threshold <= 0:
        raise UserError(
            f"optim.schedule.plateau_threshold={schedule.plateau_threshold} must be positive."
        )
    window = min(steps, units["steps_per_epoch"])
    return wrappers.Plateau(
        schedule.plateau_factor, schedule.plateau_threshold, window, round(steps / window)
    )


def _make_switch(
    config: ConfigDict, units: dict[str, int], detector: wrappers.Plateau | None
) -> wrappers.Switch | None:
    switch = config.optim.switch
    at = duration_steps(switch, "at", **units, place=True)
    if not switch.name:
        if at or switch.rate_factor != 1:
            raise UserError(
                f"optim.switch.name='' is empty, and optim.switch.rate_factor={switch.rate_factor} "
                "or optim.switch.at_* is set: name the optimiser to switch to."
            )
        return None
    if switch.rate_factor <= 0:
        raise UserError(f"optim.switch.rate_factor={switch.rate_factor} must be positive.")
    return wrappers.Switch(switch.name, switch.rate_factor, at, detector)
