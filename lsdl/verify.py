"""Verify: `python -m lsdl.verify RUN`: whether a run's checkpoints are what was written."""

import argparse
import json
import os
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, STORAGE, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.verify runs/a
  python -m lsdl.verify runs/a --json
  python -m lsdl.verify weights/gpt2                     # converted weights as well

Every byte of every checkpoint is read and compared with its manifest. Nothing is changed and no
lock is taken: a run may go on meanwhile.
exit codes: 0 the newest checkpoint verifies, 2 bad input, 74 it does not, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.verify",
        description="Read the checkpoints of a run, or converted weights, and say which are whole.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="the run folder")
    add("--json", action="store_true", help="print what was found as JSON")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return verify(arguments)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def verify(arguments: argparse.Namespace) -> int:
    """Print a line for each step and for what else lies there; returns the exit code."""
    from lsdl import commits
    from lsdl.rundir import RunDir

    folder = RunDir(arguments.run)
    stored, root = folder.read_config(), folder.checkpoints
    run = stored.get("id") if stored else None
    reasons = {step: commits.verify(root / str(step), run=run) for step in commits.steps(root)}
    # A run that goes on deletes steps under the reader's hands.
    reasons = {s: why for s, why in reasons.items() if os.path.lexists(root / str(s))}
    if not reasons:
        raise UserError(f"{folder.path} holds no checkpoint: give a folder of lsdl.train.")
    litter, rejected = commits.litter(root), commits.rejected(root)
    if arguments.json:
        steps = [{"step": s, "verified": not why, "reason": why} for s, why in reasons.items()]
        print(json.dumps({"run": run, "steps": steps, "litter": litter, "rejected": rejected}))
    else:
        for step, why in reasons.items():
            print(f"step {step}: {why or 'verified'}")
        for name in rejected:
            print(f"{name}: did not verify, set aside by an earlier start")
        for name in litter:
            print(f"{name}: not committed, or being deleted; the run's next start removes it")
    return STORAGE if reasons[max(reasons)] else FINISHED


if __name__ == "__main__":
    start(main)
