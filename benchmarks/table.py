"""Write benchmarks/README.md from what was measured: `python -m benchmarks.table`.

A line for each match and peer, and for what is to be measured on a GPU besides; "not yet run" where
no JSON lies in benchmarks/results. What people wrote around the tables stays.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import bracket, capacity
from benchmarks.matches import GOALS, MATCHES

FOLDER = Path(__file__).parent
DOCUMENT, RESULTS = FOLDER / "README.md", FOLDER / "results"
BEGIN, END = "<!-- {}: made by python -m benchmarks.table -->", "<!-- end of {} -->"
HEAD = (
    *("match", "machine", "peer", "lsdl", "theirs", "time, lsdl / theirs", "goal"),
    *("lsdl's MFU (causal)", "n", "date", "commit"),
)

ALONE = (
    *("benchmark", "machine", "beside", "time, lsdl / that", "cores' time"),
    *("n", "date", "commit"),
)
ON_GPU = ("save", "start")  # of those, what is to be measured there as well
PLANNED = ("benchmark", "machine", "planned", "measured", "measured / planned", "date", "commit")
PLANS = {"bracket": bracket, "capacity": capacity}


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
        wanted = goal(*GOALS[name, peer])
        return [title, "", peer, "not yet run", "", "", wanted, *[""] * (len(HEAD) - 7)]
    ratio, rate = one["ratio"], f"{match.unit}_per_s"
    sides = [
        f"{1000 * s['step_s']:.2f} ms, {s[rate]:,.0f} {match.unit}/s"
        for s in (one["lsdl"], one["theirs"])
    ]
    dropped = f" ({one['dropped']} dropped)" if one["dropped"] else ""
    return [
        title,
        f"{one['device']}, jax {one['versions']['jax']}",
        f"{peer} {one['peer_commit']}",
        *sides,
        share(ratio),
        goal(*GOALS[name, peer], one),
        mfu(one["lsdl"]),
        f"{one['n']}{dropped}",
        one["date"][:10],
        one["commit"][:7],
    ]


def goal(of: str, value: float, one: dict[str, Any] | None = None) -> str:
    """In words; once measured, also whether it is met, or by how much of it it is missed."""
    wanted = f"{value:.2f}" if of == "ratio" else f"{100 * value:.0f} % MFU"
    wanted += " (causal)" if of == "mfu_causal" else ""
    if one is None:
        return wanted
    found = one["ratio"]["median"] if of == "ratio" else one["lsdl"][of]
    missed = found / value - 1 if of == "ratio" else 1 - found / value
    return f"{wanted}: " + (f"missed by {100 * missed:.0f} %" if missed > 0 else "met")


def mfu(own: dict[str, Any]) -> str:
    """In percent; in brackets with half of causal attention, where that is another number."""
    if "mfu" not in own:
        return ""
    whole, causal = (f"{100 * own[name]:.1f} %" for name in ("mfu", "mfu_causal"))
    return whole if whole == causal else f"{whole} ({causal})"


def alone(results: dict[str, list[dict[str, Any]]]) -> str:
    """`results`: what was measured of lsdl beside a part of itself, by the benchmark's name."""
    lines = [row(ALONE), row(["---"] * len(ALONE))]
    for name, found in results.items():
        for one in found:
            about = [f"`{name}`: {one['match']}", one["device"], one["peer"]]
            shares = [share(one[ratio]) if ratio in one else "" for ratio in ("ratio", "cpu_ratio")]
            lines.append(row([*about, *shares, one["n"], one["date"][:10], one["commit"][:7]]))
        if name in ON_GPU and not any("NVIDIA" in one["device"] for one in found):
            lines.append(row([f"`{name}`, on a GPU", "", "", "not yet run", *[""] * 4]))
    return "\n".join(lines)


def planned(results: dict[str, list[dict[str, Any]]]) -> str:
    """`results`: what was measured of what the planner says, by the benchmark's name."""
    lines = [row(PLANNED), row(["---"] * len(PLANNED))]
    for name, benchmark in PLANS.items():
        found = {one["match"]: one for one in results.get(name, [])}
        for title in benchmark.titles():
            said = ["", "", "not yet run", *[""] * 3]
            if one := found.get(title):
                said = [one["device"], *benchmark.cells(one), one["date"][:10], one["commit"][:7]]
            lines.append(row([f"`{name}`: {title}", *said]))
    return "\n".join(lines)


def share(ratio: dict[str, float]) -> str:
    """The median, with the least and the most, or with its 95 % interval."""
    low, high = [ratio[a] if a in ratio else ratio[b] for a, b in (("min", "low"), ("max", "high"))]
    return f"**{ratio['median']:.3f}** ({low:.3f} .. {high:.3f})"


def document(text: str) -> str:
    """`text`, the tables in it made anew."""
    made = {
        "matches": table(read(RESULTS)),
        "plans": planned(read(RESULTS / "planned")),
        "lsdl alone": alone(read(RESULTS / "alone")),
    }
    for name, lines in made.items():
        begin, end = BEGIN.format(name), END.format(name)
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n\n{lines}\n\n{end}{after}"
    return text


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def main() -> int:
    DOCUMENT.write_text(document(DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
