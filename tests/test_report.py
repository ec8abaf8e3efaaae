import functools
import html.parser
import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lsdl import book, dynamics, marks, page, plots, reporting, verdict
from lsdl import runs as kept
from lsdl.analysis import noise
from lsdl.files import plain
from lsdl.report import main
from tests import browser

NAMESPACES = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
EVIL = "<script>alert(1)</script>\"'&"


VOID = ("meta", "br", "img")


class Page(html.parser.HTMLParser):
    """What a reader of HTML sees: ids, tags, text, and whether tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.tags, self.open, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def checked(text):
    """The page, which stands alone: no reference to anything outside, nothing that runs."""
    seen = Page(text)
    assert "script" not in seen.tags
    assert len(seen.ids) == len(set(seen.ids))
    bare = text
    for name in NAMESPACES:
        bare = bare.replace(name, "")
    assert not re.search(r"https?:|file:|url\((?!#)|@import|javascript:|<link|<iframe", bare)
    for svg in svgs(text):
        root = ET.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].tag.endswith("title")
        used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
        assert used <= set(re.findall(r' id="([^"]*)"', svg))
    return seen


def svgs(text):
    return re.findall(r"<svg .*?</svg>", text, flags=re.S)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two seeds of one job, really run."""
    from lsdl.train import main as train
    from tests.conftest import CONFIGS

    folders = [tmp_path_factory.mktemp("runs") / f"seed{seed}" for seed in (0, 1)]
    for seed, folder in enumerate(folders):
        path = f"{CONFIGS / 'digits_mlp.py'}:smoke"
        given = ["log.tensorboard=false", "checkpoint.every_steps=20", f"seed={seed}"]
        given = [f"--config.{field}" for field in given]
        assert train(["--config", path, "--workdir", str(folder), *given]) == 0
    return folders


def made(folder, *, seed=0, name="made", rows=(), **fields):
    """A run folder written by hand."""
    folder.mkdir()
    fields = {"name": name, "seed": seed, "optim.name": "sgd", **fields}
    (folder / "config.json").write_text(
        json.dumps({"source": "c.py", "config": fields, "history": []})
    )
    rows = rows or [{"step": s, "split": "train", "loss": 1 / s} for s in range(1, 9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(plain(row)) + "\n" for row in rows))
    return folder


def test_two_seeds_are_one_line_with_a_band(runs, tmp_path, capsys):
    out = tmp_path / "r.html"
    assert main([*map(str, runs), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written: {out}\n"
    text = out.read_text()
    seen = checked(text)
    words = " ".join(seen.words)
    assert "2 runs in 1 group" in words
    assert len(svgs(text)) == 9  # loss, accuracy, rate, batch size, 3 norms, throughput, step time
    for title in ("Loss", "Accuracy", "Learning rate", "Batch size", "Gradient", "Step time"):
        assert title in seen.words
    assert "gap: test - train" in words
    assert len(re.findall(r"± 0\.\d{4}", words)) == 8  # loss and accuracy of three splits, gap
    for part in ("jax", "optax", "cpu", "Python 3."):
        assert part in words
    assert "state_bytes_per_device" in words
    assert len(text) < 400_000


def test_the_numbers_are_those_of_the_runs(runs):
    group = kept.grouped([kept.read_run(folder) for folder in runs])[0]
    steps, mean, low, high = kept.curve(group, "train", "loss")
    rows = [[json.loads(r) for r in (f / "metrics.jsonl").read_text().splitlines()] for f in runs]
    losses = [[r["loss"] for r in run if r["split"] == "train"] for run in rows]
    assert steps == list(range(1, 21))
    assert mean == pytest.approx([(a + b) / 2 for a, b in zip(*losses, strict=True)])
    assert low == [min(pair) for pair in zip(*losses, strict=True)]
    assert high == [max(pair) for pair in zip(*losses, strict=True)]


def test_groups_are_called_by_what_they_differ_in(tmp_path):
    runs = [made(tmp_path / f"a{seed}", seed=seed) for seed in range(2)]
    runs.append(made(tmp_path / "b", **{"optim.name": "lars", "batch_size": 8}))
    read = [kept.read_run(run) for run in runs]
    groups = kept.grouped(read)
    assert [(g.label, len(g.runs)) for g in groups] == [("sgd", 2), ("lars batch_size=8", 1)]
    text = reporting.runs_page(runs)
    assert "lars batch_size=8" in checked(text).words
    assert "What differs" in text


def test_a_run_keeps_its_colour_where_another_has_no_values():
    table = ([1, 2], [1.0, 2.0])
    both = reporting._drawn({"a": table, "b": table}, title="t", y="y").svg()
    alone = reporting._drawn({"a": None, "b": table}, title="t", y="y").svg()
    assert marks.PALETTE[0] in both
    assert marks.PALETTE[1] in both
    assert marks.PALETTE[0] not in alone
    assert marks.PALETTE[1] in alone


def test_a_run_without_values_or_environment_is_reported_as_it_is(tmp_path):
    run = made(tmp_path / "a")
    (run / "metrics.jsonl").write_text("")
    assert "Nothing is measured yet." in checked(reporting.runs_page([run])).words


def test_nan_and_layers_and_memory(tmp_path):
    rows = [
        {
            "step": s,
            "split": "train",
            "loss": float("nan") if s > 2 else 1.0,
            "grad_norm/block_0": 1.0 * s,
            "peak_bytes": 10 * s,
        }
        for s in range(1, 5)
    ]
    text = reporting.runs_page([made(tmp_path / "a", rows=rows)])
    seen = checked(text)
    assert any("by layer" in word for word in seen.words)
    assert "Memory: as recorded by step" in seen.words
    assert "recorded memory" not in text


def test_a_long_curve_stays_light(tmp_path):
    rows = [{"step": s, "split": "train", "loss": 1.0} for s in range(1, 5001)]
    run = made(tmp_path / "a", rows=rows)
    group = kept.grouped([kept.read_run(run)])[0]
    steps = kept.curve(group, "train", "loss")[0]
    assert len(steps) <= kept.MOST_POINTS
    assert steps[-1] == 5000


def test_layers_of_a_deep_net_are_one_light_picture_of_each_kind(tmp_path):
    layers = [
        f"encoder/transformer/blocks/{m}/kernel[{i}]" for m in ("attn", "mlp") for i in range(65)
    ]
    kinds = list(dynamics.KINDS)
    rows = [{"step": s, "split": "train", "loss": 1.0} for s in range(1, 31)]
    for row in rows:
        row |= {f"{k}/{n}": (i + 1) / row["step"] for i, n in enumerate(layers) for k in kinds}
        row[f"trust_ratio/{layers[3]}"] = float("inf")  # a layer without gradient
    text = reporting.runs_page([made(tmp_path / "a", rows=rows)])
    seen = checked(text)
    assert len(text) < 2_000_000
    for title, _ in dynamics.KINDS.values():
        assert f"{title} by layer" in seen.words
    assert text.count("data:image/png") >= len(kinds)
    assert (
        seen.words.count("encoder/transformer/blocks/attn/kernel[0]") == 4
    )  # the lowest of each kind
    assert seen.words.count("encoder/transformer/blocks/mlp/kernel[64]") == 4
    assert any("Not measured: --config.log.measure=" in word for word in seen.words)


def test_few_layers_are_lines_in_the_order_of_the_net(tmp_path):
    names = [f"grad_norm/block_{i}/w" for i in (1, 10, 2)]
    rows = [{"step": s, "split": "train"} | dict.fromkeys(names, 1.0 * s) for s in (1, 2)]
    groups = kept.grouped([kept.read_run(made(tmp_path / "a", rows=rows))])
    (figure,) = dynamics.layer_figures(groups)
    assert set(re.findall(r"block_\d+/w", figure.svg())) == {n.partition("/")[2] for n in names}
    assert dynamics._layers(groups[0]) == {"grad_norm": ["block_1/w", "block_2/w", "block_10/w"]}


def noisy(size, steps, *, signal, accum=4, first=1, seen=0, trace=100.0):
    """Rows of a run whose gradient and noise are known, up to a jitter of its squares."""
    random = np.random.default_rng(first)
    rows = []
    for step in range(first, first + steps):
        jitter = 1 + 0.02 * random.normal(size=2)
        seen += size
        small, big = (signal + trace / n * j for n, j in zip((16, size), jitter, strict=True))
        rows.append({"step": step, "split": "train", "loss": signal, "examples_seen": seen})
        rows[-1] |= {"grad_square_micro": small, "grad_square": big, "micro_angle_deg": 80.0}
    return rows


SIZES = {"batch_size": 64, "accum": 4, "batch_ramp": []}


def group_of(folder, rows, **fields):
    return kept.grouped([kept.read_run(made(folder, rows=rows, **fields))])


def test_the_noise_scale_grows_as_the_loss_falls(tmp_path):
    rows = noisy(64, 40, signal=1.0) + noisy(64, 40, signal=0.25, first=41)
    groups = group_of(tmp_path / "a", rows, **SIZES)
    windows = dynamics.noise_windows(groups[0])
    assert len(windows) == 10
    assert [w.last_step for w in windows] == list(range(8, 81, 8))
    first = [[row[n] for row in rows[:8]] for n in ("grad_square_micro", "grad_square")]
    assert (windows[0].scale, windows[0].error) == noise.noise_scale(*first, 16, 64)
    for w in windows:
        assert w.scale == pytest.approx(100 / w.loss, abs=4 * w.error)
        assert not w.bound
    titles = [figure.title for figure in dynamics.noise_figures(groups)]
    assert titles == ["Angle between microbatches", "Noise scale", "Noise scale by loss"]
    text = reporting.runs_page([tmp_path / "a"])
    words = checked(text).words
    assert f"{windows[0].scale:.1f} ± {windows[0].error:.1f}" in words
    assert {"batch of 64", "33 to 40"} <= set(words)


def test_a_batch_that_grows_has_windows_of_its_own(tmp_path):
    rows = noisy(64, 20, signal=1.0) + noisy(256, 20, signal=1.0, first=21, seen=64 * 20)
    kept_rows = [row for row in rows if row["step"] % 2 == 1]  # one is of both sizes' steps
    (group,) = group_of(tmp_path / "a", kept_rows, **SIZES | {"batch_ramp": [[50.0, 4]]})
    windows = dynamics.noise_windows(group)
    assert [(w.first_step, w.last_step, w.batch_size) for w in windows] == [
        (1, 19, 64),
        (23, 39, 256),
    ]
    assert all(w.scale == pytest.approx(100, abs=4 * w.error) for w in windows)


def test_a_gradient_lost_in_the_noise_gives_a_bound(tmp_path):
    groups = group_of(tmp_path / "a", noisy(64, 8, signal=1e-3), **SIZES)
    (window,) = dynamics.noise_windows(groups[0])
    assert window.bound
    assert 500 < window.scale < 1e5
    assert f"&gt; {plots.word(window.scale)}" in dynamics.noise_text(groups)
    assert "at least" in list(dynamics.noise_figures(groups))[1].svg()


@pytest.mark.parametrize(
    ("steps", "fields", "told"),
    [
        (0, SIZES, "Not measured: --config.log.measure"),
        (8, {}, "config.json tells no batch_size and accum"),
        (7, SIZES, "it takes 8 logged steps"),
    ],
)
def test_noise_that_is_not_measured_is_told_so(tmp_path, steps, fields, told):
    groups = group_of(tmp_path / "a", noisy(64, steps, signal=1.0), **fields)
    assert told in dynamics.noise_text(groups)
    assert not any("Noise" in figure.title for figure in dynamics.noise_figures(groups))


@pytest.mark.threat(35)
def test_all_text_is_escaped(tmp_path):
    run = made(tmp_path / "a", name=EVIL, **{"model.name": EVIL})
    other = made(tmp_path / "b", name=EVIL, **{"model.name": "x"})
    (run / "env.json").write_text(json.dumps({"platform": EVIL, "command": [EVIL], "commit": EVIL}))
    seen = checked(reporting.runs_page([run, other]))
    assert EVIL in seen.words


@pytest.fixture
def study(tmp_path):
    """A study's folder, whose texts want to be more than text."""
    folder = tmp_path / "some_study"
    (folder / "figures").mkdir(parents=True)
    claims = [
        {"id": f"c{i}", "text": EVIL, "source": "s", "expected": ">= 1", "n": 2, "spread": 0.5}
        | {"measured": [1.5, None][i], "holds": not i}
        for i in range(2)
    ]
    found = {"study": "some_study", "scale": "small", "claims": claims, "claim": EVIL}
    entry = {"id": "big", "settings": "", "command": "python -m lsdl.train", "published": EVIL}
    found |= {"source": EVIL, "figures": ["one", "two", "../../one"], "full_scale": [entry]}
    (folder / "verdict.json").write_text(json.dumps(found))
    (folder / "table.csv").write_text(f'id,x\na,"{EVIL.replace(chr(34), chr(34) * 2)}"\n')
    for name in ("one", "two"):  # the same ids in both
        (folder / "figures" / f"{name}.svg").write_text(saved())
    return folder


@functools.cache
def saved():
    return plots.lines({"y": ([1, 2], [1, 2])}, title="T", x="x", y="y").svg()


def test_a_study_is_reported(study, capsys):
    assert main([str(study)]) == 0
    text = (study / "report.html").read_text()
    seen = checked(text)
    assert {"holds", "does not hold", "1 of 2 claims hold.", "no number ± 0.5"} <= set(seen.words)
    assert EVIL in seen.words
    assert len(svgs(text)) == 3
    assert "var(--ink" in text


@pytest.mark.parametrize(
    "inside",
    [
        "<script>1</script>",
        '<g onclick="1"/>',
        '<image href="https://example.org/a.png"/>',
        '<a href="#x"/>',
        '<path style="fill:url(https://example.org)"/>',
        "<style>@import 'x';</style>",
        '<foreignObject><body xmlns="http://www.w3.org/1999/xhtml"/></foreignObject>',
    ],
)
def test_a_figure_that_does_more_than_draw_is_left_out(study, inside):
    file = study / "figures" / "one.svg"
    for text in (
        f'<svg xmlns="http://www.w3.org/2000/svg">{inside}</svg>',
        f'<!DOCTYPE svg [<!ENTITY a "b">]><svg xmlns="http://www.w3.org/2000/svg">&a;{inside}</svg>',
    ):
        file.write_text(text)
        seen = checked(verdict.study_page(study))
        assert any("The figure one is missing" in word for word in seen.words)
    file.unlink()
    assert any("The figure one is missing" in w for w in Page(verdict.study_page(study)).words)


def test_the_book_holds_what_was_measured(study):
    seen = checked(book.book([study], failed={"other": ValueError(EVIL)}))
    assert "1 of 2 hold" in seen.words
    assert "failed" in seen.words


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{0}/none"], "holds no run"),
        (["{0}/a", "{0}/b"], "Several folders need --out"),
        (["{0}/a", "--out", "{0}"], "cannot be written"),
        (["{0}/a", "{0}/some_study", "--out", "{0}/x.html"], "report it alone"),
        (["{0}/torn"], "config.json is not what lsdl writes"),
        (["{0}/spoilt"], "is not as lsdl writes it"),
    ],
)
def test_bad_input_is_one_sentence(study, tmp_path, capsys, arguments, told):
    for name in ("a", "b", "torn", "spoilt"):
        made(tmp_path / name)
    (tmp_path / "torn" / "config.json").write_text("{")
    (tmp_path / "spoilt" / "env.json").write_text("{")
    assert main([argument.format(tmp_path) for argument in arguments]) == 2
    told_so = capsys.readouterr().err
    assert told in told_so
    assert len(told_so.splitlines()) == 1


def test_a_cell_is_escaped_unless_it_is_markup():
    assert "<b>1</b>" in page.table(["a"], [[page.element("b", "1")]])
    assert "&lt;b&gt;" in page.table(["a"], [["<b>"]])


@browser.needs_chromium
@pytest.mark.parametrize("kind", ["runs", "study"])
def test_a_browser_shows_it(kind, runs, study, tmp_path):
    """What Chromium makes of the page, offline: figures, nothing blank, no word in the console."""
    text = verdict.study_page(study) if kind == "study" else reporting.runs_page(runs)
    found = browser.opened(text, tmp_path, width=500)
    assert found["width"] <= 500  # no phone scrolls sideways
    assert (found["console"], found["asked"]) == ([], [])
    assert found["dom"].count("<svg ") == len(svgs(text))
    assert found["dom"].count("</svg>") == len(svgs(text))
    picture, file = tmp_path / "picture.png", tmp_path / "plain.html"
    file.write_text(text)
    browser.chromium(
        file, tmp_path / "profile", "--window-size=1200,1600", f"--screenshot={picture}"
    )
    from PIL import Image

    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1600, 1200, 3)
    line = [int(marks.PALETTE[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (abs(pixels.astype(int) - line).max(-1) < 8).sum() > 300  # the first series' colour


def test_a_run_has_its_prediction_beside_it(runs):
    """Of the program that ran: `lsdl.report` shows it beside what was measured."""
    run = kept.read_run(runs[0])
    rest = run.plan["state_bytes_per_device"] - 3 * 4 * run.plan["parameters"]  # Adam, in float32
    assert 0 < rest < 64  # the key, the step, counts
    step = run.plan["compiled"]
    assert step["needed_bytes"] > step["argument_bytes"] > run.plan["state_bytes_per_device"]
    assert run.plan["model_flops_per_example"] == run.plan["step_flops_per_example"] > 0
    assert "memory of a device" in reporting.runs_page(runs)
