"""Past one machine, on paper: throughput and MFU against the number of devices.

Of a model whose parameters are split over the devices of a slice or node (or over all) and whose
batch is split over all of them: no tensor, sequence or pipeline parallelism, and a large group for
each. From peak rates and bytes alone, with nothing fitted, so that each point is a bracket: all
that is sent hides behind the computation (`hidden`), or nothing of it does (`exposed`). What the
formulas do not have is in `MISSING`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from lsdl.errors import UserError
from lsdl.planner import hardware, tree
from lsdl.planner.hlo import WIRE

MISSING = (
    "products below the peak rate, latency of the network, its links shared with others or used "
    "below their peak, and waiting for the slowest device"
)
SPLITS = ("inside", "all")
EDGES = ("hidden", "exposed")


@dataclass(frozen=True)
class Work:
    """What a step does and sends. A unit is a token, or an image."""

    parameters: int  # that are gathered, and whose gradients are reduced
    model_flops: float  # of a unit, forward and backward
    extra_flops: float = 0.0  # of a unit, what rematerialisation computes again
    gathers: int = 2  # of each parameter in a step; 1: kept until the backward pass
    reduces: int = 1  # of each gradient in a step, where parameters are split: each microbatch
    weight_bytes: int = 2  # of a parameter as it is gathered
    gradient_bytes: int = 4  # of a gradient as it is reduced
    unit: str = "tokens"
    units_per_example: int = 1


def transformer(
    *,
    layers: int,
    width: int,
    heads_width: int,
    mlp: int,
    vocab: int,
    length: int,
    kv_width: int = 0,
    gated: bool = True,
    remat: bool = False,
) -> Work:
    """The work of a decoder with its own unembedding; `heads_width`: heads x their width.

    Attention counts in full. `remat`: all blocks are computed again.
    Source: Austin et al. 2025, How to Scale Your Model, chapter 4.
    """
    attention = 2 * width * heads_width + 2 * width * (kv_width or heads_width)
    block = attention + (3 if gated else 2) * width * mlp
    forward = 2 * block + 4 * heads_width * length  # FLOPs of a token in one block
    return Work(
        parameters=layers * block + 2 * vocab * width,
        model_flops=3.0 * (layers * forward + 2 * vocab * width),
        extra_flops=float(layers * forward) if remat else 0.0,
        units_per_example=length,
    )


def work_of(numbers: Mapping[str, Any], experiment: Any) -> Work:
    """The work of an `Experiment` whose plan is `numbers` (`totals.make_plan`): FLOPs as counted.

    Parameters and gradients travel as the model computes with them, those that are split in each
    microbatch: the least, as in `collectives.lower_bounds`.
    """
    itemsize = jnp.dtype(experiment.module.dtype).itemsize
    units = experiment.task.units_per_example
    model, step = (numbers[f"{name}_flops_per_example"] for name in ("model", "step"))
    return Work(
        parameters=numbers["parameters"],
        model_flops=model / units,
        extra_flops=(step - model) / units,
        gathers=experiment.accum * (1 if experiment.remat == "none" else 2),
        reduces=experiment.accum,
        weight_bytes=itemsize,
        gradient_bytes=itemsize,
        unit=experiment.task.unit,
        units_per_example=units,
    )


def counts(text: str) -> list[int]:
    """`8..65536` -> 8, 16, ... 65536, each twice the one before; `8,24` -> 8, 24.

    Raises `UserError` for another form.
    """
    if both := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        first, last = map(int, both.groups())
        found = [first << i for i in range(max(last, 1).bit_length()) if first << i <= last]
    else:
        found = [int(word) for word in text.split(",")] if re.fullmatch(r"[\d,]*\d", text) else []
    if not found or min(found) < 1:
        raise UserError(
            f"devices={text!r} must be as 8..65536 (doubled each time), or as 8,64,512."
        )
    return sorted(set(found))


def target(device: hardware.Device, count: int) -> hardware.Target:
    """`count` devices of a kind: whole nodes, or the squarest slice, or several of the largest.

    Raises `UserError` where there is none: slices have powers of two along each dim.
    """
    if device.kind == "cpu":
        return hardware.Target(device, (count,))
    if device.kind == "gpu":
        node = min(count, round(device.node_devices.value))
        if count % node:
            raise UserError(f"{count} of {device.name} are no whole nodes of {node}: change one.")
        return hardware.Target(device, (count // node, node))
    chips, rest = divmod(count, device.devices_per_chip)
    slices = 1
    while not rest and chips >= slices and chips % slices == 0:
        if shape := _slice(device.pod, chips // slices):
            return hardware.Target(device, shape, slices)
        slices *= 2
    raise UserError(f"{count} of {device.name} are no slices whose dims are powers of two.")


def _slice(pod: Sequence[int], chips: int) -> tuple[int, ...] | None:
    """Powers of two whose product is `chips`, within the pod's dims, as equal as can be."""
    if chips & (chips - 1):
        return None
    shape = [1] * len(pod)
    for _ in range(chips.bit_length() - 1):
        room = [i for i, most in enumerate(pod) if 2 * shape[i] <= most]
        if not room:
            return None
        shape[min(room, key=lambda i: (shape[i], i))] *= 2
    return tuple(sorted(shape))


def point(
    work: Work, own: hardware.Target, units_per_device: float, *, split: str = "inside"
) -> dict[str, Any]:
    """One step on the target `own`: the seconds of its parts, and the bracket that they leave.

    `least_units_per_device`: with fewer a network takes longer than computing.
    `split`: "inside" the parameters are split over a slice or node and whole in each, which then
    reduce their gradients; "all" they are split over all devices.
    """
    n, inside = own.count, own.count // own.slices
    if own.device.kind == "gpu":
        inside = own.shape[1]
    fsdp = inside if split == "inside" else n
    sizes = {"data": n // fsdp, "fsdp": fsdp}
    dcn = {"data" if split == "inside" else "fsdp": own.slices} if own.slices > 1 else None
    peak = own.flops_per_s("bfloat16")
    if not peak:
        raise UserError(f"{own.device.name} has no published rate: name a TPU or a GPU.")
    nbytes = work.parameters * work.weight_bytes
    gradient_bytes = work.parameters * work.gradient_bytes / fsdp
    sent = {
        "fsdp": {
            "all-gather": work.gathers * WIRE["all-gather"](nbytes, fsdp),
            "reduce-scatter": work.reduces * WIRE["reduce-scatter"](gradient_bytes, fsdp),
        },
        "data": {"all-reduce": WIRE["all-reduce"](gradient_bytes, n // fsdp)},
    }
    unit_s = (work.model_flops + work.extra_flops) / peak
    parts_s = {"compute": unit_s * units_per_device}
    networks = {}
    for axis, kinds in sent.items():
        link = hardware.link(own, sizes, axis, dcn=dcn)
        rates = link.bytes_per_s or {}
        parts_s[axis] = sum(nbytes / rates[kind] for kind, nbytes in kinds.items() if nbytes)
        networks[axis] = link.network
    binds = max(parts_s, key=parts_s.get)
    step_s = {"hidden": parts_s[binds], "exposed": sum(parts_s.values())}
    slowest_s = max(seconds for axis, seconds in parts_s.items() if axis != "compute")
    useful_s = work.model_flops * units_per_device / peak
    return {
        "devices": n,
        "target": own.text,
        "units_per_device": units_per_device,
        "parts_s": parts_s,
        "sent_bytes": {axis: sum(kinds.values()) for axis, kinds in sent.items()},
        "networks": networks,
        "least_units_per_device": slowest_s / unit_s,
        "binds": binds if binds == "compute" else f"{networks[binds]} ({binds})",
        "step_s": step_s,
        "units_per_s": {edge: n * units_per_device / s for edge, s in step_s.items()},
        "mfu": {edge: useful_s / s for edge, s in step_s.items()},
    }


def make(
    work: Work,
    device: hardware.Device,
    *,
    devices: Sequence[int],
    units_per_device: float,
    units_per_step: float,
    split: str = "inside",
) -> dict[str, Any]:
    """Weak scaling, `units_per_device` on each, and strong, `units_per_step` on all: JSON values.

    `binds_at`: the first number of devices on which a network takes longer than computing, None if
    there is none. Strong scaling ends where a device has less than one example.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} must be one of {', '.join(SPLITS)}.")
    targets = [target(device, count) for count in devices]
    own = {"weak": lambda n: units_per_device, "strong": lambda n: units_per_step / n}
    found = {"device": device.name, "unit": work.unit, "split": split, "missing": MISSING}
    found |= {"units_per_device": units_per_device, "units_per_step": units_per_step}
    for name, units in own.items():
        found[name] = [
            point(work, one, units(one.count), split=split)
            for one in targets
            if name == "weak" or units(one.count) >= work.units_per_example
        ]
    found["binds_at"] = {
        name: next((p["devices"] for p in found[name] if p["binds"] != "compute"), None)
        for name in own
    }
    return found


def table(found: Mapping[str, Any]) -> str:
    """`found` of `make`, for people."""
    unit = found["unit"]
    lines = []
    for name, what in (
        ("weak", f"{found['units_per_device']:,.0f} {unit} on each device"),
        ("strong", f"{found['units_per_step']:,.0f} {unit} a step"),
    ):
        at = found["binds_at"][name]
        end = f"a network binds from {at:,} devices on" if at else "no network binds"
        lines += [f"{name} scaling, {what}: {end}"]
        head = f"{'devices':>9}  {f'{unit} each':>12}  {'at least':>8}  {f'{unit}/s':>21}  "
        head += f"{'MFU':>15}  binds"
        lines += [head, *(_line(row) for row in found[name])]
        if len(found[name]) < len(found["weak"]):
            lines.append("and no further: a device would have less than one example")
    lines += [
        f"From the first figure (nothing hides) to the second (all does), on {found['device']}, "
        f"parameters split over {'all' if found['split'] == 'all' else 'a slice or node'}. With "
        f"fewer {unit} on a device than `at least` a network takes longer than computing.",
        f"Not in the formulas: {found['missing']}.",
    ]
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    low, high = (row["units_per_s"][edge] for edge in reversed(EDGES))
    mfu_low, mfu_high = (row["mfu"][edge] for edge in reversed(EDGES))
    return (
        f"{row['devices']:>9,}  {row['units_per_device']:>12,.0f}  "
        f"{row['least_units_per_device']:>8,.0f}  "
        f"{f'{tree.decimal(low)} .. {tree.decimal(high)}':>21}  "
        f"{f'{mfu_low:.1%} .. {mfu_high:.1%}':>15}  {row['binds']}"
    )


def figure(found: Mapping[str, Any], published: Mapping[str, tuple] | None = None) -> Any:
    """MFU and throughput against devices; `published`: {label: (devices, MFU)} over the first."""
    from lsdl import plots  # matplotlib takes a second, and only a figure needs it

    names = {"hidden": "all hidden", "exposed": "nothing hidden"}
    drawn = []
    for quantity, y, log in (
        ("mfu", "MFU", False),
        ("units_per_s", f"{found['unit']} a second", True),
    ):
        series = {
            f"{name}, {word}": (
                [row["devices"] for row in found[name]],
                [row[quantity][edge] for row in found[name]],
            )
            for name in ("weak", "strong")
            for edge, word in names.items()
        }
        own = dict(title=y, x="devices", y=y, logx=True, logy=log)
        drawn.append(plots.lines(series, **own, published=published if quantity == "mfu" else None))
    return plots.panels(drawn, title=f"Scaling on {found['device']}, predicted")
