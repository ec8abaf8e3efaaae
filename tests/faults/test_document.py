"""The table of threats, the table of exit codes and the documents say what the code does."""

import ast
import re

import pytest

from lsdl import errors
from tests.conftest import ROOT, of_shard
from tests.faults import conftest, coverage, merge

ROWS, MARKS = coverage.threats(), coverage.marked()
PARTS = {
    "1/12": {
        "part": "1/12",
        "date": "2026-01-02T03:04:05Z",
        "commit": "abc",
        "python": "3.11.7",
        "versions": {"jax": "0.10.2"},
        "cores": 2,
        "seconds": 90.0,
        "tests": {"passed": 3, "failed": 1, "skipped": 0},
        "longest": ["a", 1.0],
        "failures": ["tests/faults/test_x.py::test_y"],
        "counts": {"kills": 1000, "max_lost_steps": 3},
    }
}
PARTS["3/12"] = PARTS["1/12"] | {"failures": [], "counts": {"kills": 7, "max_lost_steps": 2}}


def test_there_are_44_threats_in_order():
    assert [row["number"] for row in ROWS] == list(range(1, 45))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: str(row["number"]))
def test_a_threat_has_a_test_or_says_why_nothing_is_promised(row):
    assert row.keys() - {"promise", "not_promised"} == {"number", "group", "threat"}
    assert ("promise" in row) != ("not_promised" in row)
    tests = [test for number, test, _ in MARKS if number == row["number"]]
    assert tests or "not_promised" in row


def test_no_test_claims_a_threat_that_is_none():
    assert {number for number, _, _ in MARKS} <= {row["number"] for row in ROWS}


def test_the_document_is_as_its_sources_say():
    """If not: python -m tests.faults.merge."""
    assert merge.DOCUMENT.read_text() == merge.document(merge.stored())


def test_marks_are_found_wherever_they_stand(tmp_path):
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.threat(9)\n"
        "@pytest.mark.faults\n@pytest.mark.threat(1, 2)\ndef test_a(): pass\n"
        "@pytest.mark.parametrize('x', [pytest.param(1, marks=pytest.mark.threat(3))])\n"
        "def test_b(x): pass\n"
        "def helper(): pass\n"
        "class TestC:\n    @pytest.mark.threat(4)\n    def test_c(self): pass\n"
    )
    assert coverage.marked(tmp_path) == [
        (1, "test_x.py::test_a", True),
        (2, "test_x.py::test_a", True),
        (9, "test_x.py::test_a", True),
        (3, "test_x.py::test_b", False),
        (9, "test_x.py::test_b", False),
        (4, "test_x.py::test_c", False),
        (9, "test_x.py::test_c", False),
    ]


@pytest.mark.parametrize("mark", ["threat", "threat()", "threat(number=1)", "threat(n)"])
def test_a_mark_that_names_no_number_is_an_error(tmp_path, mark):
    (tmp_path / "test_x.py").write_text(f"@pytest.mark.{mark}\ndef test_a(): pass\n")
    with pytest.raises(ValueError, match=r"threat\(number|malformed"):
        coverage.marked(tmp_path)


def test_results_tell_counts_failures_and_what_was_not_run():
    table = merge.results_table(PARTS)
    assert table.count("not yet run") == 10
    assert "| 1/12 | 2026-01-02T03:04:05Z | abc | 4 | 1 | 0 | 1.5 | kills 1,000, max lost" in table
    assert "together: kills 1,007, max lost steps 3." in table
    assert "Failed: `tests/faults/test_x.py::test_y`." in table
    assert "on 2 cores, Python 3.11.7, jax 0.10.2." in table
    assert merge.results_table({}).count("not yet run") == 12


def test_the_rest_is_what_no_part_has_run_and_adds_up():
    names = ["tests/a.py::a", "tests/a.py::b"]
    assert of_shard("rest", names, ["tests/a.py::b"]) == {"tests/a.py::b"}
    done = next(iter(merge.stored()["1/12"]["ran"]))
    assert of_shard("rest", [done], [done]) == set()
    first, second = ({**PARTS[k], "part": "rest", "ran": [k]} for k in ("1/12", "3/12"))
    both = merge.joined(first, second)
    assert both["counts"] == {"kills": 1007, "max_lost_steps": 3}
    assert (both["tests"]["passed"], both["seconds"], both["ran"]) == (6, 180, ["1/12", "3/12"])
    assert "| rest | " in merge.results_table({"rest": both})


def test_counts_add_up_and_maxima_do_not():
    counts = {}
    for value in (3, 5, 1):
        conftest.add(counts, "kills", value)
        conftest.add(counts, "max_lost_steps", value)
    assert counts == {"kills": 9, "max_lost_steps": 5}


# Exit codes

CODES = {
    name: value
    for name, value in vars(errors).items()
    if name.isupper() and isinstance(value, int) and not isinstance(value, bool)
}


def table_of_exit_codes():
    """{code: (when, what to do)} of the reference."""
    text = (ROOT / "docs" / "reference.md").read_text()
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", text.split("## Exit codes")[1], re.M)
    return {int(code): (when.strip(), do.strip()) for code, when, do in rows}


@pytest.mark.threat(44)
def test_the_reference_has_each_exit_code_once_with_what_to_do():
    table = table_of_exit_codes()
    assert sorted(table) == sorted(CODES.values())
    assert len(set(CODES.values())) == len(CODES)
    assert all(when and do for when, do in table.values())


@pytest.mark.threat(44)
def test_every_error_of_the_user_has_a_code_of_the_table():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds} <= set(table_of_exit_codes())
    assert all(issubclass(kind, errors.UserError) for kind in kinds)


def entries():
    """{entry: its epilog}."""
    for path in sorted((ROOT / "lsdl").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXAMPLES":
                text = ast.literal_eval(node.value)
                if isinstance(text, str):  # others have examples of something else
                    yield path.stem, text


@pytest.mark.threat(44)
@pytest.mark.parametrize(("entry", "epilog"), list(entries()), ids=lambda value: value[:9])
def test_help_tells_exit_codes_of_the_table_alone(entry, epilog):
    told = {int(code) for code in re.findall(r"\b\d+\b", epilog.split("exit codes:")[1])}
    assert told <= set(CODES.values())
    assert {errors.FINISHED, errors.BAD_INPUT, errors.INTERRUPTED} <= told


@pytest.mark.threat(44)
def test_trains_help_tells_all_that_training_leaves_with():
    epilog = dict(entries())["train"]
    told = {int(code) for code in re.findall(r"\b\d+\b", epilog.split("exit codes:")[1])}
    assert told == set(CODES.values()) - {errors.DOES_NOT_FIT, errors.NO_COMPILER}
