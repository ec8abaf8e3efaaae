"""Whether measured steps lie where the planner says: `python -m benchmarks.bracket [--out FILE]`.

The steps are lsdl's in benchmarks/results; the bracket is that of `python -m lsdl.plan --target`,
by closed forms, of the match's config on the device that its JSON names. No device is needed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.matches import MATCHES, Match
from lsdl.planner import analytic, hardware, present
from lsdl.source import Source

RESULTS = Path(__file__).parent / "results"


def titles() -> list[str]:
    """Of all rows that there should be."""
    return [_title(name) for name, match in MATCHES.items() if match.kind == "gpu"]


def _title(name: str) -> str:
    return f"{name}: a step"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bracket", allow_abbrev=False)
    parser.add_argument("--out", type=Path, metavar="FILE", help="add the JSON to those in FILE")
    out = parser.parse_args().out
    for name, match in MATCHES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            print(f"{name}: not yet run", file=sys.stderr)
            continue
        one = json.loads(path.read_text())[0]  # lsdl's step is the same beside every peer
        target = on(one["device"])
        if target is None:
            told = f"the hardware table has no peak of {one['device']}"
            print(f"{name}: no bracket, {told}", file=sys.stderr)
            continue
        record.tell(compared(name, one, planned(match, target)), out)
    return 0


def on(device: str) -> hardware.Target | None:
    """The one device that a result names, "1 NVIDIA H200"; None if the table does not know it."""
    found = present.row(device)
    return found and hardware.Target(found, (1, 1))


def planned(match: Match, target: hardware.Target) -> dict[str, Any]:
    flags = tuple(f"--config.{flag}" for flag in match.overrides)
    found = analytic.estimate(Source(match.config, flags).build(1), target)
    return {"step_s": found["step_s"], "binds": found["binds"]}


def compared(name: str, one: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's JSON of a result and of what was planned."""
    return {
        "match": _title(name),
        "device": one["device"],
        "peer": "the planner",
        "planned": plan,
        "measured": {"step_s": one["lsdl"]["step_s"], "commit": one["commit"]},
        **record.origin(),
    }


def cells(one: dict[str, Any]) -> tuple[str, str, str]:
    """(planned, measured, measured / planned) for the table."""
    least, most = one["planned"]["step_s"]
    took = one["measured"]["step_s"]
    said = f"inside: {took / least:.2f} of the least"
    if not least <= took <= most:
        edge, name = (most, "most") if took > most else (least, "least")
        said = f"outside: {took / edge:.2f} of the {name}"
    return f"{1000 * least:.1f} .. {1000 * most:.1f} ms", f"{1000 * took:.1f} ms", said


if __name__ == "__main__":
    sys.exit(main())
