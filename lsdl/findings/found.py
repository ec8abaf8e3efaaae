"""What a kind of analysis gives back, and the progress bar that it shows meanwhile."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lsdl import plots
from lsdl.page import Markup
from lsdl.progress import Progress


@dataclass
class Findings:
    """What was found, as it is told, drawn and stored."""

    lead: str
    head: Sequence[str]
    rows: list[Sequence[object]]
    figures: list[plots.Figure]
    values: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    more: list[Markup] = field(default_factory=list)  # of the page, below its table


@contextlib.contextmanager
def progress(name: str, ticks: int) -> Iterator[Progress]:
    bar = Progress(0, ticks, name, silent=False, unit="batch")
    try:
        yield bar
        bar.complete()
    finally:
        bar.close()
