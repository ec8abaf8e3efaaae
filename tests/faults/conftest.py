"""What a run of `make faults PART=k/n` counted, into one JSON file per part for `merge`.

A test says what it counted by `record_property("kills", 12)`. Counts of one name are added up over
the tests of a part and over the parts; of one that begins with `max_` the largest is kept.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / ".cache" / "faults"
PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "grain"),
    *("array_record", "ml_collections", "numpy"),
)


def add(counts: dict, name: str, value) -> None:
    """Put one more count into `counts`."""
    before = counts.get(name)
    largest = name.startswith("max_")
    counts[name] = value if before is None else max(before, value) if largest else before + value


class Recorder:
    """Gathers the reports of one part, also of its workers, and writes them at the end."""

    def __init__(self, part: str):
        self._part, self._started = part, time.perf_counter()
        self._counts, self._ended = {}, {"passed": 0, "failed": 0, "skipped": 0}
        self._failures, self._seconds = [], {}

    def pytest_runtest_logreport(self, report):
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self._ended[report.outcome] += 1
            if report.failed:
                self._failures.append(report.nodeid)
        if report.when == "call":
            for name, value in report.user_properties:
                add(self._counts, name, value)

    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:  # a part may be empty
            session.exitstatus = pytest.ExitCode.OK
        elif exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return  # what did not come to its end counts for nothing
        commit = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
        )
        longest = max(self._seconds, key=self._seconds.get, default=None)
        part = {
            "part": self._part,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "commit": commit.stdout.strip() or "unknown",
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "cores": os.cpu_count(),
            "seconds": round(time.perf_counter() - self._started, 1),
            "tests": self._ended,
            "longest": longest and [longest, round(self._seconds[longest], 1)],
            "failures": self._failures,
            "ran": sorted(self._seconds),
            "counts": self._counts,
        }
        PARTS.mkdir(parents=True, exist_ok=True)
        name = f"{self._part.replace('/', '-of-')}.json"
        (PARTS / name).write_text(json.dumps(part, indent=1, sort_keys=True) + "\n")


def pytest_configure(config):
    whole = config.option.markexpr == "faults" and not config.option.keyword
    folder = [Path(arg).resolve() for arg in config.args] == [Path(__file__).parent]
    if whole and folder and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("--shard")), "faults-recorder")
