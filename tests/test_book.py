"""The book and its table in Markdown: every claim of every study, in its lecture."""

import itertools
import json
import re

import pytest

from lsdl import book, laboratory, plots
from lsdl.study import main
from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "golden" / "claims.json").read_text())
RESULTS = ROOT / "docs" / "results.md"


def claim(id, holds=True, **more):
    found = {"id": id, "text": "|w| and a | b", "source": "page 7", "expected": ">= 2"}
    found |= {"measured": 2.5, "n": 3, "spread": 0.25, "holds": holds}
    return found | more


def written(root, name, *claims):
    """A study's folder as the laboratory leaves it."""
    (root / name / "figures").mkdir(parents=True)
    plots.lines({"": ([1, 2], [3, 4])}, title=name, x="x", y="y").save(
        root / name / "figures" / "one.svg"
    )
    found = {"study": name, "claim": f"{name} is so.", "source": "a paper", "claims": claims}
    found |= {"figures": ["one"], "seeds": 3, "commits": ["0123456789abcdef"]}
    found |= {"versions": {"jax": "0.10.2"}, "python": "3.12.1", "measured_s": 4.0, "cpu_count": 2}
    (root / name / "verdict.json").write_text(json.dumps(found))
    return root / name


@pytest.fixture
def folders(tmp_path):
    return [
        written(tmp_path, "grokking", claim("late"), claim("never", holds=False, measured=None)),
        written(tmp_path, "conditioning", claim("slow", n=1)),
        written(tmp_path, "something_else", claim("it")),
    ]


def rows(text):
    """{study: {claim: cells}} of a table in Markdown."""
    found, study = {}, None
    for line in text.splitlines():
        if line.startswith("### "):
            study = found.setdefault(line[4:], {})
        elif line.startswith("| ") and not line.startswith(("| claim |", "| --- |")):
            cells = [c.replace("\\|", "|") for c in re.split(r" (?<!\\)\| ", line[2:-2])]
            study[cells[0]] = dict(zip(book.HEAD, cells, strict=True))
    return found


def test_every_study_is_of_one_lecture():
    told = list(itertools.chain.from_iterable(book.LECTURES.values()))
    assert sorted(told) == laboratory.names()
    assert len(book.LECTURES) == 5


def test_the_book_has_a_row_for_each_claim_in_the_lectures_order(folders):
    page = book.book(folders, failed={"minefield": ValueError("no such animal")})
    order = [page.index(f'id="{name}"') for name in ("conditioning", "grokking", "something_else")]
    assert order == sorted(order)
    assert page.count(">2.5 ± 0.25<") == 2
    assert page.count("does not hold<") == 1
    assert page.count("<svg ") == 3
    assert 'href="grokking/report.html"' in page
    assert "1 of 2 hold" in page
    assert "no such animal" in page
    assert book.OTHER in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(set(ids)) == len(ids)


def test_the_table_in_markdown_has_what_the_verdicts_have(folders):
    text = book.results(folders, command="python -m lsdl.study all --results docs/results.md")
    found = rows(text)
    assert list(found) == ["conditioning", "grokking", "something_else"]
    assert found["grokking"]["late"] == {
        "claim": "late",
        "sentence": "|w| and a | b",
        "source": "page 7",
        "expected": ">= 2",
        "measured": "2.5 ± 0.25",
        "n": "3",
        "verdict": "holds",
    }
    assert found["grokking"]["never"]["verdict"] == "**does not hold**"
    assert found["conditioning"]["slow"]["measured"] == "2.5"
    assert "3 of 4 claims hold" in text
    assert "`python -m lsdl.study run grokking --seeds 3`; 4 s on 2 cores" in text
    assert "commit 0123456789ab; Python 3.12.1, jax 0.10.2." in text


def test_results_are_of_all_studies(capsys):
    assert main(["run", "conditioning", "--results", "x.md"]) == 2
    assert "--results=x.md is of all studies" in capsys.readouterr().err


def test_the_results_are_of_the_committed_bounds():
    """What was measured was judged by what had been written down beforehand."""
    told = rows(RESULTS.read_text())
    assert told
    for study, claims in told.items():
        assert list(claims) == list(GOLDEN[study]), study
        for id, row in claims.items():
            expected = GOLDEN[study][id]
            assert row["expected"] == expected["expected"], f"{study}.{id}"
            assert row["sentence"] == expected["text"], f"{study}.{id}"
            assert row["source"] == expected["source"], f"{study}.{id}"
