"""The parts of an experiment, each from its fields of the config: data, task, model."""

import hashlib
import importlib
import inspect
import json
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lsdl import tasks
from lsdl.checks import choice
from lsdl.config import from_json, is_of, template
from lsdl.data import dataset
from lsdl.data.dataset import SPLITS, Dataset
from lsdl.errors import UserError, nearest
from lsdl.models import attention, remat
from lsdl.optim.chain import SOLVERS
from lsdl.rundir import RunDir
from lsdl.sharding import partition, pipeline, sequence, splash

# The name table: a model's name, its file in lsdl/models/ and its class there.
MODELS = {
    "mlp": "mlp.Mlp",
    "alexnet": "alexnet.AlexNet",
    "msra": "msra.Msra",
    "inception": "inception.Inception",
    "resnet": "resnet.ResNet",
    "efficientnet": "efficientnet.EfficientNet",
    "regnet": "regnet.RegNet",
    "vit": "vit.Vit",
    "gpt": "gpt.Gpt",
    "bert": "bert.Bert",
    "clip": "clip.Clip",
}
CONVEX = ("classification", "regression")  # the loss, in the outputs
PRECISIONS = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# What each task needs of the data, and the models whose outputs it takes; a model that stands with
# none of them is left to be tried with any.
IMAGE_MODELS = ("mlp", "vit", "resnet", "alexnet", "msra", "inception", "efficientnet", "regnet")
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
    placed = {model for _, those in TASKS.values() for model in those}
    if config.model.name in placed and config.model.name not in models:
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


def model_class(name: str) -> type[nn.Module]:
    """The class of the model `name`; its file is imported when it is asked for."""
    place = MODELS[choice("model.name", name, MODELS)]
    file, _, cls = place.partition(".")
    line = f"The line {name!r}: {place!r} of MODELS in lsdl/components.py"
    try:
        module = importlib.import_module(f"lsdl.models.{file}")
    except ModuleNotFoundError as error:
        if error.name != f"lsdl.models.{file}":  # one that the file imports
            raise
        raise UserError(
            f"{line} needs a file lsdl/models/{file}.py, which is not there: write FILE.CLASS."
        ) from error
    if not hasattr(module, cls):
        classes = [n for n, v in vars(module).items() if inspect.isclass(v)]
        raise UserError(
            f"{line} needs a class {cls!r} in lsdl/models/{file}.py: {nearest(cls, classes)}"
        )
    return getattr(module, cls)


def check_fields(model: ConfigDict) -> None:
    """Raise `UserError` unless `model` has the fields of its class, each of its type."""
    cls = model_class(model.name)
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
    cls = model_class(config.model.name)
    outputs = data.features["target"].shape[0] if config.task == "regression" else data.num_classes
    dtype = PRECISIONS[choice("precision", config.precision, PRECISIONS)]
    filled = {
        "num_classes": outputs,
        "dtype": dtype,
        "remat": _policy(config.remat),
        "axis_name": mesh and (partition.manual_axes(config.partitioner, mesh) or None),
        "attention": _make_attention(config, mesh, dtype),
        "pipe": _make_pipe(config, mesh),
    }
    parameters = inspect.signature(cls).parameters
    if filled["pipe"] and "pipe" not in parameters:
        raise UserError(
            f"mesh={config.mesh!r} has stage={mesh.shape['stage']}, and model {config.model.name} "
            "cannot be cut into stages: give its devices to another axis."
        )
    if _splits_length(mesh) and "attention" not in parameters:
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


def _splits_length(mesh: Mesh | AbstractMesh | None) -> bool:
    return mesh is not None and mesh.shape["sequence"] > 1


def _make_attention(config: ConfigDict, mesh: Mesh | AbstractMesh | None, dtype: jnp.dtype):
    """Over a length that `mesh` splits, or by its devices' kernel; None: the model's own.

    A kernel's gradient has no derivative, which Newton's methods ask for.
    """
    form = choice("sequence_attention", config.sequence_attention, sequence.FORMS)
    if _splits_length(mesh):
        return sequence.make_attention(mesh, form)
    if not isinstance(mesh, Mesh) or {config.optim.name, config.optim.switch.name} & set(SOLVERS):
        return None
    device = mesh.devices.flat[0]
    if device.platform == "tpu" and attention.has_kernel("tpu", device.device_kind, dtype):
        return splash.make_attention(mesh, attention.attend)
    return attention.kernel(device, dtype)


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
