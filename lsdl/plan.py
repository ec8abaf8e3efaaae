"""Plan: `python -m lsdl.plan --config configs/NAME.py[:variant] [--json FILE]`: a run's costs."""

import argparse
import os
import sys
from pathlib import Path

from lsdl.errors import FINISHED, INTERRUPTED, UserError, refuse

EXAMPLES = """examples:
  python -m lsdl.plan --config configs/digits_vit.py --config.model.width=768 --json plan.json
  python -m lsdl.plan --config configs/digits_vit.py --config.mesh=fsdp=-1 --devices 32 --shardings
  python -m lsdl.plan --config configs/stdlib_gpt.py --config.mesh=data=8 --collectives

Nothing is allocated; the devices need not exist: a -1 in mesh takes --devices, or those here.
FLOPs are counted in the traced programs: two for each multiply-add of a matrix product or a
convolution, nothing for all else. Forward is an evaluation step; the train step is forward and
backward, and what config.remat computes again is told apart: total_flops leaves it out.
exit codes: 0 done, 2 bad input, 130 after Ctrl-C"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lsdl.plan",
        description="Parameters, FLOPs and bytes of an experiment, before any device is booked.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE[:VARIANT]", help="the experiment's config file")
    add("--devices", type=int, metavar="N", help="plan for N devices (default: what mesh says)")
    add("--depth", type=int, default=3, metavar="N", help="levels of modules shown (default: 3)")
    add("--collectives", action="store_true", help="compile the step: what its devices exchange")
    add("--shardings", action="store_true", help="how each parameter is split, and by which rule")
    add("--schedule", action="store_true", help="rate and batch size over the steps, alone")
    add("--groups", action="store_true", help="what the optimiser does to each parameter")
    add("--html", type=Path, metavar="FILE", help="write shardings or schedule there, drawn")
    add("--json", type=Path, metavar="FILE", help="write the plan there, with every module")
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments, overrides = parser().parse_known_args(argv)
    try:
        return plan(arguments, overrides)
    except UserError as error:
        return refuse(error)
    except KeyboardInterrupt:
        return INTERRUPTED


def plan(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Print the plan that the command line asks for; returns the exit code."""
    # Nothing is computed here: a GPU's memory is left to whoever computes on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    # After the parser, so that --help and a mistyped flag cost no second.
    from lsdl import config as configs
    from lsdl.experiment import build
    from lsdl.optim import groups
    from lsdl.planner import collectives, timetable, totals, tree
    from lsdl.rundir import versions, write_json
    from lsdl.sharding import inspect, mesh

    file, devices, depth = arguments.json, arguments.devices, arguments.depth
    for flag, f in (("json", file), ("html", arguments.html)):
        if f and (f.is_dir() or not os.access(f.parent, os.W_OK)):
            raise UserError(f"--{flag}={f} cannot be written: name a file in a folder there is.")
    for flag, value, least in (("devices", devices, 1), ("depth", depth, 0)):
        if value is not None and value < least:
            raise UserError(f"--{flag}={value} must be at least {least}.")
    config, _ = configs.load(arguments.config, overrides)
    if arguments.collectives:
        devices = collectives.devices(devices or mesh.num_devices(config.mesh))
    elif config.partitioner != "pmap":  # which there is on real devices alone
        devices = devices or mesh.num_devices(config.mesh)
    experiment = build(config, devices=devices)
    if arguments.schedule:
        return timetable.show(experiment, html_file=arguments.html, json_file=file)

    padding = tree.vocabulary_padding(experiment.placements, experiment.module)
    state, batch = experiment.abstract_state, experiment.abstract_batch
    given = dict(root=type(experiment.module).__name__, batch_size=experiment.batch_size)
    forward = experiment.eval_step.trace(state, batch)
    model = totals.make_model(experiment.name, state.params, forward, padding=padding, **given)
    step = experiment.train_step.trace(state, batch)
    numbers = totals.make_plan(model, step, experiment)
    print(tree.table(model, depth=depth))
    print(totals.summary(numbers))
    if arguments.collectives:
        numbers["collectives"] = collectives.of_experiment(experiment)
        print(collectives.table(numbers["collectives"]))
    if arguments.shardings:
        print(inspect.table(experiment.placements, experiment.mesh), *experiment.lint, sep="\n")
    if arguments.groups:
        print(groups.table(experiment.parameter_groups))
    if arguments.html:
        arguments.html.write_text(inspect.page(experiment))
    for note in experiment.notes:
        print(f"note: {note}")
    if file:
        head = {"name": experiment.name, "mesh": dict(experiment.mesh.shape)}
        write_json(file, {**head, **numbers, "versions": versions()})
    return FINISHED


if __name__ == "__main__":
    sys.exit(main())
