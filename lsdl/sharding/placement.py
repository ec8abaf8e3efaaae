"""The sharding of every array of a state, and why it is that.

A parameter's own rule, a (regex, spec) pair, wins over the table, for the optimiser's moments of
the parameter as well.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError, nearest
from lsdl.sharding.mesh import BATCH_AXES
from lsdl.sharding.rules import (
    LAW,
    TABLES,
    UNSPLIT,
    Axes,
    ParamRules,
    Rules,
    axes_of,
    label,
    parts,
    resolve,
)

LARGE_BYTES = 2**20  # an array from this size on must be split if a rule meant to


@dataclass(frozen=True)
class Placement:
    """How one array is split, by which rules, and which of its dims a rule meant to in vain."""

    path: str
    names: tuple[str | None, ...]  # the dims' roles
    shape: tuple[int, ...]
    spec: P
    won: tuple[str, ...]  # for each dim the rule that split it, or ""
    missed: str  # "" or the sentence that says which dim could not be split
    nbytes: int

    @property
    def rule(self) -> str:
        """Why the array is split as it is."""
        rules = [rule for rule in dict.fromkeys(self.won) if rule]
        return ", ".join(rules) or ("replicated: " + (self.missed or "no rule splits it"))


def tree_shardings(
    boxed: Any,
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    *,
    param_rules: ParamRules = (),
    moments: Sequence[str] = (),
) -> tuple[Any, list[Placement]]:
    """Shardings for an abstract tree whose parameters carry logical names (Flax boxes).

    Arrays without names (counters, keys, running statistics) are replicated. Below `opt_state` a
    named array is a moment: split like its parameter, and over the mesh axes `moments` on the first
    dim that they divide. Returns the tree of `NamedSharding`, shaped like the unboxed tree, and a
    `Placement` per array.
    Raises `UserError` for an array of `LARGE_BYTES` or more that a rule meant to split and could
    not, and for a pair of `param_rules` that does not fit its parameters or has none.
    """
    placements, matched = [], set()
    rules = [rule for rule in rules if rule[0] not in SEEN_BY]  # a table of positions stays whole

    def place(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        boxes = _is_box(leaf)
        if boxes and not hasattr(leaf.value, "ndim"):  # what the optimiser keeps of others alone
            return leaf.value
        value = leaf.value if boxes else leaf
        boxes = boxes and _is_like_parameter(leaf)
        names = (None,) * value.ndim
        if boxes:
            names = (None,) * (value.ndim - len(leaf.names)) + leaf.names
        own = [] if path.startswith("model_state/") or not boxes else param_rules
        name = _parameter(keys)
        hits = [i for i, (pattern, _) in enumerate(own) if re.fullmatch(pattern, name)]
        matched.update(hits)
        if hits:
            extra = value.ndim - len(leaf.names)
            inner = names[extra:], value.shape[extra:]
            spec = P(*(None,) * extra, *_by_own_rule(own[hits[0]], name, *inner, mesh))
            missed, won = "", (f"param_rules[{hits[0]}]",) * len(spec)
        else:
            spec, missed, won = resolve(names, value.shape, rules, mesh)
        if boxes and path.startswith("opt_state/"):
            spec, short, won = _split_more(spec, names, value.shape, mesh, axes=moments, won=won)
            missed = missed or short
        nbytes = value.size * value.dtype.itemsize
        if missed and nbytes >= LARGE_BYTES:
            raise UserError(
                f"{path} {value.shape} would be replicated on every device: {missed}. "
                "Choose sizes or mesh axes that divide."
            )
        placements.append(Placement(path, names, value.shape, spec, won, missed, nbytes))
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, boxed, is_leaf=_is_box)
    for i, (pattern, _) in enumerate(param_rules):
        if i not in matched:
            raise UserError(
                f"param_rules[{i}] matches no parameter: {pattern!r} must match a whole path such "
                f"as {_example(placements)!r}."
            )
    return shardings, placements


def gradient_shardings(boxed_params: Any, mesh: Mesh | AbstractMesh, rules: Rules, **more) -> Any:
    """The tree of shardings that gradients are wanted in: those of the moments they are added to.

    `more`: as of `tree_shardings`.
    """
    shardings, _ = tree_shardings({"opt_state": boxed_params}, mesh, rules, **more)
    return shardings["opt_state"]


# Roles of activations alone but for the batch, and that of a parameter which such a model has.
SEEN_BY = {"conv_batch": "conv_out", "length": "heads", "residual_length": "heads"}


def check_used(mesh: Mesh | AbstractMesh, placements: Sequence[Placement], rules: Rules) -> None:
    """Every mesh axis larger than 1 must split the batch, a parameter or an activation."""
    used, roles = set(BATCH_AXES), set()
    for placement in placements:
        used |= {axis for axes in placement.spec for axis in axes_of(axes)}
        roles |= set(placement.names)
    for logical, axes in rules:
        if logical in SEEN_BY and SEEN_BY[logical] in roles:
            used |= set(axes_of(axes))
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            known = roles | {role for table in TABLES.values() for role, _ in table}
            lost = [name for name, axes in rules if axis in axes_of(axes) and name not in known]
            known -= {None}
            hint = f" No dim has the role {lost[0]!r}; {nearest(lost[0], known)}" if lost else ""
            raise UserError(
                f"The mesh axis {axis}={size} splits nothing in this model under these rules: "
                f"give its devices to another axis, or choose other rules.{hint}"
            )


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _is_like_parameter(leaf: Any) -> bool:
    """Whether a box holds its parameter's dims, and perhaps a history's before them.

    Adafactor's factored moments lack a dim, and are one number where it does not need them.
    """
    return leaf.value.ndim >= len(leaf.names) and leaf.value.shape != (1,)


def _parameter(keys: tuple) -> str:
    """`block_0/mlp/up/kernel`: the path in the parameter tree, of a moment too."""
    inner: list[str] = []
    for key in reversed(keys):
        if not isinstance(key, jax.tree_util.DictKey) or key.key in ("params", "opt_state"):
            break
        inner.insert(0, key.key)
    return "/".join(inner)


def _example(placements: Sequence[Placement]) -> str:
    paths = [p.path.removeprefix("params/") for p in placements if p.path.startswith("params/")]
    return paths[0] if paths else "head/kernel"


def _by_own_rule(
    rule: tuple[str, tuple[Axes, ...]],
    name: str,
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
) -> tuple[Axes, ...]:
    _, spec = rule
    fault = f"param_rules has the pair {rule!r}, which matches {name} {tuple(shape)}: "
    if len(spec) != len(shape):
        raise UserError(f"{fault}give one entry for each of its {len(shape)} dims.")
    for size, role, axes in zip(shape, names, spec, strict=True):
        if size % parts(axes, mesh):
            raise UserError(f"{fault}{size} is not divisible by {parts(axes, mesh)}.")
        if role == UNSPLIT and axes_of(axes):
            raise UserError(f"{fault}{LAW}")
    return spec


def _split_more(
    spec: P,
    names: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    *,
    axes: Sequence[str],
    won: tuple[str, ...],
) -> tuple[P, str, tuple[str, ...]]:
    """`spec`, and the first dim that it leaves whole split over those of `axes` that are free."""
    used = {axis for chosen in spec for axis in axes_of(chosen)}
    free = tuple(axis for axis in axes if axis not in used and mesh.shape[axis] > 1)
    number = parts(free, mesh)
    if number == 1:
        return spec, "", won
    for dim, size in enumerate(shape):
        if not axes_of(spec[dim]) and size % number == 0 and names[dim] != UNSPLIT:
            more = (*won[:dim], label("moments", free), *won[dim + 1 :])
            return P(*spec[:dim], free, *spec[dim + 1 :]), "", more
    short = f"no dim of {tuple(shape)} is divisible by {number} ({' x '.join(free)})"
    return spec, short if math.prod(shape) >= number else "", won
