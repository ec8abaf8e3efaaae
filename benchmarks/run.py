"""Time lsdl against its peers: `python -m benchmarks.run --list | NAME ... | all-cpu | all-gpu`.

Peers' code comes from $LSDL_PEERS_DIR or from packages of $LSDL_PEERS_PYTHON (by default this
Python). What was measured is written to benchmarks/results/NAME.json, from which
`python -m benchmarks.table` makes benchmarks/README.md.
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.contest import Unable, play
from benchmarks.matches import MATCHES

FOLDER = Path(__file__).parent / "results"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="matches, all-cpu or all-gpu")
    add("--list", action="store_true", help="the matches that there are")
    add("--rounds", type=int, default=7, metavar="N", help="of each player, in turn (default: 7)")
    add("--out", type=Path, default=FOLDER, metavar="DIR", help="where the JSON goes")
    return parser


def main() -> int:
    arguments = parser().parse_args()
    if arguments.list or not arguments.names:
        for name, match in MATCHES.items():
            print(f"{name:16} {match.kind}  {match.title}  against {', '.join(match.peers)}")
        return 0
    names, refused = [], 0
    for name in arguments.names:
        of_kind = [n for n, match in MATCHES.items() if f"all-{match.kind}" == name]
        if not of_kind and name not in MATCHES:
            print(f"There is no match {name!r}: see --list.", file=sys.stderr)
            return 2
        names += of_kind or [name]
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in names:
        try:
            found = play(name, rounds=arguments.rounds, log=arguments.out)
        except Unable as error:
            print(f"{name}: not run: {error}", file=sys.stderr)
            refused = 1
            continue
        (arguments.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
        for one in found:
            ours = one["lsdl"]["step_s"]
            against = f", {one['ratio']['median']:.3f} of {one['peer']}'s" if one["peer"] else ""
            print(f"{name}: {1000 * ours:.2f} ms a step{against}", flush=True)
    return refused


if __name__ == "__main__":
    sys.exit(main())
