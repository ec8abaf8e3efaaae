"""A model as a tree of modules: parameters, bytes and FLOPs of each, as rows and as a table."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from lsdl.planner.count import Path
from lsdl.sharding.placement import Placement


@dataclass(frozen=True)
class Node:
    """A module: what it has of its own, and the modules in it."""

    name: str
    shapes: Mapping[str, tuple[int, ...]]  # of its own parameters
    parameters: int
    nbytes: int
    flops: int
    children: tuple["Node", ...] = ()

    def total(self, quantity: str) -> int:
        """`quantity` of the module and of all in it."""
        return getattr(self, quantity) + sum(child.total(quantity) for child in self.children)


def paths(params: Mapping, path: Path = ()) -> Iterator[Path]:
    """The paths of all modules below the outermost one."""
    for name, leaf in params.items():
        if isinstance(leaf, Mapping):
            yield (*path, name)
            yield from paths(leaf, (*path, name))


def make_tree(
    name: str,
    params: Mapping,
    *,
    flops: Mapping[Path, int],
    padding: Mapping[Path, int],
    path: Path = (),
) -> Node:
    """The module `name` with the (abstract) parameters `params`.

    `flops` are by module, `padding` by parameter: elements that stand for nothing, which do not
    count as parameters (their bytes do count). Modules come in the order of `flops`.
    """
    own = {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}
    order = [place[-1] for place in flops if place and place[:-1] == path]
    inner = [name for name in dict.fromkeys((*order, *params)) if name not in own]
    return Node(
        name,
        {name: leaf.shape for name, leaf in own.items()},
        sum(leaf.size - padding.get((*path, name), 0) for name, leaf in own.items()),
        sum(leaf.size * leaf.dtype.itemsize for leaf in own.values()),
        flops.get(path, 0),
        tuple(
            make_tree(name, params[name], flops=flops, padding=padding, path=(*path, name))
            for name in inner
        ),
    )


def vocabulary_padding(placements: Sequence[Placement], module: Any) -> dict[Path, int]:
    """{parameter: elements} of the rows that fill the vocabulary of `module` up."""
    padding = {}
    for placement in placements:
        kind, *path = placement.path.split("/")
        if kind == "params" and "vocab" in placement.names:
            padded = placement.shape[placement.names.index("vocab")]
            rest = math.prod(placement.shape) // padded
            padding[tuple(path)] = rest * (padded - module.vocab_size)
    return padding


def rows(node: Node, path: Path = ()) -> Iterator[dict[str, Any]]:
    """One JSON row for each module that has something of its own; the outermost has the path ''."""
    if node.parameters or node.nbytes or node.flops:
        yield {
            "path": "/".join(path),
            "parameters": node.parameters,
            "shapes": {name: list(shape) for name, shape in node.shapes.items()},
            "bytes": node.nbytes,
            "forward_flops_per_example": node.flops,
        }
    for child in node.children:
        yield from rows(child, (*path, child.name))


def table(node: Node, *, depth: int) -> str:
    """The tree down to `depth` levels below the outermost; each line has the sums of its branch.

    Equal modules whose names differ in their last number alone are one line. What a module has of
    its own, beside the modules in it, is a line with the names of those parameters.
    """
    lines = [("module", "parameters", "bytes", "forward FLOPs per example")]
    lines += _lines(node, depth, "")
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])))
        for line in lines
    )


def _lines(node: Node, depth: int, indent: str) -> Iterator[tuple[str, ...]]:
    yield (
        indent + node.name,
        f"{node.total('parameters'):,}",
        binary(node.total("nbytes")),
        decimal(node.total("flops")),
    )
    if depth and node.children:
        name = ", ".join(node.shapes) or "(own)"
        own = dataclasses.replace(node, name=name, children=())
        inner = [own] if own.parameters or own.flops else []
        for child in (*inner, *_folded(node.children)):
            yield from _lines(child, depth - 1, indent + "  ")


def _folded(nodes: tuple[Node, ...]) -> Iterator[Node]:
    """`nodes`, with neighbours that are alike as one node that has what all of them have."""
    alike = lambda node: (node.name.rstrip("0123456789"), dataclasses.replace(node, name=""))  # noqa: E731
    for _, group in itertools.groupby(nodes, alike):
        first, *rest = group
        if rest:
            first = _times(first, 1 + len(rest))
            name = f"{first.name} .. {rest[-1].name} ({1 + len(rest)} x)"
            first = dataclasses.replace(first, name=name)
        yield first


def _times(node: Node, number: int) -> Node:
    return dataclasses.replace(
        node,
        parameters=node.parameters * number,
        nbytes=node.nbytes * number,
        flops=node.flops * number,
        children=tuple(_times(child, number) for child in node.children),
    )


def device_bytes(tree: Any) -> int:
    """The bytes that each device holds of an abstract tree whose leaves have shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def whole_bytes(tree: Any) -> int:
    """The bytes of an abstract tree, wherever they lie."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def binary(nbytes: int) -> str:
    """1536 -> '1.50 KiB'."""
    return _scaled(nbytes, 1024, ("", "Ki", "Mi", "Gi", "Ti", "Pi")) + "B"


def decimal(number: int) -> str:
    """1500 -> '1.50 k'."""
    return _scaled(number, 1000, ("", "k", "M", "G", "T", "P", "E", "Z", "Y")).rstrip()


def _scaled(number: int, step: int, prefixes: tuple[str, ...]) -> str:
    power = 0
    while number / step**power >= step and power < len(prefixes) - 1:
        power += 1
    return f"{number / step**power:,.{2 if power else 0}f} {prefixes[power]}"
