"""PH-25: a grid of 4 x 2 devices, data by model, on a net of convolutions and dense layers.

Convolutions split the batch over all 8 devices; the dense layers' kernels are split in two, each
half on 4 devices. A thin AlexNet on digits, 8 virtual devices of a process of their own.
Letters: B the global batch, W what the dense layers see and pass on, in numbers for an example.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.experiment import opened
from lsdl.planner import collectives
from lsdl.sharding.rules import axes_of
from lsdl.studies import one_weird_trick
from lsdl.studies.claim import Cell, Claim, Expected, judged
from lsdl.studies.one_weird_trick import CONFIG

CLAIM = (
    "Data and model parallelism are two axes of one grid: the result is that of one device, and "
    "splitting the dense layers pays as long as a batch's activations are fewer than parameters."
)
SOURCE = (
    "Lectures: synchronous SGD, data x model parallelism; Krizhevsky 2014, One weird trick for "
    "parallelizing convolutional neural networks (arXiv:1404.5997)"
)
_GRID = "lecture on distributed training: data x model"
EXPECTED = {
    "same": Expected(
        "largest distance of a parameter from one device's after 20 steps, 4 x 2 devices, thin "
        "AlexNet on digits, no dropout",
        "lectures: synchronous SGD equals the large batch",
        high=1e-5,
    ),
    "moved": Expected(
        "the largest way that a parameter went in these 20 steps, to compare", "the same", low=1e-3
    ),
    "predicted": Expected(
        "bytes on the wire, counted in the compiled step over predicted, the farthest from 1 of "
        "grids of 8 x 1, 4 x 2, 2 x 4 and 1 x 8",
        "traffic of a ring",
        0.99,
        1.01,
    ),
    "less": Expected(
        "bytes that a device of 4 x 2 sends over one of 8 x 1, counted, where B W of a data "
        "shard's batch is a quarter of the dense parameters",
        "B x width < dense parameters",
        high=0.95,
    ),
    "more": Expected(
        "the same where B W of a data shard's batch is four times the dense parameters",
        "B x width > dense parameters",
        low=1.05,
    ),
    "crossing": Expected(
        "the batch from which 8 x 1 sends less than 4 x 2, counted, over that of the formula",
        "B x width = dense parameters",
        0.95,
        1.05,
    ),
    "memory": Expected(
        "bytes of parameters on a device of 4 x 2 over those of 8 x 1",
        "lecture on distributed training: very large models need model parallelism",
        high=0.6,
    ),
}

FIELDS = one_weird_trick.FIELDS | {
    "model.widths": (8, 8, 16, 16, 32),
    "model.hidden": (512, 512),
}
# Nothing is read for counting: a set of more images than the largest batch.
MANY = {
    "data.source": "tfds:mnist",
    "data.train_split": "train[:55000]",
    "data.valid_split": "train[55000:]",
    "data.test_split": "test",
}
GRIDS = ((8, 1), (4, 2), (2, 4), (1, 8))  # data x tensor
GRID, ALONE = (4, 2), (8, 1)
SMALL, LARGE = 512, 8_128  # B W of a data shard's batch: 1/4 and 4 times the dense parameters


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale Krizhevsky's table of AlexNet on 1 to 8 GPUs."""
    if scale == "full":
        return one_weird_trick.cells(scale, seeds)
    return [Cell("grids", {"devices": one_weird_trick.DEVICES, "steps": one_weird_trick.STEPS})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    return one_weird_trick.on_devices("lsdl.studies.model_parallel", folder / "found.json")


def layout(grid: tuple[int, int]) -> dict[str, str]:
    """The fields of a grid of data x tensor devices; convolutions see all of them as data."""
    sizes = zip(("data", "tensor"), grid, strict=True)
    mesh = ",".join(f"{axis}={size}" for axis, size in sizes if size > 1) or "data=1"
    return {"rules": "one_weird_trick" if grid[1] > 1 else "dp", "mesh": mesh}


def find() -> dict[str, Any]:
    """Of each grid and batch the bytes that a device sends and holds; on 8 devices."""
    programs = [(grid, SMALL) for grid in GRIDS] + [(GRID, LARGE)]
    rows = []
    for grid, batch in programs:
        name = f"{grid[0]} x {grid[1]}"
        row = one_weird_trick.counted(name, layout(grid), batch, fields=FIELDS | MANY)
        rows.append(row | {"held_bytes": held_bytes(grid)})
    found = {key: [row[key] for row in rows] for key in rows[0]}
    experiment = opened(CONFIG, FIELDS | {"batch_size": one_weird_trick.SAME_BATCH})
    found["sizes"] = asdict(one_weird_trick.sizes_of(experiment.abstract_state.params))
    start = experiment.init.lower().compile(collectives.QUICK)()
    alone, own = (
        one_weird_trick.trained(start, layout(grid), devices=math.prod(grid), fields=FIELDS)
        for grid in ((1, 1), GRID)
    )
    return found | {"distance": _largest(own, alone), "moved": _largest(alone, start.params)}


def _largest(a: Any, b: Any) -> float:
    """The largest distance of a parameter from the same one of another tree."""
    apart = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), a, b)
    return max(jax.tree.leaves(apart))


def held_bytes(grid: tuple[int, int]) -> int:
    """Bytes of parameters on one device."""
    experiment = opened(CONFIG, FIELDS | layout(grid) | {"batch_size": SMALL}, devices=8)
    own = [p for p in experiment.placements if p.path.startswith("params/")]
    pieces = [
        math.prod(experiment.mesh.shape[axis] for axes in p.spec for axis in axes_of(axes))
        for p in own
    ]
    return sum(p.nbytes // n for p, n in zip(own, pieces, strict=True))


def crossing(bytes_by_batch: Mapping[int, float], alone: float) -> float:
    """The batch at which a line through two points reaches the bytes of data parallelism."""
    (b0, y0), (b1, y1) = sorted(bytes_by_batch.items())
    return b0 + (alone - y0) * (b1 - b0) / (y1 - y0)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    (row,) = table
    pairs = list(zip(row["counted"], row["predicted"], strict=True))
    ratios = [c.get(key, 0) / p.get(key, np.nan) for c, p in pairs for key in c | p]
    sent = {
        (name, batch): sum(counted.values())
        for name, batch, counted in zip(row["program"], row["batch"], row["counted"], strict=True)
    }
    held = dict(zip(row["program"], row["held_bytes"], strict=True))
    grid, alone = (f"{g[0]} x {g[1]}" for g in (GRID, ALONE))
    pure = sent[alone, SMALL]
    sizes = one_weird_trick.Sizes(**row["sizes"])
    formula = {b: _predicted(sizes, b, GRID) for b in (SMALL, LARGE)}
    counted = {b: sent[grid, b] for b in (SMALL, LARGE)}
    return judged(
        EXPECTED,
        {
            "same": row["distance"],
            "moved": row["moved"],
            "predicted": max(ratios, key=lambda r: abs(math.log(r)) if r > 0 else math.inf),
            "less": counted[SMALL] / pure,
            "more": counted[LARGE] / pure,
            "crossing": crossing(counted, pure)
            / crossing(formula, _predicted(sizes, SMALL, ALONE)),
            "memory": held[grid] / held[alone],
        },
    )


def _predicted(sizes: one_weird_trick.Sizes, batch: int, grid: tuple[int, int]) -> float:
    return sizes.sent(batch, data=grid[0], tensor=grid[1], scattered=False).total()


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The bytes sent by batch, of each grid, and what a device holds."""
    (row,) = table
    sizes = one_weird_trick.Sizes(**row["sizes"])
    batches = np.geomspace(SMALL / 4, LARGE, 12)
    series = {
        f"{grid[0]} x {grid[1]}": (
            batches,
            np.array([_predicted(sizes, b, grid) / 1e6 for b in batches]),
        )
        for grid in GRIDS
    }
    points = {
        "counted": (row["batch"], [sum(counted.values()) / 1e6 for counted in row["counted"]])
    }
    traffic = plots.lines(
        series,
        published=points,
        title="What a device sends",
        x="global batch",
        y="MB in a step",
        logx=True,
        logy=True,
    )
    held = dict(zip(row["program"], row["held_bytes"], strict=True))
    memory = plots.bars(
        {name: nbytes / 1e6 for name, nbytes in held.items()},
        title="What it holds",
        x="MB of parameters",
    )
    alt = "With few examples grids with model parallelism send less, with many they send more."
    title = "8 devices, data x model: a thin AlexNet"
    return {"grids": plots.panels([traffic, memory], title=title, alt=alt)}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(find()))
