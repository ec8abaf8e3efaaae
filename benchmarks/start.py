"""How long a start takes: `python -m benchmarks.start [--config FILE] [--pairs N]`.

From the start of the process `python -m lsdl.train` to the first step that is done and written
down, once with what lsdl compiled before, once without, in turn. Prints JSON: ratio = the warm
start's time / the cold one's.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import record

OWN = ("JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE")


def main() -> int:
    parser = record.parser("start", pairs=7)
    parser.add_argument("--config", default="configs/digits_vit.py", metavar="FILE[:VARIANT]")
    arguments, overrides = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder, "cache")
        started(arguments.config, overrides, cache)  # writes what the warm one reads
        times = []
        for i in range(arguments.pairs):
            ways = [cache, Path(folder, f"empty-{i}")]
            pair = {}
            for way in ways if i % 2 else ways[::-1]:
                pair[way] = started(arguments.config, overrides, way)
            shutil.rmtree(ways[1])
            times.append([pair[way] for way in ways])
    warm, cold = zip(*times, strict=True)
    found = {
        "match": f"{arguments.config}, from the process's start to the first step's end",
        "device": record.machine("gpu" if shutil.which("nvidia-smi") else "cpu"),
        "peer": "the same with nothing compiled before",
        "lsdl": {"start_s": statistics.median(warm)},
        "theirs": {"start_s": statistics.median(cold)},
        "ratio": record.spread([a / b for a, b in times]),
        "n": arguments.pairs,
        **record.origin(),
    }
    return record.tell(found, arguments.out)


def started(config: str, overrides: list[str], cache: Path) -> float:
    """Seconds until the first step's row is there."""
    env = {name: value for name, value in os.environ.items() if name not in OWN}
    env["XDG_CACHE_HOME"] = str(cache)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lsdl.train", "--config", config, "--workdir", folder]
        command += ["--config.log.every_steps=1", *overrides]
        rows, began = Path(folder, "metrics.jsonl"), time.perf_counter()
        with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=2, text=True) as run:
            while not rows.exists() or b"\n" not in rows.read_bytes():
                if run.poll() is not None:
                    raise SystemExit(f"lsdl.train ended with {run.returncode}: {run.stderr.read()}")
                time.sleep(0.005)
            took = time.perf_counter() - began
            run.kill()
            run.stderr.read()
    return took


if __name__ == "__main__":
    sys.exit(main())
