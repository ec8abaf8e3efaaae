"""Which mesh axis each logical axis is split over, and the sharding of every array from it.

A table is an ordered list of (logical axis, mesh axis or axes). The first rule wins whose mesh
axes are still free in the array and divide the dim; no rule left means not split. Flax applies
the same tables to the activations (`nn.with_logical_constraint`).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError, nearest
from lsdl.sharding.mesh import BATCH_AXES

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

_BATCH = (("batch", BATCH_AXES),)
_WIDE = ("heads", "mlp", "vocab", "conv_out")
_TENSOR = tuple((axis, "tensor") for axis in _WIDE)
_FSDP = (("embed", "fsdp"), *((axis, "fsdp") for axis in _WIDE))
# A dim that tensor parallelism splits is split over fsdp too where no other dim of the array
# takes it (biases and the like), so that FSDP leaves nothing large replicated.
_BOTH = tuple((axis, ("tensor", "fsdp")) for axis in _WIDE)

# Nothing splits `conv_in`: with a kernel split over fsdp on its inputs and over tensor on its
# outputs, and the batch over data and fsdp, XLA's partitioner (jax 0.10.2 to 0.12.0) computes
# wrong gradients. tests/test_layouts.py compares gradients leaf by leaf because of it.
TABLES: dict[str, Rules] = {
    "dp": _BATCH,
    "fsdp": (*_BATCH, *_FSDP),
    "tp": (*_BATCH, *_TENSOR),
    "fsdp_tp": (*_BATCH, ("embed", "fsdp"), *_BOTH, *_TENSOR, *_FSDP),
}
LARGE_BYTES = 2**20  # an array from this size on must be split if a rule meant to


@dataclass(frozen=True)
class Placement:
    """How one array is split, and which of its dims a rule meant to split in vain."""

    path: str
    names: tuple[str | None, ...]  # the dims' roles
    shape: tuple[int, ...]
    spec: P
    missed: str  # "" or the sentence that says which dim could not be split
    nbytes: int


def table(name: str) -> Rules:
    if name not in TABLES:
        raise UserError(f"rules={name!r} is no rule table; {nearest(name, TABLES)}")
    return TABLES[name]


def resolve(
    names: Sequence[str | None], shape: Sequence[int], rules: Rules, mesh: Mesh
) -> tuple[P, str]:
    """The PartitionSpec of an array whose dims play the roles `names`, and what was missed."""
    chosen: list = [None] * len(shape)
    settled: set[int] = set()
    used: set[str] = set()
    refused = []
    for logical, axes in rules:
        for dim, name in enumerate(names):
            wanted = (axes,) if isinstance(axes, str) else tuple(axes or ())
            if name != logical or dim in settled or used & set(wanted):
                continue
            parts = math.prod(mesh.shape[axis] for axis in wanted)
            if shape[dim] % parts:
                refused.append((wanted, f"{name}={shape[dim]} is not divisible by {parts}"))
                continue
            chosen[dim] = axes
            settled.add(dim)
            used |= set(wanted)
    large = {axis for axis in mesh.shape if mesh.shape[axis] > 1}
    missed = [why for wanted, why in refused if set(wanted) & large - used]
    return P(*chosen), "; ".join(dict.fromkeys(missed))


def tree_shardings(boxed: Any, mesh: Mesh, rules: Rules) -> tuple[Any, list[Placement]]:
    """Shardings for an abstract tree whose parameters carry logical names (Flax boxes).

    Arrays without names (counters, keys, running statistics) are replicated. Returns the tree of
    `NamedSharding`, shaped like the unboxed tree, and a `Placement` per named array.
    Raises `UserError` for an array of `LARGE_BYTES` or more that a rule meant to split and could
    not.
    """
    placements = []

    def place(keys, leaf):
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, P())
        value = leaf.value
        spec, missed = resolve(leaf.names, value.shape, rules, mesh)
        placement = Placement(
            jax.tree_util.keystr(keys, simple=True, separator="/"),
            leaf.names,
            value.shape,
            spec,
            missed,
            value.size * value.dtype.itemsize,
        )
        if missed and placement.nbytes >= LARGE_BYTES:
            raise UserError(
                f"{placement.path} {value.shape} would be replicated on every device: {missed}. "
                "Choose sizes or mesh axes that divide."
            )
        placements.append(placement)
        return NamedSharding(mesh, spec)

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    return jax.tree_util.tree_map_with_path(place, boxed, is_leaf=is_box), placements


def check_used(mesh: Mesh, placements: Sequence[Placement]) -> None:
    """Every mesh axis larger than 1 must split the batch or a parameter."""
    used = set(BATCH_AXES)
    for placement in placements:
        for axes in placement.spec:
            used |= {axes} if isinstance(axes, str) else set(axes or ())
    for axis, size in mesh.shape.items():
        if size > 1 and axis not in used:
            raise UserError(
                f"The mesh axis {axis}={size} splits nothing in this model under these rules: "
                f"give its devices to another axis, or choose other rules."
            )
