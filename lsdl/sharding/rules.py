"""Which mesh axis each logical axis is split over, and the sharding of every array from it.

A table is an ordered list of (logical axis, mesh axis or axes). The first rule wins whose mesh
axes are still free in the array and divide the dim; no rule left means not split. Flax applies
the same tables to the activations (`nn.with_logical_constraint`). A parameter's own rule, a
(regex, spec) pair, wins over the table, for the optimiser's moments of the parameter as well.
"""

import math
import re
from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError, nearest
from lsdl.sharding.mesh import AXES, BATCH_AXES

Axes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, Axes]]
ParamRules = Sequence[tuple[str, tuple[Axes, ...]]]

# Roles of activations alone, and the one that a table without a rule of theirs has them follow.
FOLLOWS = {"conv_batch": "batch", "residual_length": "length"}
# What an expert takes of the batch is not split over `expert`: it has that dim.
_ROWS = (("experts", "expert"), ("batch", BATCH_AXES), ("batch", ("data", "fsdp")))
_BATCH = (*_ROWS, ("length", "sequence"), ("layers", "stage"))
_ALIKE = (("conv_batch", BATCH_AXES), ("residual_length", "sequence"))
_WIDE = ("heads", "mlp", "vocab", "conv_out")
_TENSOR = tuple((axis, "tensor") for axis in _WIDE)
_FSDP = tuple((axis, "fsdp") for axis in _WIDE)
# A dim that tensor parallelism splits is split over fsdp too where no other dim of the array
# takes it (biases and the like), so that FSDP leaves nothing large replicated.
_BOTH = tuple((axis, ("tensor", "fsdp")) for axis in _WIDE)

# Nothing splits `conv_in`: with a kernel split over fsdp on its inputs and over tensor on its
# outputs, and the batch over data and fsdp, XLA's partitioner (jax 0.10.2 to 0.12.0) computes
# wrong gradients. tests/test_layouts.py compares gradients leaf by leaf because of it.
UNSPLIT = "conv_in"
WHOLE = (UNSPLIT, "head_dim", "classes")  # roles that no table splits
TABLES: dict[str, Rules] = {
    "dp": (*_BATCH, *_ALIKE),
    "zero1": (*_BATCH, *_ALIKE),
    "fsdp": (*_BATCH, *_ALIKE, ("embed", "fsdp"), *_FSDP),
    # Column, then row (Shoeybi et al. 2019): of two kernels the first is split on its outputs.
    "tp": (*_BATCH, *_ALIKE, *_TENSOR),
    # And what lies between the pairs is split on its length (Korthikanti et al. 2022).
    "tp_sp": (
        *_BATCH,
        ("conv_batch", BATCH_AXES),
        ("residual_length", ("sequence", "tensor")),
        *_TENSOR,
    ),
    "fsdp_tp": (*_BATCH, *_ALIKE, ("embed", "fsdp"), *_BOTH, *_TENSOR, *_FSDP),
    # Less of the batch for convolutions, of the kernel for dense layers (Krizhevsky 2014).
    "one_weird_trick": (
        *_BATCH,
        ("conv_batch", (*BATCH_AXES, "tensor")),
        ("residual_length", "sequence"),
        *(rule for rule in _TENSOR if rule[0] != "conv_out"),
    ),
    "pp": (*_BATCH, *_ALIKE),
}
# The tables whose optimiser state is split further than the parameters, over which mesh axes.
MOMENTS = {"zero1": BATCH_AXES}


def table(given: str | Rules) -> Rules:
    """The table of that name, or the user's own pairs, checked, with what they leave unsaid."""
    if isinstance(given, str):
        if given not in TABLES:
            hint = nearest(given, TABLES)
            raise UserError(
                f"rules={given!r} is no rule table; {hint} docs/howto/layout.md makes one."
            )
        return TABLES[given]
    form = "write ('logical axis', 'mesh axis'), with several mesh axes in a tuple, or None."
    for rule in given if isinstance(given, tuple | list) else [given]:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise UserError(f"rules has the pair {rule!r}: {form}")
        check_axes("rules", rule, rule[1:])
        if rule[0] == UNSPLIT and axes_of(rule[1]):
            raise UserError(f"rules has the pair {rule!r}: {LAW}")
    said = {logical for logical, _ in given}
    rest = () if "batch" in said else _ROWS[1:]
    for role, other in FOLLOWS.items():
        if role not in said:
            rest += tuple((role, axes) for logical, axes in (*given, *rest) if logical == other)
    return (*given, *rest)


def moment_axes(given: str | Rules) -> tuple[str, ...]:
    """Over which mesh axes the table splits the optimiser state alone."""
    return MOMENTS[given] if isinstance(given, str) and given in MOMENTS else ()


LAW = f"{UNSPLIT} stays whole, because XLA's partitioner computes wrong gradients otherwise."


def check_param_rules(given: ParamRules) -> ParamRules:
    """The (regex, spec) pairs, unless one is none."""
    for rule in given:
        try:
            pattern, spec = rule
            re.compile(pattern)
            good = isinstance(spec, tuple)
        except (TypeError, ValueError, re.error):
            good = False
        if not good:
            raise UserError(
                f"param_rules has the pair {rule!r}: write ('regex', ('fsdp', None)), a mesh axis, "
                "a tuple of them or None for each dim."
            )
        check_axes("param_rules", rule, spec)
    return given


def check_axes(field: str, rule: tuple, spec: Sequence[Axes]) -> None:
    """Whether `spec` names mesh axes that there are, each once."""
    words = [axis for axes in spec for axis in (axes_of(axes) or ())]
    for word in words:
        if word not in AXES:
            hint = nearest(word, AXES) if isinstance(word, str) else "give the name of an axis."
            raise UserError(f"{field} has the pair {rule!r}, and {word!r} is no mesh axis; {hint}")
    twice = [word for word in dict.fromkeys(words) if words.count(word) > 1]
    if twice:
        raise UserError(f"{field} has the pair {rule!r}, which names {twice[0]!r} twice.")


def axes_of(axes: Axes) -> tuple[str, ...]:
    """A dim's part of a spec as a tuple, whatever its form."""
    return (axes if isinstance(axes, tuple | list) else (axes,)) if axes else ()


def parts(axes: Axes, mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts `axes` split a dim."""
    return math.prod(mesh.shape[axis] for axis in axes_of(axes))


def label(logical: str, axes: Axes) -> str:
    """`mlp -> tensor, fsdp`: a rule in words."""
    return f"{logical} -> {' x '.join(axes_of(axes)) or 'whole'}"


def resolve(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mesh | AbstractMesh
) -> tuple[P, str, tuple[str, ...]]:
    """The PartitionSpec of an array whose dims play the roles `names`, what was missed, who won."""
    chosen: list = [None] * len(shape)
    won: dict[int, str] = {}
    used: set[str] = set()
    refused = []
    for logical, axes in rules:
        for dim, name in enumerate(names):
            wanted = axes_of(axes)
            if name != logical or dim in won or used & set(wanted):
                continue
            number = parts(axes, mesh)
            if shape[dim] % number:
                refused.append((wanted, f"{name}={shape[dim]} is not divisible by {number}"))
                continue
            chosen[dim] = axes
            won[dim] = label(logical, axes) if number > 1 or not axes else ""
            used |= set(wanted)
    large = {axis for axis in mesh.shape if mesh.shape[axis] > 1}
    missed = [why for wanted, why in refused if set(wanted) & large - used]
    return (
        P(*chosen),
        "; ".join(dict.fromkeys(missed)),
        tuple(won.get(dim, "") for dim in range(len(shape))),
    )
