"""Write benchmarks/README.md from what was measured: `python -m benchmarks.table`.

A line for each match and peer; "not yet run" where no JSON lies in benchmarks/results. What people
wrote around the table stays.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.matches import MATCHES

FOLDER = Path(__file__).parent
DOCUMENT, RESULTS = FOLDER / "README.md", FOLDER / "results"
BEGIN, END = "<!-- made by python -m benchmarks.table -->", "<!-- end of the table -->"
HEAD = ("match", "machine", "peer", "lsdl", "theirs", "time, lsdl / theirs", "n", "date", "commit")


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """`results`: what was measured of each match, by its name."""
    lines = [row(HEAD), row(["---"] * len(HEAD))]
    for name, match in MATCHES.items():
        found = {one["peer"]: one for one in results.get(name, [])}
        for peer in match.peers:
            lines.append(row(cells(name, match, peer, found.get(peer))))
    return "\n".join(lines)


def row(values) -> str:
    return f"| {' | '.join(map(str, values))} |"


def cells(name: str, match, peer: str, one: dict[str, Any] | None) -> list[str]:
    title = f"`{name}`: {match.title}"
    if one is None:
        return [title, "", peer, "not yet run", *[""] * (len(HEAD) - 4)]
    ratio, rate = one["ratio"], f"{match.unit}_per_s"
    sides = [
        f"{1000 * s['step_s']:.2f} ms, {s[rate]:,.0f} {match.unit}/s"
        for s in (one["lsdl"], one["theirs"])
    ]
    dropped = f" ({one['dropped']} dropped)" if one["dropped"] else ""
    return [
        title,
        one["device"],
        f"{peer} {one['peer_commit']}",
        *sides,
        f"**{ratio['median']:.3f}** ({ratio['min']:.3f} .. {ratio['max']:.3f})",
        f"{one['n']}{dropped}",
        one["date"][:10],
        one["commit"][:7],
    ]


def document(text: str) -> str:
    """`text`, the table in it made anew."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{table(found)}\n\n{END}{after}"


def main() -> int:
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
