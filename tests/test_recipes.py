"""The small configs reach what their docstrings promise, judged by their last evaluation."""

import pytest

from lsdl.metrics import read_rows

pytestmark = pytest.mark.slow

PROMISES = {
    "digits_resnet": ("test", "accuracy", 0.975, 1),
    "digits_clip": ("test", "zero_shot_accuracy", 0.9, 1),
    "stdlib_gpt": ("valid", "bits_per_byte", 2.66, -1),
}


@pytest.mark.parametrize("name", sorted(PROMISES))
def test_a_recipe_keeps_its_promise(train, tmp_path, name):
    split, metric, bound, sign = PROMISES[name]
    code, _, error = train(name, "--workdir", tmp_path / "run")
    assert code == 0, error
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == split]
    [last] = rows[-1:]
    assert sign * last[metric] >= sign * bound, last
