"""Analyze: `python -m lsdl.analyze KIND --run RUN`: what a run's checkpoint can be asked."""

import argparse
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """kinds:
  hessian      largest eigenvalues, trace, condition number, spectral density
  sharpness    Keskar's phi in a box, SAM's rise, lambda_max eta / 2
  line, plane  the loss along one direction, on a plane of two
  interpolate  the loss between two runs, or two steps of one
  noise        gradient noise scale B_simple, each example's gradient
  norms        |w|, |gradient| and their ratio for each parameter: the table of LARS
  outliers     the examples with the highest loss, with their pictures or texts
  boundary     the classes of the plane, of a classifier with two inputs
  volume       radius of the basin in random directions, log-volume
  diagnose     under- or overfitting, from the run's metrics alone

examples:
  python -m lsdl.analyze hessian --run runs/digits_vit --examples 256
  python -m lsdl.analyze hessian --run runs/a --of ggn --mesh data=2,fsdp=4
  python -m lsdl.analyze plane --run runs/a --split valid --resolution 51
  python -m lsdl.analyze plane --run runs/a --direction pca
  python -m lsdl.analyze interpolate --run runs/a --to runs/b --recalibrate
  python -m lsdl.analyze noise --run runs/a --examples 0 --mesh data=8
  python -m lsdl.analyze outliers --run runs/a --split valid --top 50
  python -m lsdl.analyze diagnose --run runs/a --target 0.5

The table is printed; KIND.json and the page KIND.html go to RUN/analysis, or to --out.
exit codes: 0 done, 2 bad input, 74 no checkpoint that verifies, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.analyze",
        description="Curvature, loss surface, gradients and examples of a run's checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    kinds = ("hessian", "sharpness", "line", "plane", "interpolate", "noise", "norms")
    kinds += ("outliers", "boundary", "volume", "diagnose")
    add("kind", choices=kinds, metavar="KIND", help=", ".join(kinds))
    add("--run", required=True, type=Path, metavar="RUN", help="the run folder")
    add("--step", type=int, metavar="K", help="of which checkpoint (default: the newest)")
    add("--split", choices=("train", "valid", "test"), default="train", help="(default: train)")
    add("--examples", type=int, metavar="N", help="its first N; 0: all that evaluation takes")
    add("--mesh", default="", metavar="M", help="as data=2,fsdp=4, of all devices (default: one)")
    add("--out", type=Path, metavar="DIR", help="(default: RUN/analysis)")
    add("--seed", type=int, default=0, metavar="N", help="of directions and starts (default: 0)")
    add("--of", default="hessian", metavar="MATRIX", help="hessian, ggn or fisher")
    add("--top", type=int, metavar="K", help="eigenvalues (default: 5), outliers (default: 24)")
    add("--steps", type=int, default=40, metavar="K", help="of Lanczos, at most (default: 40)")
    add("--starts", type=int, default=3, metavar="R", help="of the density (default: 3)")
    add("--direction", default="filter", metavar="D", help="filter-normalised as Li et al. 2018 "
        "(the default), tensor, random, or pca of the checkpoints")  # fmt: skip
    add("--resolution", type=int, default=51, metavar="N", help="points a side (default: 51)")
    add("--radius", type=float, default=1.0, metavar="R", help="of line and plane (default: 1)")
    add("--around-start", action="store_true", help="around the parameters before the first step")
    add("--recalibrate", action="store_true", help="BatchNorm's statistics anew at each point")
    add("--directions", type=int, default=20, metavar="N", help="of volume (default: 20)")
    add("--cut", type=float, metavar="L", help="the basin's loss (default: 0.1 above the run's)")
    add("--target", type=float, metavar="L", help="diagnose: a training loss above it is large")
    add("--to", type=Path, metavar="RUN", help="the other end of interpolate")
    add("--to-step", type=int, metavar="K", help="its step (default: the newest)")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    try:
        # After the parser, so that --help and a mistyped flag cost no second.
        from lsdl import compile_cache, surveying

        compile_cache.use()
        print(surveying.run(arguments))
        return FINISHED
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    start(main)
