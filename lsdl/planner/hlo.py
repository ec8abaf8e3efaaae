"""The collectives of a compiled program, read from its text (`compiled.as_text()`).

The groups of devices that meet are written in three ways, and read to one: tuples of positions in
the mesh's device order. `{{0,1},{2,3}}` lists them; `[2,4]<=[8]` cuts the positions (transposed, if
a `T(1,0)` follows) into 2 groups of 4; `mesh['a'=2,'b'=4] {'b'}` names the dims of a grid, or with
`'b':(2)2` the part of size 2 of a dim below its first 2.
"""

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from lsdl.errors import UserError

Groups = list[tuple[int, ...]]

# Bytes that a device sends, from the bytes r of the result and the n devices of a group, on a ring.
# Source: Thakur et al. 2005; Rajbhandari et al. 2020, section 7.1.
WIRE: dict[str, Callable[[float, int], float]] = {
    "all-reduce": lambda r, n: 2 * (n - 1) / n * r,
    "all-gather": lambda r, n: (n - 1) / n * r,
    "reduce-scatter": lambda r, n: (n - 1) * r,
    "all-to-all": lambda r, n: (n - 1) / n * r,
    "ragged-all-to-all": lambda r, n: (n - 1) / n * r,
    "collective-permute": lambda r, n: r,
    "collective-broadcast": lambda r, n: r,
}

COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) .*-> .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.\-]+ = ")
OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|(?:true|false)_computation)=%?([\w.\-]+)"
    r"|\b(?:branch|called)_computations=\{([^}]*)\}"
)
SCATTERED = re.compile(r"\bcalls=%?(all-reduce-scatter[\w.\-]*)")
ARRAY = re.compile(r"\b(\w+)\[([^\]]*)\]")  # dtype and dims
CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
BODY = re.compile(r"\bbody=%?([\w.\-]+)")
# What the counter of a loop is read from.
SCALAR = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = (?:[su]32|pred)\[\]\S* "
    r"(constant|get-tuple-element|add|compare)\(([^)]*)\)(?:, (?:index=(\d+)|direction=(LT)))?"
)
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Collective:
    """One collective instruction of a program."""

    kind: str  # a key of WIRE
    axis: str  # the mesh axes that its groups run along: "data", "data+fsdp", "part of tensor"
    group: int  # devices that meet
    parts: tuple[int, ...]  # bytes of each array of its result
    times: int  # how often a run of the program does it
    op_name: str  # where the program's source has it: jax's scopes
    asynchronous: bool  # the device computes meanwhile
    shape: str  # of its largest array: "f32[50304,256]"

    def nbytes(self, least_bytes: int = 0) -> int:
        """Result bytes of the program's run, in arrays of at least `least_bytes`."""
        return self.times * sum(part for part in self.parts if part >= least_bytes)

    def wire_bytes(self, least_bytes: int = 0) -> float:
        """Of those, what a device sends."""
        return WIRE[self.kind](self.nbytes(least_bytes), self.group)


def collectives(text: str, sizes: Mapping[str, int]) -> list[Collective]:
    """The collectives that a run of the optimised program `text` does.

    `sizes` are the mesh's axes, in the order of its devices. Those between a device and itself are
    left out. Of a condition the branch counts that sends more. Raises `UserError` for a collective
    in a loop whose number of trips the program does not tell.
    """
    partitions = math.prod(map(int, re.findall(r"\bnum_partitions=(\d+)", text)))
    computations, entry, counters = _computations(text)

    def walk(name: str, times: int, meanwhile: bool = False) -> Iterator[Collective]:
        for opcode, shape, rest in computations[name]:
            kind = opcode.removesuffix("-start")
            if kind in WIRE:
                found = _collective(kind, shape, rest, opcode != kind, times, partitions, sizes)
                yield from (
                    (replace(one, asynchronous=True) for one in found) if meanwhile else found
                )
            elif scattered := SCATTERED.search(rest) if opcode == "fusion" else None:
                # A TPU's reduce-scatter: an all-reduce of which each device keeps its part.
                ((_, _, inner),) = computations[scattered[1]]
                yield from _collective(
                    "reduce-scatter", shape, inner + rest, False, times, partitions, sizes
                )
            elif not opcode.endswith(("-done", "-update")):  # which repeat their start's
                yield from inside(opcode, rest, times, meanwhile or opcode == "async-start")

    def inside(opcode: str, rest: str, times: int, meanwhile: bool) -> list[Collective]:
        called = [
            name.strip().lstrip("%")
            for one, several in CALLED.findall(rest)
            for name in (one or several).split(",")
        ]
        trips = _trips(rest, counters) if opcode == "while" else 1
        found = [list(walk(name, times * trips, meanwhile)) for name in called]
        if opcode == "conditional":
            return max(found, key=lambda branch: sum(one.wire_bytes() for one in branch))
        if not trips and any(found):
            where = next(one.op_name for branch in found for one in branch)
            raise UserError(
                f"The collectives of {where!r} cannot be counted: they are in a loop that does not "
                "say how often it runs; use lax.scan."
            )
        return [one for branch in found for one in branch]

    return list(walk(entry, 1))


def _trips(rest: str, counters: Mapping[str, "_Counter"]) -> int:
    """How often a while runs; 0 where that is not known."""
    if said := TRIPS.search(rest):
        return int(said[1])
    # A TPU's compiler does not say. Its loops count from 0: lax.scan's in steps of 1, those that
    # take a product and the exchange of its parts together in steps of 2.
    condition, body = (counters[of.search(rest)[1]] for of in (CONDITION, BODY))
    limit = condition.limit()
    return -(-limit[1] // body.step(limit[0])) if limit else 0


class _Counter:
    """The scalars of a computation that is a loop's condition or body."""

    def __init__(self):
        self._constants: dict[str, int] = {}
        self._places: dict[str, int] = {}  # in the loop's tuple, of what is read from it
        self._sums: dict[str, list[str]] = {}
        self._compared: list[str] = []
        self.root: list[str] = []  # the elements of the tuple that it makes

    def read(self, line: str) -> None:
        if not (found := SCALAR.match(line)):
            return
        name, opcode, operands, index, below = found.groups()
        if opcode == "constant":
            self._constants[name] = int(operands) if operands.isdigit() else 0
        elif opcode == "get-tuple-element" and index:
            self._places[name] = int(index)
        elif opcode == "add":
            self._sums[name] = _names(operands)
        elif below:
            self._compared = _names(operands)

    def limit(self) -> tuple[int | None, int] | None:
        """(place, number): it asks whether what is there is below the number."""
        if len(self._compared) != 2 or self._compared[1] not in self._constants:
            return None
        return self._places.get(self._compared[0]), self._constants[self._compared[1]]

    def step(self, place: int | None) -> int:
        """What it adds to the counter at `place`: 1, unless it says otherwise."""
        if place is None or place >= len(self.root):
            return 1
        added = self._sums.get(self.root[place], [])
        return max([self._constants[name] for name in added if name in self._constants] or [1])


def _names(operands: str) -> list[str]:
    """`%a, /*index=5*/%b` -> [a, b]."""
    return [name.split("%")[-1].strip() for name in operands.split(",")]


def _computations(
    text: str,
) -> tuple[dict[str, list[tuple[str, str, str]]], str, dict[str, _Counter]]:
    """{computation: (opcode, shape, operands and attributes) of its instructions}, and the entry.

    Of the instructions, those that are collectives or call others. And of each computation what
    a loop counts by.
    """
    computations, counters, name, entry = {}, {}, "", ""
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            name = head[1]
            computations[name], counters[name] = [], _Counter()
            entry = name if line.startswith("ENTRY") else entry
        elif name and (head := INSTRUCTION.match(line)):
            counters[name].read(line)
            root = line.lstrip().startswith("ROOT")
            line = line[head.end() :]
            shape = line[: _end(line)]
            opcode = OPCODE.match(line, len(shape))
            rest = line[opcode.end() :]
            if root and opcode[1] == "tuple":
                counters[name].root = _names(rest.split(")")[0])
            if opcode[1].removesuffix("-start") in WIRE or CALLED.search(rest):
                computations[name].append((opcode[1], shape, rest))
    return computations, entry, counters


def _end(text: str) -> int:
    """Where the shape ends that `text` starts with: an array's at a space, a tuple's at its ")"."""
    if not text.startswith("("):
        return text.index(" ")
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return i + 1
    raise AssertionError(text)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple's shape."""
    elements, depth, start = [], 0, 1
    for i, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == (0 if letter == ")" else 1) and letter in ",)":
            elements.append(shape[start:i].strip())
            start = i + 1
    return [element for element in elements if element]


def sizes_of(shape: str) -> list[int]:
    """The bytes of each array in a shape, tuples in tuples included."""
    parts = []
    for dtype, dims in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.search(r"\d+", dtype) or ["0"])[0])
        size = math.prod(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)
        parts.append(-(-size * bits // 8))
    return parts


def _collective(
    kind: str,
    shape: str,
    rest: str,
    start: bool,
    times: int,
    partitions: int,
    sizes: Mapping[str, int],
) -> Iterator[Collective]:
    if start and kind != "all-reduce":  # (operands, results, ...)
        shape = _elements(shape)[1]
    if kind == "collective-permute":
        groups = [pair for pair in _listed("source_target_pairs", rest) if pair[0] != pair[1]]
    else:
        groups = _groups(rest, partitions)
        # Without global ids the groups are of replicas, each of which is all partitions.
        replicas = "channel_id=" in rest and "use_global_device_ids=true" not in rest
        if replicas and kind in ("all-reduce", "all-gather", "reduce-scatter"):
            groups = [tuple(range(partitions))]
    group = max(map(len, groups), default=1)
    if group > 1:
        name = re.search(r'op_name="([^"]*)"', rest)
        parts = tuple(sizes_of(shape))
        axis = axis_of(groups, sizes, whole=kind != "collective-permute")
        # Where nothing can be computed meanwhile a GPU's compiler says so at the start.
        alone = not start or '"is_sync":true' in rest
        arrays = ARRAY.findall(shape)
        largest = arrays[parts.index(max(parts))] if parts else ("", "")
        what = "{}[{}]".format(*largest)
        name = name[1] if name else ""
        yield Collective(kind, axis, group, parts, times, name, not alone, what)


def _groups(rest: str, partitions: int) -> Groups:
    if grid := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", rest):
        return _of_grid(*grid.groups())
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return [tuple(group) for group in _iota(iota[3]).reshape(int(iota[1]), -1).tolist()]
    return _listed("replica_groups", rest) or [tuple(range(partitions))]  # none listed: all meet


def _listed(attribute: str, rest: str) -> Groups:
    listed = re.search(attribute + r"=\{(\{.*?\})?\}", rest)
    groups = re.findall(r"\{([\d,]+)\}", (listed and listed[1]) or "")
    return [tuple(map(int, group.split(","))) for group in groups]


def _iota(text: str) -> np.ndarray:
    """`[2,4]T(1,0)` -> 0..7 as a 2 x 4 array, transposed, as one row."""
    dims, _, order = text.partition("T")
    dims = [int(dim) for dim in re.findall(r"\d+", dims)]
    ids = np.arange(math.prod(dims)).reshape(dims)
    return ids.transpose([int(dim) for dim in re.findall(r"\d+", order)] or None).reshape(-1)


def _of_grid(dims: str, ids: str, grouped: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"([^=,]+)=(\d+)", dims)}
    order = re.search(r"device_ids=\((.*)\)", ids)
    if order is None:
        positions = np.arange(math.prod(sizes.values()))
    elif order[1].startswith("["):
        positions = _iota(order[1])
    else:
        positions = np.array(order[1].split(","), int)
    rest = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    for axis in grouped.split(","):
        name, _, part = axis.partition(":")
        before, size = map(int, part[1:].split(")")) if part else (1, sizes[name])
        stride = sizes[name] // (before * size)
        rest[name] = rest[name] - rest[name] // stride % size * stride
    groups = defaultdict(list)
    for key, position in zip(zip(*rest.values(), strict=True), positions.tolist(), strict=True):
        groups[key].append(position)
    return [tuple(group) for group in groups.values()]


def axis_of(groups: Groups, sizes: Mapping[str, int], *, whole: bool = True) -> str:
    """The mesh axes along which the devices of a group differ: "data+fsdp".

    With `whole` "part of" them, where the groups are smaller than these axes.
    """
    used = set()
    for group in groups:
        coordinates = np.unravel_index(group, tuple(sizes.values()))
        used |= {name for name, c in zip(sizes, coordinates, strict=True) if len(set(c)) > 1}
    name = "+".join(name for name in sizes if name in used)
    full = math.prod(sizes[name] for name in used)
    return f"part of {name}" if whole and any(len(group) < full for group in groups) else name
