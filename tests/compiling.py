"""`python -m tests.compiling '[[CONFIG, OVERRIDE, ...], ...]'`: what XLA says to train steps.

On stderr, a line with each case before what is said to it. A process of its own, because the log
is C++'s and because a program that comes from the cache is not compiled.
"""

import json
import sys

import jax

from lsdl import config
from lsdl.experiment import build
from tests.tiny import FAST

CASE = "case "


def main():
    for name, *overrides in json.loads(sys.argv[1]):
        print(CASE + json.dumps([name, *overrides]), file=sys.stderr, flush=True)
        file, _, arg = name.partition(":")
        path = f"configs/{file}.py" + (f":{arg}" if arg else "")
        loaded, _ = config.load(path, [f"--config.{o}" for o in overrides])
        experiment = build(loaded, devices=jax.devices())
        step = experiment.train_step
        step.lower(experiment.abstract_state, experiment.abstract_batch).compile(FAST)


if __name__ == "__main__":
    main()
