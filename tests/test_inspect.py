"""The pictures and tables of shardings say what jax does with the arrays."""

import html.parser
import itertools
import math
import re
import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import BAD_INPUT, FINISHED
from lsdl.experiment import build
from lsdl.plan import main
from lsdl.sharding import inspect
from lsdl.sharding.mesh import make_mesh, parse_mesh
from tests.conftest import CONFIGS

LAW = settings(max_examples=60, derandomize=True, database=None, deadline=None)
MESHES = ["data=8", "data=2,fsdp=2,tensor=2", "tensor=2,data=4", "stage=4,fsdp=2", "data=1"]


def grid(text):
    number = math.prod(int(part.split("=")[1]) for part in text.split(","))
    return make_mesh(parse_mesh(text, number), jax.devices()[:number])


@st.composite
def shardings(draw, most=4):
    mesh = grid(draw(st.sampled_from(MESHES)))
    axes = draw(st.permutations([a for a, n in mesh.shape.items() if n > 1]))
    spec = [[] for _ in range(draw(st.integers(0, most)))]
    for axis in axes:
        if spec and draw(st.booleans()):
            spec[draw(st.integers(0, len(spec) - 1))].append(axis)
    spec = P(*(tuple(dim) or None for dim in spec))
    shape = tuple(8 * draw(st.integers(1, 3)) for _ in spec)
    return NamedSharding(mesh, spec), shape


def svg(picture):
    root = ElementTree.fromstring(picture.svg)
    find = lambda tag: root.findall(f"{{http://www.w3.org/2000/svg}}{tag}")  # noqa: E731
    return root, find("rect"), [word.text for word in find("text")]


@LAW
@given(shardings())
def test_blocks_are_those_of_jax(drawn):
    sharding, shape = drawn
    held = inspect.blocks(sharding.spec, len(shape), sharding.mesh)
    theirs = {}
    step = sharding.shard_shape(shape)
    for device, index in sharding.devices_indices_map(shape).items():
        block = tuple((s.start or 0) // n for s, n in zip(index, step, strict=True))
        theirs.setdefault(block, []).append(device.id)
    assert {block: sorted(ids) for block, ids in held.items()} == {
        block: sorted(ids) for block, ids in theirs.items()
    }


@LAW
@given(shardings())
def test_a_picture_has_a_chip_for_every_block_of_every_device(drawn):
    sharding, shape = drawn
    picture = inspect.picture(sharding, shape, title="<w>")
    root, rects, words = svg(picture)
    chips = [rect for rect in rects if rect.get("fill") != "none"]
    assert len(chips) == sharding.mesh.size
    assert len({chip.get("fill") for chip in chips}) == sharding.mesh.size
    area = math.prod(n // s for n, s in zip(shape, sharding.shard_shape(shape), strict=True))
    assert len(rects) - len(chips) == area
    for rect in rects:
        for place, size, whole in (("x", "width", "width"), ("y", "height", "height")):
            assert float(rect.get(place)) >= 0
            assert float(rect.get(place)) + float(rect.get(size)) <= float(root.get(whole)) + 0.1
    ids = [device.id for device in sharding.mesh.devices.flat]
    assert sorted(int(w) for w in words[1:] if w.isdigit()) == sorted(ids)
    assert words[0].startswith(f"<w> {shape}")
    assert picture._repr_html_() == picture.svg
    assert str(picture).splitlines()[0] == words[0]


def test_copies_are_told_from_parts():
    """Chips stand apart in one frame, as parts of an array never do: they fill no frame."""
    mesh = grid("data=2,fsdp=4")
    for spec, frames in ((P(), 1), (P("fsdp"), 4), (P(("data", "fsdp")), 8)):
        _, rects, _ = svg(inspect.picture(NamedSharding(mesh, spec), (8,)))
        spans = [(float(r.get("x")), float(r.get("x")) + float(r.get("width"))) for r in rects]
        chips = sorted(s for s, r in zip(spans, rects, strict=True) if r.get("fill") != "none")
        around = [s for s, r in zip(spans, rects, strict=True) if r.get("fill") == "none"]
        assert (len(chips), len(around)) == (8, frames)
        assert all(end + 1 <= start for (_, end), (start, _) in itertools.pairwise(chips))
        for start, end in chips:
            assert any(left + 1 <= start < end <= right - 1 for left, right in around)


def test_words_beside_the_blocks_have_the_colour_of_the_pages_text():
    """A dark page's too; the blocks are light on every page, and what stands in them is black."""
    root = ElementTree.fromstring(inspect.picture_of_mesh(grid("data=2,fsdp=2,tensor=2")).svg)
    inks = {text.text: text.get("fill") for text in root if text.tag.endswith("text")}
    assert root.get("fill") == "currentColor"
    assert {inks[word] for word in inks if not word.isdigit()} == {"inherit"}
    assert {inks[str(i)] for i in range(8)} == {"#000"}


def test_the_text_form():
    mesh = grid("data=2,fsdp=2,tensor=2")
    lines = str(inspect.picture_of_mesh(mesh)).splitlines()
    assert [re.sub(" +", " ", line.strip()) for line in lines] == [
        *("mesh data=2, fsdp=2, tensor=2", "data 0", "| tensor 0 | tensor 1"),
        *("fsdp 0 | 0 | 1", "fsdp 1 | 2 | 3", "data 1", "| tensor 0 | tensor 1"),
        *("fsdp 0 | 4 | 5", "fsdp 1 | 6 | 7"),
    ]
    x = jax.device_put(jnp.zeros((4, 6)), NamedSharding(mesh, P("fsdp", "tensor")))
    lines = str(inspect.picture(x.sharding, x.shape, title="x")).splitlines()
    assert [re.sub(" +", " ", line.strip()) for line in lines] == [
        *("x (4, 6) P('fsdp', 'tensor')", "| 0:3 | 3:6", "0:2 | 0 4 | 1 5", "2:4 | 2 6 | 3 7")
    ]
    assert (
        str(inspect.picture(NamedSharding(mesh, P()), ()))
        .splitlines()[-1]
        .endswith("0 1 2 3 4 5 6 7")
    )


def test_more_devices_than_can_be_named_are_counted():
    mesh = make_mesh(parse_mesh("data=32", 32), 32)
    _, rects, words = svg(inspect.picture(NamedSharding(mesh, P()), (4,)))
    assert len(rects) == 33
    assert words[-9:] == [*map(str, range(8)), "+24"]


# What the table says


def here(x):
    """The bytes of it that one device holds."""
    return x.addressable_shards[0].data.nbytes


@pytest.mark.parametrize("rules", ["zero1", "fsdp", "fsdp_tp"])
def test_bytes_are_those_that_devices_hold(load, rules):
    mesh = "data=4,fsdp=2" if rules == "zero1" else "fsdp=8"
    built = build(load("digits_mlp:smoke", f"rules={rules}", f"mesh={mesh}"))
    put = lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)  # noqa: E731
    state = built.abstract_state
    parts = {part: jax.tree.map(put, getattr(state, part)) for part in ("params", "opt_state")}
    held, whole = (
        {part: sum(map(count, jax.tree.leaves(tree))) for part, tree in parts.items()}
        for count in (here, lambda x: x.nbytes)
    )
    assert inspect.totals(built.placements, built.mesh) == (
        f"each of 8 devices holds {held['params']:,} of {whole['params']:,} bytes of parameters "
        f"and {held['opt_state']:,} of {whole['opt_state']:,} bytes of optimiser state"
    )
    by_path = {p.path: inspect.device_bytes(p, built.mesh) for p in built.placements}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(parts["params"]):
        path = "params/" + jax.tree_util.keystr(keys, simple=True, separator="/")
        assert by_path[path] == here(leaf)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.words = [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}

    def handle_data(self, data):
        self.words.append(data)


def plan(*flags):
    config = f"{CONFIGS / 'digits_vit.py'}:smoke"
    return main(["--config", config, "--config.mesh=data=2,fsdp=2,tensor=2", *flags])


def test_the_plan_prints_every_parameter_and_writes_a_page_that_needs_no_other(
    load, tmp_path, capsys
):
    page = tmp_path / "page.html"
    assert plan("--shardings", f"--html={page}") == FINISHED
    out = capsys.readouterr().out
    built = build(load("digits_vit:smoke", "mesh=data=2,fsdp=2,tensor=2"))
    for placement in built.placements:
        lines = [line for line in out.splitlines() if line.startswith(f"{placement.path} ")]
        assert len(lines) == placement.path.startswith("params/")
        for line in lines:
            assert placement.rule in line
            assert inspect.show(placement.spec, built.mesh) in line
    (unused,) = (line for line in out.splitlines() if line.startswith("unused: "))
    assert "conv_out -> tensor" in unused
    assert "expert" not in unused  # of which the mesh has one
    tags = Tags()
    tags.feed(page.read_text())
    assert tags.seen.count("svg") == 1 + inspect.MOST_PICTURES
    assert inspect.KEY in page.read_text()
    number = sum(p.path.startswith("params/") for p in built.placements)
    assert (
        f"Of {number} parameters the {inspect.MOST_PICTURES} largest are drawn" in page.read_text()
    )
    assert not {"script", "link", "img"} & set(tags.seen)
    assert {placement.path for placement in built.placements} <= set(tags.words)


def test_a_page_that_cannot_be_written_is_bad_input(tmp_path, capsys):
    assert plan("--shardings", f"--html={tmp_path / 'no' / 'page.html'}") == BAD_INPUT
    assert "--html=" in capsys.readouterr().err


def test_pictures_together_are_one_picture():
    mesh = grid("data=8")
    one, two = inspect.picture_of_mesh(mesh), inspect.picture(NamedSharding(mesh, P("data")), (16,))
    both = inspect.together(one, two)
    assert both._repr_html_().count("<svg") == both._repr_html_().count("</svg>") == 2
    assert str(both) == f"{one}\n\n{two}"
