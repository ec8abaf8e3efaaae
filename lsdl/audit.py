"""Audit: `python -m lsdl.audit RUN --steps FIRST:LAST` trains these steps again and compares."""

import argparse

from lsdl.entry import framed, start
from lsdl.errors import FINISHED, UserError
from lsdl.rendezvous import add_flags, flags

EXAMPLES = """examples:
  python -m lsdl.audit runs/a --steps 1000:2000
  JAX_NUM_CPU_DEVICES=8 python -m lsdl.audit runs/a --steps 1:20
  srun python -m lsdl.audit runs/a --steps 1000:2000 --distributed=auto

The run must have been trained with guard.audit_every_steps, and the replay needs the processes,
the devices and the versions that it had. Nothing is written.
exit codes: 0 the same bits, 2 bad input, 65 and 66 the data, 69 other processes out of reach,
71 other bits, or audit.jsonl was changed, 74 no checkpoint verifies, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.audit",
        description="Replay audited steps of a run, and compare them bit for bit.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="the run folder")
    add("--steps", required=True, metavar="FIRST:LAST", help="the steps compared")
    add_flags(add)
    return parser


def main(argv: list[str] | None = None) -> int:
    return framed(audit, parser(), argv)


def audit(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Compare what the command line says; returns the exit code."""
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import compile_cache, processes
    from lsdl.config import from_json
    from lsdl.experiment import build
    from lsdl.replay import replay
    from lsdl.rundir import RunDir

    if rest:
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    first, colon, last = arguments.steps.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise UserError(f"--steps={arguments.steps} must be FIRST:LAST, as 1000:2000.")
    folder = RunDir(arguments.run)
    stored = folder.read_config()
    if stored is None:
        raise UserError(f"{arguments.run} is no run folder: it has no config.json.")
    processes.initialise(**flags(arguments))
    compile_cache.use(quiet=not processes.is_main())
    experiment = build(from_json(stored["config"]))
    experiment.check_data()
    steps = replay(experiment, folder, first=int(first), last=int(last))
    if processes.is_main():
        print(f"{len(steps)} audited steps, {steps[0]:,} to {steps[-1]:,}: the same bits.")
    return FINISHED


if __name__ == "__main__":
    start(main)
