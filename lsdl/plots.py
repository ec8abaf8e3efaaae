"""Figures from tables: with `marks` the only one to import matplotlib, and never pyplot.

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from lsdl import marks
from lsdl.marks import word

THEME = {marks.INK: "ink", marks.FAINT: "faint", marks.PAPER: "paper"}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lsdl",
    "text.parse_math": False,  # a label is shown as it is, dollars included
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": marks.INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": marks.INK,
    "axes.labelcolor": marks.INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": marks.PAPER,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "figure.facecolor": marks.PAPER,
    "savefig.facecolor": marks.PAPER,
    "grid.color": marks.FAINT,
    "grid.linewidth": 0.6,
    "xtick.color": marks.INK,
    "ytick.color": marks.INK,
    "lines.linewidth": marks.THICK,
    "lines.markersize": 5,
    "legend.frameon": False,
}
WIDTH, HEIGHT = 5.0, marks.HEIGHT  # of one panel, in inches
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
    among: Sequence[str] = (),
    alt: str = "",
) -> Figure:
    """Lines, each with its label at its end.

    `among`: the labels of several figures, in each of which a label then has the same colour.
    `band`: (low, high) or (low, high, label), a range of y that is shaded, such as a claim's.
    `levels`: {label: y}, dashed lines across. `published`: others' points, drawn hollow.
    """
    published, levels = dict(published or {}), dict(levels or {})
    ours = {label: marks.table(values, logx, logy) for label, values in series.items()}
    theirs = {label: marks.table(values, logx, logy) for label, values in published.items()}
    few = max((len(values[0]) for values in ours.values()), default=0) <= 24

    def draw(axes: Axes) -> None:
        axes.set_title(title)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        tables = [*ours.values(), *theirs.values()]
        if not any(len(values[0]) for values in tables):
            marks.nothing(axes)
            return
        xs, ys = ([values[i] for values in tables] for i in (0, 1))
        marks.scale(axes, logx, logy, xs, ys, few)
        ends = []
        under = marks.buried([*ours.values()], logy)
        for i, (label, values) in enumerate(ours.items()):
            number = among.index(label) if label in among else i
            ends.append((label, marks.line(axes, values, number, joined, few, under[i])))
        hollow = dict(zip(theirs, itertools.cycle(marks.HOLLOW), strict=False))
        for label, values in theirs.items():
            style = dict(color=marks.INK, markerfacecolor="none", markersize=6)
            axes.plot(*values[:2], hollow[label], linestyle="none", **style)
            ends.append((label, (*marks.last(values), marks.INK)))
        if diagonal:
            start = [max(axes.get_xlim()[0], axes.get_ylim()[0])] * 2
            axes.axline(start, [2 * start[0]] * 2 if start[0] else [1, 1], color=marks.INK, lw=0.8)
        for label, level in levels.items():
            axes.axhline(level, color=marks.INK, linewidth=1, linestyle=(0, (4, 3)))
            ends.append((label, (math.nan, level, marks.INK)))
        if band:
            axes.axhspan(*band[:2], color=marks.PALETTE[2], alpha=0.14, linewidth=0)
            if len(band) > 2:
                ends.append((band[2], (math.nan, marks.middle(axes, *band[:2]), marks.PALETTE[2])))
        marks.name_ends(axes, ends, hollow)

    labels = [*series, *published, *levels, *(band or ())[2:]]
    return Figure(title, (Panel(draw, marks.space(labels)),), alt)


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
            marks.nothing(axes)
            return
        if logx:
            axes.set_xscale("log")
            marks.log_ticks(axes.xaxis)
        for i, (label, bar) in enumerate(groups.items()):
            row = [bar.get(name, math.nan) for name in names]
            marks.row_of_bars(axes, label, row, i, thick, logx)
        axes.set_yticks([k + thick * (len(groups) - 1) / 2 for k in range(len(names))])
        axes.set_yticklabels([marks.short(str(name)) for name in names])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(names) - 0.3, -0.7 + thick * (len(groups) - 1) / 2)
        axes.margins(x=0.12)
        if nested:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))

    tall = max(HEIGHT * 0.5, 0.9 + 0.28 * len(names) * max(1, 0.7 * len(groups)))
    extra = marks.space(names) + (marks.space(groups) if nested else 0)
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
            marks.nothing(axes)
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
            marks.log_ticks(bar.ax.yaxis)
        for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
            most = 24 if axis is axes.yaxis else max(2, 40 // max(len(word(n)) + 1 for n in names))
            every = range(0, len(names), math.ceil(len(names) / most))
            axis.set_ticks([i + 0.5 for i in every], [marks.short(word(names[i])) for i in every])
        for (i, j), value in np.ndenumerate(grid):
            if written and not np.ma.is_masked(value):
                light = np.mean(mesh.cmap(mesh.norm(value))[:3]) > 0.45
                colour = "#000000" if light else "#ffffff"
                axes.text(j + 0.5, i + 0.5, word(value), ha="center", va="center", color=colour)
        marks.points_on(axes, points or {}, columns, rows, "-" if path else "")

    tall = max(HEIGHT, 1.0 + 0.3 * min(len(rows), 16))
    return Figure(title, (Panel(draw, marks.space([word(row) for row in rows]), tall),), alt)


def summary(values: Any) -> tuple:
    """Mean, least and most over the first axis, such as the seeds: for `lines` and for `bars`."""
    values = np.asarray(values, np.float64)
    return values.mean(0), values.min(0), values.max(0)
