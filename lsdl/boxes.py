"""Figures made of boxes: what takes how much, when, and of which kind. Drawn as `plots` draws.

Boxes of one name have one colour in a figure, in the order in which the names come first.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lsdl import marks
from lsdl.marks import word
from lsdl.plots import WIDTH, Figure, Panel

LIGHT = 0.55  # of a box's colour: ink is read on all of them
ROW = 0.42  # inches


def stacks(
    bars: Mapping[str, Mapping[str, float]],
    *,
    title: str,
    x: str,
    levels: Mapping[str, float] | None = None,
    alt: str = "",
) -> Figure:
    """A horizontal bar of parts for each row, {bar: {part: value}}, with its sum at the end.

    `levels`: {label: x}, dashed lines across, such as what there is.
    """
    levels = dict(levels or {})
    colours = _colours(name for parts in bars.values() for name in parts)
    longest = max([sum(parts.values()) for parts in bars.values()] + [*levels.values()])

    def draw(axes: Any) -> None:
        _rows(axes, list(bars), title, x, above=len(levels))
        for row, parts in enumerate(bars.values()):
            start = 0.0
            for name, value in parts.items():
                box = dict(color=colours[name], alpha=LIGHT, edgecolor=marks.PAPER, linewidth=1)
                axes.barh(row, value, 0.72, left=start, **box)
                start += value
            axes.annotate(word(start), (start, row), **_beside())
        for i, (label, level) in enumerate(levels.items()):
            axes.axvline(level, color=marks.INK, linewidth=1, linestyle=(0, (4, 3)))
            place = (level, 1 + 0.07 * i)
            style = dict(ha="right", va="bottom", size=9, xycoords=("data", "axes fraction"))
            axes.annotate(f"{label} {word(level)}", place, **style)
        axes.set_xlim(0, 1.12 * longest)
        _legend(axes, colours)

    tall = 1.3 + ROW * max(len(bars), len(colours) * 0.5)
    return Figure(title, (Panel(draw, marks.space(bars) + marks.space(colours) + 0.5, tall),), alt)


def timeline(
    rows: Mapping[str, Sequence[tuple[str, float, float]]], *, title: str, x: str, alt: str = ""
) -> Figure:
    """Boxes along time, {row: [(name, start, end), ...]}; the names are told by their colours."""
    colours = _colours(name for spans in rows.values() for name, *_ in spans)

    def draw(axes: Any) -> None:
        _rows(axes, list(rows), title, x)
        for row, spans in enumerate(rows.values()):
            for name, start, end in spans:
                box = dict(color=colours[name], alpha=LIGHT, edgecolor=marks.INK, linewidth=0.5)
                axes.barh(row, end - start, 0.72, left=start, **box)
        _legend(axes, colours)

    tall = 1.2 + ROW * max(len(rows), len(colours) * 0.5)
    return Figure(title, (Panel(draw, marks.space(rows) + marks.space(colours) + 0.5, tall),), alt)


def cells(
    words: Sequence[Sequence[str]],
    *,
    title: str,
    columns: Sequence[str],
    rows: Sequence[str],
    plain: Sequence[str] = (),
    alt: str = "",
) -> Figure:
    """`words[row][column]` in a grid, equal words in one colour; those of `plain` in grey.

    An empty word has no cell.
    """
    colours = dict.fromkeys(plain, marks.FAINT) | _colours(
        word for line in words for word in line if word and word not in plain
    )

    def draw(axes: Any) -> None:
        axes.set_title(title)
        axes.grid(visible=False)
        for i, line in enumerate(words):
            for j, name in enumerate(line):
                if name:
                    box = dict(color=colours[name], alpha=LIGHT, edgecolor=marks.PAPER, linewidth=2)
                    axes.barh(i, 1, 1, left=j, **box)
                    axes.text(j + 0.5, i, name, ha="center", va="center", size=8)
        axes.set_xlim(0, len(columns))
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xticks([j + 0.5 for j in range(len(columns))], columns)
        axes.set_yticks(range(len(rows)), [marks.short(row) for row in rows])
        axes.tick_params(length=0)
        axes.spines[["left", "bottom"]].set_visible(False)

    tall = max(1.5, 0.9 + 0.27 * len(rows))
    width = max(1.5, 1.15 * len(columns)) - WIDTH
    return Figure(title, (Panel(draw, width + marks.space(rows), tall),), alt)


def _colours(names: Iterable[str]) -> dict[str, str]:
    found = list(dict.fromkeys(names))
    return {name: marks.PALETTE[i % len(marks.PALETTE)] for i, name in enumerate(found)}


def _rows(axes: Any, names: list[str], title: str, x: str, *, above: int = 0) -> None:
    """`above`: lines of text between the title and the rows."""
    axes.set_title(title, pad=10 + 12 * above)
    axes.set_xlabel(x)
    axes.grid(visible=False, axis="y")
    axes.set_yticks(range(len(names)), [marks.short(name) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _legend(axes: Any, colours: Mapping[str, str]) -> None:
    """The names with their colours, right of the axes."""
    for name, colour in colours.items():
        axes.barh([0], [0], color=colour, alpha=LIGHT, label=marks.short(name))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)


def _beside() -> dict[str, Any]:
    return {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "size": 9}
