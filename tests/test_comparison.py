"""README's comparison with other codebases says what docs/comparison.md does."""

import re

import pytest

from tests.conftest import ROOT

# The rows of the README, and those of the document that each is made of.
ROWS = {
    "data, fsdp, tensor, sequence, pipeline and expert axes": (
        *("data and fsdp axes", "tensor axis", "sequence (context) axis"),
        *("pipeline axis", "expert axis"),
    ),
    "a test that layouts change no numbers": ("a test that layouts change no numbers",),
    "a step compiled for devices that are not there": (
        "step compiled for devices that are not there, with its memory",
    ),
    "its time, device-hours and money": ("time of a step, device-hours, money",),
    "restart to the same bits, tested": ("restart to the same bits, tested",),
    "vision and language models": ("vision and language models",),
    "curvature and loss surface of a run": ("curvature and loss surface of a run",),
    "training in 8 or 4 bits": ("training in 8 or 4 bits",),
    "published speed on 128 devices and more": ("published speed on 128 devices and more",),
}


def rows(text):
    """{feature: (yes, in part or no, of each codebase)} of the tables that compare six."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 7 and cells[0].strip("-"):
            words = [re.match(r"yes|in part|no", cell) for cell in cells[1:]]
            assert all(words), line
            found[cells[0]] = tuple(word[0] for word in words)
    return found


def joined(words):
    return words[0] if len(set(words)) == 1 else "in part"


README = rows((ROOT / "README.md").read_text())
DOCUMENT = rows((ROOT / "docs" / "comparison.md").read_text())


def test_the_readme_has_the_rows_that_are_compared_here():
    assert README.keys() == ROWS.keys()


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_readme_says_what_the_document_says(row):
    columns = zip(*(DOCUMENT[name] for name in ROWS[row]), strict=True)
    assert README[row] == tuple(joined(words) for words in columns)
