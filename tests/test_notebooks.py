"""Every notebook runs from top to bottom, and every exercise's check can be passed and failed."""

import json
import os
import re
import runpy
import subprocess
import sys

import pytest

from lsdl.exercise import check
from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RUN = (sys.executable, str(ROOT / "tests" / "notebook.py"))
# The first cell chooses the devices by itself, as it has to for a reader.
ENV = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")}
ENV["PYTHONPATH"] = str(ROOT)
FIELDS = {
    "markdown": {"cell_type", "id", "metadata", "source"},
    "code": {"cell_type", "execution_count", "id", "metadata", "outputs", "source"},
}

each_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def run(file):
    return subprocess.run([*RUN, str(file)], env=ENV, capture_output=True, text=True, timeout=600)


@each_notebook
def test_a_notebook_runs_in_a_fresh_process(file):
    done = run(file)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr  # that a reader would have to ignore


@each_notebook
def test_a_notebook_is_stored_as_it_was_written_and_not_as_it_was_run(file):
    text = file.read_text()
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    assert notebook["metadata"] == {"kernelspec": kernel, "language_info": {"name": "python"}}
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell.keys() == FIELDS[cell["cell_type"]], cell["id"]
        assert cell["metadata"] == {}, cell["id"]
        assert "".join(cell["source"]).splitlines(keepends=True) == cell["source"] != []
        if cell["cell_type"] == "code":
            assert (cell["execution_count"], cell["outputs"]) == (None, []), cell["id"]


def test_every_notebook_with_solutions_exists():
    solutions = runpy.run_path(str(ROOT / "notebooks" / "solutions.py"))["SOLUTIONS"]
    assert solutions.keys() <= {file.stem for file in NOTEBOOKS}


def test_a_check_says_what_is_open_and_what_is_wrong_but_not_the_truth(capsys):
    truth = {"bytes": 64, "copies": 2.0}
    check({"bytes": None, "copies": None}, truth)
    assert capsys.readouterr().out == "Still open: bytes; copies.\n"
    check({"bytes": 64, "copies": None}, truth)
    assert capsys.readouterr().out == "Still open: copies.\n"
    check({"bytes": 65, "copies": 2}, truth, relative=0.02)
    assert capsys.readouterr().out == "All right.\n"
    with pytest.raises(AssertionError, match=r"^think again about: bytes = 65\.$"):
        check({"bytes": 65, "copies": 2}, truth)
    with pytest.raises(AssertionError, match="answer these: bytes; copies"):
        check({"bytes": 64}, truth)


def test_where_many_answers_are_right_a_function_judges_them_all(capsys):
    six = lambda answers: "" if answers["a"] * answers["b"] == 6 else "their product is not 6"  # noqa: E731
    check({"a": 5, "b": None}, six)
    check({"a": 2, "b": 3}, six)
    check({"a": 1, "b": 6}, six)
    assert capsys.readouterr().out == "Still open: b.\n" + 2 * "All right.\n"
    with pytest.raises(AssertionError, match=r"^think again about: a = 2; b = 2 \(their product"):
        check({"a": 2, "b": 2}, six)


# The runner: what does not hold in a notebook has to end the run.

IMPORT = "from lsdl.exercise import check"
QUESTION = 'two = {"one and one": None}'
CHECK = 'check(two, {"one and one": 2})'
SOLUTIONS = 'SOLUTIONS = {"lesson": {"two": ({"one and one": 2}, {"one and one": 3})}}'


def written(folder, *cells):
    cells = [{"cell_type": "code", "id": str(i), "source": [c]} for i, c in enumerate(cells)]
    file = folder / "lesson.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    (folder / "solutions.py").write_text(SOLUTIONS)
    return file


def test_a_sound_notebook_passes_and_shows_its_last_values(tmp_path):
    done = run(written(tmp_path, IMPORT, QUESTION, f"{CHECK}\n6 * 7"))
    assert (done.returncode, done.stderr) == (0, "")
    # As it stands; the wrong answer is refused before the last value; the right one.
    assert done.stdout == "Still open: one and one.\n42\nAll right.\n42\n"


@pytest.mark.parametrize(
    ("cells", "fault"),
    [
        ((IMPORT, QUESTION, "assert 1 == 2", CHECK), "lesson.ipynb, cell 2"),
        ((IMPORT, QUESTION), "[] were checked"),
        (("check = lambda *_: None", QUESTION, CHECK), "two passes"),
        ((IMPORT, QUESTION, CHECK.replace("2", "4")), "think again about: one and one = 2"),
        ((IMPORT, QUESTION.replace("None", "2"), CHECK), "two is solved"),
    ],
    ids=["a false claim", "an unchecked exercise", "passes all", "fails all", "gives it away"],
)
def test_an_unsound_notebook_fails(tmp_path, cells, fault):
    done = run(written(tmp_path, *cells))
    assert done.returncode == 1
    assert fault in done.stderr
