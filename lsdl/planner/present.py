"""The devices that are there, as a target: what a run's predictions are made for."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from lsdl.errors import UserError
from lsdl.planner import devices as table
from lsdl.planner.hardware import Target

# What jax calls a device -> its row in the table. A card that is not listed has other peaks.
KINDS = (
    (r"V100-SXM\w*-32GB", "gpu", "v100-32"),
    (r"V100-SXM\w*-16GB", "gpu", "v100-16"),
    (r"A100-SXM\w*-80GB", "gpu", "a100-80"),
    (r"A100-SXM\w*-40GB", "gpu", "a100-40"),
    (r"H100 80GB HBM3", "gpu", "h100"),
    (r"H200", "gpu", "h200"),
    (r"B200", "gpu", "b200"),
    (r"TPU v3", "tpu", "v3"),
    (r"TPU v4$", "tpu", "v4"),
    (r"TPU (v5 lite|v5e)", "tpu", "v5e"),
    (r"TPU (v5|v5p)$", "tpu", "v5p"),
    (r"TPU (v6 lite|v6e)", "tpu", "v6e"),
    (r"TPU ?7x", "tpu", "7x"),
)


def row(name: str) -> table.Device | None:
    """The table's row of what jax, or the driver, calls a device; None if it has none."""
    found = next(((kind, key) for form, kind, key in KINDS if re.search(form, name)), None)
    try:
        return found and table.find(*found)
    except UserError:  # a generation that the table has no row of
        return None


def target(devices: Sequence[Any]) -> Target | None:
    """`devices` (jax's, all alike) as a target; None if the table does not know them.

    GPUs are taken to fill their nodes, TPU chips to be the box that their coordinates span.
    """
    device = row(devices[0].device_kind)
    if device is None:
        return None
    if device.kind == "gpu":
        node = min(len(devices), int(device.node_devices.value))
        return Target(device, (len(devices) // node, node))
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    spans = zip(*(d.coords for d in devices), strict=True)
    shape = tuple(max(span) - min(span) + 1 for span in spans)[: len(device.pod)]
    found = Target(device, shape, slices)
    return found if found.count == len(devices) else None


def memory_bytes() -> int | None:
    """What a program may use of one device; None where the device does not tell (CPUs)."""
    stats = jax.local_devices()[0].memory_stats() or {}  # other processes' are out of reach
    return stats.get("bytes_limit")


def capacity_bytes() -> int:
    """The same, and of a CPU's virtual devices each one's part of the machine's memory."""
    return memory_bytes() or host_bytes() // jax.local_device_count()


def host_bytes() -> int:
    """What this machine, or the container on it, has of memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")
    word = limit.read_text().strip() if limit.exists() else "max"
    return machine if word == "max" else min(machine, int(word))
