"""What a study is made of: cells that are measured, and claims that then hold or do not.

A study is a module of `lsdl.studies` with

    CLAIM       the lectures' claim in one sentence
    SOURCE      where it stands: the lecture, and the paper
    EXPECTED    {id: Expected}: what is measured for it, and the bound written down beforehand
    SLOW        optional, as EXPECTED: the claims of cells that take minutes each
    cells(scale, seeds) -> [Cell]        scale "small": what `measure` does; "full": what to run
                                         on accelerators, with the published numbers; "slow", of a
                                         study with SLOW alone: what --slow adds to "small";
                                         `seeds`: how many, the whole number of --seeds
    measure(cell, folder) -> row         {name: number, string or list}: JSON values, cached as a
                                         file; `folder` is the cell's own, for runs
    claims(table) -> [Claim]             `table` holds one row for each cell, its settings included;
                                         with slow cells in it, SLOW's claims come after EXPECTED's
    figure(table) -> {name: Figure}      made by `lsdl.plots`
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cell:
    """One thing to measure: settings alone, or a config with overrides."""

    id: str  # the name of its file: letters, digits and ._=-
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON values, columns of the table
    config: str = ""  # configs/NAME.py[:variant]
    overrides: Mapping[str, Any] = field(default_factory=dict)  # {"optim.name": "lars", ...}
    published: str = ""  # of scale="full": the paper's number for this very cell


@dataclass(frozen=True)
class Claim:
    """One sentence with its number: a row of `verdict.json`."""

    id: str
    text: str
    source: str
    expected: str
    measured: float
    n: int  # values that `measured` is the mean of
    spread: float  # their sample standard deviation; 0.0 for n = 1
    holds: bool


@dataclass(frozen=True)
class Expected:
    """A claim before it is measured: `low <= mean of the values <= high`."""

    text: str  # the sentence, with the setting and the unit
    source: str
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        low, high = f"{self.low:g}", f"{self.high:g}"
        if self.low == self.high:
            return low
        if math.isinf(self.low):
            return f"<= {high}"
        return f">= {low}" if math.isinf(self.high) else f"{low} to {high}"

    def judge(self, id: str, values: Sequence[float] | float) -> Claim:
        """The claim `id` on the measured `values`, one for each seed; NaN never holds."""
        values = np.atleast_1d(np.asarray(values, np.float64))
        mean = float(values.mean()) if values.size else math.nan
        spread = float(values.std(ddof=1)) if values.size > 1 else 0.0
        holds = bool(self.low <= mean <= self.high)
        return Claim(id, self.text, self.source, str(self), mean, values.size, spread, holds)


def judged(expected: Mapping[str, Expected], values: Mapping[str, Any]) -> list[Claim]:
    """The claims in the order of `expected`; `values` has exactly its ids."""
    if expected.keys() != values.keys():
        lone = expected.keys() ^ values.keys()
        raise ValueError(f"claims without values, or values without a claim: {lone}")
    return [expected[id].judge(id, values[id]) for id in expected]
