"""How everything is split, to be read: a table with what to look at, pictures, one page of both.

A picture shows the blocks that an array is cut into: the last two dims as a panel's rows and
columns, a panel for each block of the others. A block has a chip in the colour of every device
that holds it, so that replicas show, and their ids.
"""

import html
import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import nearest
from lsdl.sharding.placement import SEEN_BY, Placement
from lsdl.sharding.rules import TABLES, WHOLE, ParamRules, Rules, axes_of, label, parts

Block = tuple[int, ...]
MOST_DEVICES = 512  # that are drawn
MOST_IDS = 8  # of a block's devices that are named
MOST_PICTURES = 20  # of a page: the largest arrays


# Words


def device_bytes(placement: Placement, mesh: Mesh | AbstractMesh) -> int:
    """The bytes of the array that one device holds."""
    return placement.nbytes // math.prod(parts(axes, mesh) for axes in placement.spec)


def show(spec: P, mesh: Mesh | AbstractMesh) -> str:
    """`P('fsdp', None)`: the spec without the mesh axes of size 1."""
    dims = (tuple(a for a in axes_of(axes) if mesh.shape[a] > 1) for axes in spec)
    return f"P({', '.join(repr(d[0] if len(d) == 1 else d or None) for d in dims)})"


def rows(placements: Sequence[Placement], mesh: Mesh | AbstractMesh) -> Iterator[tuple[str, ...]]:
    """Of each array: path, shape, roles, the rule that won, spec, bytes per device."""
    for p in placements:
        roles = ", ".join(name or "-" for name in p.names)
        shape = " x ".join(map(str, p.shape))
        yield p.path, shape, roles, p.rule, show(p.spec, mesh), f"{device_bytes(p, mesh):,}"


HEAD = ("array", "shape", "roles", "rule", "spec", "bytes per device")


def table(placements: Sequence[Placement], mesh: Mesh | AbstractMesh) -> str:
    """One line per parameter, then what a device holds in all."""
    lines = [HEAD, *rows(_within(placements, "params/"), mesh)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join((*text, totals(placements, mesh)))


def totals(placements: Sequence[Placement], mesh: Mesh | AbstractMesh) -> str:
    """The bytes of a device by what they are for, and of how many in all devices' one copy."""
    words = []
    for part, what in (("params/", "parameters"), ("opt_state/", "optimiser state")):
        inside = _within(placements, part)
        held = sum(device_bytes(p, mesh) for p in inside)
        words.append(f"{held:,} of {sum(p.nbytes for p in inside):,} bytes of {what}")
    return f"each of {mesh.size} devices holds {' and '.join(words)}"


def _within(placements: Sequence[Placement], part: str) -> list[Placement]:
    return [p for p in placements if p.path.startswith(part)]


def lint(
    placements: Sequence[Placement],
    rules: Rules,
    param_rules: ParamRules = (),
    *,
    mesh: Mesh | AbstractMesh,
) -> Iterator[str]:
    """Sentences: the rules that never had a chance, those unused, what is split less than meant.

    A rule for mesh axes of size 1 splits nothing and is not missed.
    """
    won = {rule for p in placements for rule in p.won}
    above = shadowed(rules)
    for i, j in above.items():
        yield f"shadowed: the rule {label(*rules[i])}, by {label(*rules[j])}"
    unused = [
        label(logical, axes)
        for i, (logical, axes) in enumerate(rules)
        if i not in above
        and logical not in ("batch", *SEEN_BY)
        and label(logical, axes) not in won
        and parts(axes, mesh) > 1
    ]
    if unused:
        yield f"unused: {'; '.join(unused)}"
    for i, (pattern, _) in enumerate(param_rules):
        if f"param_rules[{i}]" not in won:
            yield f"shadowed: param_rules[{i}], {pattern!r}, by those before it"
    roles = {role for table in (rules, *TABLES.values()) for role, _ in table} | {*WHOLE, None}
    for p in _within(placements, "params/"):
        for role in p.names:
            if role not in roles:
                yield (
                    f"unknown role: {role!r} of {p.path} {p.shape} is in no rule table, and its "
                    f"dim stays whole; {nearest(role, roles - {None})}"
                )
    for p in placements:
        if p.missed:
            how = "replicated" if not any(p.won) else f"split by {p.rule} alone"
            yield f"fall-back: {p.path} {p.shape} is {how}: {p.missed}"
    named = {logical for logical, _ in rules}
    bare = [
        p for p in _within(placements, "params/") if not named & set(p.names) and not any(p.won)
    ]
    if bare:
        largest = max(bare, key=lambda p: p.nbytes)
        yield (
            f"replicated, no rule names their roles: {len(bare)} parameters of "
            f"{sum(p.nbytes for p in bare):,} bytes, the largest {largest.path} {largest.shape}"
        )


def shadowed(rules: Rules) -> dict[int, int]:
    """{a rule that never has a chance: the one before it that is the reason}.

    Where a rule does not fit, one that takes its mesh axes and more does not either.
    """
    above = {}
    for i, (logical, axes) in enumerate(rules):
        for j, (role, fewer) in enumerate(rules[:i]):
            if role == logical and set(axes_of(fewer)) <= set(axes_of(axes)):
                above.setdefault(i, j)
    return above


# Pictures


@dataclass(frozen=True)
class Picture:
    """A drawing: SVG in notebooks and pages, characters where it is printed."""

    svg: str
    text: str

    def _repr_html_(self) -> str:
        return self.svg

    def __str__(self) -> str:
        return self.text


def together(*pictures: Picture) -> Picture:
    """One under the other, as one."""
    svg = "".join(f"<div>{picture.svg}</div>" for picture in pictures)
    return Picture(svg, "\n\n".join(picture.text for picture in pictures))


@dataclass(frozen=True)
class Panel:
    """Rows and columns of blocks; `held[row][column]`: the devices that hold it."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    held: Sequence[Sequence[Sequence[int]]]


def picture_of_mesh(mesh: Mesh | AbstractMesh) -> Picture:
    """Where each device stands; in a job of several processes, of which one it is."""
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    marks = [[f"{axis} {i}" for i in range(mesh.shape[axis])] for axis in axes]
    names = {}
    if isinstance(mesh, Mesh) and len({d.process_index for d in mesh.devices.flat}) > 1:
        names = {d.id: f"{d.id} of process {d.process_index}" for d in mesh.devices.flat}
    title = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    title = f"mesh {title or 'of one device'}"
    return _draw(title, _panels(marks, blocks(P(*axes), len(axes), mesh)), names=names)


def picture(sharding: NamedSharding, shape: Sequence[int], *, title: str = "") -> Picture:
    """Which device holds which block of an array: `picture(x.sharding, x.shape)`."""
    mesh, spec = sharding.mesh, sharding.spec
    dims = [*spec, *(None for _ in range(len(shape) - len(spec)))]
    marks = []
    for size, axes in zip(shape, dims, strict=True):
        step = size // parts(axes, mesh)
        marks.append([f"{i * step}:{(i + 1) * step}" for i in range(parts(axes, mesh))])
    words = f"{title} {tuple(shape)} {show(P(*dims), mesh)}".strip()
    return _draw(words, _panels(marks, blocks(spec, len(shape), mesh)), names={})


def blocks(spec: P, rank: int, mesh: Mesh | AbstractMesh) -> dict[Block, list[int]]:
    """{block's place along each dim: the ids of the devices that hold it}."""
    held = defaultdict(list)
    for place, device in np.ndenumerate(_ids(mesh)):
        at = dict(zip(mesh.axis_names, place, strict=True))
        block = [0] * rank
        for dim, axes in enumerate(spec):
            for axis in axes_of(axes):
                block[dim] = block[dim] * mesh.shape[axis] + at[axis]
        held[tuple(block)].append(int(device))
    return dict(held)


def _ids(mesh: Mesh | AbstractMesh) -> np.ndarray:
    if isinstance(mesh, Mesh):
        return np.array([device.id for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    return np.arange(mesh.size).reshape(tuple(mesh.shape.values()))


def _panels(marks: Sequence[Sequence[str]], held: Mapping[Block, list[int]]) -> list[Panel]:
    missing = max(0, 2 - len(marks))
    *outer, rows, columns = [[""]] * missing + list(marks)
    panels = []
    for index in itertools.product(*(range(len(m)) for m in outer)):
        grid = [
            [held[(*index, i, j)[missing:]] for j in range(len(columns))] for i in range(len(rows))
        ]
        title = ", ".join(m[i] for m, i in zip(outer, index, strict=True) if len(m) > 1)
        panels.append(Panel(title, rows, columns, grid))
    return panels


def _draw(title: str, panels: Sequence[Panel], *, names: Mapping[int, str]) -> Picture:
    ids = sorted({i for panel in panels for row in panel.held for cell in row for i in cell})
    words = {i: names[i] if i in names else str(i) for i in ids}
    colours = {i: f"hsl({360 * n / len(ids):.0f} 65% 78%)" for n, i in enumerate(ids)}
    return Picture(_svg(title, panels, words, colours), _text(title, panels, words))


def _text(title: str, panels: Sequence[Panel], words: Mapping[int, str]) -> str:
    lines = [title]
    for panel in panels:
        grid = [["", *panel.columns]]
        for name, row in zip(panel.rows, panel.held, strict=True):
            grid.append([name, *(" ".join(words[i] for i in cell) for cell in row)])
        widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
        lines += [f"  {panel.title}"] if panel.title else []
        lines += ["  " + " | ".join(map(str.ljust, line, widths)).rstrip() for line in grid]
    return "\n".join(lines)


CELL_HEIGHT, LETTER, GAP = 30, 7, 14


def _svg(
    title: str, panels: Sequence[Panel], words: Mapping[int, str], colours: Mapping[int, str]
) -> str:
    texts = [" ".join(_ids_shown(cell, words)) for p in panels for row in p.held for cell in row]
    texts += [name for p in panels for name in p.columns]
    width = max(24, *(LETTER * (len(text) + 2) for text in texts))
    left = max(LETTER * len(name) for p in panels for name in p.rows) + 10
    body, x, y, right, tall = [_word(title, 0, 14, anchor="start", weight="bold")], 0, 24, 0, 0
    for panel in panels:
        across = left + width * len(panel.columns) + GAP
        if x and x + across > 1200:  # a new line of panels
            x, y, tall = 0, y + tall, 0
        down = 34 + CELL_HEIGHT * len(panel.rows) + GAP
        body.append(_word(panel.title, x + left, y + 12, anchor="start"))
        for j, name in enumerate(panel.columns):
            body.append(_word(name, x + left + width * (j + 0.5), y + 28))
        for i, (name, row) in enumerate(zip(panel.rows, panel.held, strict=True)):
            top = y + 34 + CELL_HEIGHT * i
            body.append(_word(name, x + left - 6, top + 19, anchor="end"))
            for j, cell in enumerate(row):
                body += _cell(cell, x + left + width * j, top, width, words, colours)
        x, tall = x + across, max(tall, down)
        right = max(right, x)
    size = f'width="{max(right, 8 * len(title))}" height="{y + tall}"'
    style = 'font-family="monospace" font-size="11" fill="currentColor"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(body)}</svg>'


def _ids_shown(cell: Sequence[int], words: Mapping[int, str]) -> list[str]:
    few = [words[i] for i in cell[:MOST_IDS]]
    return [*few, f"+{len(cell) - MOST_IDS}"] if len(cell) > MOST_IDS else few


def _word(
    text: str,
    x: float,
    y: float,
    *,
    anchor: str = "middle",
    weight: str = "normal",
    ink: str = "inherit",
) -> str:
    if not text:
        return ""
    fixed = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{ink}"'
    return f"<text {fixed}>{html.escape(text)}</text>"


def _cell(
    cell: Sequence[int],
    x: float,
    y: float,
    width: float,
    words: Mapping[int, str],
    colours: Mapping[int, str],
) -> Iterator[str]:
    chip, shown = width / len(cell), _ids_shown(cell, words)
    gap = min(3, chip / 4)  # between the frame and the chips, and between them: copies, not parts
    for k, device in enumerate(cell):
        fixed = f'x="{x + k * chip + gap:g}" y="{y + gap:g}" rx="{gap:g}"'
        size = f'width="{chip - 2 * gap:g}" height="{CELL_HEIGHT - 2 * gap:g}"'
        yield f'<rect {fixed} {size} fill="{colours[device]}"/>'
    for k, word in enumerate(shown):
        # The chips are light on a dark page too.
        yield _word(word, x + (k + 0.5) * width / len(shown), y + 19, ink="#000")
    frame = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{CELL_HEIGHT}"'
    yield f'<rect {frame} fill="none" stroke="#444"/>'


# The page

KEY = (
    "A frame is a block of the array, at its place; a coloured chip in it is a device that holds "
    "the whole block: several chips, as many copies. The last two dims are the rows and columns."
)


def page(experiment: Any) -> str:
    """One HTML file that needs no other: the mesh, the largest arrays' pictures, all in a table.

    `experiment`: what has a `name`, a `mesh`, `placements` and their `lint`.
    """
    title, mesh, placements = experiment.name, experiment.mesh, experiment.placements
    e = html.escape
    params = _within(placements, "params/")
    largest = sorted(params, key=lambda p: -p.nbytes)[:MOST_PICTURES]
    drawn = [f"<p>More than {MOST_DEVICES} devices are not drawn.</p>"]
    if mesh.size <= MOST_DEVICES:
        pictures = [picture(NamedSharding(mesh, p.spec), p.shape, title=p.path) for p in largest]
        most = f"Of {len(params)} parameters the {len(largest)} largest are drawn, and all listed."
        drawn = [f"<p>{KEY} {most}</p>"]
        drawn += [f"<div>{p.svg}</div>" for p in (picture_of_mesh(mesh), *pictures)]
    line = lambda row, tag: "".join(f"<{tag}>{e(word)}</{tag}>" for word in row)  # noqa: E731
    return "\n".join(
        (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{e(title)}</title>',
            "<style>body{font:14px sans-serif;margin:2em}td,th{text-align:left;padding:0 1em 0 0}"
            "table{font:12px monospace}div{margin:1em 0;overflow-x:auto}</style>",
            f"<h1>{e(title)}</h1><p>{e(totals(placements, mesh))}</p>",
            *drawn,
            f"<ul>{''.join(f'<li>{e(note)}</li>' for note in experiment.lint)}</ul>",
            f"<table><tr>{line(HEAD, 'th')}</tr>",
            *(f"<tr>{line(row, 'td')}</tr>" for row in rows(placements, mesh)),
            "</table></html>\n",
        )
    )
