"""One HTML page that needs no other file, no network and no script."""

import base64
import html
import re
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

CSS = """
:root{color-scheme:light dark;--ink:#23272e;--faint:#d5d9df;--paper:#fefefe;--quiet:#5c6470;
--good:#00684a;--goodback:#d9f2e7;--bad:#9c3200;--badback:#fde5d8;--back:#f4f5f7}
@media (prefers-color-scheme:dark){:root{--ink:#e4e7ec;--faint:#3b424d;--paper:#181b20;
--quiet:#9aa3b0;--good:#7fdcb8;--goodback:#0e3a2c;--bad:#ffb38f;--badback:#4a2010;--back:#20242b}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:76rem;padding:1.5rem 1rem 4rem;background:var(--paper);
color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.75rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2.5rem 0 .6rem;padding-top:.8rem;border-top:1px solid var(--faint)}
p{max-width:46rem;margin:.5rem 0}
.lead{font-size:1.1rem}.quiet{color:var(--quiet);font-size:.9rem}
a{color:inherit;text-underline-offset:.15em}
.wide{overflow-x:auto;margin:.8rem 0}
figure{margin:0;max-width:100%;overflow-x:auto}
.row{display:flex;flex-wrap:wrap;gap:1.2rem 1.6rem;margin:1.2rem 0}
.gallery{display:flex;flex-wrap:wrap;gap:1rem;margin:1.2rem 0}
.gallery figure{width:11rem;font-size:.85rem;overflow-wrap:anywhere}
img.pixels{width:6rem;height:auto;image-rendering:pixelated;display:block;margin-bottom:.3rem}
svg{display:block;max-width:100%;height:auto}svg.many{min-width:44rem}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;
border-bottom:1px solid var(--faint)}
th{color:var(--quiet);font-weight:600;white-space:nowrap}
td.number{text-align:right;white-space:nowrap}
code,pre{font:.85rem/1.45 ui-monospace,Menlo,Consolas,monospace}
pre{background:var(--back);padding:.6rem .8rem;border-radius:.4rem;overflow-x:auto;margin:.4rem 0}
summary{cursor:pointer}
.mark{display:inline-block;padding:.05rem .5rem;border-radius:.3rem;font-weight:600;
font-size:.8rem;white-space:nowrap}
.good{color:var(--good);background:var(--goodback)}.bad{color:var(--bad);background:var(--badback)}
@media (max-width:44rem){body{font-size:15px}h1{font-size:1.4rem}
table.cards tr{display:block;padding:.6rem 0;border-bottom:1px solid var(--faint)}
table.cards tr:first-child{display:none}
table.cards td{display:block;border:0;padding:.1rem 0;text-align:left;white-space:normal}
table.cards td[data-label]::before{content:attr(data-label) ": ";color:var(--quiet)}}
"""


NUMBER = re.compile(r"[-+]?[\d.,]+(e-?\d+)?[kMGT%]?( ± [\d.e-]+)?")


class Markup(str):
    """Text that is HTML already; any other is escaped."""

    __slots__ = ()


def escape(text: object) -> Markup:
    return text if isinstance(text, Markup) else Markup(html.escape(str(text), quote=True))


def element(tag: str, *content: object, **attributes: str) -> Markup:
    """`element("p", "text", class_="quiet")`."""
    given = "".join(
        f' {k.strip("_").replace("_", "-")}="{escape(v)}"' for k, v in attributes.items()
    )
    return Markup(f"<{tag}{given}>{''.join(map(escape, content))}</{tag}>")


def section(title: str, *content: object) -> Markup:
    """A heading and what stands under it; nothing if that is nothing."""
    content = [part for part in content if part]
    if not content:
        return Markup("")
    return element("section", element("h2", title), *content)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, cards: bool = False) -> Markup:
    """Columns of numbers stand to the right. `cards`: on a phone each row becomes a paragraph."""
    rows = list(rows)
    right = [all(not str(cell) or _is_number(cell) for cell in c) for c in zip(*rows, strict=True)]
    lines = [element("tr", *(element("th", name) for name in head))]
    for row in rows:
        cells = []
        for name, cell, number in zip(head, row, right, strict=True):
            style = {"data_label": name} if cards and name else {}
            cells.append(element("td", cell, **style, **({"class": "number"} if number else {})))
        lines.append(element("tr", *cells))
    body = element("table", *lines, **({"class": "cards"} if cards else {}))
    return element("div", body, class_="wide")


def _is_number(cell: object) -> bool:
    return isinstance(cell, int | float) or bool(NUMBER.fullmatch(str(cell)))


def facts(values: Mapping[str, object]) -> Markup:
    """Names and values, one a line."""
    rows = (element("tr", element("th", k), element("td", v)) for k, v in values.items())
    return element("div", element("table", *rows), class_="wide")


def mark(word: str, good: bool) -> Markup:
    """A verdict, in a colour and in a word."""
    return element("span", word, class_="mark good" if good else "mark bad")


def details(summary: str, *content: object) -> Markup:
    return element("details", element("summary", summary), *content)


def figure(svg: str, *, many: bool = False) -> Markup:
    """An `<svg>` element that may be trusted; `many`: it has several panels."""
    return element("figure", Markup(svg.replace("<svg ", '<svg class="many" ', 1) if many else svg))


def row(*figures: Markup) -> Markup:
    """Figures side by side, as many as the screen is wide."""
    return element("div", *figures, class_="row") if figures else Markup("")


def gallery(entries: Iterable[tuple[Markup, str]]) -> Markup:
    """Small pictures or texts, each with what is told of it."""
    shown = [element("figure", what, element("figcaption", told)) for what, told in entries]
    return element("div", *shown, class_="gallery") if shown else Markup("")


def picture(pixels_HWC: np.ndarray, alt: str, *, most: int = 64) -> Markup:
    """A uint8 image of 1 or 3 channels, in the page itself, with at most some `most` pixels a side.

    A larger one is made smaller by leaving pixels out.
    """
    every = -(-max(pixels_HWC.shape[:2]) // most)
    data = base64.b64encode(_png(pixels_HWC[::every, ::every])).decode()
    return Markup(
        f'<img class="pixels" src="data:image/png;base64,{data}" alt="{escape(str(alt))}">'
    )


def _png(pixels_HWC: np.ndarray) -> bytes:
    height, width, channels = pixels_HWC.shape
    kind = {1: 0, 3: 2}[channels]  # grey, or red, green and blue
    lines = np.ascontiguousarray(pixels_HWC, np.uint8).reshape(height, width * channels)
    filtered = np.pad(lines, ((0, 0), (1, 0)))  # a line begins with how it is filtered: not at all
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)),
        (b"IDAT", zlib.compress(filtered.tobytes(), 9)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def document(title: str, *content: object, css: str = "") -> str:
    """A whole page; `css`: rules beside its own."""
    style = Markup(f"<style>{CSS}{css}</style>")
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>{style}</head>\n<body>\n"
    )
    body = "\n".join(escape(part) for part in content if part)
    return f"{head}{element('h1', title)}\n{body}\n</body></html>\n"
