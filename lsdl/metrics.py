"""Metrics: means from (sum, weight) pairs, and the writers of the run folder's curves."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np


def means(sums, weight):
    """The tree of sum / weight: how every mean in lsdl is made, from sums over all devices."""
    return jax.tree.map(lambda value: value / weight, sums)


def fetched(results: Iterable) -> Iterator:
    """Each of `results` on the host, fetched when the next one has been sent to the devices.

    So the devices never wait for the host, and never have more than two results in flight: many
    at a time fill memory, and starve the collectives of a CPU with virtual devices.
    """
    pending = None
    for result in results:
        if pending is not None:
            yield jax.device_get(pending)
        pending = result
    if pending is not None:
        yield jax.device_get(pending)


class JsonLines:
    """`metrics.jsonl`: one row per (step, split), append-only; the first one written stays."""

    def __init__(self, path: Path, *, after_step: int):
        """Open `path`; rows beyond `after_step`, which a resumed run writes again, are dropped."""
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        self._written = {(row["step"], row["split"]) for row in kept}
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w") as file:
            file.writelines(_line(row) for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        self._file = open(path, "a")  # noqa: SIM115  (lives as long as the run)

    def write(self, row: dict) -> None:
        if (row["step"], row["split"]) not in self._written:
            self._written.add((row["step"], row["split"]))
            self._file.write(_line(row))
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files, one tag per split and metric.

    Without what is not finite, such as the update ratio of a layer that starts at zero: it has no
    place on a curve, and the writer warns of each.
    """

    def __init__(self, path: Path, *, after_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(path), purge_step=after_step + 1)

    def write(self, row: dict) -> None:
        for name, value in row.items():
            if name not in ("step", "split") and math.isfinite(value):
                self._writer.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def close(self) -> None:
        self._writer.close()


class Writers:
    """All writers of one process as one."""

    def __init__(self, writers: Iterable):
        self._writers = tuple(writers)

    def write(self, step: int, split: str, values: dict) -> None:
        row = {"step": int(step), "split": split}
        row |= {name: _number(value) for name, value in values.items()}
        for writer in self._writers:
            writer.write(row)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`; a torn last line, left by a crash, is skipped."""
    if not Path(path).exists():
        return []
    rows = []
    lines = Path(path).read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def _number(value) -> int | float:
    value = np.asarray(value)
    return int(value) if value.dtype.kind in "iu" else float(value)


def _line(row: dict) -> str:
    return json.dumps(row) + "\n"
