"""Whether a compiled step fits into a device, and what it says, for people."""

from collections.abc import Iterator, Mapping
from typing import Any

from lsdl.planner import collectives, tree

PARTS = ("argument", "temporary", "output", "aliased")


def needed_bytes(answer: Mapping[str, Any]) -> int | None:
    """What one device has to have for the step of a `compiled.Answer`; None: it did not compile."""
    return answer.get("compiled", {}).get("needed_bytes")


def verdict(answer: Mapping[str, Any], limit_bytes: int | None = None) -> bool | None:
    """Whether the step fits into `limit_bytes`, by default what the target has; None: unknown."""
    needed = needed_bytes(answer)
    if needed is None:
        return False
    if limit_bytes is not None:
        return needed <= limit_bytes
    return answer["compiled"]["fits"]


def why(answer: Mapping[str, Any]) -> str:
    """Why there is no compiled step: the config's or the compiler's sentence."""
    return answer.get("refused") or answer["compiled"].get("error", "")


def in_short(answer: Mapping[str, Any]) -> str:
    """What came out, in some words."""
    if why(answer):
        return why(answer)
    step = answer["compiled"]
    return f"{tree.binary(step['needed_bytes'])} on a device, in {step['compile_s']:.1f} s"


def table(answer: Mapping[str, Any], limit_bytes: int | None = None) -> str:
    """Bytes, verdict, the largest tensors and the bill of collectives."""
    return "\n".join(_lines(answer, limit_bytes))


def _lines(answer: Mapping[str, Any], limit_bytes: int | None) -> Iterator[str]:
    if why(answer):
        yield f"compiled: {why(answer)}"
        return
    step, binary = answer["compiled"], tree.binary
    limit = limit_bytes or step["limit_bytes"]
    fits = verdict(answer, limit_bytes)
    said = {None: "of an unknown limit", True: "fits in", False: "does NOT fit in"}[fits]
    parts = ", ".join(f"{part} {binary(step[f'{part}_bytes'])}" for part in PARTS)
    yield (
        f"compiled for {step['device_count']:,} devices in {step['compile_s']:.1f} s: "
        f"{binary(step['needed_bytes'])} on each {said} {binary(limit) if limit else ''}".rstrip()
        + f" ({parts})"
    )
    yield "largest on a device"
    for row in step["largest"]:
        shape = ",".join(map(str, row["shape"]))
        yield f"  {binary(row['bytes']):>12}  {row['dtype']}[{shape}]  {row['what']}: {row['name']}"
    if answer["collectives"] is None:
        yield f"collectives: not read, {answer['unread']}"
    else:
        yield collectives.table(answer["collectives"])
