import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from lsdl import marks, plots

SVG = "{http://www.w3.org/2000/svg}"
XS = np.arange(1, 31)


def words(svg):
    return ["".join(node.itertext()) for node in ET.fromstring(svg).iter(f"{SVG}text")]


def a_line(**options):
    ys = 3 / np.sqrt(XS)
    series = {"train": (XS, ys), "valid": (XS, ys + 0.1, ys, ys + 0.2)}
    return plots.lines(series, title="Loss & more", x="step", y="loss", **options)


FIGURES = {
    "lines": a_line(),
    "log": a_line(logx=True, logy=True, levels={"chance": 2.3}, band=(1, 2, "claimed")),
    "published": a_line(published={"Goyal 2017": ([2, 4], [1, 2])}, joined=False),
    "scatter": plots.scatter({"a": ([1, 2], [2, 1])}, title="s", x="x", y="y", diagonal=True),
    "bars": plots.bars({"lars": (3, 2, 4), "sgd": 1, "lost": float("nan")}, title="b", x="s"),
    "groups": plots.bars({"jit": {"a": 1, "b": 2}, "pmap": {"a": 3}}, title="g", x="s", logx=True),
    "heatmap": plots.heatmap(
        [[1.5, -2], [np.nan, 0]], title="h", x="c", y="r", columns="ab", rows=[1, 2], diverging=True
    ),
    "picture": plots.heatmap(
        np.ones((40, 40)), title="p", x="c", y="r", columns=range(40), rows=range(40), logz=True
    ),
    "empty": plots.lines({}, title="nothing", x="x", y="y"),
    "lost": plots.lines(
        {"no": ([1, 2], [np.nan, -1])}, title="n", x="x", y="y", logx=True, logy=True
    ),
    "panels": plots.panels([a_line(), a_line(logy=True)], title="Both"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_one_self_contained_element_and_the_same_each_time(name):
    figure = FIGURES[name]
    svg = figure.svg()
    assert svg == figure.svg() == figure._repr_html_()
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text == figure.title
    left = svg.replace("http://www.w3.org/2000/svg", "").replace("http://www.w3.org/1999/xlink", "")
    assert not re.search(r"https?:|file:|url\((?!#)|<metadata|<!DOCTYPE|<script", left)
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg)) == set(ids)


def test_several_figures_in_one_page_share_no_id():
    ids = [
        name
        for prefix, figure in (("", FIGURES["lines"]), ("", FIGURES["log"]), ("b", FIGURES["log"]))
        for name in re.findall(r' id="([^"]*)"', figure.svg(prefix=prefix))
    ]
    assert ids
    assert len(ids) == len(set(ids))


def test_text_stays_text_and_each_line_has_its_label():
    shown = words(FIGURES["log"].svg())
    assert {"train", "valid", "chance", "claimed", "step", "loss", "Loss & more"} <= set(shown)
    assert "no values" in words(FIGURES["empty"].svg())
    assert "no values" in words(FIGURES["lost"].svg())
    assert {"lars", "3", "no value"} <= set(words(FIGURES["bars"].svg()))


def widths(series, **options):
    """Of each series' line in the drawing, in their order."""
    svg = plots.lines(series, title="t", x="x", y="y", **options).svg()
    drawn = []
    for i in range(len(series)):
        style = re.search(rf'style="[^"]*stroke: {marks.PALETTE[i]};[^"]*"', svg)[0]
        drawn.append(float(re.search(r"stroke-width: ([\d.]+)", style)[1]))
    return drawn


def test_of_lines_on_top_of_each_other_each_is_seen():
    ys = 3 / np.sqrt(XS)
    apart = {"a": (XS, ys), "b": (XS, ys + 1), "c": (XS[1:], ys[1:])}
    assert set(widths(apart)) == {marks.THICK}
    one = widths({"a": (XS, ys), "b": (XS, ys + 1), "c": (XS, ys + 1e-6), "d": (XS, ys)})
    assert one[0] > one[2] > one[3] == one[1] == marks.THICK
    # On a logarithmic axis a distance is a ratio.
    near = {"a": (XS, ys), "b": (XS, ys / 1e3), "c": (XS, ys / 2e3)}
    assert widths(near)[1] > marks.THICK == widths(near, logy=True)[1]
    assert set(widths({"a": ([1, 2], [1, 1]), "b": ([1, 2], [1, 1])})) != {marks.THICK}


def test_a_label_has_one_colour_in_all_figures_of_its_kind():
    drawn = {"b": (XS, XS), "c": (XS, 2 * XS)}
    for among, colours in (((), (0, 1)), (("a", "b", "c"), (1, 2))):
        svg = plots.lines(drawn, title="t", x="x", y="y", among=among).svg()
        assert {c for c in marks.PALETTE if c in svg} == {marks.PALETTE[i] for i in colours}


def test_a_label_is_shown_as_it_is():
    label = r"a_$\frac{1}$ <b> & 字"
    svg = plots.lines({label: ([1, 2], [1, 2])}, title="<i>", x="$x^", y="y").svg()
    assert {label, "<i>", "$x^"} <= set(words(svg))


def test_labels_do_not_overlap():
    series = {f"run {i}": (XS, XS * 0 + 1 + i * 1e-6) for i in range(8)}
    figure = plots.lines(series | {"far": (XS, XS)}, title="t", x="x", y="y")
    root = ET.fromstring(figure.svg())
    nodes = {"".join(n.itertext()): n for n in root.iter(f"{SVG}text")}
    places = [
        float(re.search(r"translate\(\S+ (\S+)\)|$", nodes[label].get("transform", ""))[1] or 0)
        or float(nodes[label].get("y"))
        for label in series
    ]
    assert min(abs(np.diff(sorted(places)))) > 8


def test_ink_and_paper_are_left_to_the_page():
    plain, themed = FIGURES["lines"].svg(), FIGURES["lines"].svg(themed=True)
    assert "var(" not in plain
    for colour, name in plots.THEME.items():
        assert f"var(--{name}, {colour})" in themed
        assert colour in plain


def test_saved_as_svg_or_png(tmp_path):
    FIGURES["lines"].save(tmp_path / "a.svg")
    assert ET.parse(tmp_path / "a.svg").getroot().tag == f"{SVG}svg"
    FIGURES["lines"].save(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        FIGURES["lines"].save(tmp_path / "a.gif")


def test_a_series_of_two_lengths_is_refused():
    with pytest.raises(ValueError, match="one length"):
        plots.lines({"a": ([1, 2], [1])}, title="t", x="x", y="y")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(3, "3"), (0.12345, "0.123"), (1e-5, "1e-5"), (50304, "50.3k"), (1.5e9, "1.5G"), ("a", "a")],
)
def test_numbers_are_short(value, shown):
    assert plots.word(value) == shown
