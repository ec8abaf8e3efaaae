"""What a run may be planned for, `tpu:v5p:8x8x16`, and what its mesh axes send over.

The links' rates are peaks, from the formulas of Austin et al. 2025, How to Scale Your Model,
chapters 3 (sharding) and 12 (GPUs): what the devices of a group send at once, each to its
neighbours, and no time until the first byte is there.
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lsdl.errors import UserError
from lsdl.planner import devices, tree
from lsdl.planner.devices import Device
from lsdl.planner.hlo import WIRE

FORMS = "tpu:v5p:8x8x16 (chips), gpu:h100:4x8 (nodes x GPUs), cpu:64, tpu:v5e:16x16:4 (four slices)"


@dataclass(frozen=True)
class Target:
    """Devices to plan for."""

    device: Device
    shape: tuple[int, ...]  # cpu: devices; gpu: nodes, GPUs of each; tpu: chips along each dim
    slices: int = 1  # tpu: so many of that shape, over the data-centre network

    @property
    def count(self) -> int:
        """Devices, as jax counts them."""
        return math.prod(self.shape) * self.slices * self.device.devices_per_chip

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        key = "" if self.device.kind == "cpu" else f"{self.device.key}:"
        shape = "x".join(map(str, self.shape)) + (f":{self.slices}" if self.slices > 1 else "")
        return f"{self.device.kind}:{key}{shape}"

    @property
    def memory_bytes(self) -> int | None:
        """Of one device."""
        figure = self.device.memory_bytes
        return figure and round(figure.value / self.device.devices_per_chip)

    @property
    def memory_bytes_per_s(self) -> float | None:
        """Of one device."""
        figure = self.device.memory_bytes_per_s
        return figure and figure.value / self.device.devices_per_chip

    def flops_per_s(self, dtype: str) -> float | None:
        """Peak of one device in products of `dtype`, None where none was published."""
        _, figure = self.device.peak(dtype)
        return figure and figure.value / self.device.devices_per_chip


def parse(text: str, file: Path | None = None) -> Target:
    """`tpu:v5p:8x8x16 | gpu:h100:4x8 | cpu:64` -> Target; `file`: the user's own rows.

    Raises `UserError` for another form, a device that the table does not have, and a shape that is
    none of the device's.
    """
    kind, *rest = text.split(":")
    if kind == "cpu":
        rest = ["cpu", *rest]
    if (kind in devices.NEEDED and len(rest) not in (2, 3)) or not rest:
        raise UserError(f"target={text!r} is no target: write {FORMS}.")
    device = devices.find(kind, rest[0], file)
    sizes = rest[1].split("x")
    slices = rest[2] if len(rest) == 3 else "1"
    if not all(re.fullmatch(r"[1-9]\d{0,6}", size) for size in (*sizes, slices)):
        raise UserError(f"target={text!r} has the shape {':'.join(rest[1:])!r}: write {FORMS}.")
    shape = tuple(map(int, sizes))
    dims = {"cpu": 1, "gpu": 2, "tpu": len(device.pod)}[kind]
    if len(shape) != dims:
        raise UserError(f"target={text!r} must have {dims} sizes, as in {FORMS}.")
    if len(rest) == 3 and kind != "tpu":
        raise UserError(f"target={text!r}: slices are of TPUs; give a GPU's nodes, as in 4x8.")
    if kind == "gpu" and shape[1] > device.node_devices.value:
        raise UserError(
            f"target={text!r} has nodes of {shape[1]} GPUs: {device.name} comes in nodes of up to "
            f"{device.node_devices.value}, so write more nodes."
        )
    pairs = zip(sorted(shape), sorted(device.pod), strict=False)
    if kind == "tpu" and any(size > most for size, most in pairs):
        pod = "x".join(map(str, device.pod))
        raise UserError(
            f"target={text!r} is larger than a pod of {device.name}, {pod}: write a smaller slice, "
            "and how many, as in 16x16:4."
        )
    return Target(device, shape, int(slices))


@dataclass(frozen=True)
class Link:
    """What the devices of a mesh axis exchange their bytes over, and how fast one device sends.

    The time of a collective is the bytes that a device sends on a ring (`hlo.WIRE`) divided by
    `bytes_per_s[kind]`; None: nothing is known.
    """

    network: str  # none | NVLink | network | chip | ICI | ICI + DCN | DCN | unknown
    group: int  # devices that meet
    bytes_per_s: Mapping[str, float] | None
    why: str


def link(
    target: Target, sizes: Mapping[str, int], axis: str, *, dcn: Mapping[str, int] | None = None
) -> Link:
    """What the mesh axis `axis` ("fsdp", "data+fsdp" for both at once) of `target` runs over.

    `sizes` are the mesh's axes in order, the last one varying fastest; `dcn` the part of each that
    crosses slices or nodes (config.dcn_mesh).
    """
    axes, parts = axis.split("+"), dcn or {}
    group = math.prod(sizes[name] for name in axes)
    if math.prod(sizes.values()) != target.count:
        raise UserError(
            f"The mesh has {math.prod(sizes.values())} devices and {target.text} has "
            f"{target.count}: make them equal."
        )
    if group == 1:
        return Link("none", 1, None, "one device")
    within = {name: size // parts.get(name, 1) for name, size in sizes.items()}
    if target.device.kind == "gpu":
        return _gpu(target, sizes, axes, group, within if parts else None)
    if target.device.kind == "tpu":
        return _tpu(target, axes, group, within)
    return Link("unknown", group, None, "nothing is known of how CPUs are connected")


def _gpu(target, sizes, axes, group: int, within) -> Link:
    """GPUs of a node send one another all that their links carry, whoever they send it to.

    A group that spans nodes with m GPUs in each has their m network cards: gathering, scattering
    and reducing are done in the node first (chapter 12, cross-node collectives), so that m devices
    share what crosses. An all-to-all cannot be.
    """
    device, node = target.device, target.shape[1]
    inside = math.prod(
        within[name] if within else _inside(sizes, name, node) for name in sizes if name in axes
    )
    inside = min(inside, group, node)
    nvlink, network = device.node_bytes_per_s.value, device.network_bytes_per_s.value
    if inside == group:
        return Link("NVLink", group, dict.fromkeys(WIRE, nvlink), f"{group} GPUs of one node")
    rates = dict.fromkeys(WIRE, min(nvlink, inside * network))
    crossing = network * (group - 1) / (group - inside)
    rates |= dict.fromkeys(("all-to-all", "ragged-all-to-all"), min(nvlink, crossing))
    rates["collective-permute"] = network
    return Link("network", group, rates, f"{group // inside} nodes, {inside} GPUs in each")


def _inside(sizes: Mapping[str, int], axis: str, node: int) -> int:
    """How many neighbours along `axis` lie in one node."""
    names = list(sizes)
    stride = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
    return min(sizes[axis], max(1, node // stride))


@dataclass(frozen=True)
class Piece:
    """A mesh axis's part of a torus dim: every `stride`-th of `size * stride` chips in a row."""

    dim: int  # of the torus; one more than there are: the devices of one chip
    size: int
    stride: int
    wraps: bool  # the dim is a ring, and the piece goes all the way round


def torus(target: Target, within: Mapping[str, int]) -> dict[str, list[Piece]]:
    """How the axes of a mesh lie on a slice's torus: {axis: its pieces}.

    From the last axis on, each takes as many whole dims as its size is made of, as jax does where
    it can (jax.experimental.mesh_utils); the rest share what is left, the last axis innermost.
    """
    device, shape = target.device, target.shape
    ring = {
        "cube": [all(size % 4 == 0 for size in shape)] * len(shape),
        "pod": [size == most for size, most in zip(shape, device.pod, strict=True)],
    }[device.wraps]
    chip = {len(shape): device.devices_per_chip} if device.devices_per_chip > 1 else {}
    left = chip | dict(enumerate(shape))
    used = dict.fromkeys(left, 1)
    pieces: dict[str, list[Piece]] = {axis: [] for axis in within}
    is_ring = lambda dim: dim < len(shape) and ring[dim]  # noqa: E731
    shared = []
    for axis in reversed(within):
        whole = _whole(left, within[axis])
        if whole is None:
            shared.append(axis)
        for dim in whole or ():
            size = left.pop(dim)
            pieces[axis].append(Piece(dim, size, 1, is_ring(dim)))
    for axis in shared:
        rest = within[axis]
        for dim in sorted(left, key=lambda dim: -math.gcd(left[dim], rest)):
            part = math.gcd(left[dim], rest)
            if part > 1:
                last = part == left[dim]
                pieces[axis].append(Piece(dim, part, used[dim], is_ring(dim) and last))
                rest, left[dim], used[dim] = rest // part, left[dim] // part, used[dim] * part
    return pieces


def _whole(left: Mapping[int, int], size: int) -> tuple[int, ...] | None:
    """The dims whose product is `size`, as many as can be; None: there are none."""
    dims = [dim for dim, n in left.items() if n > 1]
    for number in range(len(dims), -1, -1):
        for chosen in itertools.combinations(dims, number):
            if math.prod(left[dim] for dim in chosen) == size:
                return chosen
    return None


def _tpu(target: Target, axes, group: int, within: Mapping[str, int]) -> Link:
    """Chips send their neighbours along each dim of the torus what its two links carry.

    A ring sends both ways, a line, whose ends send one way alone, half of that (chapter 3). An
    axis whose chips are `stride` apart shares its links with stride - 1 others. An all-to-all is
    as slow as the middle of its longest dim: a quarter of a gather of the same bytes on a ring.
    Two devices of one chip share its links, unless the chip's devices meet as well.
    """
    if math.prod(within.values()) * target.slices != target.count:
        raise UserError(
            f"{target.text} has {target.slices} slices: config.dcn_mesh must say which mesh axes "
            f"cross them, sizes whose product is {target.slices}, as data={target.slices}."
        )
    device, inside = target.device, math.prod(within[name] for name in axes)
    found = torus(target, within)
    pieces = _joined(piece for name in axes for piece in found[name])
    dims = [piece for piece in pieces if piece.dim < len(target.shape)]
    if not dims and inside == group:
        return Link("chip", group, None, "the devices of one chip: no rate was published")
    share = 1 if len(dims) < len(pieces) else device.devices_per_chip
    rates = _ici(dims, group=inside, one_way=device.link_bytes_per_s.value / share)
    rings = sum(piece.wraps for piece in dims)
    why = f"{len(dims)} torus dims, {rings} of them rings"
    if inside == group:
        return Link("ICI", group, rates, why)
    network = device.network_bytes_per_s.value / device.devices_per_chip
    crossing = dict.fromkeys(WIRE, inside * network)
    crossing |= dict.fromkeys(
        ("all-to-all", "ragged-all-to-all"), network * (group - 1) / (group - inside)
    )
    crossing["collective-permute"] = network
    if inside == 1:
        return Link("DCN", group, crossing, f"{group} slices")
    rates = {kind: min(rates[kind], crossing[kind]) for kind in WIRE}
    return Link("ICI + DCN", group, rates, f"{group // inside} slices, in each {why}")


def _joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Those of one dim that continue one another as one."""
    joined: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.dim, piece.stride)):
        last = joined[-1] if joined else None
        if last and last.dim == piece.dim and last.size * last.stride == piece.stride:
            size = last.size * piece.size
            joined[-1] = Piece(piece.dim, size, last.stride, piece.wraps and last.stride == 1)
        else:
            joined.append(piece)
    return joined


def _ici(dims: list[Piece], *, group: int, one_way: float) -> dict[str, float]:
    each = [(2 if piece.wraps else 1) * one_way / piece.stride for piece in dims]
    rates = dict.fromkeys(WIRE, sum(each))
    if dims:
        # Half of each device's r bytes cross the middle, a quarter each way: size r / 4 over the
        # links of a row, which are two where it is a ring.
        slowest = max(piece.size / (4 * rate) for piece, rate in zip(dims, each, strict=True))
        rates |= dict.fromkeys(("all-to-all", "ragged-all-to-all"), (group - 1) / group / slowest)
        rates["collective-permute"] = min(one_way / piece.stride for piece in dims)
    return rates


def table(file: Path | None = None) -> str:
    """The devices, their figures and the source of each, for people."""
    return "\n".join(_lines(file))


def _lines(file: Path | None) -> Iterator[str]:
    for (kind, key), device in devices.devices(file).items():
        also = f" ({', '.join(device.also)})" if device.also else ""
        torus_of = f", pods of {'x'.join(map(str, device.pod))}" if device.pod else ""
        per = f", {device.devices_per_chip} devices a chip" if device.devices_per_chip > 1 else ""
        yield f"{kind}:{key}{also}  {device.name}{torus_of}{per}"
        figures = {name: (shown(name, f.value), f.source) for name, f in device.figures().items()}
        widths = [
            max(map(len, column), default=0)
            for column in (figures, (v for v, _ in figures.values()))
        ]
        for name, (value, source) in figures.items():
            yield f"  {name.ljust(widths[0])}  {value.rjust(widths[1])}  {source}"


def shown(name: str, value: float) -> str:
    """The figure `value` in the unit that its name ends with: 450.00 GB/s."""
    if name.endswith("_bytes"):
        return tree.binary(value)
    if name.endswith("_latency_s"):
        return f"{1e6 * value:g} us"
    for end, unit in (("_flops_per_s", "FLOP/s"), ("_bytes_per_s", "B/s")):
        if name.endswith(end):
            number, _, prefix = tree.decimal(value).partition(" ")
            return f"{number} {prefix}{unit}"
    return f"{value:g}"
