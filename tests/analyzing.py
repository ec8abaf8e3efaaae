"""Small runs for the tests of `lsdl.analyze`, and what it finds of them."""

import re

from lsdl import analyze, train
from lsdl.files import read_json
from tests.conftest import CONFIGS


def trained(folder, name, *overrides):
    """The folder of a run of a few steps."""
    options = ["--config.total_steps=6", "--config.eval.every_steps=6"]
    if name == "digits_mlp":
        options += ["--config.model.hidden=(8,8)"]
    code = train.main(
        ["--config", f"{CONFIGS / name}.py:smoke", f"--workdir={folder}", *options, *overrides]
    )
    assert code == 0
    return folder


def analyzed(kind, run, out, *options):
    """(stored values, the page)."""
    assert analyze.main([kind, "--run", str(run), "--out", str(out), *map(str, options)]) == 0
    page = (out / f"{kind}.html").read_text()
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page)
    return read_json(out / f"{kind}.json"), page
