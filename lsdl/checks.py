"""Whether the fields of a model, and the sizes of a run, fit together: in the config's words.

Raises `UserError` with the field, the rule and the values that would do.
"""

from jax.sharding import Mesh
from ml_collections import ConfigDict

from lsdl import measures
from lsdl.data.dataset import Dataset
from lsdl.errors import UserError, nearest
from lsdl.models import alexnet, gpt, mlp, resnet, vit
from lsdl.models.layers import ACTIVATIONS
from lsdl.sharding import mesh as meshes

CHOICES = {  # of model fields
    "activation": tuple(ACTIVATIONS),
    "pool": tuple(vit.CLASS_TOKENS),
    "form": gpt.FORMS,
}
OF_MODEL = {"mlp": {"norm": mlp.NORMS}, "resnet": resnet.WORDS}  # of fields that one model has
POSITIVE = (
    *("width", "num_layers", "num_heads", "mlp_dim", "patch", "embed_dim", "max_length"),
    *("group_width", "vocab_size", "widening", "stem_width", "stem_pool", "kernel"),
)


# The models whose fields are known here: of a user's own, a field of the same name may be anything.
KNOWN = (
    *("mlp", "alexnet", "msra", "inception", "resnet", "efficientnet", "regnet"),
    *("vit", "gpt", "bert", "clip"),
)


def check_ranges(model: ConfigDict) -> None:
    if model.name not in KNOWN:
        return
    for field in model:
        name = field.removeprefix("vision_").removeprefix("text_")
        if name in POSITIVE and model[field] < 1:
            raise UserError(f"model.{field}={model[field]} must be at least 1.")
    for name in ("stem", "kv_heads", "stem_multiplier", "head_std", "num_experts"):
        if name in model and not isinstance(model[name], str) and model[name] < 0:
            raise UserError(f"model.{name}={model[name]} must not be negative.")
    for name in ("hidden", "depths", "widths", "pyramid"):
        if name in model and any(not isinstance(n, int) or n < 1 for n in model[name]):
            raise UserError(f"model.{name}={model[name]} must hold numbers of at least 1.")
    for name, choices in (CHOICES | OF_MODEL.get(model.name, {})).items():
        if name in model and isinstance(model[name], str):
            choice(f"model.{name}", model[name], choices)
    for name in ("dropout", "drop_path"):
        if name in model and not 0 <= model[name] < 1:
            raise UserError(f"model.{name}={model[name]} must be within [0, 1).")
    _check_convnet(model)
    if "form" in model:
        _check_gpt(model)
    if "vocab_padded" in model and model.vocab_padded < model.vocab_size:
        raise UserError(
            f"model.vocab_padded={model.vocab_padded} must be at least model.vocab_size="
            f"{model.vocab_size}."
        )


def _check_convnet(model: ConfigDict) -> None:
    for name in ("width_factor", "depth_factor", "gain"):
        if name in model and model[name] <= 0:
            raise UserError(f"model.{name}={model[name]} must be positive.")
    fields = set(model)  # not all of its own if the name was changed alone, which is told later
    if {"zero_gamma", "shortcut"} <= fields and model.zero_gamma and model.shortcut == "none":
        raise UserError(
            "model.zero_gamma=True needs a shortcut: without one (model.shortcut='none') nothing "
            "comes out of a block whose last scale is 0."
        )
    convolutions = [len(rows) for rows in (alexnet.LAYERS, alexnet.SHALLOW)]
    if model.name == "alexnet" and "widths" in fields and len(model.widths) not in convolutions:
        raise UserError(f"model.widths={model.widths} must hold 5 widths, or the 2 of C1.")
    if {"depths", "widths"} <= fields and len(model.depths) != len(model.widths):
        raise UserError(
            f"model.depths={model.depths} and model.widths={model.widths} must be as long as "
            "each other: one number for each stage."
        )
    if {"widths", "group_width"} <= fields:
        for width in model.widths:
            divides("a width of model.widths", width, model.group_width, "model.group_width")


def _check_gpt(model: ConfigDict) -> None:
    if model.form == "gpt2" and (model.kv_heads or model.rope_theta):
        raise UserError(
            f"model.kv_heads={model.kv_heads} and model.rope_theta={model.rope_theta} must be 0 "
            "for model.form=gpt2: they are of the llama form."
        )
    if model.form == "llama":
        if model.rope_theta <= 0:
            raise UserError(
                f"model.rope_theta={model.rope_theta} must be positive for model.form=llama, whose "
                "positions are rotary: 10000.0 is usual."
            )
        divides("model.width / model.num_heads", model.width // model.num_heads, 2, "rotary pairs")
    number, each, factor = model.num_experts, model.experts_per_token, model.capacity_factor
    if not number and (each or factor):
        raise UserError(
            f"model.experts_per_token={each} and model.capacity_factor={factor} must be 0 for "
            "model.num_experts=0: they are of a mixture of experts."
        )
    if number and not 1 <= each <= number:
        raise UserError(
            f"model.experts_per_token={each} must be from 1 to model.num_experts={number}."
        )
    if number and factor <= 0:
        raise UserError(f"model.capacity_factor={factor} must be positive: 1.25 is usual.")


def check_divides(config: ConfigDict, mesh: Mesh, data: Dataset) -> None:
    """The sizes that have to divide one another, in the words of the config."""
    shards, tensor = meshes.batch_shards(mesh), mesh.shape["tensor"]
    divides(
        "batch_size",
        config.batch_size,
        shards * config.accum,
        " x ".join((*meshes.BATCH_AXES, "accum")),
    )
    model, chunk = config.model if config.model.name in KNOWN else ConfigDict(), config.loss.chunk
    for prefix in ("", "vision_", "text_"):
        if f"{prefix}num_heads" not in model:
            continue
        heads, width, mlp_dim = (f"{prefix}{n}" for n in ("num_heads", "width", "mlp_dim"))
        divides(f"model.{heads}", model[heads], tensor, "the mesh axis tensor")
        divides(f"model.{mlp_dim}", model[mlp_dim], tensor, "the mesh axis tensor")
        divides(f"model.{width}", model[width], model[heads], f"model.{heads}")
    number = model.get("num_experts")
    if number:
        divides("model.num_experts", number, mesh.shape["expert"], "the mesh axis expert")
    if number and mesh.shape["stage"] > 1:
        raise UserError(
            f"model.num_experts={number} must be 0 with stage={mesh.shape['stage']} in the mesh: "
            "a pipeline carries no balance loss; use the axis expert instead."
        )
    if config.loss.balance and model and not number:
        raise UserError(
            f"loss.balance={config.loss.balance} must be 0 without model.num_experts: it balances "
            "the experts of a mixture."
        )
    if mesh.shape["stage"] > 1:
        _check_stages(config, mesh)
    if model.get("kv_heads"):
        divides("model.num_heads", model.num_heads, model.kv_heads, "model.kv_heads")
    for patch in ("patch", "vision_patch"):
        if patch in model:
            for size in data.features["image"].shape[:2]:
                divides("the image's side", size, model[patch], f"model.{patch}")
    if config.task == "contrastive":
        if config.accum > 1:
            raise UserError(
                f"accum={config.accum} must be 1 for task=contrastive: its loss compares all rows "
                "of the batch with one another, so it is no sum over microbatches."
            )
        rows = config.batch_size // (shards if config.partitioner != "jit" else 1)
        if 0 < chunk < rows:
            divides("the batch of a device", rows, chunk, "loss.chunk")
    if "max_length" in model:
        leaf = data.features["caption" if config.task == "contrastive" else "token"]
        length = leaf.shape[0] - (config.task == "language")
        if length > model.max_length:
            raise UserError(
                f"model.max_length={model.max_length} is shorter than the {length} tokens of an "
                "example."
            )
        what = "data.seq_len" if config.data.seq_len else "the tokens of an example"
        divides(what, length, mesh.shape["sequence"], "the mesh axis sequence")
    elif "pool" in model and "patch" in model:
        height, width = (size // model.patch for size in data.features["image"].shape[:2])
        length = height * width + vit.CLASS_TOKENS[model.pool]
        what = "the image's patches and class tokens"
        divides(what, length, mesh.shape["sequence"], "the mesh axis sequence")


def _check_stages(config: ConfigDict, mesh: Mesh) -> None:
    model, stages = config.model, mesh.shape["stage"]
    of = f"the mesh axis stage={stages}"
    fields = set(model)
    if "scan_layers" not in fields or "num_layers" not in fields:
        raise UserError(f"{of} needs a model of equal layers, which {model.name} is not.")
    if not model.scan_layers:
        raise UserError(f"{of} needs model.scan_layers=true: each stage has its part of the stack.")
    if "dropout" in fields and model.dropout:
        raise UserError(f"{of} needs model.dropout=0.0, not {model.dropout}.")
    if mesh.shape["sequence"] > 1:
        raise UserError(f"{of} and sequence={mesh.shape['sequence']} exclude one another.")
    divides("model.num_layers", model.num_layers, stages, of)
    rows = config.batch_size // (meshes.batch_shards(mesh) * config.accum)
    pieces = config.pipeline_microbatches or stages
    divides("a device's rows of a microbatch", rows, pieces, "pipeline_microbatches")


def check_measures(config: ConfigDict) -> None:
    words = config.log.measure
    for word in words:
        choice("log.measure", word, measures.NAMES)
    small = [word for word in measures.OF_MICROBATCHES if word in words]
    if small and config.accum < 2:
        raise UserError(
            f"log.measure has {small[0]!r}, which compares microbatches: accum={config.accum} must "
            "be at least 2."
        )
    if small and config.partitioner != "jit":
        raise UserError(
            f"log.measure has {small[0]!r}, and partitioner={config.partitioner} does not know a "
            "microbatch's gradient before the end of the step: use partitioner=jit."
        )


def divides(what: str, value: int, by: int, of: str) -> None:
    if value % by:
        near = max(value // by, 1) * by
        raise UserError(
            f"{what}={value} must be divisible by {by} ({of}): the nearest that are: {near} "
            f"and {near + by}."
        )


def choice(field: str, value: str, choices) -> str:
    if value not in choices:
        raise UserError(f"{field}={value!r} is unknown; {nearest(value, choices)}")
    return value
