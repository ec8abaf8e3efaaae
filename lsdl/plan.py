"""Plan: `python -m lsdl.plan --config configs/NAME.py[:variant] [--target T]`: a run's costs."""

import argparse
import os
from pathlib import Path

from lsdl.entry import start
from lsdl.errors import INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.plan --config configs/digits_vit.py --config.model.width=768 --json plan.json
  python -m lsdl.plan --config configs/gpt3.py:175b --target tpu:v5p:8x8x16 \\
      --config.mesh=data=4,fsdp=64,tensor=4 --price-per-device-hour 4.2
  python -m lsdl.plan --config configs/gpt3.py:1.3b --target gpu:h100:1x8 --config.mesh=fsdp=8
  python -m lsdl.plan --config configs/lm_llama.py:7b --target gpu:h100:8x8 --search
  python -m lsdl.plan --config configs/digits_vit.py --remat-table --html remat.html
  python -m lsdl.plan --config configs/lm_llama.py:7b --target tpu:v5e:16x16 --devices 256..8192

Nothing is allocated; the devices need not exist: a -1 in mesh takes --devices, or those here.
A plan has three sources, which are never mixed. analytic: closed forms. counted: FLOPs of the
traced programs, two for each multiply-add of a product or convolution and nothing for all else;
what config.remat computes again is told apart. compiled: the very train step by the target's
compiler, which `make plan-tools` installs.
exit codes: 0 done, 1 it does not fit, 2 bad input, 3 no compiler for the target, 130 Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.plan",
        description="Memory, FLOPs, traffic, time and cost of an experiment, before a device is "
        "booked.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:VARIANT]", help="the experiment's config file")
    add("--target", metavar="T", help="tpu:v5p:8x8x16, gpu:h100:4x8 (nodes x GPUs), cpu:64 ...")
    add("--analytic", action="store_true", help="closed forms alone: nothing is compiled")
    add("--devices", metavar="N[..M]", help="plan for N devices; N..M: how the run scales")
    add("--memory-gib", type=float, metavar="G", help="of a device (default: the target's)")
    add("--price-per-device-hour", type=float, metavar="X", help="what the run costs, in your unit")
    add(
        "--mtbf-device-hours", type=float, metavar="H", help="mean time between a device's failures"
    )
    add("--hardware", type=Path, metavar="FILE", help="devices of your own (TOML)")
    add("--remat-table", action="store_true", help="every remat policy's memory and FLOPs")
    add("--search", action="store_true", help="the best mesh, layout, remat and accum for a target")
    add("--depth", type=int, default=3, metavar="N", help="levels of modules shown (default: 3)")
    add("--collectives", action="store_true", help="compile the step: what its devices exchange")
    add("--shardings", action="store_true", help="how each parameter is split, and by which rule")
    add("--schedule", action="store_true", help="rate and batch size over the steps, alone")
    add("--groups", action="store_true", help="what the optimiser does to each parameter")
    add("--devices-known", action="store_true", help="the table of hardware, with its sources")
    add("--lectures", action="store_true", help="the lectures' numbers, computed again")
    add("--html", type=Path, metavar="FILE", help="write what is asked for there, drawn")
    add("--json", type=Path, metavar="FILE", help="write the plan there, with every module")
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parser().parse_known_args(argv)
    # Nothing is computed here: a GPU's memory is left to whoever computes on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    try:
        # After the parser, so that --help and a mistyped flag cost no second.
        from lsdl import planning

        return planning.run(arguments, overrides)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    start(main)
