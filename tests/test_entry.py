"""How the entries end their process."""

import runpy
import subprocess
import sys

import pytest

from lsdl import entry
from lsdl.errors import BAD_INPUT
from tests.conftest import ROOT

REFUSED = {
    "analyze": "norms --run=nowhere",
    "audit": "nowhere --steps=1:2",
    "convert": "--run=nowhere --out=nowhere",
    "doctor": "--data=nowhere.py",
    "generate": "--run=nowhere",
    "plan": "--config=nowhere.py",
    "study": "run nowhere",
    "train": "--config=nowhere.py",
}


@pytest.mark.threat(44)
def test_what_was_done_is_told_whatever_the_end_of_the_interpreter_brings():
    # As a thread of C++ does now and then that asks for Python while the interpreter ends.
    aborts = "import atexit, os; atexit.register(os.abort)"
    done = f"{aborts}; from lsdl.entry import leave; print('1,000 steps', end=''); leave(75)"
    ended = subprocess.run((sys.executable, "-c", done), capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "1,000 steps", "")


@pytest.mark.threat(44)
@pytest.mark.parametrize("name", REFUSED)
def test_every_entry_that_computes_ends_so(monkeypatch, name):
    codes = []
    monkeypatch.setattr(entry, "leave", codes.append)
    monkeypatch.setattr(sys, "argv", [name, *REFUSED[name].split()])
    monkeypatch.delitem(sys.modules, f"lsdl.{name}", raising=False)
    runpy.run_module(f"lsdl.{name}", run_name="__main__")
    assert codes == [BAD_INPUT]
