"""`python -m tests.faults.moved FOLDER DO FIELDS --coordinator=...`: save a state, or restore it.

DO: save | restore | commit-fails. All processes together have four devices; FIELDS, split by
blanks, are those of a small config with its mesh.
"""

import argparse
import errno
import json
import os
from pathlib import Path

import jax
import numpy as np

from lsdl import commits, config, entry, processes
from lsdl.checkpoint import Checkpoints
from lsdl.errors import UserError, refuse
from lsdl.experiment import build
from tests.conftest import CONFIGS

FIELDS = ("batch_size=16", "model.hidden=(16,16)", "model.dropout=0.1", "optim.ema_decay=0.9")
STEP = 5


def abstract_of(fields, devices=None):
    given = [f"--config.{field}" for field in (*FIELDS, *fields)]
    settings = config.load(f"{CONFIGS / 'digits_mlp.py'}:smoke", given)[0]
    return build(settings, devices=devices).abstract_state


def numbers(abstract):
    """A state whose numbers are all different, the same in every process, on the host."""
    draw = np.random.default_rng(5)

    def make(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(5)
        return np.asarray(draw.integers(1, 2**30, leaf.shape)).astype(leaf.dtype)

    return jax.tree.map(make, abstract)


def placed(abstract):
    """These numbers, where `abstract` has them."""

    def put(leaf, host):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            make = jax.jit(lambda: jax.random.key(5), out_shardings=leaf.sharding)
            return make()
        part = lambda index: host[index]  # noqa: E731
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

    return jax.tree.map(put, abstract, numbers(abstract))


def same(state, abstract):
    """Whether each device has the bits that are its part, placed as `abstract` says."""
    for leaf, host, place in zip(
        *map(jax.tree.leaves, (state, numbers(abstract), abstract)), strict=True
    ):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, host = jax.random.key_data(leaf), np.asarray(jax.random.key_data(host))
        elif not leaf.sharding.is_equivalent_to(place.sharding, leaf.ndim):
            return False
        for shard in leaf.addressable_shards:
            if np.asarray(shard.data).tobytes() != host[shard.index].tobytes():
                return False
    return True


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def work(folder, do, fields):
    abstract = abstract_of(fields)
    checkpoints = Checkpoints(Path(folder, "checkpoints"))
    if do == "restore":
        assert checkpoints.latest_step() == STEP
        return same(checkpoints.restore(STEP, abstract), abstract)
    if do == "commit-fails":
        commits.commit = no_room
    checkpoints.save(STEP, placed(abstract), metrics=None, notes={"n": 1})
    checkpoints.close()
    return checkpoints.notes(STEP) == {"n": 1}


def main():
    parser = argparse.ArgumentParser()
    for name in ("folder", "do", "fields", "--coordinator"):
        parser.add_argument(name)
    for name in ("--num-processes", "--process-id"):
        parser.add_argument(name, type=int)
    a = parser.parse_args()
    processes.initialise(
        coordinator=a.coordinator, num_processes=a.num_processes, process_id=a.process_id
    )
    try:
        good = work(a.folder, a.do, a.fields.split())
        Path(a.folder, f"{a.do}-{a.process_id}.json").write_text(json.dumps(good))
        code = 0
    except UserError as error:
        code = refuse(error)
    except SystemExit as leaving:
        code = leaving.code
    entry.leave(code)


if __name__ == "__main__":
    main()
