"""Audit: `python -m lsdl.audit RUN --steps FIRST:LAST` trains these steps again and compares."""

import argparse
import sys

from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """example:
  python -m lsdl.audit runs/a --steps 1000:2000

The run must have been trained with guard.audit_every_steps, and the replay needs the devices and
the versions that it had. Nothing is written.
exit codes: 0 the same bits, 2 bad input, 65 and 66 the data, 71 other bits, or audit.jsonl was
changed, 74 no checkpoint verifies, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.audit",
        description="Replay audited steps of a run, and compare them bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the run folder")
    parser.add_argument("--steps", required=True, metavar="FIRST:LAST", help="the steps compared")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return audit(arguments)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def audit(arguments: argparse.Namespace) -> int:
    from lsdl.config import from_json
    from lsdl.experiment import build
    from lsdl.replay import replay
    from lsdl.rundir import RunDir

    first, colon, last = arguments.steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--steps={arguments.steps} must be FIRST:LAST, as 1000:2000.")
    folder = RunDir(arguments.run)
    stored = folder.read_config()
    if stored is None:
        raise UserError(f"{arguments.run} is no run folder: it has no config.json.")
    experiment = build(from_json(stored["config"]))
    experiment.check_data()
    steps = replay(experiment, folder, first=int(first), last=int(last))
    print(f"{len(steps)} audited steps, {steps[0]:,} to {steps[-1]:,}: the same bits.")
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
