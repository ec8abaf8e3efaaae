"""Report: `python -m lsdl.report FOLDER [FOLDER ...] [--out FILE]`: one page to look at."""

import argparse
import os
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.report runs/a                           # runs/a/report.html
  python -m lsdl.report runs/a runs/b --out compare.html
  python -m lsdl.report runs/studies/conditioning

FOLDERs are run folders of lsdl.train, or one study's folder of lsdl.study. Runs that differ in
their seed alone make one line with a band. The page needs no other file and no network.
exit codes: 0 done, 2 bad input, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.report",
        description="Curves, norms, throughput, results and environments of runs on one page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="FOLDER", help="run folders, or a study's folder")
    add("--out", type=Path, metavar="FILE", help="(default: report.html in the only FOLDER)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        return report(arguments)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def report(arguments: argparse.Namespace) -> int:
    """Write the page that the command line asks for; returns the exit code."""
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import reporting, verdict
    from lsdl.files import write_text

    folders, out = arguments.folders, arguments.out
    if out is None and len(folders) > 1:
        raise UserError("Several folders need --out=FILE: name the page.")
    out = out or folders[0] / "report.html"
    studies = [folder for folder in folders if verdict.is_study(folder)]
    if studies and len(folders) > 1:
        raise UserError(f"{studies[0]} is a study's folder: report it alone.")
    text = verdict.study_page(folders[0]) if studies else reporting.runs_page(folders)
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"--out={out} cannot be written: name a file in a folder there is.")
    write_text(out, text)
    print(f"written: {out}")
    return FINISHED


if __name__ == "__main__":
    start(main)
