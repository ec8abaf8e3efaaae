"""The largest batch and the deepest model that fit a GPU: `python -m benchmarks.capacity [CASE]`.

For each remat policy, first what the planner says: the largest number whose compiled step needs no
more bytes than a program may have. Then what is so: one step of it is really taken, and of the
numbers next to it, each in a process of its own, for running out of memory is an answer. Prints
JSON: ratio = the peak that was measured / the bytes that were planned.

`--target gpu:h200:1x1` plans for a device that is not here, by `make plan-tools`, and runs nothing.
"""

import argparse
import functools
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import record
from lsdl.errors import UserError, refuse

POLICIES = ("none", "dots", "dots_no_batch", "full")
FRACTION = 0.95  # of a device's memory, which a program may have
ON_A_LINE = 4  # compilations that are guessed so
PERCENT = (1, 2, 3)  # above what was planned, or below, that is tried
Tried = dict[str, Any]  # what a process told: limit_bytes, needed_bytes, peak_bytes


@dataclass(frozen=True)
class Case:
    """What grows, in steps, of an experiment."""

    title: str
    config: str
    field: str
    step: int
    flags: tuple[str, ...] = ("--config.data.segments=False",)

    def given(self, policy: str, number: int) -> list[str]:
        grown = f"--config.{self.field}={number * self.step}"
        return [*self.flags, f"--config.remat={policy}", grown]


CASES = {
    "batch": Case(
        *("GPT-2 124M: sequences of 1,024 tokens", "configs/lm_gpt2.py:124m,smoke"),
        *("batch_size", 4),
    ),
    "layers": Case(
        *("GPT-2 of 1,600 wide, 8 x 1,024 tokens: layers", "configs/lm_gpt2.py:1.5b,smoke"),
        *("model.num_layers", 4),
    ),
}


def titles() -> list[str]:
    """Of all rows that there should be."""
    return [_title(case, policy) for case in CASES.values() for policy in POLICIES]


def _title(case: Case, policy: str) -> str:
    return f"{case.title}, remat={policy}"


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        work(*json.loads(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capacity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)} (default: all)")
    add("--remat", nargs="+", default=POLICIES, metavar="POLICY", help="default: %(default)s")
    add("--target", metavar="T", help="plan for it, as lsdl.plan does, and run nothing")
    add("--out", type=Path, metavar="FILE", help="add the JSON to those in FILE")
    asked = parser.parse_args()
    try:
        for name in asked.cases or CASES:
            if name not in CASES:
                raise UserError(f"There is no case {name!r}: choose from {', '.join(CASES)}.")
            for policy in asked.remat:
                record.tell(measured(CASES[name], policy, target=asked.target), asked.out)
    except UserError as error:
        return refuse(error)
    return 0


def measured(case: Case, policy: str, *, target: str | None = None, attempt=None) -> dict[str, Any]:
    """The benchmark's JSON. `attempt(file, flags)` is `tried`, or `planned` for a `target`."""
    attempt = attempt or (functools.partial(planned, target=target) if target else tried)
    at = functools.cache(lambda number: attempt(case.config, case.given(policy, number)))
    limit = at(1)["limit_bytes"]
    if limit is None:
        raise UserError(
            "A CPU does not tell how much of its memory a program may have: benchmarks.capacity "
            "needs a GPU, or --target gpu:h200:1x1 to plan for one."
        )
    most = largest(lambda number: at(number)["needed_bytes"], limit)
    found = {
        "match": _title(case, policy),
        "device": at(1)["device"],
        "peer": "the planner",
        "planned": {
            "largest": most * case.step,
            "needed_bytes": at(most)["needed_bytes"] if most else None,
            "limit_bytes": limit,
        },
        **record.origin(),
    }
    if target or not most:
        return found
    runs = lambda number: at(number)["peak_bytes"] is not None  # noqa: E731
    ran = nearest(runs, most)
    peak = at(ran)["peak_bytes"] if ran else None
    found["measured"] = {"largest": ran * case.step, "peak_bytes": peak}
    return found | {"ratio": peak and peak / at(ran)["needed_bytes"]}


def largest(needed: Callable[[int], int | None], limit_bytes: int) -> int:
    """The largest number that needs no more than the limit, 0 if 1 does; None: more than any has.

    What is needed grows with the number, almost on a line: the first guesses are where the line
    through the two that lie nearest to the limit meets it. After those it goes by halves.
    """
    low, high, seen, number = 0, None, {}, 1
    while high is None or high - low > 1:
        seen[number] = needed(number)
        if seen[number] is not None and seen[number] <= limit_bytes:
            low = number
        else:
            high = number
        number = 2 * low if high is None else (low + high) // 2
        if len(seen) <= ON_A_LINE:
            number = _on_the_line(seen, limit_bytes) or number
        number = max(low + 1, number if high is None else min(number, high - 1))
    return low


def _on_the_line(seen: dict[int, int | None], limit_bytes: int) -> int | None:
    known = [number for number, found in seen.items() if found is not None]
    if len({seen[number] for number in known}) < 2:
        return None
    a, b, *_ = sorted(known, key=lambda number: abs(seen[number] - limit_bytes))
    slope = (seen[b] - seen[a]) / (b - a)
    return a + int((limit_bytes - seen[a]) // slope) if slope else None


def nearest(runs: Callable[[int], bool], number: int) -> int:
    """The largest that runs of `number` and those 1, 2 and 3 % beside it, 0 if none does."""
    apart = [max(percent, percent * number // 100) for percent in PERCENT]
    if runs(number):
        above = [number + more for more in apart]
        return max(itertools.takewhile(runs, above), default=number)
    return next((number - less for less in apart if less < number and runs(number - less)), 0)


def planned(file: str, flags: list[str], *, target: str) -> Tried:
    """What a step needs of a device that need not be here."""
    from lsdl.planner import compiled, fit, hardware

    device = hardware.parse(target)
    return {
        "device": device.device.name,
        "limit_bytes": device.memory_bytes and round(FRACTION * device.memory_bytes),
        "needed_bytes": fit.needed_bytes(compiled.ask(file, flags, target)),
    }


def tried(file: str, flags: list[str]) -> Tried:
    """What a process says that compiles the step, then takes one; peak_bytes None: it could not."""
    command = [sys.executable, "-m", "benchmarks.capacity", "--worker", json.dumps([file, flags])]
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(FRACTION)} | os.environ
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(f"{' '.join(flags)} ended with {run.returncode}: {run.stderr[-2000:]}")
    found = {"needed_bytes": None, "peak_bytes": None}
    for line in run.stdout.splitlines():
        found |= json.loads(line)
    print(f"{' '.join(flags)}: {found}", file=sys.stderr)
    return found


def work(file: str, flags: list[str]) -> None:
    """Tell `tried` in lines of JSON; that memory runs out is no error."""
    import jax

    from lsdl.planner import present

    tell = lambda **values: print(json.dumps(values), flush=True)  # noqa: E731
    limit, name = present.memory_bytes(), jax.devices()[0].device_kind
    known = present.row(name)
    tell(limit_bytes=limit, device=known.name if known else name)
    if not limit:
        return
    try:
        for told in step(file, flags):
            tell(**told)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise


def step(file: str, flags: list[str]):
    """Yields what the compiled step needs, then the peak once it is done."""
    import jax
    import numpy as np

    from lsdl.planner import compiled
    from lsdl.source import Source

    experiment = Source(file, tuple(flags)).build()
    batch = dict(experiment.abstract_batch)
    program = experiment.train_step.lower(experiment.abstract_state, batch).compile()
    yield {"needed_bytes": compiled.memory(program)["needed_bytes"]}
    ones = {k: jax.device_put(np.ones(x.shape, x.dtype), x.sharding) for k, x in batch.items()}
    jax.block_until_ready(program(experiment.init(), ones))
    yield {"peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")}


def cells(one: dict[str, Any]) -> tuple[str, str, str]:
    """(planned, measured, measured / planned) for the table."""
    plan, found = one["planned"], one.get("measured")
    size = lambda n: f"{n / 1e9:.1f} GB"  # noqa: E731
    needed = f": {size(plan['needed_bytes'])}" if plan["largest"] else ""
    said = f"{plan['largest']}{needed} of {size(plan['limit_bytes'])}"
    if found is None:
        return said, "not yet run", ""
    if not found["largest"]:
        return said, "out of memory", ""
    share = f"{found['largest'] / plan['largest']:.3f}, bytes {one['ratio']:.3f}"
    return said, f"{found['largest']}: {size(found['peak_bytes'])}", share


if __name__ == "__main__":
    sys.exit(main())
