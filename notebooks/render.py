"""Runs notebooks and writes each as one HTML page: python notebooks/render.py [NAME ...].

A page is what a reader sees who runs the notebook from top to bottom: the exercises are open. It
needs no other file, no network and no script. The notebooks' formulas are written in letters, so
that no page has to set TeX.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import HTMLExporter
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from lsdl import page

HERE = Path(__file__).resolve().parent
PAGES = HERE.parent / "build" / "notebooks"
LIMIT_S = 600  # of one cell
WORDS = 4000  # letters shown of what a kernel wrote before it died
# What of an output is shown, the first that it has: nothing that takes a script.
SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]
CSS = """
body{max-width:80rem}
.cell{margin:.8rem 0}.cell p,.cell li{max-width:46rem}
.input .highlight{border-left:3px solid var(--faint);border-radius:.4rem}
.input pre{margin:0}.output pre{background:none;padding:.1rem 0 .1rem .8rem;font-size:.75rem}
@media (min-width:72rem){.output pre{white-space:pre-wrap;overflow-wrap:anywhere}}
.output_html,.output_svg,.output_png{margin:.6rem 0 .6rem .8rem;overflow-x:auto}
.output_stderr pre{color:var(--quiet)}
"""
# What makes a browser fetch: these attributes, unless they hold the thing itself.
FETCHED = {"src", "srcset", "data", "poster", "background", "xlink:href"}


def executed(file: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, run in a fresh kernel whose working folder is its own.

    Raises CellExecutionError if a cell raises, and RuntimeError, with what the kernel wrote of its
    own, if the kernel does not start, dies or takes longer than LIMIT_S for a cell.
    """
    notebook = nbformat.read(file, as_version=4)
    # The first cell chooses the devices by itself, as it has to for a reader.
    own = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in own}
    # The kernel's own words, such as of a socket that closed before it ended, are no outputs.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as own_words:
        # The kernel's sockets are files of this folder's, as no other user may open them; and so
        # are IPython's, as the user's own start-up files do not belong into a page.
        sockets = {"transport": "ipc", "ip": f"{folder}/kernel"}
        client = NotebookClient(
            notebook,
            timeout=LIMIT_S,
            kernel_name="python3",
            resources={"metadata": {"path": str(file.parent)}},
            coalesce_streams=True,  # what was printed in pieces is one text
            config=Config(KernelManager=sockets),
        )
        try:
            client.execute(env=env | {"IPYTHONDIR": folder}, stderr=own_words)
        except CellExecutionError:
            raise
        except Exception as error:
            own_words.seek(0)
            words = own_words.read().decode(errors="replace")
            raise RuntimeError(f"{type(error).__name__}: {error}\n{words[-WORDS:]}") from error
    return notebook


def html_of(notebook: nbformat.NotebookNode, name: str) -> str:
    """The page of a notebook that has run. Raises ValueError if it would fetch anything."""
    first, *cells = notebook.cells
    title, _, rest = first.source.partition("\n")
    top = nbformat.v4.new_markdown_cell(rest.strip())
    shown = nbformat.v4.new_notebook(cells=[top, *cells], metadata=notebook.metadata)
    exporter = HTMLExporter(
        template_name="basic",
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
        config=Config(NbConvertBase={"display_data_priority": SHOWN}),
    )
    body, _ = exporter.from_notebook_node(shown)
    told = (
        f"{name}.ipynb, run from top to bottom with jax {importlib.metadata.version('jax')}; "
        "the exercises are open."
    )
    text = page.document(
        title.lstrip("# "), page.element("p", told, class_="quiet"), page.Markup(body), css=css()
    )
    if fetched := list(dict.fromkeys(elsewhere(text))):
        raise ValueError(f"The page would fetch {', '.join(fetched)}: put it into the notebook.")
    return text


def css() -> str:
    """Of cells, and of code in light and dark."""
    code = (
        f"@media (prefers-color-scheme:{scheme}){{"
        + HtmlFormatter(style=style).get_style_defs(".highlight")
        + "}\n"
        for scheme, style in (("light", "default"), ("dark", "github-dark"))
    )
    return "".join(code) + ".highlight,.highlight pre{background:var(--back)}" + CSS


def elsewhere(text: str) -> Iterator[str]:
    """What a browser that opens the page would fetch or run."""
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag in ("script", "link", "iframe", "object", "embed", "base"):
                found.append(f"<{tag}>")
            for name, value in attrs:
                here = (value or "").strip().startswith(("data:", "#"))
                if name in FETCHED and not here:
                    found.append(str(value))
                if name == "style":
                    self.read_style(value or "")

        def handle_data(self, data):
            if self.lasttag == "style":
                self.read_style(data)

        def read_style(self, style):
            for part in style.split("url(")[1:]:
                if not part.lstrip("\"' ").startswith(("data:", "#")):
                    found.append(part.partition(")")[0])
            if "@import" in style:
                found.append("@import")

    Reader().feed(text)
    yield from found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as 02_sharding; all if none")
    parser.add_argument("--source", type=Path, default=HERE, help="where the notebooks are")
    parser.add_argument("--out", type=Path, default=PAGES, help="where the pages go")
    args = parser.parse_args(argv)
    files = {file.stem: file for file in sorted(args.source.glob("*.ipynb"))}
    names = [Path(name).stem for name in args.names] or list(files)
    if unknown := [name for name in names if name not in files]:
        print(f"No notebook is named {', '.join(unknown)}: choose from {', '.join(files)}.")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for i, name in enumerate(names):
        print(f"[{i + 1}/{len(names)}] {name} ...", flush=True)
        start, out = time.monotonic(), args.out / f"{name}.html"
        out.unlink(missing_ok=True)  # what lies there in the end is of this run
        try:
            text = html_of(executed(files[name]), name)
        except Exception as error:  # in whatever way it fails, the others get their pages
            print(f"{type(error).__name__}: {error}", flush=True)
            failed.append(name)
        else:
            out.write_text(text)
            size, seconds = len(text.encode()) / 1e6, time.monotonic() - start
            print(f"      {out}: {size:.1f} MB, {seconds:.0f} s", flush=True)
    if failed:
        print(f"Without a page, for what stands above: {', '.join(failed)}.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
