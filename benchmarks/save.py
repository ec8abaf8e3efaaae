"""How long a save holds the steps up: `python -m benchmarks.save [--config FILE] [--pairs N]`.

The state of an experiment, saved as `lsdl.train` does, and by torch.save, into the same folder, in
turn. torch.save holds the next step up until it returns: its tensors are in the host's memory
already, and it does not wait for the disk. lsdl's save returns once the arrays are copied off the
devices; on a CPU it copies nothing, and the next step pays for it. So both are told: the time until
the save returns, and with the step behind it (it adds 1 to all numbers of the donated state), less
the same step alone. Needs a Python that has torch as well. Prints JSON: ratio = lsdl's time /
torch.save's of each pair.
"""

import functools
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import record
from lsdl.checkpoint import Checkpoints
from lsdl.errors import UserError, refuse
from lsdl.planner import tree
from lsdl.rundir import RunDir
from lsdl.source import Source

SEEN = ("until it returns", "with the step behind it")


def main() -> int:
    parser = record.parser("save", pairs=7)
    parser.add_argument("--config", default="configs/lm_gpt2.py:124m", metavar="FILE[:VARIANT]")
    arguments, overrides = parser.parse_known_args()
    try:
        if not importlib.util.find_spec("torch"):
            raise UserError("There is no torch here: run this by a Python that has it beside lsdl.")
        experiment = Source(arguments.config, tuple(overrides)).build(jax.devices()[:1])
        found = measured(experiment.init(), arguments.pairs, match=arguments.config)
    except UserError as error:
        return refuse(error)
    for one in found:
        record.tell(one, arguments.out)
    return 0


def measured(state: Any, pairs: int, *, match: str) -> list[dict[str, Any]]:
    """The benchmark's JSON of each way to see it; a pair more is run first and not counted."""
    import torch

    jax.block_until_ready(state)
    tensors = [torch.from_numpy(np.array(leaf)) for leaf in jax.tree.leaves(raw(state))]
    times = []
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.acquire()
        with Checkpoints(run.checkpoints, owner=run) as checkpoints:
            for i in range(pairs + 1):
                pair = {}
                for way in ("lsdl", "torch") if i % 2 else ("torch", "lsdl"):
                    os.sync()  # what the other one left to be written
                    if way == "lsdl":
                        state, pair[way] = of_lsdl(checkpoints, i, state)
                    else:
                        pair[way] = of_torch(tensors, Path(folder, "state.pt"))
                times.append((*pair["lsdl"], pair["torch"]))
        run.release()
    *ways, done, theirs = zip(*times[1:], strict=True)
    about = {
        "match": f"{match}, {tree.decimal(tree.whole_bytes(state))}B of state",
        "device": record.device(),
        "peer": "torch.save of the same arrays",
        "peer_commit": f"torch {torch.__version__}",
        "theirs": {"held_s": statistics.median(theirs)},
        "n": pairs,
        **record.origin(),
    }
    return [
        about
        | {
            "match": f"{about['match']}, {what}",
            "lsdl": {"held_s": statistics.median(held), "committed_s": statistics.median(done)},
            "ratio": record.spread([a / b for a, b in zip(held, theirs, strict=True)]),
        }
        for what, held in zip(SEEN, ways, strict=True)
    ]


def raw(state: Any) -> Any:
    """The state with its key as numbers."""
    is_key = lambda x: jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, state)


@functools.partial(jax.jit, donate_argnums=0)
def stepped(state: Any) -> Any:
    is_number = lambda x: jax.dtypes.issubdtype(x.dtype, np.number)  # noqa: E731
    return jax.tree.map(lambda x: x + 1 if is_number(x) else x, state)


def of_lsdl(checkpoints: Checkpoints, number: int, state: Any) -> tuple[Any, tuple[float, ...]]:
    """(the state, seconds until the save returned, held up with a step, until it was committed)."""
    began = time.perf_counter()
    state = jax.block_until_ready(stepped(state))
    alone = time.perf_counter() - began
    began = time.perf_counter()
    checkpoints.save(number, state, metrics=None)
    returned = time.perf_counter() - began
    state = jax.block_until_ready(stepped(state))
    held = time.perf_counter() - began - alone
    if checkpoints.check(wait=True):
        raise UserError("A save failed: see the line above.")
    return state, (returned, held, time.perf_counter() - began)


def of_torch(tensors: list, path: Path) -> float:
    import torch

    began = time.perf_counter()
    torch.save(tensors, path)
    took = time.perf_counter() - began
    path.unlink()
    return took


if __name__ == "__main__":
    sys.exit(main())
