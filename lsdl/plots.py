"""Figures from tables: the only matplotlib import, without pyplot and so without global state.

A figure is a description until `svg()` or `save(path)` draws it; `panels` puts several side by
side. Series are {label: (xs, ys)} or {label: (xs, ys, lows, highs)}, with a band around the line.
What is not finite, or not positive on a logarithmic axis, is left out.
"""

import hashlib
import html
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

# Okabe and Ito's colours, told apart by all readers; yellow, which paper swallows, is left out.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7f87")
MARKERS = "osD^vPX"
HOLLOW = "D^sovPX"  # of others' points
DASHES = ("-", "--", ":", "-.")
# The colours that a page with a dark mode replaces: see `Figure.svg`.
INK, FAINT, PAPER = "#23272e", "#d5d9df", "#fefefe"
THEME = {INK: "ink", FAINT: "faint", PAPER: "paper"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lsdl",
    "text.parse_math": False,  # a label is shown as it is, dollars included
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
    "legend.frameon": False,
}
WIDTH, HEIGHT = 5.0, 3.3  # of one panel, in inches
LETTER = 0.085  # inches, of a label's mean letter
LONGEST = 36  # letters of a label

Series = Mapping[str, Sequence]
Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: how it is drawn, and the space that its labels take."""

    draw: Draw
    extra: float = 0.0
    height: float = HEIGHT


@dataclass(frozen=True)
class Figure:
    """One or several panels. The same figure gives the same bytes."""

    title: str
    contents: tuple[Panel, ...]
    alt: str = ""  # one sentence for who cannot see it

    def svg(self, *, prefix: str = "", themed: bool = False) -> str:
        """One `<svg>` element that needs nothing else.

        Its ids start with `prefix`, by default a hash of the drawing: several fit in one page.
        `themed` leaves ink and paper to the page's `--ink`, `--faint` and `--paper`.
        """
        file = io.StringIO()
        self._draw(file, "svg")
        text = re.sub(r"<metadata>.*?</metadata>\s*", "", file.getvalue(), flags=re.S)
        text = text[text.index("<svg") :].strip()
        # What a style element says of all elements would hold for the whole page.
        rules = re.findall(r"<style[^>]*>\*\{(.*?)\}</style>", text)
        text = re.sub(r"<style.*?</style>", "", text).replace(
            "<svg ", f'<svg style="{rules[0]}" ', 1
        )
        text = text.replace("'DejaVu Sans'", FONT)
        text = _renamed(text, prefix or "f" + hashlib.sha256(text.encode()).hexdigest()[:10])
        if themed:
            text = _themed(text)
        words = f"<title>{html.escape(self.title)}</title>"
        words += f"<desc>{html.escape(self.alt)}</desc>" if self.alt else ""
        label = html.escape(self.title or "figure", quote=True)
        text = text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        return re.sub(r"^(<svg [^>]*>)", lambda m: m[1] + words, text)

    def _repr_html_(self) -> str:
        """In a notebook a figure is its drawing."""
        return self.svg()

    def save(self, path: str | Path) -> None:
        """Write `path`, an .svg or a .png by its name."""
        path = Path(path)
        if path.suffix == ".svg":
            path.write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{self.svg()}\n')
        elif path.suffix == ".png":
            self._draw(path, "png")
        else:
            raise ValueError(f"{path.name}: a figure is saved as .svg or .png.")

    def _draw(self, file: Any, kind: str) -> None:
        widths = [WIDTH + panel.extra for panel in self.contents]
        tall = max(panel.height for panel in self.contents)
        with matplotlib.rc_context(STYLE), warnings.catch_warnings():
            # The browser has letters that the font of the measurement lacks.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            drawing = Drawing(figsize=(sum(widths), tall), layout="constrained")
            grid = {"width_ratios": widths, "wspace": 0.06}
            rows = drawing.subplots(1, len(widths), squeeze=False, gridspec_kw=grid)
            for axes, panel in zip(rows[0], self.contents, strict=True):
                panel.draw(axes)
            named = len(widths) > 1 and self.title
            if named:
                drawing.suptitle(self.title, x=0.01, ha="left", weight="bold", size=12)
            fixed = {"metadata": {"Date": None}} if kind == "svg" else {"metadata": {}}
            drawing.savefig(file, format=kind, bbox_inches="tight", dpi=160, **fixed)


def inline(svg: str, prefix: str) -> str:
    """A saved figure as one of several in a page that says what ink and paper are."""
    return _themed(_renamed(svg[svg.index("<svg") :].strip(), prefix))


def _renamed(svg: str, prefix: str) -> str:
    """Ids start with `prefix`; those that nothing refers to are left out."""
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    return re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", svg)


def _themed(svg: str) -> str:
    return re.sub("|".join(THEME), lambda m: f"var(--{THEME[m[0]]}, {m[0]})", svg)


def panels(figures: Sequence[Figure], *, title: str = "", alt: str = "") -> Figure:
    """The panels of all `figures` side by side."""
    contents = tuple(panel for figure in figures for panel in figure.contents)
    return Figure(title, contents, alt or "; ".join(f.title for f in figures))


def lines(
    series: Series,
    *,
    title: str,
    x: str,
    y: str,
    logx: bool = False,
    logy: bool = False,
    band: Sequence | None = None,
    levels: Mapping[str, float] | None = None,
    published: Series | None = None,
    joined: bool = True,
    diagonal: bool = False,
    alt: str = "",
) -> Figure:
    """Lines, each with its label at its end.

    `band`: (low, high) or (low, high, label), a range of y that is shaded, such as a claim's.
    `levels`: {label: y}, dashed lines across. `published`: others' points, drawn hollow.
    """
    published, levels = dict(published or {}), dict(levels or {})
    ours = {label: _table(values, logx, logy) for label, values in series.items()}
    theirs = {label: _table(values, logx, logy) for label, values in published.items()}
    few = max((len(values[0]) for values in ours.values()), default=0) <= 24

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        tables = [*ours.values(), *theirs.values()]
        if not any(len(values[0]) for values in tables):
            _nothing(axes)
            return
        xs, ys = ([values[i] for values in tables] for i in (0, 1))
        _scale(axes, logx, logy, xs, ys, few)
        ends = []
        for i, (label, values) in enumerate(ours.items()):
            ends.append((label, _line(axes, values, i, joined, few)))
        hollow = dict(zip(theirs, itertools.cycle(HOLLOW), strict=False))
        for label, values in theirs.items():
            style = dict(color=INK, markerfacecolor="none", markersize=6)
            axes.plot(*values[:2], hollow[label], linestyle="none", **style)
            ends.append((label, (*_last(values), INK)))
        if diagonal:
            start = [max(axes.get_xlim()[0], axes.get_ylim()[0])] * 2
            axes.axline(start, [2 * start[0]] * 2 if start[0] else [1, 1], color=INK, lw=0.8)
        for label, level in levels.items():
            axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            ends.append((label, (math.nan, level, INK)))
        if band:
            axes.axhspan(*band[:2], color=PALETTE[2], alpha=0.14, linewidth=0)
            ends += [(band[2], (math.nan, _middle(axes, *band[:2]), PALETTE[2]))] * (len(band) > 2)
        _name(axes, ends, hollow)

    labels = [*series, *published, *levels, *(band or ())[2:]]
    return Figure(title, (Panel(draw, _space(labels)),), alt)


def scatter(series: Series, *, title: str, x: str, y: str, **options: Any) -> Figure:
    """Points without lines; `options` are those of `lines`, such as `published` or `diagonal`."""
    return lines(series, title=title, x=x, y=y, joined=False, **options)


def bars(
    values: Mapping[str, Any], *, title: str, x: str, logx: bool = False, alt: str = ""
) -> Figure:
    """Horizontal bars: {name: value | (value, low, high)}, or {series: {name: ...}} for groups."""
    nested = all(isinstance(value, Mapping) for value in values.values())
    groups = {str(k): dict(v) for k, v in values.items()} if nested else {"": dict(values)}
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    thick = 0.8 / max(len(groups), 1)

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.grid(visible=False, axis="y")
        if not names:
            _nothing(axes)
            return
        if logx:
            axes.set_xscale("log")
            _log_ticks(axes.xaxis)
        for i, (label, bar) in enumerate(groups.items()):
            _bars(axes, label, [bar.get(name, math.nan) for name in names], i, thick, logx)
        axes.set_yticks([k + thick * (len(groups) - 1) / 2 for k in range(len(names))])
        axes.set_yticklabels([_short(str(name)) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.3, -0.7 + thick * (len(groups) - 1) / 2)
        axes.margins(x=0.12)
        if nested:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    tall = max(HEIGHT * 0.5, 0.9 + 0.28 * len(names) * max(1, 0.7 * len(groups)))
    extra = _space(names) + (_space(groups) if nested else 0)
    return Figure(title, (Panel(draw, extra, tall),), alt)


def heatmap(
    values: Any,
    *,
    title: str,
    x: str,
    y: str,
    columns: Sequence,
    rows: Sequence,
    z: str = "",
    diverging: bool = False,
    logz: bool = False,
    numbers: bool | None = None,
    points: Series | None = None,
    path: bool = False,
    limits: tuple[float, float] | None = None,
    alt: str = "",
) -> Figure:
    """`values[row][column]` as colours; `numbers` writes them too, by default where they fit.

    `points`: {label: (xs, ys)} on top, in the units of `columns` and `rows`, which are then rising
    numbers; as a line from one to the next if they are a `path`.
    `limits`: the values of the first and the last colour, for panels that are compared.
    """
    grid = np.ma.masked_invalid(np.array(values, np.float64))
    if logz:
        grid = np.ma.masked_less_equal(grid, 0)
    written = grid.size <= 120 if numbers is None else numbers

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(visible=False)
        if not grid.count():
            _nothing(axes)
            return
        limit = float(abs(grid).max()) or 1.0
        low, high = limits or ((-limit, limit) if diverging else (None, None))
        mesh = axes.pcolormesh(
            grid,
            cmap="RdBu_r" if diverging else "viridis",
            norm="log" if logz else None,
            rasterized=grid.size > 256,
            vmin=low,
            vmax=high,
        )
        bar = axes.figure.colorbar(mesh, ax=axes, label=z)
        bar.outline.set_visible(False)
        if logz:
            _log_ticks(bar.ax.yaxis)
        for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
            most = 24 if axis is axes.yaxis else max(2, 40 // max(len(word(n)) + 1 for n in names))
            every = range(0, len(names), math.ceil(len(names) / most))
            axis.set_ticks([i + 0.5 for i in every], [_short(word(names[i])) for i in every])
        for (i, j), value in np.ndenumerate(grid):
            if written and not np.ma.is_masked(value):
                light = np.mean(mesh.cmap(mesh.norm(value))[:3]) > 0.45
                colour = "#000000" if light else "#ffffff"
                axes.text(j + 0.5, i + 0.5, word(value), ha="center", va="center", color=colour)
        _points(axes, points or {}, columns, rows, "-" if path else "")

    tall = max(HEIGHT, 1.0 + 0.3 * min(len(rows), 16))
    return Figure(title, (Panel(draw, _space([word(row) for row in rows]), tall),), alt)


def _points(axes: Axes, points: Series, columns: Sequence, rows: Sequence, style: str) -> None:
    for i, (label, places) in enumerate(points.items()):
        x, y = (
            np.interp(place, ends, np.arange(len(ends)) + 0.5)
            for place, ends in zip(places, (columns, rows), strict=True)
        )
        colour, marker = PALETTE[(i + 1) % len(PALETTE)], MARKERS[i % len(MARKERS)]
        how = dict(markeredgecolor="#ffffff", markeredgewidth=0.6, label=_short(label))
        axes.plot(x, y, color=colour, marker=marker, linestyle=style, **how)
    if points:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)


def summary(values: Any) -> tuple:
    """Mean, least and most over the first axis, such as the seeds: for `lines` and for `bars`."""
    values = np.asarray(values, np.float64)
    return values.mean(0), values.min(0), values.max(0)


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


def _table(values: Sequence, logx: bool, logy: bool) -> list[np.ndarray]:
    """xs, ys and the band's limits, without the points that cannot be drawn."""
    table = [np.atleast_1d(np.asarray(column, np.float64)) for column in values]
    if len(table) not in (2, 4) or len({len(column) for column in table}) != 1:
        raise ValueError("a series is (xs, ys) or (xs, ys, lows, highs), all of one length")
    kept = np.logical_and.reduce([np.isfinite(column) for column in table])
    for column, log in zip(table, (logx, logy, logy, logy), strict=False):
        kept &= (column > 0) | (not log)
    return [column[kept] for column in table]


def _line(axes: Axes, values: list[np.ndarray], i: int, joined: bool, few: bool) -> tuple:
    """Draw series `i`; returns its end and its colour."""
    colour = PALETTE[i % len(PALETTE)]
    axes.plot(
        *values[:2],
        color=colour,
        marker=MARKERS[i % len(MARKERS)] if few or not joined else "",
        linestyle=DASHES[i // len(PALETTE) % len(DASHES)] if joined else "",
    )
    if len(values) == 4 and joined:
        axes.fill_between(values[0], *values[2:], color=colour, alpha=0.16, linewidth=0)
    elif len(values) == 4:
        gaps = np.maximum([values[1] - values[2], values[3] - values[1]], 0)
        axes.errorbar(*values[:2], yerr=gaps, fmt="none", ecolor=colour, capsize=2, linewidth=1)
    return (*_last(values), colour)


def _last(values: list[np.ndarray]) -> tuple[float, float]:
    if not len(values[0]):
        return math.nan, math.nan
    last = int(np.argmax(values[0]))
    return float(values[0][last]), float(values[1][last])


def _bars(axes: Axes, label: str, row: list, i: int, thick: float, log: bool) -> None:
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


def _scale(axes: Axes, logx: bool, logy: bool, xs: list, ys: list, few: bool) -> None:
    """Whole steps between whole numbers, short large ones; a tick at each of few logarithmic x."""
    for axis, columns in ((axes.xaxis, xs), (axes.yaxis, ys)):
        values = np.concatenate(columns)
        if axis is axes.xaxis and (values == np.round(values)).all():
            axis.set_major_locator(ticker.MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
        if abs(values).max() >= 1e4:
            axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: word(value)))
    if logy:
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
    if logx:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis)
        places = np.unique(np.concatenate(xs))
        if few and len(places) <= 9:
            axes.xaxis.set_major_locator(ticker.FixedLocator(places))
            axes.xaxis.set_minor_locator(ticker.NullLocator())


class _LogTicks(ticker.LogLocator):
    """1, 2 and 5 of each decade where there are few decades, else the decades alone."""

    def tick_values(self, low: float, high: float) -> np.ndarray:
        self.set_params(subs=(1, 2, 5) if high < 500 * max(low, 1e-300) else (1,))
        return super().tick_values(low, high)


def _log_ticks(axis: Any) -> None:
    axis.set_major_locator(_LogTicks(numticks=9))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: word(value)))
    axis.set_minor_formatter(ticker.NullFormatter())


def _middle(axes: Axes, low: float, high: float) -> float:
    bottom, top = sorted(axes.get_ylim())
    low, high = max(low, bottom), min(high, top)
    return math.sqrt(low * high) if axes.get_yscale() == "log" else (low + high) / 2


def _name(axes: Axes, ends: Sequence, hollow: Mapping[str, str]) -> None:
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
        axes.text(1.06, height, _short(label), transform=axes.transAxes, va="center", size=size)


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


def _nothing(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center")


def _short(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}…"


def _space(labels: Any) -> float:
    return LETTER * max((len(_short(str(label))) for label in labels), default=0)
