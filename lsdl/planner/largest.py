"""The largest tensors that a device holds during a step: who they are, and why.

Of a compiled program they are read from its text: its arguments, and what its instructions write
to the device's memory. Of one that was too large for a TPU they are read from the refusal.
"""

import math
import re
from typing import Any

import jax

from lsdl.planner import hlo

Row = dict[str, Any]  # name, shape, dtype, bytes, what
# They write nothing of their own: views, and results that lie where an operand does.
VIEWS = {
    *("parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("optimization-barrier", "after-all", "dynamic-update-slice", "opt-barrier"),
}
RESULT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\](\S*) ([a-z][\w\-]*)\(")
FUSED = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")
OP_NAME = re.compile(r'op_name="([^"]*)"')
ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a layout's memory space, 0 being the device's own


def arguments(*trees: Any) -> list[Row]:
    """Of abstract trees with shardings: the part of each leaf that one device has."""
    rows = []
    for keys, leaf in jax.tree_util.tree_leaves_with_path(trees):
        shape = leaf.sharding.shard_shape(leaf.shape)
        path = jax.tree_util.keystr(keys[1:], simple=True, separator="/")
        nbytes = math.prod(shape) * leaf.dtype.itemsize
        rows.append(row(path, shape, leaf.dtype.name, nbytes, "argument"))
    return rows


def row(name: str, shape, dtype: str, nbytes: int, what: str) -> Row:
    return {"name": name, "shape": list(shape), "dtype": dtype, "bytes": nbytes, "what": what}


def temporaries(text: str, *, least_bytes: int = 2**10) -> list[Row]:
    """What a program's instructions write: a row for each shape and dtype that occurs.

    Which of them are there at once is not looked at; `what` is the first source line that makes
    one. What is within a fusion is never written, and what a TPU keeps on the chip is left out.
    """
    fused = set(FUSED.findall(text))
    found: dict[tuple, Row] = {}
    name = ""
    for line in text.splitlines():
        if head := hlo.COMPUTATION.match(line):
            name = head[1]
            continue
        result = RESULT.match(line)
        if not result or name in fused or result[5] in VIEWS or result[5].endswith("-done"):
            continue
        (nbytes,) = hlo.sizes_of(f"{result[2]}[{result[3]}]")
        if nbytes < least_bytes or ELSEWHERE.search(result[4]):
            continue
        shape = [int(size) for size in result[3].split(",") if size]
        source = OP_NAME.search(line)
        key = (result[2], *shape)
        if key not in found or (source and not found[key]["what"]):
            what = source[1] if source else ""
            found[key] = row(result[1], shape, result[2], nbytes, what)
    return list(found.values())


def top(rows: list[Row], number: int = 5) -> list[Row]:
    """The largest `number`."""
    return sorted(rows, key=lambda row: -row["bytes"])[:number]
