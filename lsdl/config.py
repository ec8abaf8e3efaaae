"""Experiment configs: load by path, override, lock, validate; durations become steps here.

A config file has `get_config(arg)`, which starts from `template()`, fills it in and returns it
locked.
"""

import ast
import functools
import json
import math
import os
import re
import runpy
import traceback
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from lsdl.errors import UserError, nearest
from lsdl.files import check_name, near_file
from lsdl.schema import DURATIONS, OPTIONAL_DURATIONS, UNITS, template
from lsdl.secrecy import holds_secret

NOT_NEGATIVE = (
    *("loss.mixup", "loss.distill_temperature", "loss.z_loss", "loss.balance"),
    *("pipeline_microbatches", "stuck_after_s"),
    "loss.chunk",
    *("optim.clip_norm", "eval.probe_shots", "checkpoint.keep_best"),
    *(f"optim.schedule.{name}_factor" for name in ("start", "end", "low")),
    *("optim.schedule.growth_decay", "guard.limit", "guard.audit_every_steps"),
    *("optim.schedule.peak", "optim.weight_decay"),
    *("optim.eps", "optim.eps_root", "optim.damping", "optim.sam_rho"),
    *("optim.muon_rms", "optim.linesearch_steps", "optim.initial_accumulator"),
)

AT_LEAST_1 = (
    *("optim.lbfgs_memory", "optim.newton_limit", "optim.cg_steps", "optim.factored_dim"),
    "guard.rewind_steps",
)

# What a resumed run may change: nothing here enters the mathematics of a step.
RESUMABLE = re.compile(
    r"((dcn_)?mesh|(param_)?rules|partitioner|sequence_attention|pipeline_microbatches|remat|total_\w+"
    r"|stuck_after_s)$"
    r"|(log|eval|checkpoint)\.|data\.(in_memory_mib|prefetch)$|guard\.(limit|audit_every_steps)$"
)


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
        near = near_file(file, "configs")
        hint = f"did you mean {near!r}?" if near else "give the path of a Python file."
        raise UserError(f"There is no config file {file!r}: {hint}")
    # Not an import: the cache of bytecode misses an edit within the same second.
    try:
        module = runpy.run_path(file, run_name="lsdl_config")
        if "get_config" not in module:
            raise UserError(f"The config file {file!r} has no function get_config(arg).")
        config = module["get_config"](arg)
    except UserError:
        raise
    except Exception as error:  # the file is the user's program
        raise UserError(_failure(file, error)) from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"get_config of {file!r} returns {config!r:.40}, which is no config: end it with "
            "return config.lock()."
        )
    return config


def _failure(file: str, error: Exception) -> str:
    """Where in the config file it went wrong, and how."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    lines += [error.lineno] if isinstance(error, SyntaxError) else []
    place = f"line {lines[-1]} of {file}" if lines else file
    return f"The config fails at {place}: {type(error).__name__}: {str(error).strip()}"


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
    for name in (*DURATIONS, *OPTIONAL_DURATIONS):
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
    for field in sorted(actual.keys() - fields.keys()):
        if not field.startswith(own):
            raise UserError(f"The config has no field {field!r}: {nearest(field, fields)}")
    for field in sorted(fields.keys() - actual.keys()):
        raise UserError(f"The config lacks the field {field!r}: start from lsdl.config.template().")
    _check_types(schema, actual)
    for field, value in actual.items():
        if isinstance(value, str | tuple) and holds_secret(str(value)):
            raise UserError(
                f"{field} holds what looks like a password or a key, and a run records all fields: "
                "put it into a file or an environment variable of whatever asks for it."
            )
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
    check_name(actual["name"], what="name")
    _check_durations(actual)
    for field in (*("batch_size", "accum", "checkpoint.keep_latest", "data.prefetch"), *AT_LEAST_1):
        if actual[field] < 1:
            raise UserError(f"{field}={actual[field]} must be at least 1.")
    for field in ("optim.b1", "optim.b2", "optim.momentum", "optim.ema_decay"):
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
    if actual["optim.clip_form"] != "global_norm" and not actual["optim.clip_norm"]:
        raise UserError(
            f"optim.clip_form={actual['optim.clip_form']!r} clips nothing with clip_norm=0.0: "
            "give its threshold there."
        )
    if not 0 <= actual["seed"] < 2**32:
        raise UserError(f"seed={actual['seed']} must be within [0, 2^32).")
    if actual["batch_size"] % actual["accum"]:
        raise UserError(
            f"accum={actual['accum']} must divide batch_size={actual['batch_size']}: "
            f"choose from {_divisors(actual['batch_size'])}."
        )


def _check_types(schema: ConfigDict, actual: dict) -> None:
    """What a ConfigDict lets pass: None for anything, and a truth value for a number.

    An integer may stand for a real number.
    """
    for field, default in flatten(schema).items():
        group, _, leaf = field.rpartition(".")
        node = functools.reduce(ConfigDict.__getitem__, filter(None, group.split(".")), schema)
        kind, value = node.get_type(leaf), actual[field]
        if field == "rules":
            if not isinstance(value, str | tuple):
                raise UserError(f"rules={value!r} must be a name, or a tuple of pairs.")
        elif not is_of(value, kind) and not (value is None and default is None):
            raise UserError(f"{field}={value!r} must be of type {kind.__name__}.")


def is_of(value: Any, kind: Any) -> bool:
    """Whether `value` is of `kind`: bool, int, float (or an int), str, tuple, tuple[int, ...]."""
    kind, of = typing.get_origin(kind) or kind, typing.get_args(kind)
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    right = isinstance(value, int | float if kind is float else kind)
    return right and all(is_of(inner, of[0]) for inner in value) if of else right


def _check_durations(actual: dict) -> None:
    for name in (*DURATIONS, *OPTIONAL_DURATIONS):
        units = [unit for unit in UNITS if f"{name}_{unit}" in actual]
        spelled = [f"{name}_{u}" for u in units if actual[f"{name}_{u}"] is not None]
        needed = name in DURATIONS
        if len(spelled) > 1 or (needed and not spelled):
            given, most = " and ".join(spelled) or "none", "Exactly" if needed else "At most"
            said = "is needed" if needed else "may be given"
            raise UserError(f"{most} one of {name}_{{{','.join(units)}}} {said}, not {given}.")
        least = 0 if name.endswith("warmup") else 1e-12
        if spelled and actual[spelled[0]] < least:
            rule = "be positive" if least else "not be negative"
            raise UserError(f"{spelled[0]}={actual[spelled[0]]} must {rule}.")


def _check_tuples(actual: dict) -> None:
    """A tuple's elements have no type of their own in a ConfigDict."""
    words = ("data.transforms", "data.eval_transforms", "eval.transfer_transforms", "eval.probes")
    words += ("log.measure",)
    for field in words:
        if not all(isinstance(word, str) for word in actual[field]):
            raise UserError(f"{field}={actual[field]} must hold words such as 'shift:1'.")
    for unit in ("percent", "steps", "epochs"):
        places = actual[f"optim.schedule.boundaries_{unit}"]
        if not all(isinstance(p, int | float) and math.isfinite(p) for p in places):
            raise UserError(f"optim.schedule.boundaries_{unit}={places} must hold numbers.")
    if actual["optim.schedule.boundaries_steps"] and actual["optim.schedule.boundaries_epochs"]:
        raise UserError(
            "optim.schedule.boundaries_steps and optim.schedule.boundaries_epochs say the same: "
            "give one."
        )
    for field in ("optim.decay_mask", "optim.trust_mask", "optim.muon_mask", "optim.rate_rules"):
        for rule in actual[field]:
            factors = field == "optim.rate_rules"
            try:
                pattern, value = rule
                re.compile(pattern)
                good = isinstance(value, int | float if factors else bool)
                good = good and (not factors or (math.isfinite(value) and value >= 0))
            except (TypeError, ValueError, re.error):
                good = False
            if not good:
                form = "a factor of at least 0" if factors else "True or False"
                raise UserError(f"{field} has the rule {rule!r}: write ('regex', {form}).")


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


def duration_steps(group: ConfigDict, stem: str, **units) -> int:
    """The one duration `stem`_{steps,epochs,examples,tokens,percent} of `group`, in steps.

    0 if there is none: only `OPTIONAL_DURATIONS` may be missing. `units`: as in `to_steps`.
    """
    given = [u for u in UNITS if group.get(f"{stem}_{u}") is not None]
    return to_steps(given[0], group[f"{stem}_{given[0]}"], what=stem, **units) if given else 0


def to_steps(
    unit: str,
    value: float,
    *,
    what: str,
    batch_size: int,
    steps_per_epoch: int,
    tokens_per_example: int,
    total_steps: int = 0,
    ramp: Any = None,
    epoch_examples: int = 0,
    place: bool = False,
) -> int:
    """`value` of `unit` in steps; `what` is the field's name without its unit.

    An epoch is `steps_per_epoch` steps: the split's examples // batch_size, because training
    drops the last partial batch. A duration other than 0 is at least one step.
    Under a batch `ramp` an epoch is `epoch_examples`, and a percent is one of the run's examples; a
    `place` in the run is where as many are taken, and any other length has the mean batch.
    """
    if unit == "tokens" and not tokens_per_example:
        raise UserError(f"{what}_tokens={value} needs a language task: give {what}_examples.")
    if ramp is None or unit == "steps":
        steps = {
            "steps": value,
            "epochs": round(min(value * steps_per_epoch, 2.0**53)),
            "examples": math.ceil(value / batch_size),
            "tokens": math.ceil(value / (batch_size * max(tokens_per_example, 1))),
            "percent": round(value / 100 * total_steps),
        }[unit]
    else:
        examples = {
            "epochs": min(value * epoch_examples, 2.0**53),
            "examples": value,
            "tokens": value / max(tokens_per_example, 1),
            "percent": value / 100 * ramp.total_examples,
        }[unit]
        mean = ramp.total_examples / total_steps
        steps = ramp.step_at(examples) if place else round(examples / mean)
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
    """The config that a run folder stores: `to_json` undone. It is checked as one from a file."""
    config = template()
    for field, value in fields.items():
        *groups, name = field.split(".")
        try:
            group = functools.reduce(ConfigDict.__getitem__, groups, config)
            group[name] = _tuples(value)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"The stored field {field[:80]!r} is not a config's: {reason}"
            ) from error
    validate(config)
    return FrozenConfigDict(config)


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def compare(stored: dict, current: dict) -> dict[str, tuple]:
    """{field: (stored, current)} of what a resumed run changes (both from `to_json`).

    Raises `UserError` naming the first field that a resume may not change (`RESUMABLE`).
    """
    # A field that an older lsdl did not have stands at its default, which changes nothing.
    fresh = {field: value for field, value in to_json(template()).items() if field in current}
    stored = fresh | stored
    changed = {
        field: (stored.get(field), current.get(field))
        for field in sorted(stored.keys() | current.keys())
        if stored.get(field) != current.get(field)
    }
    for field, (old, new) in changed.items():
        if current.get("batch_ramp") and field.startswith("total_"):
            raise UserError(
                f"The workdir holds a run with {field}={old} and a batch_ramp, whose steps take "
                f"other examples with {field}={new}: choose another --workdir, or take it back."
            )
        if not RESUMABLE.match(field):
            raise UserError(
                f"The workdir holds a run with {field}={old}, and this one has {field}={new}: "
                "choose another --workdir, or take the change back (docs/howto/restart.md)."
            )
    return changed
