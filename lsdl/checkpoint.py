"""Checkpoints: orbax behind one door. Saved asynchronously, restored onto any mesh."""

import math
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lsdl.errors import UserError
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


def save_weights(folder: Path, weights: dict[str, Any]) -> None:
    """Write {"params": tree, "model_state": tree} where a run has its checkpoints, as step 0."""
    with ocp.CheckpointManager(folder) as manager:
        manager.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave(weights)), force=True)


def load_weights(folder: Path, abstract: dict[str, Any], *, fresh: str = "") -> dict[str, Any]:
    """The {"params", "model_state"} of the newest checkpoint, shaped and sharded as `abstract`.

    Leaves whose whole name, such as `head/kernel`, `fresh` matches are left out; what else the
    checkpoint holds is not read. Raises `UserError` for a folder without a checkpoint, and for
    leaves that are missing from it or have another shape.
    """
    abstract = _without(abstract, fresh)
    with _opened(folder) as manager:
        step = _fitting_step(manager, folder, abstract)
        args = ocp.checkpoint_utils.construct_restore_args(abstract)
        restore = ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=True)
        return manager.restore(step, args=ocp.args.Composite(state=restore))["state"]


def check_weights(folder: Path, abstract: dict[str, Any], *, fresh: str = "") -> None:
    """Raise the `UserError` that `load_weights` would; reads no array."""
    with _opened(folder) as manager:
        _fitting_step(manager, folder, _without(abstract, fresh))


def holds(folder: Path, part: str) -> bool:
    """Whether the newest checkpoint has the `part` of a state: converted weights have not all."""
    with _opened(folder) as manager:
        step = manager.latest_step()
        return step is not None and part in manager.item_metadata(step)["state"].tree


def merged(tree: dict, over: dict) -> dict:
    """`tree` with the leaves that `over` has, which may be only some, in their places."""
    return {
        name: merged(leaf, over.get(name, {})) if isinstance(leaf, dict) else over.get(name, leaf)
        for name, leaf in tree.items()
    }


def _without(weights: dict[str, Any], fresh: str) -> dict[str, Any]:
    if not fresh:
        return weights
    matched = []

    def prune(tree: dict, path: tuple[str, ...]) -> dict:
        kept = {}
        for name, leaf in tree.items():
            if isinstance(leaf, dict):
                inner = prune(leaf, (*path, name))
                kept |= {name: inner} if inner else {}  # orbax takes no empty one for a full one
            elif re.fullmatch(fresh, "/".join((*path, name))):
                matched.append(name)
            else:
                kept[name] = leaf
        return kept

    kept = {part: inner for part, tree in weights.items() if (inner := prune(tree, ()))}
    if not matched:
        raise UserError(f"init_fresh={fresh!r} matches nothing in the model: try 'head/.*'.")
    return kept


def _opened(folder: Path) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(folder, item_handlers={"state": ocp.PyTreeCheckpointHandler()})


def _fitting_step(manager: ocp.CheckpointManager, folder: Path, abstract: dict[str, Any]) -> int:
    step = manager.latest_step()
    if step is None:
        raise UserError(f"{folder} holds no checkpoint to start from.")
    stored = _shapes(manager.item_metadata(step)["state"].tree)
    wanted = _shapes(abstract)
    wrong = [name for name, shape in wanted.items() if stored.get(name) != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(wanted)} arrays are not in {folder}/{step} as the model has "
            f"them, the first: {name} {wanted[name]}, there {stored.get(name, 'missing')}. "
            "(What init_from should not bring, init_fresh leaves out.)"
        )
    return step


def _shapes(tree) -> dict[str, tuple]:
    is_leaf = lambda x: hasattr(x, "shape")  # noqa: E731  (orbax's metadata is a tree of its own)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
        for keys, leaf in leaves
    }


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
