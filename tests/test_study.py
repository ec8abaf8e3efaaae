import csv
import json
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from lsdl import config as configs
from lsdl import laboratory, rundir, studies
from lsdl.study import main
from tests.conftest import ROOT

GOLDEN = Path(__file__).parent / "golden" / "claims.json"
TOY = """
import math
import numpy as np
from lsdl import plots
from lsdl.studies.claim import Cell, Expected, judged

CLAIM = "Twice a number is <b>more</b> than the number."
SOURCE = "lecture 0; Euclid, Elements"
EXPECTED = {
    "double": Expected("ratio of twice x and x", "book 7", low=2, high=2),
    "negative": Expected("twice -1", "none", low=-1),
    "lost": Expected("the root of -1", "none"),
}
BASE = 1
CALLS = []

def cells(scale, seeds):
    if scale == "full":
        fields = {"optim.name": "sgd", "model.hidden": (8, 8)}
        return [Cell("big", {"x": 9}, "digits_mlp:smoke", fields, "2.0 (Euclid)")]
    return [Cell(f"x{s}", {"x": BASE + s, "sizes": (1, 2)}) for s in range(seeds)]

def measure(cell, folder):
    if HOOK:
        HOOK(cell, folder)
    CALLS.append(cell.id)
    return {"twice": 2 * np.float32(cell.settings["x"]), "curve": np.arange(2)}

def claims(table):
    ratio = [row["twice"] / row["x"] for row in table]
    return judged(EXPECTED, {"double": ratio, "negative": -2.0, "lost": math.nan})

def figure(table):
    xs = [row["x"] for row in table]
    series = {"twice": (xs, [row["twice"] for row in table])}
    return {"doubling": plots.lines(series, title="Doubling", x="x", y="2 x")}

HOOK = None
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The module of a study that the laboratory finds beside the shipped ones."""
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "toy_study.py").write_text(TOY)
    (folder / "toy_bounds.py").write_text(TOY.split("def cells")[0])
    monkeypatch.setattr(studies, "__path__", [*studies.__path__, str(folder)])
    yield laboratory._module("toy_study")
    for name in ("toy_study", "toy_bounds"):
        sys.modules.pop(f"lsdl.studies.{name}", None)
        if hasattr(studies, name):
            delattr(studies, name)


@pytest.fixture
def study(tmp_path, capfd):
    def study(*arguments):
        capfd.readouterr()
        code = main([*map(str, arguments), "--workdir", str(tmp_path / "w")])
        return code, *capfd.readouterr()

    return study


def test_a_study_is_measured_told_and_written(toy, study, tmp_path):
    code, out, _ = study("run", "toy_study", "--seeds", "2")
    assert code == 0  # it worked, though two claims do not hold
    assert "HOLDS          double: 2 +- 0 (n=2), expected 2\n" in out
    assert "DOES NOT HOLD  negative: -2 (n=1), expected >= -1\n" in out
    assert "DOES NOT HOLD  lost: nan" in out
    assert "1 of 3 claims hold; cells: 2, 2 of them measured now" in out

    folder = tmp_path / "w" / "toy_study"
    verdict = json.loads((folder / "verdict.json").read_text(), parse_constant=pytest.fail)
    assert (verdict["study"], verdict["scale"], verdict["seeds"]) == ("toy_study", "small", 2)
    assert [list(claim) for claim in verdict["claims"]] == 3 * [
        ["id", "text", "source", "expected", "measured", "n", "spread", "holds"]
    ]
    assert [claim["holds"] for claim in verdict["claims"]] == [True, False, False]
    assert verdict["claims"][2]["measured"] is None  # JSON has no NaN
    assert {"commit", "versions", "time", "measured_s"} <= verdict.keys()

    with open(folder / "table.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [(r["id"], r["x"], r["twice"], r["curve"]) for r in rows] == [
        ("x0", "1", "2.0", "[0, 1]"),
        ("x1", "2", "4.0", "[0, 1]"),
    ]
    assert float(rows[0]["seconds"]) >= 0
    assert (folder / "figures" / "doubling.svg").exists()
    page = (folder / "report.html").read_text()
    assert "1 of 3 claims hold" in page
    assert "is &lt;b&gt;more&lt;/b&gt;" in page
    assert "does not hold" in page
    assert "python -m lsdl.train --config configs/digits_mlp.py:smoke" in page


def test_what_is_done_is_not_measured_again(toy, study):
    study("run", "toy_study", "--seeds", "2")
    _, out, _ = study("run", "toy_study", "--seeds", "3")
    assert toy.CALLS == ["x0", "x1", "x2"]
    assert "cells: 3, 1 of them measured now" in out
    _, out, _ = study("run", "toy_study", "--seeds", "1")
    assert "cells: 1, 0 of them measured now" in out


def test_a_changed_cell_is_measured_again(toy, study, tmp_path):
    study("run", "toy_study", "--seeds", "2")
    toy.BASE = 5
    study("run", "toy_study", "--seeds", "2")
    assert toy.CALLS == ["x0", "x1"] * 2
    assert "10.0" in (tmp_path / "w" / "toy_study" / "table.csv").read_text()


def test_an_interrupted_grid_goes_on_and_so_does_the_cell(toy, study):
    seen = []

    def stop(cell, folder):
        seen.append((cell.id, sorted(path.name for path in folder.iterdir())))
        (folder / "checkpoint").touch()
        if cell.id == "x1" and len(seen) == 2:
            raise KeyboardInterrupt

    toy.HOOK = stop
    code, _, err = study("run", "toy_study")
    assert code == 130
    assert "goes on" in err
    assert study("run", "toy_study")[0] == 0
    assert seen[1:] == [
        ("x1", ["cell.json"]),
        ("x1", ["cell.json", "checkpoint"]),  # what it had kept
        ("x2", ["cell.json"]),
    ]
    assert toy.CALLS == ["x0", "x1", "x2"]


def test_a_changed_cell_does_not_find_the_old_ones_runs(toy, study):
    kept = []

    def keep(cell, folder):
        kept.append((folder / "checkpoint").exists())
        (folder / "checkpoint").touch()

    toy.HOOK = keep
    study("run", "toy_study", "--seeds", "1")
    toy.BASE = 5
    study("run", "toy_study", "--seeds", "1")
    assert kept == [False, False]


def test_a_study_in_use_is_left_alone(toy, study, tmp_path):
    holder = rundir.RunDir(tmp_path / "w" / "toy_study")
    holder.create()
    holder.acquire()
    code, _, err = study("run", "toy_study")
    holder.release()
    assert code == 73
    assert f"in use by process {os.getpid()}" in err
    assert toy.CALLS == []


def test_claims_that_moved_after_the_measurement_are_a_bug(toy, study, monkeypatch):
    moved = {**toy.EXPECTED, "negative": toy.Expected("twice -1", "none", low=-3)}
    values = {"double": 2, "negative": -2, "lost": 0}
    monkeypatch.setattr(toy, "claims", lambda table: toy.judged(moved, values))
    code, _, err = study("run", "toy_study")
    assert code == 1
    assert "differ from EXPECTED" in err


def test_the_full_scale_is_told_and_not_measured(toy, study, tmp_path):
    code, out, _ = study("run", "toy_study", "--scale", "full")
    assert code == 0
    assert toy.CALLS == []
    assert not (tmp_path / "w").exists()
    comment, command = out.splitlines()[1:]
    assert comment == "# big x=9: published 2.0 (Euclid)"
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "lsdl.train"]
    assert words[words.index("--workdir") + 1] == str(tmp_path / "w/toy_study/full/big")
    assert words[4:7] == [
        "configs/digits_mlp.py:smoke",
        "--config.optim.name=sgd",
        "--config.model.hidden=(8, 8)",
    ]


def test_list_names_each_with_claim_source_and_size(toy, study):
    code, out, _ = study("list")
    assert code == 0
    assert "toy_study: 3 cells, 3 claims, 1 runs at full scale\n" in out
    assert f"  {toy.CLAIM}\n  {toy.SOURCE}" in out
    assert "toy_bounds: bounds alone" in out
    assert "claim:" not in out  # the module of what a study is made of is none


def test_all_ends_with_a_summary_and_the_book(toy, study, tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "names", lambda: ["toy_bounds", "toy_study"])
    code, out, _ = study("all")
    assert code == 0
    assert out.splitlines()[-3].split()[:4] == ["study", "claims", "hold", "seconds"]
    assert out.splitlines()[-2].split()[:3] == ["toy_study", "3", "1"]
    assert out.splitlines()[-2].endswith("negative, lost")
    book = (tmp_path / "w" / "report.html").read_text()
    assert 'href="toy_study/report.html"' in book
    assert "1 of 3 hold" in book


def test_a_study_that_fails_does_not_stop_the_others(toy, study, tmp_path, monkeypatch):
    monkeypatch.setattr(laboratory, "names", lambda: ["toy_study"])

    def fail(cell, folder):
        raise RuntimeError("no such animal")

    toy.HOOK = fail
    code, out, err = study("all")
    assert code == 1
    assert "no such animal" in err
    assert "toy_study  failed: RuntimeError('no such animal')" in out
    assert "no such animal" in (tmp_path / "w" / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run"], "needs the NAME of a study"),
        (["all", "toy_study"], "takes no name"),
        (["run", "toy_stduy"], "did you mean 'toy_study'?"),
        (["run", "toy_bounds"], "its bounds alone"),
        (["run", "toy_study", "--seeds", "0"], "--seeds=0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(toy, study, arguments, told):
    code, _, err = study(*arguments)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_a_spoilt_cell_file_is_told(toy, study, tmp_path):
    study("run", "toy_study", "--seeds", "1")
    (tmp_path / "w" / "toy_study" / "cells" / "x0.json").write_text("{")
    code, _, err = study("run", "toy_study", "--seeds", "1")
    assert code == 2
    assert "x0.json is not what a study writes" in err


def test_the_bounds_are_the_committed_ones(request):
    """What is expected of the lectures' claims is changed on purpose or not at all."""
    found = {
        name: {id: {**_bound(e)} for id, e in laboratory.bounds(name).items()}
        for name in laboratory.names()
    }
    if request.config.getoption("--rewrite-golden"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert list(found) == list(golden)
    for name, bounds in found.items():
        assert bounds == golden[name], name


def _bound(expected):
    known = asdict(expected)
    return {"text": known["text"], "source": known["source"], "expected": str(expected)}


@pytest.mark.parametrize("name", laboratory.complete())
def test_the_cells_are_listed_without_measuring(name):
    cells = laboratory.find(name).cells("small", 2)
    assert len({cell.id for cell in cells}) == len(cells) > 0
    assert all(laboratory.ID.fullmatch(cell.id) for cell in cells)
    assert laboratory.find(name).CLAIM
    assert laboratory.find(name).SOURCE


@pytest.mark.parametrize("name", laboratory.complete())
def test_the_full_scale_commands_are_accepted(name, monkeypatch):
    """The config files are there and take the overrides."""
    monkeypatch.chdir(ROOT)
    for entry in laboratory.full_scale(name, 1, Path("runs")):
        words = shlex.split(entry["command"])
        assert words or entry["published"]
        if words:
            configs.load(words[4], [word for word in words if word.startswith("--config.")])
