"""Study: `python -m lsdl.study list | run NAME [NAME ...] | all`: the lectures' claims measured."""

import argparse
import sys
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.study list
  python -m lsdl.study run conditioning staleness --workdir runs/studies
  python -m lsdl.study run large_batch --seeds 5
  python -m lsdl.study run large_batch --scale full
  python -m lsdl.study run grokking --slow
  python -m lsdl.study all --results docs/results.md

Every claim is printed with what was measured and what was expected: HOLDS or DOES NOT HOLD. A
claim that does not hold is a result, and the exit code stays 0. Each study has a folder in the
workdir with table.csv, verdict.json, figures/ and report.html, and `all` writes the workdir's
report.html: every claim, lecture by lecture. The same command again measures
only the cells that are not done or not the same; remove the folder to measure all once more.
--slow adds the cells that `list` counts apart, such as grokking's transformer, to those of the
small scale; once measured they stay in the study's table and report.
--scale full measures nothing: it prints what to run on accelerators, and the published numbers.
exit codes: 0 done, 1 a study failed, 2 bad input, 73 workdir in use, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.study",
        description="Measure the claims of the lectures on two cores, each with its bound.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("action", choices=("list", "run", "all"), help="list the studies, run some, or run all")
    add("names", nargs="*", metavar="NAME", help="the studies to run")
    add("--scale", choices=("small", "full"), default="small", help="(default: small)")
    add("--seeds", type=int, metavar="N", help="seeds of each setting (default: 3)")
    add("--slow", action="store_true", help="measure the slow cells too, minutes each")
    add("--workdir", type=Path, default=Path("runs/studies"), help="(default: runs/studies)")
    add("--results", type=Path, metavar="FILE", help="all: the claims' table, in Markdown")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_intermixed_args(argv)
    try:
        return study(arguments)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from the last cell.", file=sys.stderr)
        return INTERRUPTED


def study(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code."""
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import compile_cache, laboratory

    action, names, root = arguments.action, arguments.names, arguments.workdir
    seeds = laboratory.SEEDS if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise UserError(f"--seeds={seeds} must be at least 1.")
    if bool(names) != (action == "run"):
        rule = "needs the NAME of a study" if action == "run" else f"takes no name: {names[0]!r}"
        raise UserError(f"{action} {rule}; `python -m lsdl.study list` shows the studies.")
    if action == "list":
        print(laboratory.inventory(seeds))
        return FINISHED
    if arguments.results and action != "all":
        raise UserError(f"--results={arguments.results} is of all studies: {action} takes it not.")
    names = list(dict.fromkeys(names)) or laboratory.complete()
    for name in names:
        laboratory.find(name)
    if arguments.scale == "full":
        print("\n".join(laboratory.told_full(name, seeds, root) for name in names))
        return FINISHED
    compile_cache.use()
    outcomes, failed = laboratory.run_all(names, root, seeds=seeds, slow=arguments.slow)
    if action == "all":
        print(laboratory.summary(outcomes, failed))
        written = laboratory.write_book(outcomes, failed, root, results=arguments.results)
        print("\n".join(f"written: {file}" for file in written))
    elif failed:
        print(f"lsdl: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else FINISHED


if __name__ == "__main__":
    start(main)
