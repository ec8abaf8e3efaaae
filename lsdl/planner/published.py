"""Published scaling curves, and what `scaling` makes of the same runs with nothing fitted."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lsdl.planner import hardware, scaling
from lsdl.planner.devices import Figure

MAXTEXT = "AI-Hypercomputer/maxtext, configs/v5e/README.md and {}b.sh, 2025"
A3 = "AI-Hypercomputer/maxtext, configs/a3/llama_2_7b/README.md and models/gpu/llama2_7b.yml, 2025"
# Google Cloud, GPU machine types, 2025: a3-highgpu-8g has 4 cards of 200 Gb/s for 8 GPUs.
A3_NETWORK_BYTES_PER_S = 12.5e9


@dataclass(frozen=True)
class Curve:
    """A run on more and more devices, the batch of each device the same."""

    name: str
    source: str
    device: str  # kind:key of the hardware table
    work: scaling.Work
    examples_per_device: int
    values: Mapping[int, float]  # {devices: value}
    quantity: str  # "mfu", or "units_per_s": of one device
    split: str = "inside"
    network_bytes_per_s: float = 0.0  # of a device, where it is not the table's


def _maxtext(scale: int, width: int, layers: int) -> scaling.Work:
    """global_parameter_scale=16 or 32 of MaxText's base.yml: 64 heads of 128, an MLP of 28,672."""
    sizes = dict(layers=layers, width=width, heads_width=8192, mlp=28_672, vocab=32_000)
    return scaling.transformer(**sizes, length=2048, remat=True)


_LLAMA2_7B = scaling.transformer(
    layers=32, width=4096, heads_width=4096, mlp=11_008, vocab=32_000, length=4096
)
_LLAMA3_8B = scaling.transformer(
    **dict(layers=32, width=4096, heads_width=4096, kv_width=1024, mlp=14_336),
    **dict(vocab=128_256, length=8192),
)
_MPT_13B = scaling.transformer(
    **dict(layers=40, width=5120, heads_width=5120, mlp=20_480, gated=False),
    **dict(vocab=50_368, length=2048),
)
SLICES = (256, 512, 1024, 2048, 4096, 8192)
CURVES = (
    Curve(
        "MaxText 32B, v5e",
        MAXTEXT.format(32),
        "tpu:v5e",
        _maxtext(32, width=8192, layers=32),
        4,
        dict(zip(SLICES, (0.6686, 0.6481, 0.6410, 0.6367, 0.6226, 0.6040), strict=True)),
        "mfu",
    ),
    Curve(
        "MaxText 16B, v5e",
        MAXTEXT.format(16),
        "tpu:v5e",
        _maxtext(16, width=4096, layers=32),
        6,
        dict(zip(SLICES, (0.6110, 0.5937, 0.5914, 0.5827, 0.5656, 0.5465), strict=True)),
        "mfu",
    ),
    Curve(
        "MaxText Llama 2 7B, H100",
        A3,
        "gpu:h100",
        dataclasses.replace(_LLAMA2_7B, gathers=1),
        4,
        {
            n: x * 1e12 / 989.5e12
            for n, x in ((8, 492), (16, 422), (32, 407), (64, 409), (128, 375))
        },
        "mfu",
        network_bytes_per_s=A3_NETWORK_BYTES_PER_S,
    ),
    Curve(
        "torchtitan Llama 3.1 8B, H100",
        "pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3",
        "gpu:h100",
        _LLAMA3_8B,
        2,
        {8: 6_667.0, 128: 6_514.0},
        "units_per_s",
        split="all",
    ),
    Curve(
        "llm-foundry MPT 13B, H100",
        "mosaicml/llm-foundry, scripts/train/benchmarking/README.md, 2048 tokens",
        "gpu:h100",
        _MPT_13B,
        2,
        {8: 0.3979, 16: 0.3958, 32: 0.3995, 64: 0.3986},
        "mfu",
        split="all",
    ),
)


def of(device: hardware.Device) -> list[Curve]:
    """The curves on that device."""
    return [curve for curve in CURVES if curve.device == f"{device.kind}:{device.key}"]


def overlay(device: hardware.Device) -> dict[str, tuple[list[int], list[float]]]:
    """{name: (devices, MFU)} of the curves on that device, for `scaling.figure`."""
    found = [compare(curve) for curve in of(device)]
    return {
        one["name"].partition(",")[0]: (
            [row["devices"] for row in one["rows"]],
            [row["published_mfu"] for row in one["rows"]],
        )
        for one in found
    }


def compare(curve: Curve) -> dict[str, Any]:
    """The published curve beside the predicted one, as JSON values.

    `efficiency`: MFU over that on the fewest devices. `within`: the largest relative distance of
    the published efficiency from the bracket of the predicted ones, 0 inside of it.
    """
    kind, key = curve.device.split(":")
    device = hardware.devices.find(kind, key)
    if curve.network_bytes_per_s:
        own = Figure(curve.network_bytes_per_s, curve.source)
        device = dataclasses.replace(device, network_bytes_per_s=own)
    units = curve.examples_per_device * curve.work.units_per_example
    points = [
        scaling.point(curve.work, scaling.target(device, n), units, split=curve.split)
        for n in curve.values
    ]
    peak = scaling.target(device, min(curve.values)).flops_per_s("bfloat16")
    per_value = curve.work.model_flops / peak if curve.quantity == "units_per_s" else 1.0
    rows = []
    for own, value in zip(points, curve.values.values(), strict=True):
        published = value / next(iter(curve.values.values()))
        predicted = {e: own["mfu"][e] / points[0]["mfu"][e] for e in scaling.EDGES}
        low, high = sorted(predicted.values())
        nearest = min(max(published, low), high)
        row = {"devices": own["devices"], "published_mfu": value * per_value, "mfu": own["mfu"]}
        row |= {"published_efficiency": published, "efficiency": predicted}
        row |= {"parts_s": own["parts_s"], "away": nearest / published - 1}
        rows.append(row)
    last = rows[-1]
    found = {"name": curve.name, "source": curve.source, "device": device.name, "rows": rows}
    found |= {"published_drop": 1 - last["published_efficiency"]}
    found |= {"drop": {e: 1 - last["efficiency"][e] for e in scaling.EDGES}}
    return found | {"within": max(abs(row["away"]) for row in rows)}


def table(found: Mapping[str, Any]) -> str:
    """`found` of `compare`, for people, and what it does not explain."""
    lines = [f"{found['name']}: {found['source']}"]
    lines += [
        f"{'devices':>9}  {'MFU':>6}  {'predicted':>14}  {'of the first':>12}  {'predicted':>15}"
    ]
    for row in found["rows"]:
        mfu, part = (
            " .. ".join(f"{row[name][edge]:.1%}" for edge in reversed(scaling.EDGES))
            for name in ("mfu", "efficiency")
        )
        lines.append(
            f"{row['devices']:>9,}  {row['published_mfu']:>6.1%}  {mfu:>14}  "
            f"{row['published_efficiency']:>12.1%}  {part:>15}"
        )
    return "\n".join([*lines, verdict(found)])


def verdict(found: Mapping[str, Any]) -> str:
    """What the prediction explains of the published loss, and what is missing for the rest."""
    lost, drop = found["published_drop"], found["drop"]
    most = max(drop.values())
    text = (
        f"lost: {lost:.1%} as published, {min(drop.values()):.1%} to {most:.1%} predicted; the "
        f"curve is within {found['within']:.1%} of the bracket"
    )
    if lost <= most:
        return f"{text}, which explains it."
    text += f", which explains {most / lost:.0%} of the loss at most."
    return f"{text} Missing: {scaling.MISSING}. {_growth(found)}"


def _growth(found: Mapping[str, Any]) -> str:
    """Whether the published loss still grows where the bytes sent no longer do."""
    before, last = found["rows"][-2:]
    sent = [sum(row["parts_s"][axis] for axis in ("fsdp", "data")) for row in (before, last)]
    step = 1 - last["published_mfu"] / before["published_mfu"]
    return (
        f"From {before['devices']:,} to {last['devices']:,} devices each sends "
        f"{sent[1] / sent[0] - 1:.1%} more, and {step:.1%} of the throughput are lost: bytes alone "
        "cannot say why."
    )
