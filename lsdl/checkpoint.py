"""Checkpoints: orbax behind one door. Saved asynchronously, restored onto any mesh."""

import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lsdl.state import TrainState

_policies = ocp.checkpoint_managers


class Checkpoints:
    """The checkpoints of one run: the newest `keep_latest`, and the `keep_best` by valid loss.

    A save returns once the arrays are copied off the devices; the files are written behind the
    next steps. `close` waits for them.
    """

    def __init__(self, path: Path, *, keep_latest: int = 1, keep_best: int = 0):
        kept: list[Any] = [_policies.LatestN(keep_latest)]
        if keep_best:
            best = _policies.BestN(
                get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False
            )
            kept.append(best)
        self._manager = ocp.CheckpointManager(
            path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_policies.AnyPreservationPolicy(kept),
                enable_async_checkpointing=True,
            ),
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, *, metrics: dict | None) -> None:
        """Save `state` as `step`; `metrics` (of the valid split) are what `keep_best` compares.

        A later step may donate `state`: its values are copied before this returns.
        """
        if step in self._manager.all_steps():
            return
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        if not self._manager.save(step, args=args, metrics=metrics, force=True):
            raise RuntimeError(f"Orbax refused to save step {step}.")

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, with the shapes and the shardings of `abstract`."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args)["state"]

    def close(self) -> None:
        """Wait for what is being written, then let go."""
        self._manager.wait_until_finished()
        self._manager.close()


def _score(metrics: dict) -> float:
    """Orbax keeps the highest; it would take NaN for that."""
    return -metrics["loss"] if math.isfinite(metrics["loss"]) else -math.inf


def with_shardings(abstract: TrainState, shardings: TrainState) -> TrainState:
    """`abstract` with the shardings that a restore is to give its arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
