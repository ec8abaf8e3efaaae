"""What a benchmark's JSON says besides its own figures, and what it is printed and written by."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsdl.rundir import commit, now, versions


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def bootstrapped(values: Sequence[float]) -> dict[str, float]:
    """The median with the 2.5 and 97.5 % points of its bootstrap, of many small measurements."""
    draws = np.random.default_rng(0).choice(values, (2_000, len(values)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return {"low": float(low), "median": float(np.median(values)), "high": float(high)}


def ratios(pairs: Sequence[tuple], of=spread) -> dict[str, dict[str, float]]:
    """Of (ours, theirs), each (wall, CPU) seconds of the same work."""
    return {
        "ratio": of([ours[0] / theirs[0] for ours, theirs in pairs]),
        "cpu_ratio": of([ours[1] / theirs[1] for ours, theirs in pairs]),
    }


def origin() -> dict[str, Any]:
    """Where figures of this process come from."""
    return {
        "versions": versions(),
        "command": " ".join([f"python -m {sys.modules['__main__'].__spec__.name}", *sys.argv[1:]]),
        "commit": os.environ.get("LSDL_COMMIT") or commit(),
        "date": now(),
    }


def processor() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}"


def machine(kind: str) -> str:
    """What benchmarks of a `kind`, cpu | gpu, run on; no device is touched."""
    if kind == "cpu":
        return processor()
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True).stdout.split("\n")
    return f"1 {names[0].strip() or 'GPU'}"


def device() -> str:
    import jax

    return f"{jax.device_count()} {jax.devices()[0].device_kind}, {processor()}"


def parser(name: str, *, pairs: int) -> argparse.ArgumentParser:
    """Of a benchmark that measures lsdl beside a part of itself, in pairs."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", type=int, default=pairs, metavar="N", help=f"of each (default: {pairs})")
    add("--out", type=Path, metavar="FILE", help="add the JSON to those in FILE")
    return parser


def tell(found: dict[str, Any], out: Path | None) -> int:
    """Print it, and write it to `out` in the place of one of the same match, device and peer."""
    print(json.dumps(found, indent=1))
    if out:
        before = json.loads(out.read_text()) if out.exists() else []
        about = lambda one: [one.get(key) for key in ("match", "device", "peer")]  # noqa: E731
        kept = [one for one in before if about(one) != about(found)]
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps([*kept, found], indent=1) + "\n")
    return 0
