"""docs/coverage.md from docs/coverage.toml: python docs/coverage.py.

A test compares the two, and looks whether everything that is named is there.
"""

import tomllib
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE / "coverage.toml"
DOCUMENT = HERE / "coverage.md"
INTRODUCTION = """# Coverage

Generated from docs/coverage.toml by `python docs/coverage.py`; do not edit.

Each row is something that the lectures define, claim, name or draw, and where it is here: a module,
a config, a study (`python -m lsdl.study run NAME`), a test, an entry. What is not here has its
reason. D-nn are the places where the lectures differ from the papers or from themselves: below.
"""


def read() -> dict:
    return tomllib.loads(TABLE.read_text())


def rows(table: dict) -> dict[str, dict]:
    """{id: row} of all sections."""
    return {
        f"{section}-{number}": {"where": [], "note": ""} | row
        for section in table["sections"]
        for number, row in table[section].items()
    }


def document(table: dict) -> str:
    found = rows(table)
    here = sum(bool(row["where"]) for row in found.values())
    lines = [INTRODUCTION, f"{here} of {len(found)} rows are here."]
    for section, title in table["sections"].items():
        lines += [
            "",
            f"## {title}",
            "",
            "| id | what | where | note |",
            "| --- | --- | --- | --- |",
        ]
        for number in table[section]:
            row = found[f"{section}-{number}"]
            where = "<br>".join(f"`{place}`" for place in row["where"]) or "not here"
            lines.append(f"| {section}-{number} | {row['name']} | {where} | {row['note']} |")
    lines += ["", "## Where the lectures differ", "", "| id | what, and what lsdl does |"]
    lines += ["| --- | --- |"]
    lines += [f"| {id} | {text} |" for id, text in table["discrepancies"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(read()))
