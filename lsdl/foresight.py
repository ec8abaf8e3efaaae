"""What was predicted of runs beside what was measured: `plan.json` against `metrics.jsonl`."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lsdl import page
from lsdl.page import Markup, element
from lsdl.planner import tree
from lsdl.runs import Run

HEAD = ("run", "quantity", "predicted", "measured", "measured / predicted")
BRACKET = (
    "A predicted step lies between what it takes if products, memory and network overlap wholly "
    "and if they do not at all, at the published peaks: a measured one is longer."
)


def section(runs: Sequence[Run]) -> Markup:
    """A table for those runs that a prediction lies beside."""
    rows = [(str(run.path), *row) for run in runs for row in compared(run)]
    if not rows:
        told = "None of these runs has a plan.json: lsdl.train writes it before the first step."
        return element("p", told)
    return Markup(page.table(HEAD, rows) + element("p", BRACKET, class_="quiet"))


def compared(run: Run) -> Iterator[tuple[str, str, str, str]]:
    """(quantity, predicted, measured, ratio) of each that was predicted."""
    plan, rows = run.plan, run.rows.get("train", ())
    step_s = _median(rows[1:] or rows, "step_time_s")  # the first is of a cold machine
    closed = plan.get("analytic") or {}
    if bracket := closed.get("step_s"):
        yield ("step time", _seconds(*bracket), _seconds(step_s), _ratio(step_s, *bracket))
        for name, word in (("mfu", "MFU"), ("mfu_causal", "MFU, half of causal attention")):
            if closed.get(name):
                found = _median(rows[1:] or rows, name)
                yield word, _percent(*closed[name]), _percent(found), _ratio(found, *closed[name])
    step = plan.get("compiled") or {}
    if needed := step.get("needed_bytes"):
        peak = max(
            (row["memory_peak_bytes"] for row in rows if "memory_peak_bytes" in row), default=None
        )
        yield "memory of a device", tree.binary(needed), _bytes(peak), _ratio(peak, needed)
    if flops := plan.get("step_flops_per_example"):
        batch, found = plan["batch_size"], _median(rows[1:] or rows, "examples_per_s")
        rate = found and tree.decimal(round(flops * found)) + "FLOP/s"
        yield "products of a step", f"{tree.decimal(flops * batch)}FLOP", rate or "", ""


def _median(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


def _ratio(found: float | None, *bracket: float) -> str:
    if found is None:
        return ""
    return " .. ".join(f"{found / edge:.2f}" for edge in sorted(bracket, reverse=True))


def _seconds(*values: float | None) -> str:
    return " .. ".join("" if value is None else f"{value:.3g} s" for value in values)


def _percent(*values: float | None) -> str:
    return " .. ".join("" if value is None else f"{value:.1%}" for value in values)


def _bytes(value: int | None) -> str:
    return "" if value is None else tree.binary(value)
