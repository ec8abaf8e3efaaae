"""Weights of Hugging Face's models to lsdl's and back, both by the same table of names.

Weights are {"params": tree, "model_state": tree} of float32 arrays; tensors {their name: array}.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from lsdl.errors import UserError
from lsdl.models import (
    bert,
    clip,
    convert_convnets,
    convert_transformers,
    efficientnet,
    gpt,
    regnet,
    resnet,
    vit,
)
from lsdl.models.convert_rules import SYNONYMS, Counterpart

COUNTERPARTS = {
    bert.Bert: convert_transformers.bert,
    clip.Clip: convert_transformers.clip,
    efficientnet.EfficientNet: convert_convnets.efficientnet,
    gpt.Gpt: convert_transformers.gpt,
    regnet.RegNet: convert_convnets.regnet,
    resnet.ResNet: convert_convnets.resnet,
    vit.Vit: convert_transformers.vit,
}

Weights = dict[str, Any]
Tensors = Mapping[str, np.ndarray]


def to_lsdl(tensors: Tensors, module: nn.Module, abstract: Weights) -> Weights:
    """Weights shaped as `abstract`, from the tensors of a Hugging Face file.

    Floats of any size become float32. Raises `UserError` for tensors that are missing, unknown or
    of another shape, and for a `module` that Hugging Face has no counterpart of.
    """
    expected = _unstacked(_shapes(abstract))
    theirs = counterpart(module, abstract)
    tensors = _select(tensors, theirs)
    arrays, wrong = {}, []
    for ours, names, op in theirs.rules:
        if not ours:
            continue
        given = [np.asarray(tensors[name], np.float32) for name in names]
        try:
            read = dict(zip(ours, op.read(*given), strict=True))
        except (ValueError, IndexError):  # other sizes than the operation is for
            read = {}
        if [value.shape for value in read.values()] != [expected[path].shape for path in ours]:
            wrong.append(f"{names[0]} {given[0].shape} for {ours[0]} {expected[ours[0]].shape}")
        arrays |= read
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(tensors)} tensors have another shape than the model needs, the "
            f"first: {wrong[0]}: give the config of the model that the weights are of."
        )
    return _stacked(arrays, abstract)


def to_hf(weights: Weights, module: nn.Module) -> dict[str, np.ndarray]:
    """The tensors of the Hugging Face file of `weights`; `to_lsdl` inverted."""
    arrays = _unstacked(_flatten(weights))
    theirs = counterpart(module, weights)
    paths = [path for rule in theirs.rules for path in rule.ours]
    _same(arrays, paths, "arrays", theirs.architecture)
    tensors = {}
    for ours, names, op in theirs.rules:
        written = op.write(*(np.asarray(arrays[path]) for path in ours))
        # The arrays' own memory order: the writer of the file does not look at strides.
        written = [np.asarray(tensor, order="C") for tensor in written]
        tensors |= zip(names, written, strict=True)
    return tensors


def fields(module: nn.Module, abstract: Weights) -> dict[str, Any]:
    """The config.json by which transformers builds the model that `to_hf` has the tensors of."""
    theirs = counterpart(module, abstract)
    values: dict[str, Any] = {
        "architectures": [theirs.architecture],
        "model_type": theirs.model_type,
    }
    flat = {field.theirs: field.value for field in theirs.fields} | dict(theirs.extra)
    for name, value in flat.items():
        *groups, leaf = name.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        group[leaf] = value
    values.pop("num_labels", None)  # id2label says it
    return values


def check_fields(values: Mapping[str, Any] | None, module: nn.Module, abstract: Weights) -> None:
    """Raise `UserError` unless `values`, a Hugging Face config.json, describes `module`.

    A field that is not there has transformers' default; without a file the shapes have to do.
    """
    if values is None:
        return
    theirs = counterpart(module, abstract)
    kind = values.get("model_type", theirs.model_type)
    if kind != theirs.model_type:
        raise UserError(
            f"config.json has model_type={kind!r}, and model.* describes a {theirs.model_type!r}: "
            "choose the config of that model."
        )
    values = _modern(values)
    for field in theirs.fields:
        value: Any = values
        for name in field.theirs.split("."):
            value = (value or {}).get(name)
        value = field.default if value is None else value
        if isinstance(value, str):
            value = SYNONYMS.get(value, value)
        if value != field.value:
            raise UserError(
                f"config.json has {field.theirs}={value!r}, and {field.ours} asks for "
                f"{field.value!r}: give the config of the model that the weights are of."
            )


def counterpart(module: nn.Module, abstract: Weights) -> Counterpart:
    """The table of `module`, whose weights are shaped as `abstract`."""
    if type(module) not in COUNTERPARTS:
        names = ", ".join(sorted(cls.__name__ for cls in COUNTERPARTS))
        raise UserError(f"{type(module).__name__} has no counterpart at Hugging Face: {names} do.")
    shapes = {path: leaf.shape for path, leaf in _unstacked(_shapes(abstract)).items()}
    return COUNTERPARTS[type(module)](module, shapes)


def _modern(values: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of older versions of transformers in the words of the newer ones."""
    values = dict(values)
    if "id2label" in values:
        values["num_labels"] = len(values["id2label"])
    if "rope_parameters" not in values:
        scaling = dict(values.get("rope_scaling") or {})
        scaling.setdefault("rope_type", scaling.get("type"))
        values["rope_parameters"] = {"rope_theta": values.get("rope_theta")} | scaling
    text = values.get("text_config") or {}
    if text.get("eos_token_id") == text.get("vocab_size", 49408) - 1:
        values["text_config"] = text | {"eos_token_id": 2}  # both are read at the largest token
    return values


def _select(tensors: Tensors, theirs: Counterpart) -> Tensors:
    """The tensors of the table under its names, after those that may be there are left out."""
    names = {name for rule in theirs.rules if rule.ours for name in rule.theirs}
    counts = {name for rule in theirs.rules if not rule.ours for name in rule.theirs}
    known = names | counts | theirs.tied.keys()
    found = {}
    for name, tensor in tensors.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        if name not in known and theirs.prefix + name in known:
            name = theirs.prefix + name
        if name in known or not re.search(theirs.ignored, name):
            found[name] = tensor
    for name, first in theirs.tied.items():
        tensor = found.pop(name, None)
        if tensor is not None and first in found and not np.array_equal(tensor, found[first]):
            raise UserError(
                f"The tensors {name} and {first} differ, and the model has one array for both: "
                "give a model of these fields that is not tied, or other weights."
            )
    found = {name: tensor for name, tensor in found.items() if name not in counts}
    _same(found, names, "tensors", "the model")
    return found


def _same(given: Iterable[str], wanted: Iterable[str], what: str, of: str) -> None:
    given, wanted = set(given), set(wanted)
    problems = []
    for word, names in (("missing", wanted - given), ("unknown", given - wanted)):
        if names:
            first = ", ".join(sorted(names)[:3]) + (", ..." if len(names) > 3 else "")
            problems.append(f"{word} {len(names)} ({first})")
    if problems:
        raise UserError(
            f"The {len(given)} {what} are not the {len(wanted)} of {of}: {'; '.join(problems)}: "
            "give the config of the model that the weights are of."
        )


def _flatten(weights: Weights) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in leaves}


def _shapes(abstract: Weights) -> dict[str, np.ndarray]:
    """Arrays of these shapes that take no memory."""
    zero = np.zeros((), np.float32)
    return {p: np.broadcast_to(zero, leaf.shape) for p, leaf in _flatten(abstract).items()}


def _unstacked(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Scanned layers, `stack/blocks`, as if each were one of its own, `stack/block_0`, ..."""
    flat = {}
    for path, value in arrays.items():
        stack, scanned, rest = path.partition("stack/blocks/")
        if scanned:
            flat |= {f"{stack}stack/block_{i}/{rest}": layer for i, layer in enumerate(value)}
        else:
            flat[path] = value
    return flat


def _stacked(arrays: Mapping[str, np.ndarray], abstract: Weights) -> Weights:
    """The tree of `abstract`, of arrays in which every layer is one of its own."""

    def leaf(keys, like):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        stack, scanned, rest = path.partition("stack/blocks/")
        if not scanned:
            return arrays[path]
        layers = [arrays[f"{stack}stack/block_{i}/{rest}"] for i in range(like.shape[0])]
        return np.stack(layers)

    return jax.tree_util.tree_map_with_path(leaf, abstract)
