"""What a chart consists of: marks, scales, ticks, and names at the ends of lines.

A series is [xs, ys] or [xs, ys, lows, highs], as `table` makes it.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes

# Okabe and Ito's colours, told apart by all readers; yellow, which paper swallows, is left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7f87")
MARKERS = "osD^vPX"
HOLLOW = "D^sovPX"  # of others' points
DASHES = ("-", "--", ":", "-.")
# The colours that a page with a dark mode replaces: see `plots.Figure.svg`.
INK, FAINT, PAPER = "#23272e", "#d5d9df", "#fefefe"
HEIGHT = 3.3  # of a panel, in inches
THICK = 1.7  # points, of a line
LETTER = 0.085  # inches, of a label's mean letter
LONGEST = 36  # letters of a label


def word(value: Any) -> str:
    """A number as a reader wants it: 3 digits, k M G for thousands; anything else by str."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    if float(value).is_integer():
        return str(int(value))
    return re.sub(r"e-0?", "e-", f"{value:.3g}")


def table(values: Sequence, logx: bool, logy: bool) -> list[np.ndarray]:
    """xs, ys and the band's limits, without the points that cannot be drawn."""
    table = [np.atleast_1d(np.asarray(column, np.float64)) for column in values]
    if len(table) not in (2, 4) or len({len(column) for column in table}) != 1:
        raise ValueError("a series is (xs, ys) or (xs, ys, lows, highs), all of one length")
    kept = np.logical_and.reduce([np.isfinite(column) for column in table])
    for column, log in zip(table, (logx, logy, logy, logy), strict=False):
        kept &= (column > 0) | (not log)
    return [column[kept] for column in table]


def buried(tables: list[list[np.ndarray]], logy: bool) -> list[int]:
    """For each series the number of later ones that lie on it, within 1 % of what is shown."""
    ys = [np.log(values[1]) if logy else values[1] for values in tables]
    shown = [y for y in ys if len(y)]
    near = 0.01 * (max(y.max() for y in shown) - min(y.min() for y in shown)) if shown else 0.0

    def on(i: int, j: int) -> bool:
        same = len(ys[i]) > 1 and np.array_equal(tables[i][0], tables[j][0])
        return same and bool(np.abs(ys[i] - ys[j]).max() <= near)

    return [sum(on(i, j) for j in range(i + 1, len(ys))) for i in range(len(ys))]


def line(
    axes: Axes, values: list[np.ndarray], i: int, joined: bool, few: bool, under: int = 0
) -> tuple:
    """Draw series `i`, wide enough to be seen below `under` others; returns its end and colour."""
    colour = PALETTE[i % len(PALETTE)]
    axes.plot(
        *values[:2],
        color=colour,
        linewidth=THICK * (1 + 1.5 * min(under, 4)),
        marker=MARKERS[i % len(MARKERS)] if few or not joined else "",
        linestyle=DASHES[i // len(PALETTE) % len(DASHES)] if joined else "",
    )
    if len(values) == 4 and joined:
        axes.fill_between(values[0], *values[2:], color=colour, alpha=0.16, linewidth=0)
    elif len(values) == 4:
        gaps = np.maximum([values[1] - values[2], values[3] - values[1]], 0)
        axes.errorbar(*values[:2], yerr=gaps, fmt="none", ecolor=colour, capsize=2, linewidth=1)
    return (*last(values), colour)


def last(values: list[np.ndarray]) -> tuple[float, float]:
    if not len(values[0]):
        return math.nan, math.nan
    last = int(np.argmax(values[0]))
    return float(values[0][last]), float(values[1][last])


def row_of_bars(axes: Axes, label: str, row: list, i: int, thick: float, log: bool) -> None:
    table = np.array([v if np.ndim(v) else (v, v, v) for v in row], np.float64)
    middle, gaps = table[:, 0], np.maximum(np.abs(table[:, 1:] - table[:, :1]).T, 0)
    places = [k + thick * i for k in range(len(row))]
    shown = np.isfinite(middle) & ((middle > 0) | (not log))
    drawn = np.where(shown, middle, np.nan)
    axes.barh(places, drawn, thick * 0.9, color=PALETTE[i % len(PALETTE)], label=label)
    spread = np.where(shown & (gaps.max(0) > 0), gaps, np.nan)
    axes.errorbar(middle, places, xerr=spread, fmt="none", ecolor=INK, capsize=2, linewidth=1)
    for place, value, ok, gap in zip(places, middle, shown, np.nan_to_num(spread[1]), strict=True):
        end = value + gap if ok and value > 0 else axes.get_xlim()[0] if log else 0
        style = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "size": 9}
        axes.annotate(word(value) if ok else "no value", (end, place), **style)


def scale(axes: Axes, logx: bool, logy: bool, xs: list, ys: list, few: bool) -> None:
    """Whole steps between whole numbers, short large ones; a tick at each of few logarithmic x."""
    for axis, columns in ((axes.xaxis, xs), (axes.yaxis, ys)):
        values = np.concatenate(columns)
        if axis is axes.xaxis and (values == np.round(values)).all():
            axis.set_major_locator(ticker.MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        if abs(values).max() >= 1e4:
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: word(value)))
    if logy:
        axes.set_yscale("log")
        log_ticks(axes.yaxis)
    if logx:
        axes.set_xscale("log")
        log_ticks(axes.xaxis)
        places = np.unique(np.concatenate(xs))
        if few and len(places) <= 9:
            axes.xaxis.set_major_locator(ticker.FixedLocator(places))
            axes.xaxis.set_minor_locator(ticker.NullLocator())


class _LogTicks(ticker.LogLocator):
    """1, 2 and 5 of each decade where there are few decades, else the decades alone."""

    def tick_values(self, low: float, high: float) -> np.ndarray:
        self.set_params(subs=(1, 2, 5) if high < 500 * max(low, 1e-300) else (1,))
        return super().tick_values(low, high)


def log_ticks(axis: Any) -> None:
    axis.set_major_locator(_LogTicks(numticks=9))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: word(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def middle(axes: Axes, low: float, high: float) -> float:
    bottom, top = sorted(axes.get_ylim())
    low, high = max(low, bottom), min(high, top)
    return math.sqrt(low * high) if axes.get_yscale() == "log" else (low + high) / 2


def name_ends(axes: Axes, ends: Sequence, hollow: Mapping[str, str]) -> None:
    """Each label right of the axes, level with its line's end, none on top of another."""
    ends = [end for end in ends if end[0] and math.isfinite(end[1][1])]
    axes.autoscale_view()
    axes.set_xlim(axes.get_xlim()), axes.set_ylim(axes.get_ylim())
    to_axes = lambda x, y: (axes.transData + axes.transAxes.inverted()).transform((x, y))  # noqa: E731
    left = axes.get_xlim()[0]
    places = [to_axes(left if math.isnan(x) else x, y) for _, (x, y, _) in ends]
    gap = min(15 / 72 / (HEIGHT * 0.7), 1 / max(len(ends), 1))
    order = sorted(range(len(ends)), key=lambda i: (places[i][1], -i))
    heights = _apart([float(np.clip(places[i][1], 0, 1)) for i in order], gap)
    size = 9 if gap > 0.06 else 7
    for i, height in zip(order, heights, strict=True):
        label, (x, _, colour) = ends[i]
        start = 1.0 if math.isnan(x) else min(float(places[i][0]), 1.0)
        near = max(start, 0.985)  # the leader starts at the axes' edge if the line ends before it
        path = ((near, 1.025, 1.05), (places[i][1], height, height))
        style = {"color": colour, "linewidth": 1.3, "clip_on": False}
        if start < 0.9:
            path = ((1.02, 1.05), (height, height))
            style |= {"linewidth": 2.2}
        if label in hollow:
            path = ((1.035,), (height,))
            style |= {"marker": hollow[label], "markerfacecolor": "none", "markersize": 6}
        axes.plot(*path, transform=axes.transAxes, **style)
        axes.text(1.06, height, short(label), transform=axes.transAxes, va="center", size=size)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """`heights`, rising, moved as little as it takes to be `gap` apart and below 1."""
    placed = []
    for height in heights:
        placed.append(max(height, placed[-1] + gap) if placed else height)
    over = max(0.0, (placed[-1] if placed else 0) - 1)
    limit = math.inf
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i] - over * (i == len(placed) - 1), limit)
        limit = placed[i] - gap
    return placed


def nothing(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")


def short(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def space(labels: Any) -> float:
    return LETTER * max((len(short(str(label))) for label in labels), default=0)


def points_on(
    axes: Axes, points: Mapping[str, Sequence], columns: Sequence, rows: Sequence, style: str
) -> None:
    for i, (label, places) in enumerate(points.items()):
        x, y = (
            np.interp(place, ends, np.arange(len(ends)) + 0.5)
            for place, ends in zip(places, (columns, rows), strict=True)
        )
        colour, marker = PALETTE[(i + 1) % len(PALETTE)], MARKERS[i % len(MARKERS)]
        how = dict(markeredgecolor="#ffffff", markeredgewidth=0.6, label=short(label))
        axes.plot(x, y, color=colour, marker=marker, linestyle=style, **how)
    if points:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
