"""docs/coverage.md: every row of the lectures, and everything that it names is there."""

import ast
import re

import pytest

from tests.conftest import ROOT
from tests.documents import generator

COUNTS = {"SYS": 20, "GEN": 21, "GD": 16, "OPT": 15, "SCH": 10, "SGD": 19}
COUNTS |= {"LB": 8, "MIN": 9, "MOD": 7, "DIST": 5, "AD": 5, "PHN": 15}


@pytest.fixture(scope="module")
def coverage():
    return generator("coverage")


@pytest.fixture(scope="module")
def rows(coverage):
    return coverage.rows(coverage.read())


def there(place):
    """Whether a place that a row names is in the repository."""
    if place.startswith("study "):
        file = ROOT / "lsdl" / "studies" / f"{place.removeprefix('study ')}.py"
        return file.exists() and "\nEXPECTED" in file.read_text()
    if place.startswith("python -m lsdl."):
        entry, *flags = place.removeprefix("python -m lsdl.").split()
        file = ROOT / "lsdl" / f"{entry}.py"
        return file.exists() and all(f'"{flag}"' in file.read_text() for flag in flags)
    if place.startswith("tests/"):
        file, _, name = place.partition("::")
        found = ast.parse((ROOT / file).read_text()).body if (ROOT / file).exists() else ()
        return any(isinstance(node, ast.FunctionDef) and node.name == name for node in found)
    if place.startswith("configs/"):
        file, _, variant = place.partition(":")
        text = (ROOT / file).read_text() if (ROOT / file).exists() else ""
        return bool(re.search(rf"[\"' ]{variant}[\"', ]", text))
    if place.startswith("lsdl."):
        return (ROOT / (place.replace(".", "/") + ".py")).exists()
    return (ROOT / place).is_file()


def test_every_row_of_the_lectures_is_there_once(rows):
    assert list(rows) == [f"{p}-{i:02}" for p, count in COUNTS.items() for i in range(1, count + 1)]
    assert len(rows) == 150


def test_a_row_is_somewhere_or_says_why_not(rows):
    for id, row in rows.items():
        assert row.keys() == {"name", "where", "note"}, id
        assert row["where"] or row["note"], id
        assert "|" not in row["name"] + row["note"]


def test_everything_that_a_row_names_exists(rows):
    missing = {id: [p for p in row["where"] if not there(p)] for id, row in rows.items()}
    assert {id: places for id, places in missing.items() if places} == {}


def test_the_check_sees_what_is_missing():
    for place in ("study none", "lsdl.none", "configs/none.py", "configs/digits_mlp.py:nonesuch"):
        assert not there(place)
    for place in ("tests/test_book.py::test_none", "python -m lsdl.plan --none", "docs/none.md"):
        assert not there(place)


def test_every_discrepancy_is_named(coverage, rows):
    table = coverage.read()["discrepancies"]
    assert list(table) == [f"D-{i:02}" for i in range(1, 33)]
    named = set(re.findall(r"D-\d\d", " ".join(row["note"] for row in rows.values())))
    assert named == set(table)


def test_the_document_is_current(coverage):
    assert coverage.DOCUMENT.read_text() == coverage.document(coverage.read()), (
        "run python docs/coverage.py"
    )
