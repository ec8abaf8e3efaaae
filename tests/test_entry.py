"""How the entries end their process."""

import os
import runpy
import subprocess
import sys

import pytest

from lsdl import entry
from lsdl.errors import BAD_INPUT, UNREAD
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


def started(work, **options):
    """A process that ends by `start` of `work`, lines of Python."""
    code = f"from lsdl.entry import start\ndef main():\n {work}\n return 0\nstart(main)"
    return subprocess.run((sys.executable, "-c", code), text=True, cwd=ROOT, **options)


@pytest.mark.parametrize("work", ["print('a' * 2**16)", "print('a', flush=True)"])
def test_the_end_is_quiet_when_nobody_reads(work):
    reader, writer = os.pipe()
    os.close(reader)
    ended = started(work, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (UNREAD, "")


def test_another_broken_pipe_is_told():
    ended = started("raise BrokenPipeError('of a worker')", capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("BrokenPipeError: of a worker\n")


@pytest.mark.parametrize("asked", ["cuda", "cpu,cuda", "gpu", "cpuu"])
def test_devices_that_cannot_be_had_are_refused_in_one_line(asked):
    environment = os.environ | {"JAX_PLATFORMS": asked}
    ended = started("import jax; jax.devices()", capture_output=True, env=environment)
    assert (ended.returncode, ended.stdout) == (BAD_INPUT, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"lsdl: JAX_PLATFORMS={asked} ")
    assert "unset it" in line


def test_an_error_of_another_kind_is_no_question_of_devices():
    ended = started("raise RuntimeError('of a worker')", capture_output=True)
    assert ended.returncode == 1
    assert ended.stderr.endswith("RuntimeError: of a worker\n")


@pytest.mark.parametrize("number", ["eight", "", "1.5", "-2", "0"])
def test_a_number_of_devices_that_is_none_is_refused_in_one_line(number):
    environment = os.environ | {entry.DEVICES: number}
    ended = started("import jax", capture_output=True, env=environment)
    said = f"lsdl: JAX_NUM_CPU_DEVICES={number!r} must be a whole number of at least 1: "
    assert (ended.returncode, ended.stdout) == (BAD_INPUT, "")
    assert ended.stderr.startswith(said)
    assert ended.stderr.count("\n") == 1
