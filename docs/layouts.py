"""The README's figure, from runs of one config on several layouts: python docs/layouts.py RUN ...

Left the loss of each after every step, right how far it lies from the first run's, relative to it.
Writes layouts.svg beside the first run: the README shows docs/layouts.svg, a copy of it.
"""

import json
import sys
from pathlib import Path

import numpy as np

from lsdl import plots
from lsdl.metrics import read_rows


def label(folder: Path) -> str:
    """What of the layout a run's config tells."""
    config = json.loads((folder / "config.json").read_text())["config"]
    by = "" if config["partitioner"] == "jit" else f" {config['partitioner']}"
    return config["mesh"].replace(",", " ") + by


def losses(folder: Path) -> tuple[list[int], np.ndarray]:
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    return [row["step"] for row in rows], np.array([row["loss"] for row in rows])


def figure(folders: list[Path]) -> plots.Figure:
    curves = {label(folder): losses(folder) for folder in folders}
    (_, first), *_ = curves.values()
    apart = {
        name: (steps, (loss / first - 1) * 1e7) for name, (steps, loss) in list(curves.items())[1:]
    }
    (config,) = {json.loads((f / "config.json").read_text())["source"] for f in folders}
    drawn = [
        plots.lines(curves, title="Training loss", x="step", y="nats", among=[*curves]),
        plots.lines(
            apart,
            title=f"Distance from {next(iter(curves))}",
            x="step",
            y="ten-millionths of the loss",
            among=[*curves],
        ),
    ]
    alt = f"The curves of {len(folders)} layouts lie on one another, to rounding."
    return plots.panels(drawn, title=f"{config} on {len(folders)} layouts of 8 devices", alt=alt)


if __name__ == "__main__":
    folders = [Path(folder) for folder in sys.argv[1:]]
    written = folders[0].parent / "layouts.svg"
    figure(folders).save(written)
    print(f"written: {written}")
