"""Checkpoints: orbax behind one door, below a protocol of its own (see `commits`).

Saved behind the next steps, verified before use, restored onto any mesh.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from lsdl import commits, processes
from lsdl.errors import StorageError, UserError
from lsdl.progress import tell
from lsdl.rundir import RunDir
from lsdl.saving import Saver
from lsdl.state import TrainState

ARRAYS = "state"  # of a step's folder: what orbax writes

# A failed save is one line, of `Saver`. Orbax logs what it raises as well, with its traceback, and
# tensorstore tells of each array that nobody waits for any more.
logging.getLogger("absl").addFilter(
    lambda record: record.levelno < logging.ERROR or "orbax" not in record.pathname
)
_hook = sys.unraisablehook


def _told_elsewhere(unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        _hook(unraisable)


sys.unraisablehook = _told_elsewhere


class Checkpoints:
    """The checkpoints of one run: the newest `keep_latest`, and the `keep_best` by valid loss.

    Two that verify are kept at least. A save returns once the arrays are copied off the devices;
    the files are written, digested and committed behind the next steps, which ask `check` how it
    went. `owner` is the run folder that this process has locked; without one nothing that is found
    here is moved: for readers. All processes of a job call the same methods.
    """

    def __init__(
        self,
        path: Path,
        *,
        keep_latest: int = 2,
        keep_best: int = 0,
        owner: RunDir | None = None,
    ):
        self.path = Path(path).absolute()
        self._owner = owner if owner and owner.token else None
        self._run = _run_of(self.path)[0]
        self._verified: set[int] = set()
        self._writer = _writer()
        self._saver = Saver(
            self.path,
            written=lambda: self._writer.wait_until_finished(),
            owner=self._owner,
            keep={"latest": keep_latest, "best": keep_best},
            verified=self._verified,
        )
        if self._owner:
            commits.purge(self.path)

    def __enter__(self):
        return self

    def __exit__(self, kind, *_):
        if kind is None:
            self.close()
        else:  # what has gone wrong already is what is told
            with contextlib.suppress(Exception, SystemExit):
                self.close()

    def latest_step(self) -> int | None:
        """The newest step that verifies; None in a folder without steps.

        Newer ones that do not are told, and moved aside. Raises `StorageError` if none verifies.
        """
        return self.newest(at_most=None)

    def newest(self, *, at_most: int | None) -> int | None:
        """The newest step that verifies, up to `at_most`."""
        self._saver.wait()
        step = _decided(lambda: self._newest(at_most))
        return None if step < 0 else step

    def save(
        self, step: int, state: TrainState, *, metrics: dict | None, notes: dict | None = None
    ) -> None:
        """Save `state` as `step`; `metrics` (of the valid split) are what `keep_best` compares.

        `notes` is what else a run wants to find again: small, JSON. A later step may donate
        `state`: its values are copied before this returns. Raises as `check` does.
        """
        self.check(wait=True)  # one that failed is made good by this one
        if _decided(lambda: self._has(step)):
            return
        if self._saver.failed:  # orbax would raise what is left of that once more
            with contextlib.suppress(Exception):
                self._writer.close()
            self._writer = _writer()
        run, digest = _run_of(self.path)
        args = ocp.args.StandardSave(state)
        self._saver.begin(
            step,
            lambda folder: self._writer.save(folder / ARRAYS, args=args),
            size_bytes=sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
            run=run,
            config_digest=digest,
            metrics=commits.numbers(metrics),
            notes=notes or {},
        )

    def check(self, *, wait: bool = False) -> bool:
        """Whether a save has failed, so that the state of this step is to be saved in its place.

        Called at every step. `wait`: for the save that is still being written. Raises
        `StorageError` if the one before had failed too, or at once in a job of several processes;
        `LockedError` if the folder has another owner now.
        """
        self._saver.settle(wait=wait)
        return self._saver.due_again

    def restore(self, step: int, abstract: TrainState) -> TrainState:
        """The state of `step`, with the shapes and the shardings of `abstract`.

        Raises `StorageError` if the step does not verify.
        """
        self.verified(step)
        _check_same(self.path / str(step))
        args = ocp.args.StandardRestore(abstract)
        with _reading(self.path / str(step)) as arrays:
            return self._writer.restore(arrays, args=args)

    def verified(self, step: int) -> int:
        """`step`; raises `StorageError` if it does not verify."""
        self._saver.wait()
        processes.together(lambda: self._require(step), main_alone=True)
        return step

    def notes(self, step: int) -> dict:
        """What `save` was given with `step`."""
        self._saver.wait()
        try:
            return dict(commits.read_manifest(self.path / str(step)).notes)
        except (commits.Damage, OSError) as error:
            raise StorageError(f"Step {step} in {self.path} does not verify: {error}.") from error

    def drop_after(self, step: int) -> None:
        """Delete the steps after `step`: they belong to a trajectory that was given up."""
        self._saver.wait()
        _decided(lambda: self._drop_after(step))

    def close(self) -> None:
        """Wait for what is being written, then let go; raises if it failed: no step comes."""
        try:
            self._saver.settle(wait=True, last=True)
            if self._saver.failed:
                raise self._saver.failed
        finally:
            self._saver.clean()
            with contextlib.suppress(*([Exception] if self._saver.failed else [])):
                self._writer.close()

    # What process 0 does alone

    def _newest(self, at_most: int | None) -> int:
        step, rejected = commits.newest(self.path, run=self._run, at_most=at_most)
        if step is None and rejected:
            raise _none_verifies(self.path, rejected)
        for bad, reason in rejected.items():
            self._reject(bad, reason)
        if step is None:
            return -1
        self._verified.add(step)
        return step

    def _has(self, step: int) -> bool:
        """Whether `step` is committed; what has its name and does not verify is moved aside."""
        if not os.path.lexists(self.path / str(step)):
            return False
        if reason := commits.verify(self.path / str(step), run=self._run):
            self._reject(step, reason, move=True)
        return not reason

    def _reject(self, step: int, reason: str, *, move: bool = False) -> None:
        told = f"step {step} in {self.path} does not verify: {reason}"
        if self._owner or move:
            told += f"; it is kept as {commits.reject(self.path, step).name}"
        tell(f"{told}.")

    def _require(self, step: int) -> None:
        if step not in self._verified:
            if reason := commits.verify(self.path / str(step), run=self._run):
                raise StorageError(f"Step {step} in {self.path} does not verify: {reason}.")
            self._verified.add(step)

    def _drop_after(self, step: int) -> int:
        newer = [number for number in commits.steps(self.path) if number > step]
        for number in newer:  # the newest first: a kill leaves no gap
            commits.discard(self.path, number)
            self._verified.discard(number)
        return len(newer)


def save_weights(folder: Path, weights: dict[str, Any]) -> None:
    """Write {"params": tree, "model_state": tree} where a run has its checkpoints, as step 0."""
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(0, weights, metrics=None)


def load_weights(
    folder: Path, abstract: dict[str, Any], *, fresh: str = "", step: int | None = None
) -> dict[str, Any]:
    """The {"params", "model_state"} of a checkpoint, shaped and sharded as `abstract`.

    That of `step`, or the newest that verifies.
    Leaves whose whole name, such as `head/kernel`, `fresh` matches are left out; what else the
    checkpoint holds is not read. Raises `UserError` for a folder without a checkpoint, and for
    leaves that are missing from it or have another shape; `StorageError` if none verifies.
    """
    abstract = _without(abstract, fresh)
    with Checkpoints(folder) as checkpoints:
        step = checkpoints.latest_step() if step is None else checkpoints.verified(step)
    _check_fit(folder, step, abstract)
    _check_same(Path(folder) / str(step))
    args = ocp.checkpoint_utils.construct_restore_args(abstract)
    restore = ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=True)
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with reader, _reading(Path(folder).absolute() / str(step)) as arrays:
        return reader.restore(arrays, args=restore)


def check_weights(folder: Path, abstract: dict[str, Any], *, fresh: str = "") -> None:
    """Raise the `UserError` that `load_weights` would; reads no array, and so finds no bad byte."""
    _check_fit(folder, _newest_by_sizes(folder), _without(abstract, fresh))


def holds(folder: Path, part: str) -> bool:
    """Whether the newest checkpoint has the `part` of a state: converted weights have not all."""
    step = _newest_by_sizes(folder)
    return step is not None and part in _tree(folder, step)


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


def _newest_by_sizes(folder: Path) -> int | None:
    step, rejected = commits.newest(folder, run=_run_of(folder)[0], digests=False)
    if step is None and rejected:
        raise _none_verifies(folder, rejected)
    return step


def _none_verifies(folder: Path, rejected: dict[int, str]) -> StorageError:
    newest = max(rejected)
    return StorageError(
        f"None of the {len(rejected)} checkpoints in {folder} verifies, the newest, step {newest}: "
        f"{rejected[newest]}. Nothing was changed: bring back a copy, or begin in another folder."
    )


def _tree(folder: Path, step: int) -> dict[str, Any]:
    """The shapes of what is stored."""
    reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    with reader, _reading(Path(folder).absolute() / str(step)) as arrays:
        return dict(reader.metadata(arrays).item_metadata.tree)


@contextlib.contextmanager
def _reading(step: Path) -> Iterator[Path]:
    """Where orbax's arrays are; what it raises at them becomes a sentence.

    A step that verifies is as it was signed: by a stranger, with whatever its files say.
    """
    try:
        yield step / ARRAYS
    except UserError:
        raise
    except (
        *(AttributeError, KeyError, IndexError, TypeError, ValueError),
        *(OSError, OverflowError, RecursionError),
    ) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
        raise StorageError(
            f"The arrays in {step} are not as lsdl writes them: {reason}."
        ) from error


def _check_fit(folder: Path, step: int | None, abstract: dict[str, Any]) -> None:
    if step is None:
        raise UserError(f"{folder} holds no checkpoint to start from.")
    stored = _shapes(_tree(folder, step))
    wanted = _shapes(abstract)
    wrong = [name for name, shape in wanted.items() if stored.get(name) != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{len(wrong)} of {len(wanted)} arrays are not in {folder}/{step} as the model has "
            f"them, the first: {name} {wanted[name]}, there {stored.get(name, 'missing')}. "
            "(What init_from should not bring, init_fresh leaves out.)"
        )


def _shapes(tree) -> dict[str, tuple]:
    is_leaf = lambda x: hasattr(x, "shape")  # noqa: E731  (orbax's metadata is a tree of its own)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): tuple(leaf.shape)
        for keys, leaf in leaves
    }


def _writer() -> ocp.AsyncCheckpointer:
    return ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())


def _run_of(path: Path) -> tuple[str | None, str | None]:
    """(id, sha256 of the config's fields) of the run whose checkpoints are in `path`."""
    stored = RunDir(Path(path).parent).read_config()
    if stored is None:
        return None, None
    fields = json.dumps(stored["config"], sort_keys=True).encode()
    return stored.get("id"), hashlib.sha256(fields).hexdigest()


def _check_same(folder: Path) -> None:
    """Raise `StorageError` on all processes unless they see one and the same manifest."""
    if jax.process_count() == 1:
        return
    try:
        digest = hashlib.sha256((folder / commits.MANIFEST).read_bytes()).digest()
    except OSError:
        digest = bytes(32)
    seen = multihost_utils.process_allgather(np.frombuffer(digest, np.uint32))
    others = np.flatnonzero((seen != seen[0]).any(axis=1)).tolist()
    if others:
        raise StorageError(
            f"Process {others[0]} does not see what process 0 sees in {folder}: the processes of "
            "a job need one folder that all of them share."
        )


def _decided(work: Callable[[], int]) -> int:
    """What `work` returned in process 0, which alone does it; the processes meet here."""
    value = int(processes.together(work, main_alone=True) or 0)
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def with_shardings(abstract: TrainState, shardings: TrainState) -> TrainState:
    """`abstract` with the shardings that a restore is to give its arrays."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
