"""`audit.jsonl`: what a run was at its audited steps, as a chain that no row can leave unseen."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl import digests
from lsdl.errors import StuckError
from lsdl.experiment import Experiment
from lsdl.state import TrainState

PARTS = ("params", "model_state", "opt_state")
COMPARED = ("batch", "loss", *PARTS)


def chained(row: dict, before: str) -> dict:
    """`row` with its link: the digest of itself and of the link `before` it ("": none)."""
    text = json.dumps({name: row[name] for name in sorted(row) if name != "chain"})
    return row | {"chain": hashlib.sha256((before + text).encode()).hexdigest()}


def read(path: Path) -> list[dict]:
    """The rows of an `audit.jsonl`, their chain checked; a torn last line is left out.

    Raises `StuckError` naming the first row that is not the one that was written.
    """
    rows: list[dict] = []
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith(b"\n"):
            break
        try:
            row = json.loads(line)
            good = row == chained(row, rows[-1]["chain"] if rows else "")
        except (ValueError, TypeError, KeyError, RecursionError):
            good = False
        if not good:
            raise StuckError(
                f"{path} has a line {number} that is not what was written: it, or one before it, "
                "was changed; move the file away to train on without it."
            )
        rows.append(row)
    return rows


def recorder(experiment: Experiment) -> Callable[[TrainState], dict[str, jax.Array]]:
    """`record(state) -> {part: digest}`, on the devices."""
    whole = NamedSharding(experiment.mesh, P())
    of_parts = lambda state: {p: digests.of_tree(getattr(state, p)) for p in PARTS}  # noqa: E731
    return jax.jit(of_parts, out_shardings=whole)


def row(step: int, identities: np.ndarray, loss: Any, parts: dict[str, Any], layout: str) -> dict:
    """What is written of `step`: `identities` of its batch, its loss, `record` of its state."""
    text = lambda array: np.asarray(array).tobytes().hex()  # noqa: E731
    return {
        "step": step,
        "batch": hashlib.sha256(identities.tobytes()).hexdigest(),
        "loss": text(np.float32(loss)),
        **{part: text(parts[part]) for part in PARTS},
        "layout": layout,
    }


class AuditLog:
    """The rows of a run that goes on after a step; each is written when the next step is sent."""

    def __init__(self, path: Path, *, after_step: int, silent: bool):
        self._file, self._link = None, ""
        if silent:
            return
        kept = [row for row in read(path) if row["step"] <= after_step]
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        self._link = kept[-1]["chain"] if kept else ""
        self._file = open(path, "a")  # noqa: SIM115  (lives as long as the run)

    def write(self, row: dict) -> None:
        if self._file:
            row = chained(row, self._link)
            self._link = row["chain"]
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


class Auditor:
    """Takes the digests of the steps that are due, and writes them one step late."""

    def __init__(self, experiment: Experiment, path: Path, loader: Any, *, first: int, main: bool):
        self._every = experiment.audit_every_steps
        self._experiment, self._loader = experiment, loader
        self._pending: tuple | None = None
        if self._every:
            self._record = recorder(experiment)
            self._log = AuditLog(path, after_step=first, silent=not main)

    def sent(self, step: int, state: TrainState, metrics: dict) -> None:
        """`step` was sent and has left `state`: write what is pending, take the digests if due."""
        self.flush()
        if self._every and step % self._every == 0:
            self._pending = step, metrics["loss"], self._record(state)

    def flush(self) -> None:
        if self._pending:
            (step, loss, parts), self._pending = self._pending, None
            loss, parts = jax.device_get((loss, parts))
            batch = self._loader.identities(step - 1)
            self._log.write(row(step, batch, loss, parts, self._experiment.layout))

    def close(self) -> None:
        if self._every:
            self._log.close()
