"""Verdicts: a study's folder as one self-contained HTML page.

Read are `verdict.json`, `table.csv` and the figures, which may draw and do nothing else.
"""

import csv
import json
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from lsdl import page, plots
from lsdl.errors import UserError
from lsdl.page import Markup, element

MOST_ROWS = 500  # of the table
TAGS = {"svg", "title", "desc", "g", "defs", "path", "use", "text", "tspan", "rect", "line"}
TAGS |= {"circle", "ellipse", "polygon", "polyline", "clipPath", "image"}
NAMESPACE = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"


def is_study(folder: Path) -> bool:
    return (Path(folder) / "verdict.json").exists()


def read_verdict(folder: Path) -> dict:
    file = Path(folder) / "verdict.json"
    try:
        verdict = json.loads(file.read_text())
        verdict["study"], [claim["holds"] for claim in verdict["claims"]]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not what a study writes ({error!r}).") from error
    return verdict


def study_page(folder: Path) -> str:
    """The claims and how they stand, the figures, the table, and what to run at full scale."""
    folder, verdict = Path(folder), read_verdict(folder)
    claims = verdict["claims"]
    held = sum(claim["holds"] for claim in claims)
    lead = f"{held} of {len(claims)} claims hold."
    return page.document(
        verdict["study"].replace("_", " "),
        element("p", verdict.get("claim", ""), class_="lead"),
        element("p", verdict.get("source", ""), class_="quiet"),
        page.section("Verdict", element("p", lead), claims_table(claims)),
        page.section("Figures", page.row(*figures(folder, verdict, prefix="g"))),
        page.section("Measurements", *_measurements(folder / "table.csv")),
        page.section("At full scale", *_full_scale(verdict.get("full_scale", ()))),
        page.section("How it was measured", _provenance(verdict)),
    )


def figures(folder: Path, verdict: Mapping, *, prefix: str) -> list[Markup]:
    """Each of the study's figures, for a page on which their ids start with `prefix`."""
    drawn = []
    for number, name in enumerate(verdict.get("figures", ()), 1):
        svg = _trusted(folder / "figures" / f"{Path(name).name}.svg")
        lost = element("p", f"The figure {name} is missing or not as lsdl.plots saves it.")
        inline = plots.inline(svg, f"{prefix}{number}") if svg else ""
        drawn.append(page.figure(inline, many=len(inline) > 40_000) if svg else lost)
    return drawn


def claims_table(claims: Sequence[Mapping], *, figure: Markup | str = "") -> Markup:
    """A row for each claim; with a link to its `figure`, if that is not beside it."""
    rows = []
    for claim in claims:
        text = Markup(
            element("div", claim["text"])
            + element("div", element("code", claim["id"]), " · ", claim["source"], class_="quiet")
        )
        holds = bool(claim["holds"])
        word = page.mark("holds" if holds else "does not hold", holds)
        row = (word, text, measured(claim), claim["expected"], claim["n"])
        rows.append((*row, figure) if figure else row)
    head = ("verdict", "claim", "measured", "expected", "n", *(("",) if figure else ()))
    return page.table(head, rows, cards=True)


def measured(claim: Mapping) -> str:
    """The mean, and over several values their spread."""
    spread = "" if claim["n"] < 2 else f" ± {_number(claim['spread'], 2)}"
    return _number(claim["measured"]) + spread


def _number(value: float | None, digits: int = 5) -> str:
    return "no number" if value is None else f"{value:.{digits}g}"


def _measurements(file: Path) -> Iterator[Markup]:
    if not file.exists():
        return
    with open(file, newline="") as lines:
        head, *rows = list(csv.reader(lines)) or [[]]
    shown = [[_shorter(_short(cell)) for cell in row] for row in rows[:MOST_ROWS]]
    rest = f", the first {MOST_ROWS} of them here" if len(rows) > MOST_ROWS else ""
    told = f"{_count(len(rows), 'row')}{rest}; table.csv has every digit."
    body = [element("p", told, class_="quiet"), page.table(head, shown)]
    yield (
        page.details(f"The table of {_count(len(rows), 'cell')}", *body)
        if len(rows) > 12
        else Markup("".join(body))
    )


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _shorter(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _short(text: str) -> str:
    try:
        return f"{float(text):.5g}" if "." in text or "e" in text else text
    except ValueError:
        return text


def _full_scale(entries: Sequence[Mapping]) -> Iterator[Markup]:
    for entry in entries:
        name = element("strong", entry["id"])
        published = f" published: {entry['published']}" if entry["published"] else ""
        yield element("p", name, " ", entry["settings"], published)
        if entry["command"]:
            yield element("pre", entry["command"])


def _provenance(verdict: Mapping) -> Markup:
    names = ("scale", "seeds", "cells", "measured_s", "time", "commit", "commits", "python")
    facts = {name: verdict[name] for name in names if name in verdict}
    if "measured_s" in facts:
        facts["measured_s"] = f"{facts['measured_s']:.1f}"
    if "commits" in facts:
        facts["commits"] = ", ".join(c[:12] for c in facts["commits"])
    versions = ", ".join(f"{k} {v}" for k, v in verdict.get("versions", {}).items())
    facts |= {"versions": versions, "platform": verdict.get("platform", "")}
    return page.facts(facts | {"CPU cores": verdict.get("cpu_count", "")})


def _trusted(file: Path) -> str | None:
    """The figure in `file` if it draws and does nothing else: no script, no link, no style."""
    try:
        text = file.read_text()
        root = None if "<!" in text else ET.fromstring(text)
    except (OSError, UnicodeDecodeError, ET.ParseError):
        return None
    if root is None or root.tag != f"{NAMESPACE}svg":
        return None
    for node in root.iter():
        if node.tag.removeprefix(NAMESPACE) not in TAGS or not node.tag.startswith(NAMESPACE):
            return None
        for name, value in node.attrib.items():
            link = name in (LINK, "href") and not value.startswith(("#", "data:image/png;base64,"))
            far = "url(" in value.replace("url(#", "") or "\\" in value
            if link or far or name.startswith("on"):
                return None
    return text
