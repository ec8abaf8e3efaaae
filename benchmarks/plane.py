"""What a loss surface costs: `python -m benchmarks.plane [--config FILE] [--pairs N] [--chunks N]`.

As many examples, once as points of a surface (`lsdl.analysis.landscape`), once by as many plain
evaluations of the split, in turns, from the newly initialised parameters. Compilation is left out:
of a surface the time counts from the end of its first chunk of points. A plane of 51 x 51 has 41
chunks of 64; a few of them have its rate. Prints JSON: ratio = the surface's time / evaluation's of
each pair, below 1 is better; cpu_ratio: of the seconds that the cores were busy, which a machine
with other work on it changes less.
"""

import argparse
import functools
import statistics
import sys
import time

import jax

from benchmarks import record
from lsdl import step as steps
from lsdl.analysis import landscape
from lsdl.experiment import Experiment
from lsdl.loop import evaluate
from lsdl.rundir import commit
from lsdl.sharding import partition
from lsdl.source import Source
from lsdl.state import TrainState

CHUNK = 64
SPLIT = "valid"


def main() -> int:
    parser = record.parser("plane", pairs=5)
    add = parser.add_argument
    add("--config", default="configs/digits_vit.py", metavar="FILE[:VARIANT]")
    add("--chunks", type=int, default=2, metavar="N", help="of 64 points each (default: 2)")
    add("--at-a-time", type=int, default=1, metavar="N", help="points together (default: 1)")
    arguments, overrides = parser.parse_known_args()
    experiment = Source(arguments.config, tuple(overrides)).build()
    return record.tell(measured(experiment, arguments), arguments.out)


def measured(experiment: Experiment, arguments: argparse.Namespace) -> dict:
    """The benchmark's JSON."""
    state, points = experiment.init(), CHUNK * arguments.chunks
    evaluate(experiment, state, SPLIT)  # compiles
    of_surface, of_evaluation = [], []
    for i in range(arguments.pairs):
        for way in (0, 1) if i % 2 else (1, 0):
            if way:
                of_surface.append(surface(experiment, state, arguments))
            else:
                of_evaluation.append(evaluations(experiment, state, points))
    pairs = list(zip(of_surface, of_evaluation, strict=True))
    examples = points * experiment.eval_loader(SPLIT).num_examples
    return {
        "match": f"{arguments.config}, {points} points of {examples // points} examples each",
        "device": record.device(),
        "peer": "lsdl.loop.evaluate, as often as there are points",
        "peer_commit": commit(),
        "lsdl": {"examples_per_s": examples / statistics.median(wall for wall, _ in of_surface)},
        **record.ratios(pairs),
        "n": arguments.pairs,
        **record.origin(),
    }


def clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def surface(
    experiment: Experiment, state: TrainState, arguments: argparse.Namespace
) -> tuple[float, float]:
    """(wall, CPU) seconds of the chunks after the first one."""
    eval_step = steps.make_eval_step(experiment.module.apply, experiment.task)

    def sums(variables, batch):
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        return dict(eval_step(state.replace(params=variables["params"], model_state=rest), batch))

    loader, ticks = experiment.eval_loader(SPLIT), []
    batches = list(loader.batches(0, loader.num_batches))
    keys = jax.random.split(jax.random.key(0))
    landscape.surface(
        sums,
        steps.variables_of(state),
        [landscape.random(state.params, key) for key in keys],
        landscape.grid(*[landscape.line(-1, 1, 51)] * 2)[: CHUNK * (1 + arguments.chunks)],
        batches,
        program=functools.partial(
            partition.program, mesh=experiment.mesh, rules=experiment.rules, precision="float32"
        ),
        chunk=CHUNK,
        at_a_time=arguments.at_a_time,
        tick=lambda: ticks.append(clocks()),
    )
    return tuple(b - a for a, b in zip(ticks[len(batches) - 1], ticks[-1], strict=True))


def evaluations(experiment: Experiment, state: TrainState, number: int) -> tuple[float, float]:
    """(wall, CPU) seconds of as many."""
    began = clocks()
    for _ in range(number):
        evaluate(experiment, state, SPLIT)
    return tuple(b - a for a, b in zip(began, clocks(), strict=True))


if __name__ == "__main__":
    sys.exit(main())
