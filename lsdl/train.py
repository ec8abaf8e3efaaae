"""Train: `python -m lsdl.train --config configs/NAME.py[:variant] [--config.FIELD=VALUE ...]`."""

import argparse
import signal

from lsdl.entry import framed, start
from lsdl.errors import FINISHED, INTERRUPTED, SAVED_AND_STOPPED, UserError
from lsdl.rendezvous import add_flags, flags

EXAMPLES = """examples:
  python -m lsdl.train --config configs/digits_vit.py --workdir runs/a
  python -m lsdl.train --config configs/digits_vit.py:smoke --config.optim.schedule.peak=3e-4
  JAX_NUM_CPU_DEVICES=8 python -m lsdl.train --config configs/digits_vit.py:smoke \\
      --workdir runs/b --config.mesh=data=2,fsdp=2,tensor=2

The same command again resumes from the newest checkpoint, on the same mesh or another one.
Every field of the config can be set as --config.FIELD=VALUE; config.json lists them.
exit codes: 0 complete, 2 bad input, 65 data damaged, 66 data missing, 69 a process missing or lost,
70 not finite, 71 stuck, 73 workdir in use or not writable, 74 no space or I/O error, 75 saved after
SIGTERM, 78 processes that differ, 130 after Ctrl-C, 141 nobody reads its output, 143 a second
SIGTERM"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.train",
        description="Train one experiment, or go on with it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="the experiment's config file")
    add("--workdir", help="the run folder (default: runs/NAME, the config's name)")
    add("--eval-only", action="store_true", help="evaluate the newest checkpoint and stop")
    add_flags(add)
    return parser


def main(argv: list[str] | None = None) -> int:
    return framed(train, parser(), argv)


def train(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run what the command line asks for; returns the exit code."""
    # After the parser, so that --help costs no second; what is mistyped or in use is told before
    # jax is there and the processes meet.
    from lsdl import config as configs
    from lsdl.rundir import RunDir

    config, _ = configs.load(arguments.config, overrides)
    folder = RunDir(arguments.workdir or f"runs/{config.name}")
    arguments.eval_only or folder.check_usable()
    from lsdl import capacity, compile_cache, loop, processes, remat_choice, summary
    from lsdl.experiment import build
    from lsdl.rundir import program
    from lsdl.source import Source

    processes.initialise(**flags(arguments))
    compile_cache.use(quiet=not processes.is_main())
    asked = {"--workdir": str(folder.path), "--eval-only": arguments.eval_only}
    processes.agree(configs.to_json(config) | program() | asked)
    source = Source(arguments.config, tuple(overrides))
    source = processes.together(lambda: remat_choice.resolved(source))
    config, given = source.load()
    experiment = processes.together(lambda: build(config))
    processes.together(experiment.check_data)
    processes.agree({"remat": config.remat, "data": experiment.data_fingerprint})
    say = print if processes.is_main() else lambda *_: None
    if arguments.eval_only:
        folder.check(fields=configs.to_json(config))
        outcome = loop.evaluate_run(experiment, folder) if folder.checkpoints.exists() else None
        if outcome is None:
            raise UserError(f"{folder.path} holds no checkpoint to evaluate: train first.")
        say(summary.table(outcome, experiment))
        return FINISHED
    processes.together(lambda: capacity.check(experiment))
    changes = processes.together(
        lambda: folder.claim(
            source=arguments.config,
            overrides=given,
            fields=configs.to_json(config),
            devices=processes.devices(),
            data=experiment.data_fingerprint,
            total_steps=experiment.total_steps,
        ),
        main_alone=True,
    )
    for field, (old, new) in (changes or {}).items():
        say(f"resuming with {field}: {old} -> {new}")
    say(summary.heading(experiment))
    try:
        outcome = loop.run(experiment, folder)
    finally:
        folder.release()
    if outcome.signal is not None:
        say(f"Stopped after step {outcome.step:,}, saved. The same command goes on from there.")
        return INTERRUPTED if outcome.signal == signal.SIGINT else SAVED_AND_STOPPED
    if not outcome.trained:
        say(f"The run in {folder.path} is complete.")
    if outcome.results:
        say(summary.table(outcome, experiment))
    say(f"written: {folder.metrics}\n         {folder.checkpoints}\n         {folder.tensorboard}")
    return FINISHED


if __name__ == "__main__":
    start(main)
