"""`python -m tests.faults.merge`: coverage and results of `make faults` into docs/reliability.md.

What people wrote in docs/reliability.md stays; what stands between its marks is made here.
"""

import json
import subprocess
import sys
from collections.abc import Iterator

from tests.faults import coverage
from tests.faults.conftest import PARTS, ROOT, add

DOCUMENT = ROOT / "docs" / "reliability.md"
RESULTS = ROOT / "tests" / "faults" / "results.json"
NUMBER = 12  # parts of make faults
NAMES = [f"{k}/{NUMBER}" for k in range(1, NUMBER + 1)]
REST = "rest"  # what was in no part that was run, as what was added since: make faults PART=rest
COLLECT = ("-m", "pytest", "--collect-only", "-q", "-m", "faults", "tests/faults")


def between(text: str, name: str, made: str) -> str:
    """`text` with `made` between the marks of `name`."""
    begin, end = f"<!-- {name}: made by python -m tests.faults.merge -->", f"<!-- end of {name} -->"
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n\n{made}\n\n{end}{after}"


def coverage_table() -> str:
    """Each threat, what is promised, and the tests that hold it."""
    tests: dict[int, list[str]] = {}
    for number, test, long in coverage.marked():
        tests.setdefault(number, []).append(f"`{test}`" + " (long)" * long)
    lines, group = [], None
    for row in coverage.threats():
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"### {group}", "", "| | threat | promise | tests |", "|---|---|---|---|"]
        promise = row.get("promise") or f"Not promised: {row['not_promised']}"
        held = "<br>".join(tests.get(row["number"], [])) or "none"
        lines.append(f"| {row['number']} | {row['threat']} | {promise} | {held} |")
    return "\n".join(lines[1:])


def results_table(parts: dict[str, dict]) -> str:
    """What the parts of `make faults` counted, each with its commit, or that it was not run."""
    return "\n".join(_results(parts))


def _results(parts: dict[str, dict]) -> Iterator[str]:
    yield "| part | date | commit | tests | failed | skipped | minutes | counted |"
    yield "|---|---|---|---|---|---|---|---|"
    total: dict = {}
    for name in NAMES + [REST] * (REST in parts):
        part = parts.get(name)
        if part is None:
            yield f"| {name} | not yet run | | | | | | |"
            continue
        for count, value in part["counts"].items():
            add(total, count, value)
        ended, minutes = part["tests"], part["seconds"] / 60
        row = [name, part["date"], part["commit"], sum(ended.values()), ended["failed"]]
        row += [ended["skipped"], f"{minutes:.1f}", _counts(part["counts"])]
        yield f"| {' | '.join(map(str, row))} |"
    yield ""
    yield f"All parts that were run, together: {_counts(total) or 'nothing'}."
    failures = [test for part in parts.values() for test in part["failures"]]
    yield ""
    yield f"Failed: {', '.join(f'`{test}`' for test in failures) or 'none'}."
    told = {_setting(part) for part in parts.values()}
    yield from ("", *sorted(told)) if told else ()


def _counts(counts: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {counts[name]:,}" for name in sorted(counts))


def _setting(part: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    machine = f"{part['cores']} cores, Python {part['python']}"
    return f"`make faults PART=k/{NUMBER}` on {machine}, {versions}."


def document(parts: dict[str, dict]) -> str:
    """docs/reliability.md as it should be."""
    text = between(DOCUMENT.read_text(), "coverage", coverage_table())
    return between(text, "results", results_table(parts))


def stored() -> dict[str, dict]:
    """The parts that were run, by name."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def joined(before: dict, part: dict) -> dict:
    """Both runs of `rest` as one: the second ran what the first had not."""
    both = part | {"seconds": before["seconds"] + part["seconds"], "counts": dict(before["counts"])}
    for name, value in part["counts"].items():
        add(both["counts"], name, value)
    both["tests"] = {name: n + before["tests"][name] for name, n in part["tests"].items()}
    both["failures"] = before["failures"] + part["failures"]
    return both | {"ran": sorted(before["ran"] + part["ran"])}


def not_run(parts: dict[str, dict]) -> list[str]:
    """The long tests that no part has run, as `make faults PART=rest` would."""
    done = subprocess.run((sys.executable, *COLLECT), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"The long tests could not be listed: {(done.stderr or done.stdout).strip()}")
    ran = {test for part in parts.values() for test in part["ran"]}
    return [line for line in done.stdout.splitlines() if "::" in line and line not in ran]


def main() -> int:
    """Take in what lies in .cache/faults, and write the document."""
    parts = stored()
    for file in sorted((*PARTS.glob(f"*-of-{NUMBER}.json"), *PARTS.glob(f"{REST}.json"))):
        part = json.loads(file.read_text())
        name, before = part["part"], parts.get(part["part"])
        if not before or part["date"] > before["date"]:
            parts[name] = joined(before, part) if before and name == REST else part
    RESULTS.write_text(json.dumps(parts, indent=1, sort_keys=True) + "\n")
    DOCUMENT.write_text(document(parts))
    print(f"written: {DOCUMENT}, {len(parts.keys() & set(NAMES))} of {NUMBER} parts")
    if missed := not_run(parts):
        print(f"{len(missed)} are in none of them: make faults PART={REST}", *missed, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
