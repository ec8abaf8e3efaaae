"""Doctor: `python -m lsdl.doctor [FLAGS of lsdl.train]`: whether the set-up is fit for it."""

import argparse
from pathlib import Path

from lsdl.entry import framed, start
from lsdl.errors import BAD_INPUT, FINISHED, UserError
from lsdl.rendezvous import add_flags, flags

EXAMPLES = """examples:
  python -m lsdl.doctor
  srun python -m lsdl.doctor --distributed=auto --config configs/digits_vit.py --workdir runs/a
  python -m lsdl.doctor --data configs/digits_vit.py
  python -m lsdl.doctor --data configs/cifar10_vit.py --digests

Looked at: processes and devices against what the launcher says, one all-reduce for each axis of the
mesh (the config's, or data=-1), the versions and clocks of all processes, the workdir and the space
in it, the config and its data. Nothing is trained.
exit codes: 0 all is well, 2 findings, 65 damaged data, 66 no data, 69 other processes out of reach,
71 no answer, 130 Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.doctor",
        description="Look at all processes, devices and folders of a job before it starts.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:VARIANT]", help="the experiment that is to run")
    add("--workdir", help="its run folder (default: runs/NAME, the config's name)")
    add("--eval-only", action="store_true", help="for train; changes nothing here")
    add("--data", metavar="FILE[:VARIANT]", help="measure this config's loader alone, and stop")
    add("--digests", action="store_true", help="of --data: read all prepared files and compare")
    add("--batches", type=int, default=50, metavar="N", help="of --data (default: 50)")
    add_flags(add, wait_s=120)  # also what each check may take
    return parser


def main(argv: list[str] | None = None) -> int:
    return framed(doctor, parser(), argv)


def doctor(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Look at what the command line says; returns the exit code."""
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import checkup, processes
    from lsdl import config as configs
    from lsdl.experiment import build

    if overrides and not (arguments.config or arguments.data):
        parser().error(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.batches < 1 or arguments.wait <= 0:
        raise UserError(
            f"--batches={arguments.batches} and --wait={arguments.wait:g} must be positive."
        )
    file = arguments.data or arguments.config
    config = configs.load(file, overrides)[0] if file else None
    processes.initialise(**flags(arguments))
    if arguments.data:
        experiment = build(config)
        if arguments.digests:
            print(checkup.shards_compared(experiment.check_digests()))
        else:
            print(checkup.loader_alone(experiment, arguments.batches))
        return FINISHED
    workdir = arguments.workdir or (config and f"runs/{config.name}")
    findings = checkup.examine(
        (lambda: build(config)) if config else None,
        mode="explicit" if arguments.coordinator else arguments.distributed,
        workdir=Path(workdir).expanduser().absolute() if workdir else None,
        wait_s=arguments.wait,
    )
    return BAD_INPUT if findings else FINISHED


if __name__ == "__main__":
    start(main)
