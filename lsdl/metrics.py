"""Metrics: means from (sum, weight) pairs, and the writers of the run folder's curves."""

import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from lsdl.errors import UserError
from lsdl.files import open_regular, parse_json, plain, write_text


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
    """`metrics.jsonl`: one row per (step, split), append-only; the first one written stays.

    What is not finite is null, so that every reader of JSON can read every line.
    """

    def __init__(self, path: Path, *, after_step: int):
        """Open `path`; rows beyond `after_step`, which a resumed run writes again, are dropped."""
        kept = [row for row in read_rows(path) if row["step"] <= after_step]
        self._written = {(row["step"], row["split"]) for row in kept}
        write_text(path, "".join(map(_line, kept)))
        self._file = open(path, "a")  # noqa: SIM115  (lives as long as the run)

    def write(self, row: dict) -> None:
        if (row["step"], row["split"]) not in self._written:
            self._written.add((row["step"], row["split"]))
            self._file.write(_line(row))
            self._file.flush()

    def sync(self) -> None:
        """Have the rows on the disk: a checkpoint that is committed after this has its rows."""
        os.fsync(self._file.fileno())

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

    def sync(self) -> None:
        """Nothing: these are curves to look at, and no resume reads them."""

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

    def sync(self) -> None:
        for writer in self._writers:
            writer.sync()

    def close(self) -> None:
        for writer in self._writers:
            writer.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, null as NaN; a torn last line, left by a crash, is skipped.

    Raises `UserError` for a file that lsdl has not written so.
    """
    try:
        with open_regular(Path(path)) as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    last = len(lines) - (lines[-1] == b"")
    rows = []
    for number, line in enumerate(lines[:last], start=1):
        try:
            rows.append(_row(parse_json(line)))
        except ValueError as error:
            if number < last:
                raise UserError(
                    f"{path} has the broken line {number} ({error}): mend it."
                ) from error
    return rows


def _row(found: object) -> dict:
    """A row as it was before `_line`; `ValueError` if it was none."""
    if not isinstance(found, dict):
        raise ValueError("it is no object")
    row = {name: math.nan if value is None else value for name, value in found.items()}
    numbers = [value for name, value in row.items() if name != "split"]
    if type(row.get("step")) is not int or not isinstance(row.get("split"), str):
        raise ValueError("it has no step and split")
    # A float of Python's at most: 1e999 would be read as infinite.
    if not all(type(v) in (int, float) and abs(v) <= sys.float_info.max for v in numbers if v == v):
        raise ValueError("not all its values are numbers")
    return row


def _number(value) -> int | float:
    value = np.asarray(value)
    return int(value) if value.dtype.kind in "iu" else float(value)


def _line(row: dict) -> str:
    return json.dumps(plain(row), allow_nan=False) + "\n"
