"""The small configs reach what their docstrings promise, run as a user runs them."""

import os
import subprocess
import sys

import pytest

from lsdl.metrics import read_rows
from tests.conftest import CONFIGS

pytestmark = pytest.mark.slow

PROMISES = {
    "digits_resnet": ("test", "accuracy", 0.975, 1),
    "digits_clip": ("test", "zero_shot_accuracy", 0.9, 1),
    "stdlib_gpt": ("valid", "bits_per_byte", 2.66, -1),
}


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_a_recipe_keeps_its_promise(tmp_path, name):
    split, metric, bound, sign = PROMISES[name]
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "lsdl.train", "--config", f"{CONFIGS / name}.py"]
    one_device = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [*command, f"--workdir={workdir}"], env=one_device, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [last] = [row for row in read_rows(workdir / "metrics.jsonl") if row["split"] == split][-1:]
    assert sign * last[metric] >= sign * bound, last
