"""One player of a match: `python -m benchmarks.worker MATCH PLAYER FOLDER`, a process of its own.

Says one line of JSON when it is ready, and one for each line that it reads: `compare N` takes N
steps, each with its loss; `time N` takes N steps and tells the seconds until the device is done.
"""

import importlib
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.matches import MATCHES


def main() -> int:
    name, player, folder = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")  # what libraries print goes to stderr
    os.dup2(2, 1)
    began = time.perf_counter()
    made = importlib.import_module(f"benchmarks.players.{player}").Player(
        MATCHES[name], Path(folder)
    )
    tell(answers, made.told | {"ready_s": time.perf_counter() - began})
    for line in sys.stdin:
        verb, number = line.split()
        if verb == "compare":
            losses = []
            for _ in range(int(number)):
                made.steps(1)
                losses.append(made.loss())
            tell(answers, {"losses": losses})
            continue
        made.steps(1)  # while others work, the system takes back what a step has freed
        made.loss()
        began = time.perf_counter(), time.process_time()
        made.steps(int(number))
        loss = made.loss()
        wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
        tell(answers, {"wall_s": wall, "cpu_s": cpu, "loss": loss, "peak": made.peak_bytes()})
    return 0


def tell(file, value) -> None:
    print(json.dumps(value), file=file, flush=True)


if __name__ == "__main__":
    sys.exit(main())
