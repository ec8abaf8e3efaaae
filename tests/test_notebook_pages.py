"""`make notebooks`: a page shows what the notebook shows, and asks for nothing from elsewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest
from nbformat import v4

from lsdl import plots
from tests import browser
from tests.conftest import ROOT

RENDER = ROOT / "notebooks" / "render.py"
WORDS = "Noise: tr Σ / |G|² < B_crit, so a * b and x_1, x_2.\n\n    S = S_min (1 + B_crit / B)"


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", RENDER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook(*cells):
    """Of (source, output) pairs, None in place of an output for text; an output is its data."""
    made = [v4.new_markdown_cell("# Noise & size\n\nWhat it is.")]
    for source, data in cells:
        if data is None:
            made.append(v4.new_markdown_cell(source))
        else:
            output = v4.new_output("execute_result", data, execution_count=1)
            made.append(v4.new_code_cell(source, outputs=[output], execution_count=1))
    return v4.new_notebook(cells=made)


def figure():
    return plots.lines({"a": ([1, 2], [3, 4])}, title="Loss", x="step", y="nats").svg()


def test_a_page_has_what_the_notebook_has_and_asks_for_nothing(render):
    drawn = {"text/html": figure(), "text/plain": "Figure()"}
    text = render.html_of(
        notebook((WORDS, None), ("1 < 2", {"text/plain": "<b>"}), ("f", drawn)), "n"
    )
    assert list(render.elsewhere(text)) == []
    assert text.count("<h1>Noise &amp; size</h1>") == text.count("Noise &amp; size</h1>") == 1
    assert "tr Σ / |G|² &lt; B_crit, so a * b and x_1, x_2." in text  # no letter is lost
    assert re.search(r"<pre><code>S = S_min \(1 \+ B_crit / B\)\s*</code></pre>", text)
    assert "&lt;b&gt;" in text
    assert "Figure()" not in text
    assert text.count("<svg ") == text.count("</svg>") == 1


def test_what_needs_a_script_is_shown_as_text(render):
    scripts = {"application/javascript": "alert(1)", "text/latex": "$x$", "text/plain": "plain one"}
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "m"}, "text/plain": "bar"}
    text = render.html_of(notebook(("a", scripts), ("b", widget)), "n")
    assert "plain one" in text
    assert ">bar<" in text.replace("\n", "")
    assert "alert" not in text


@pytest.mark.parametrize(
    ("cell", "fetched"),
    [
        (("![a](https://example.org/a.png)", None), "https://example.org/a.png"),
        (("![a](figure.png)", None), "figure.png"),
        (("a", {"text/html": "<script>alert(1)</script>"}), "<script>"),
        (("a", {"text/html": "<iframe src='data:text/html,a'></iframe>"}), "<iframe>"),
        (("a", {"text/html": "<p style='background:url(\"//example.org\")'>"}), '"//example.org"'),
        (("a", {"text/html": "<style>@import 'a.css'</style>"}), "@import"),
    ],
    ids=["picture", "file", "script", "frame", "style", "import"],
)
def test_a_page_that_would_fetch_something_is_refused(render, cell, fetched):
    with pytest.raises(ValueError, match=re.escape(f"would fetch {fetched}: ")):
        render.html_of(notebook(cell), "n")


def test_no_notebook_writes_tex_for_its_page_could_not_set_it():
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(file.read_text())["cells"]:
            source = "".join(cell["source"]) if cell["cell_type"] == "markdown" else ""
            assert not re.search(r"\$[^$]+\$|\\[(\[]|\\begin", source), (file.name, cell["id"])


def write(folder, *names, source=RENDER.parent):
    command = [sys.executable, RENDER, *names, "--source", source, "--out", folder]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)


def test_a_notebook_that_fails_is_named_and_the_others_have_pages(tmp_path):
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "b.html").write_text("of an earlier run")
    sources = {
        "a": "import os\nsorted({'JAX_PLATFORMS', 'JAX_NUM_CPU_DEVICES'} & set(os.environ))",
        "b": "assert 1 == 2, 'one is not two'",
        "c": "print('first', flush=True)\nprint('and', 'last')\nopen('c.ipynb').read(1)",
        # What a kernel writes of its own while it ends is nobody's matter.
        "d": "import atexit, sys\natexit.register(sys.__stderr__.write, 'a closed socket')",
    }
    for name, source in sources.items():
        nbformat.write(notebook((source, {})), tmp_path / f"{name}.ipynb")
    done = write(pages, source=tmp_path)
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert [line for line in done.stdout.splitlines() if line.startswith("[")] == [
        f"[{i + 1}/4] {name} ..." for i, name in enumerate(sources)
    ]
    assert "one is not two" in done.stdout
    assert done.stdout.splitlines()[-1] == "Without a page, for what stands above: b."
    assert sorted(file.name for file in pages.iterdir()) == ["a.html", "c.html", "d.html"]
    # The first cell chooses the devices, and the notebook's folder is the working one.
    assert "[]" in (pages / "a.html").read_text()
    assert "first\nand last" in (pages / "c.html").read_text()
    done = write(pages, "e", source=tmp_path)
    assert done.returncode == 2
    assert done.stdout == "No notebook is named e: choose from a, b, c, d.\n"


def test_what_a_kernel_wrote_before_it_died_is_shown(render, tmp_path):
    source = "import os, sys\nprint('the last words', file=sys.__stderr__, flush=True)\nos._exit(3)"
    nbformat.write(notebook((source, {})), tmp_path / "n.ipynb")
    with pytest.raises(RuntimeError, match=r"^DeadKernelError: [^\n]*\n(.*\n)*the last words"):
        render.executed(tmp_path / "n.ipynb")


@pytest.mark.slow
@browser.needs_chromium
def test_a_browser_shows_a_notebook_offline(tmp_path):
    """Figures are there, no text is cut off, nothing is asked for, no word in the console."""
    name = "05_plan_a_pod"
    done = write(tmp_path, name)
    assert done.returncode == 0, done.stdout
    text = (tmp_path / f"{name}.html").read_text()
    found = browser.opened(text, tmp_path, width=1280)
    assert (found["console"], found["asked"], found["cut"]) == ([], [], [])
    assert found["width"] <= 1280
    assert found["figures"] == text.count("<svg ") >= 3
    assert "Still open: " in found["dom"]
    assert "output_stream output_stderr" not in found["dom"]
