"""Experiment configs: load by path, override, lock, validate; durations become steps here.

A config file has `get_config(arg)`, which starts from `template()`, fills it in and returns it
locked. What the template holds is the whole schema: there is no default below this module.
"""

import ast
import functools
import json
import math
import os
import re
import runpy
from collections.abc import Iterable

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from lsdl.errors import UserError, nearest

UNITS = {"steps": int, "epochs": float, "examples": int, "tokens": int, "percent": float}
DURATIONS = ("total", "optim.schedule.warmup", "eval.every", "checkpoint.every", "log.every")
NOT_NEGATIVE = (
    *("loss.mixup", "loss.distill_temperature", "loss.z_loss", "loss.balance"),
    "pipeline_microbatches",
    "loss.chunk",
    *("optim.clip_norm", "eval.probe_shots", "checkpoint.keep_best"),
)

# What a resumed run may change: nothing here enters the mathematics of a step.
RESUMABLE = re.compile(
    r"((dcn_)?mesh|(param_)?rules|partitioner|sequence_attention|pipeline_microbatches|remat|total_\w+)$"
    r"|(log|eval|checkpoint)\.|data\.(in_memory_mib|prefetch)$"
)


def template() -> ConfigDict:
    """The schema of every experiment, with the values that most of them share."""
    config = ConfigDict()
    config.name = ""
    config.seed = 0
    config.task = "classification"

    config.batch_size = 128  # global batch: examples per optimizer update
    config.accum = 1  # microbatches per update
    config.precision = "float32"  # of the computation: float32 | bfloat16; parameters are float32
    _durations(config, "total")

    config.mesh = "data=-1"  # ordered axes, one -1 takes the devices that are left
    config.dcn_mesh = ""  # as data=2: the part of mesh's sizes that crosses slices or nodes
    # dp | zero1 | fsdp | tp | tp_sp | fsdp_tp | one_weird_trick | pp, or pairs (logical axis, mesh
    # axis or axes) of one's own, the first that fits wins
    config.rules = placeholder(object)
    config.rules = "fsdp_tp"
    # (regex, mesh axis or axes of each dim) of single parameters: these win over the rules
    config.param_rules = ()
    config.partitioner = "jit"  # jit | shard_map | pmap
    config.sequence_attention = "ring"  # of a length that the mesh splits: ring | gather
    config.pipeline_microbatches = 0  # that travel through the stages; 0: as many as stages
    config.remat = "none"  # none | full | dots

    config.model = ConfigDict({"name": ""})  # the other fields are the model's own

    config.data = _data()

    config.loss = ConfigDict()
    config.loss.label_smoothing = 0.0  # classification
    config.loss.mixup = 0.0  # classification: alpha of Beta(alpha, alpha); 0 turns it off
    config.loss.distill_weight = 0.0  # classification: of the teacher's part
    config.loss.distill_temperature = 0.0  # 0: the teacher's most probable class
    config.loss.z_loss = 0.0  # language
    config.loss.balance = 0.0  # language, of a mixture of experts: each layer's balance loss
    config.loss.form = "softmax"  # contrastive: softmax | sigmoid
    config.loss.chunk = 0  # positions, or rows, with logits in memory at one time; 0: all
    config.init_from = ""  # a run folder or converted weights to start from
    config.init_fresh = ""  # regex of what is not taken from there, as "head/.*"
    config.teacher = ""  # a run folder whose model is distilled

    config.optim = _optim()
    for group in ("eval", "checkpoint", "log"):
        config[group] = ConfigDict()
        _durations(config[group], "every")
    config.eval.probes = ()  # "knn", "linear": on frozen features, after training
    config.eval.probe_shots = 0  # training examples of each class that they see; 0: all
    # Another labelled data set that probes, and zero-shot classification, are measured on.
    config.eval.transfer_source = ""
    config.eval.transfer_train_split = "train"
    config.eval.transfer_test_split = "test"
    config.eval.transfer_transforms = ()
    config.eval.transfer_class_names = ""  # a file with a line for each class; "": as it says
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_best = 1  # by the lowest valid loss
    config.log.tensorboard = True
    return config


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = ""  # digits | wine | stdlib_text | modular:97:add | ... | tfds:NAME
    data.mixture = ()  # (source, weight) of the training examples; (): data.source alone
    data.train_split = "train"  # or slices of splits, in TFDS's words: "train[:90%]"
    data.valid_split = "valid"
    data.test_split = "test"
    data.train_examples = placeholder(int)  # for a set without a card, and for text
    data.valid_examples = placeholder(int)
    data.test_examples = placeholder(int)
    data.sampling = "epoch"  # epoch: a permutation each epoch | replace: independent draws
    data.transforms = ()  # of training examples, in this order: "shift:1", "flip", ...
    data.eval_transforms = ()  # of every other example, as "center_crop:224"
    data.label_noise = 0.0  # share of the training labels that are drawn at random
    data.tokenizer = "bytes"  # or a tokenizer.json, or a SentencePiece .model; "": given later
    data.seq_len = 0  # tokens of a window of text, or of a caption; 0 without text
    data.segments = False  # windows say which of their documents a token belongs to
    data.in_memory_mib = 256  # a split up to this size is decoded once and kept
    data.prefetch = 2  # batches made and sent to the devices ahead of the step
    return data


def _optim() -> ConfigDict:
    optim = ConfigDict()
    optim.name = "adamw"  # sgd | adam | adamw | lars | lamb
    optim.momentum = 0.9  # sgd, lars
    optim.nesterov = False  # sgd, lars
    optim.b1 = 0.9  # adam, adamw, lamb
    optim.b2 = 0.999
    optim.eps = 1e-8
    optim.trust_coefficient = 0.001  # lars
    optim.weight_decay = 0.0
    optim.clip_norm = 0.0  # global norm of the gradient; 0 turns clipping off
    # (regex, value) in order, the first match wins, every parameter must match one
    optim.decay_mask = ((r".*/(bias|scale)", False), (r".*", True))
    optim.trust_mask = ((r".*/(bias|scale)", False), (r".*", True))  # lars, lamb
    optim.schedule = ConfigDict()
    # constant | warmup_cosine | step | exponential | polynomial
    optim.schedule.name = "warmup_cosine"
    optim.schedule.peak = 1e-3
    optim.schedule.start_factor = 0.0  # first rate of the warm-up / peak
    # last rate / peak (warmup_cosine, exponential, polynomial)
    optim.schedule.end_factor = 0.0
    optim.schedule.power = 2.0  # polynomial
    optim.schedule.boundaries_percent = (50.0, 75.0)  # of the run (step)
    optim.schedule.step_factor = 0.1  # at each boundary (step)
    _durations(optim.schedule, "warmup")
    return optim


def _durations(group: ConfigDict, name: str) -> None:
    for unit, kind in UNITS.items():
        if (name, unit) != ("total", "percent"):
            group[f"{name}_{unit}"] = placeholder(kind)


def parse_arg(arg: str | None, *choices: str) -> set[str]:
    """The comma-separated words behind `configs/x.py:`, each one of `choices`."""
    words = {word for word in (arg or "").split(",") if word}
    for word in sorted(words - set(choices)):
        raise UserError(
            f"The config has no variant {word!r}; {nearest(word, choices)}"
            if choices
            else f"The config has no variants, so {word!r} behind the colon must go."
        )
    return words


def one_of(words: set[str], choices: Iterable[str], default: str) -> str:
    """The one of `words` that is among `choices`, or the default."""
    found = sorted(words & set(choices)) or [default]
    if len(found) > 1:
        raise UserError(f"The variants {' and '.join(found)} exclude one another: give one.")
    return found[0]


def load(path: str, overrides: list[str] = ()) -> tuple[FrozenConfigDict, dict]:
    """Read the config `path[:arg]`, apply `--config.a.b=value` overrides, validate.

    Returns the frozen config and {field: value} of the overrides.
    Raises `UserError` for a file that cannot be loaded, an unknown field, a wrong type, two
    spellings of one duration on the command line, or none at all.
    """
    config = _read(path)
    given = {}
    arguments = list(overrides)
    while arguments:
        argument = arguments.pop(0)
        if not argument.startswith("--config."):
            raise UserError(
                f"Unknown argument {argument!r}: write config fields as --config.FIELD=VALUE."
            )
        field, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals:
            if not arguments or arguments[0].startswith("--"):
                raise UserError(f"--config.{field} has no value: write --config.{field}=VALUE.")
            text = arguments.pop(0)
        given[field] = _override(config, field, text)
    _clear_siblings(config, given)
    validate(config)
    return FrozenConfigDict(config), given


def _override(config: ConfigDict, field: str, text: str):
    """Set `field` from its command-line `text`, keeping the field's type."""
    if field not in flatten(config):
        raise UserError(_unknown_field(field, config))
    group, _, leaf = field.rpartition(".")
    for name in filter(None, group.split(".")):
        config = config[name]
    kind = config.get_type(leaf)
    try:
        value = _parse(text, kind)
    except (ValueError, TypeError, SyntaxError, KeyError, MemoryError) as error:
        example = {bool: "true or false", tuple: "('a', 'b')"}.get(kind, f"of type {kind.__name__}")
        raise UserError(f"--config.{field}={text}: the value must be {example}.") from error
    config[leaf] = value
    return value


def _parse(text: str, kind: type):
    if kind is bool:
        return {"true": True, "false": False, "True": True, "False": False}[text]
    if kind is tuple:
        value = ast.literal_eval(text)
        return tuple(value) if isinstance(value, tuple | list) else (value,)
    return text if kind is object else kind(text)  # an object: the name of a rule table


def _read(path: str) -> ConfigDict:
    """What the file's `get_config(arg)` returns."""
    file, _, arg = path.partition(":")
    if not file.endswith(".py") or not os.path.isfile(file):
        raise UserError(f"There is no config file {file!r}: give the path of a Python file.")
    # Not an import: the cache of bytecode misses an edit within the same second.
    module = runpy.run_path(file, run_name="lsdl_config")
    if "get_config" not in module:
        raise UserError(f"The config file {file!r} has no function get_config(arg).")
    return module["get_config"](arg)


def _unknown_field(word: str, config: ConfigDict) -> str:
    fields = flatten(config)
    group, _, leaf = word.rpartition(".")
    if any(field.startswith(f"{word}.") for field in fields):
        return f"The field {word!r} is a group: set one of its fields, {word}.NAME=VALUE."
    inside = {f.removeprefix(f"{group}."): f for f in fields if group and f.startswith(f"{group}.")}
    if not inside:
        return f"The config has no field {word!r}; {nearest(word, fields)}"
    return f"The config has no field {word!r}; in {group}, {nearest(leaf, inside)}"


def _clear_siblings(config: ConfigDict, given: dict) -> None:
    """A duration given on the command line replaces the file's, whatever its unit."""
    for name in DURATIONS:
        group, _, stem = name.rpartition(".")
        spelled = [f"{name}_{unit}" for unit in UNITS if f"{name}_{unit}" in given]
        if len(spelled) > 1:
            raise UserError(f"{spelled[0]} and {spelled[1]} say the same duration: give one.")
        if spelled:
            node = config[group] if group else config
            for unit in UNITS:
                field = f"{stem}_{unit}"
                if field in node and f"{name}_{unit}" not in spelled:
                    node[field] = None


def validate(config: ConfigDict) -> None:
    """Check what needs no device and no data: the schema, the durations, the ranges."""
    schema = template()
    fields, own = flatten(schema), ("model.",)
    actual = flatten(config)
    for field in sorted(fields.keys() - actual.keys()):
        raise UserError(f"The config lacks the field {field!r}: start from lsdl.config.template().")
    for field in sorted(actual.keys() - fields.keys()):
        if not field.startswith(own):
            raise UserError(f"The config has no field {field!r}: {nearest(field, fields)}")
    for field, value in actual.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{field}={value} must be a finite number.")
    _check_tuples(actual)
    try:
        re.compile(actual["init_fresh"])
    except re.error as error:
        raise UserError(f"init_fresh={actual['init_fresh']!r} is no regex: {error}.") from error
    if actual["init_fresh"] and not actual["init_from"]:
        raise UserError(f"init_fresh={actual['init_fresh']!r} needs an init_from.")
    if not actual["name"]:
        raise UserError("name='' is empty: it names the run's default folder, runs/NAME.")
    for name in DURATIONS:
        spelled = [f"{name}_{u}" for u in UNITS if actual.get(f"{name}_{u}") is not None]
        if len(spelled) != 1:
            given = " and ".join(spelled) or "none"
            raise UserError(f"Exactly one of {name}_{{{','.join(UNITS)}}} is needed, not {given}.")
        least = 0 if name.endswith("warmup") else 1e-12
        if actual[spelled[0]] < least:
            rule = "be positive" if least else "not be negative"
            raise UserError(f"{spelled[0]}={actual[spelled[0]]} must {rule}.")
    for field in ("batch_size", "accum", "checkpoint.keep_latest", "data.prefetch"):
        if actual[field] < 1:
            raise UserError(f"{field}={actual[field]} must be at least 1.")
    for field in ("optim.b1", "optim.b2", "optim.momentum"):
        if not 0 <= actual[field] < 1:
            raise UserError(f"{field}={actual[field]} must be within [0, 1).")
    for field in ("loss.label_smoothing", "loss.distill_weight"):
        if not 0 <= actual[field] <= 1:
            raise UserError(f"{field}={actual[field]} must be within [0, 1].")
    if actual["optim.schedule.step_factor"] <= 0:
        raise UserError(
            f"optim.schedule.step_factor={actual['optim.schedule.step_factor']} must be positive."
        )
    for field in NOT_NEGATIVE:
        if actual[field] < 0:
            raise UserError(f"{field}={actual[field]} must not be negative.")
    if not 0 <= actual["seed"] < 2**32:
        raise UserError(f"seed={actual['seed']} must be within [0, 2^32).")
    if actual["batch_size"] % actual["accum"]:
        raise UserError(
            f"accum={actual['accum']} must divide batch_size={actual['batch_size']}: "
            f"choose from {_divisors(actual['batch_size'])}."
        )


def _check_tuples(actual: dict) -> None:
    """A tuple's elements have no type of their own in a ConfigDict."""
    words = ("data.transforms", "data.eval_transforms", "eval.transfer_transforms", "eval.probes")
    for field in words:
        if not all(isinstance(word, str) for word in actual[field]):
            raise UserError(f"{field}={actual[field]} must hold words such as 'shift:1'.")
    percents = actual["optim.schedule.boundaries_percent"]
    if not all(isinstance(p, int | float) and math.isfinite(p) for p in percents):
        raise UserError(f"optim.schedule.boundaries_percent={percents} must hold numbers.")
    for field in ("optim.decay_mask", "optim.trust_mask"):
        for rule in actual[field]:
            try:
                pattern, value = rule
                re.compile(pattern)
                good = isinstance(value, bool)
            except (TypeError, ValueError, re.error):
                good = False
            if not good:
                raise UserError(f"{field} has the rule {rule!r}: write ('regex', True or False).")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def duration_steps(
    group: ConfigDict,
    stem: str,
    *,
    batch_size: int,
    steps_per_epoch: int,
    tokens_per_example: int,
    total_steps: int = 0,
) -> int:
    """The one duration `stem`_{steps,epochs,examples,tokens,percent} of `group`, in steps.

    An epoch is `steps_per_epoch` steps: the split's examples // batch_size, because training
    drops the last partial batch. A duration other than 0 is at least one step.
    """
    unit = next(u for u in UNITS if group.get(f"{stem}_{u}") is not None)
    value = group[f"{stem}_{unit}"]
    if unit == "tokens" and not tokens_per_example:
        raise UserError(f"{stem}_tokens={value} needs a language task: give {stem}_examples.")
    steps = {
        "steps": value,
        "epochs": round(min(value * steps_per_epoch, 2.0**53)),
        "examples": math.ceil(value / batch_size),
        "tokens": math.ceil(value / (batch_size * max(tokens_per_example, 1))),
        "percent": round(value / 100 * total_steps),
    }[unit]
    return max(steps, 1) if value else 0


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict:
    """{"a.b": value} of a config, tuples included, in sorted order."""
    flat = {}
    for key in sorted(config):
        value = config[key]
        if isinstance(value, ConfigDict | FrozenConfigDict | dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def to_json(config: ConfigDict) -> dict:
    """The config as JSON values, in the form that a run folder stores and compares."""
    return json.loads(json.dumps(flatten(config)))


def from_json(fields: dict) -> FrozenConfigDict:
    """The config that a run folder stores: `to_json` undone."""
    config = template()
    for field, value in fields.items():
        *groups, name = field.split(".")
        group = functools.reduce(ConfigDict.__getitem__, groups, config)
        group[name] = _tuples(value)
    return FrozenConfigDict(config)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compare(stored: dict, current: dict) -> dict[str, tuple]:
    """{field: (stored, current)} of what a resumed run changes (both from `to_json`).

    Raises `UserError` naming the first field that a resume may not change (`RESUMABLE`).
    """
    changed = {
        field: (stored.get(field), current.get(field))
        for field in sorted(stored.keys() | current.keys())
        if stored.get(field) != current.get(field)
    }
    for field, (old, new) in changed.items():
        if not RESUMABLE.match(field):
            raise UserError(
                f"The workdir holds a run with {field}={old}, and this one has {field}={new}: "
                "choose another --workdir, or take the change back."
            )
    return changed
