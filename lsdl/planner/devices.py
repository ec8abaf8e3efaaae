"""The rows of the hardware table: each device's figures, and where each of them was found.

The table is `hardware.toml`, whose head says how its figures are to be read. A user's own file has
the same form, and its rows go before the table's.
"""

import difflib
import functools
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from lsdl.errors import UserError, nearest

TABLE = Path(__file__).with_name("hardware.toml")
WRAPS = ("cube", "pod")
DTYPES = ("float64", "float32", "tensorfloat32", "bfloat16", "float16", "float8", "int8")


class Figure(NamedTuple):
    """A number, and who says so."""

    value: float
    source: str


@dataclass(frozen=True)
class Device:
    """One row. Figures are of a chip; a chip is `devices_per_chip` devices to jax."""

    kind: str  # a key of NEEDED
    key: str  # v5p, h100, ...
    name: str
    also: tuple[str, ...] = ()  # other keys
    devices_per_chip: int = 1
    flops_per_s: Mapping[str, Figure] = field(default_factory=dict)  # dense peak, by dtype
    memory_bytes: Figure | None = None
    memory_bytes_per_s: Figure | None = None
    network_bytes_per_s: Figure | None = None  # to other nodes or slices, one way
    host_bytes_per_s: Figure | None = None  # to the host's memory, one way
    node_devices: Figure | None = None  # gpu: that reach one another by links of their own
    node_bytes_per_s: Figure | None = None  # gpu: over these links, all of a device's, one way
    pod: tuple[int, ...] = ()  # tpu: the largest torus there is
    wraps: str = ""  # tpu: when a dim of a slice closes to a ring, one of WRAPS
    link_bytes_per_s: Figure | None = None  # tpu: of one link to one neighbour, one way
    hop_latency_s: Figure | None = None
    compiler: Mapping[str, Any] = field(default_factory=dict)  # what XLA is told of it

    def figures(self) -> dict[str, Figure]:
        """{name: figure}, all of them."""
        peaks = {f"{dtype}_flops_per_s": peak for dtype, peak in self.flops_per_s.items()}
        return peaks | {k: value for k, value in vars(self).items() if isinstance(value, Figure)}

    def peak(self, dtype: str) -> tuple[str, Figure | None]:
        """(the dtype that products run in, FLOP/s of one chip).

        Where bfloat16 has no unit of its own (V100) it is float16's. None where nobody published
        a peak: a TPU makes a float32 product of several bfloat16 ones.
        """
        if dtype == "bfloat16" and dtype not in self.flops_per_s and "float16" in self.flops_per_s:
            dtype = "float16"
        return dtype, self.flops_per_s.get(dtype)


_BOTH = ("flops_per_s", "memory_bytes", "memory_bytes_per_s", "network_bytes_per_s")
NEEDED = {  # by kind, the fields that a row has to have beside its name
    "cpu": (),
    "gpu": (*_BOTH, "node_devices", "node_bytes_per_s"),
    "tpu": (*_BOTH, "pod", "wraps", "link_bytes_per_s"),
}
FIELDS = {field.name: field.type for field in fields(Device) if field.name not in ("kind", "key")}


def devices(file: Path | None = None) -> dict[tuple[str, str], Device]:
    """{(kind, key): row}: the table's, and those of the user's `file`, which go before."""
    rows = _table()
    return rows | _rows(file, rows) if file else rows


def find(kind: str, key: str, file: Path | None = None) -> Device:
    """The row whose key, or other key, is `key`. Raises `UserError` with the nearest there are."""
    if kind not in NEEDED:
        raise UserError(f"There is no kind of device {kind!r}; {nearest(kind, NEEDED)}")
    named = {}
    for (of, name), row in devices(file).items():
        if of == kind:
            named |= dict.fromkeys((*row.also, name), row)
    if key not in named:
        close = difflib.get_close_matches(key, named, n=3) or named
        raise UserError(
            f"The hardware table has no {kind} {key!r}: choose {' or '.join(close)}, or give a row "
            "of your own with --hardware FILE."
        )
    return named[key]


@functools.cache
def _table() -> dict[tuple[str, str], Device]:
    return _rows(TABLE, {})


def _rows(file: Path, known: Mapping[tuple[str, str], Device]) -> dict[tuple[str, str], Device]:
    try:
        text = tomllib.loads(Path(file).read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{file} cannot be read as a table of hardware: {error}.") from None
    sources = text.pop("sources", {})
    rows = {}
    for kind, of_kind in text.items():
        if kind not in NEEDED:
            raise UserError(f"{file} has a table [{kind}]; {nearest(kind, (*NEEDED, 'sources'))}")
        for key, given in of_kind.items():
            where = f"{file}, [{kind}.{key}]"
            rows[kind, key] = _row(where, kind, key, dict(given), sources, {**known, **rows})
    return rows


def _row(where: str, kind: str, key: str, given: dict, sources: Mapping, known: Mapping) -> Device:
    values = {}
    if like := given.pop("like", ""):
        if (kind, like) not in known:
            others = [name for of, name in known if of == kind]
            raise UserError(
                f"{where} is like {like!r}, which is no {kind}; {nearest(like, others)}"
            )
        values = {name: getattr(known[kind, like], name) for name in FIELDS} | {"also": ()}
    for name, value in given.items():
        if name not in FIELDS:
            raise UserError(f"{where} has no field {name!r}; {nearest(name, (*FIELDS, 'like'))}")
        values[name] = _value(f"{where}, {name}", name, value, sources, values.get(name))
    for name in ("name", *NEEDED[kind]):
        if not values.get(name):
            raise UserError(f"{where} lacks {name}: a row of a {kind} has to have it.")
    return Device(kind, key, **values)


def _value(where: str, name: str, value: Any, sources: Mapping, inherited: Any) -> Any:
    """The field `name`'s value from what the file has."""
    if name == "flops_per_s":
        for dtype in value:
            if dtype not in DTYPES:
                raise UserError(f"{where} has {dtype!r}; {nearest(dtype, DTYPES)}")
        return {dtype: _figure(where, one, sources) for dtype, one in value.items()}
    if name == "compiler":
        return {**(inherited or {}), **value}
    if name == "wraps" and value not in WRAPS:
        raise UserError(f"{where} is {value!r}; {nearest(str(value), WRAPS)}")
    if name in ("name", "wraps"):
        return value
    if name in ("also", "pod"):
        return tuple(value)
    if name == "devices_per_chip":
        return int(value)
    return _figure(where, value, sources)


def _figure(where: str, value: Any, sources: Mapping[str, str]) -> Figure:
    pair = isinstance(value, list) and len(value) == 2 and isinstance(value[1], str)
    if not (pair and isinstance(value[0], int | float) and value[0] > 0):
        raise UserError(f"{where} is {value!r}: write [a positive number, a key of [sources]].")
    if value[1] not in sources:
        raise UserError(f"{where} has the source {value[1]!r}, which [sources] does not have.")
    return Figure(value[0], sources[value[1]])
