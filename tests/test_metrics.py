"""Metrics: means from sums, and curves that survive crashes and resumes."""

import json
import math
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.errors import UserError
from lsdl.metrics import JsonLines, TensorBoard, Writers, means, read_rows


def test_means_are_sums_over_the_weight():
    assert means({"loss": 6.0, "accuracy": 3.0}, 4.0) == {"loss": 1.5, "accuracy": 0.75}
    assert means({}, 4.0) == {}


def test_means_of_parts_are_the_mean_of_the_whole():
    values = np.random.default_rng(0).normal(size=7)
    weights = np.array([1, 1, 0, 1, 1, 1, 0])
    parts = [slice(0, 2), slice(2, 3), slice(3, 7)]
    total = sum((values[p] * weights[p]).sum() for p in parts)
    weight = sum(weights[p].sum() for p in parts)
    expected = values[weights == 1].mean()
    assert means({"loss": jnp.float32(total)}, jnp.float32(weight))["loss"] == pytest.approx(
        expected, rel=1e-5
    )


# metrics.jsonl


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def row(step, split="train", **values):
    return {"step": step, "split": split, "loss": float(step)} | values


def write(path, rows, *, after_step=0):
    lines = JsonLines(path, after_step=after_step)
    for r in rows:
        lines.write(r)
    lines.close()


def test_rows_are_read_as_written(path):
    rows = [row(1), row(1, "valid"), row(2, accuracy=0.1, examples=270), row(2, "test")]
    write(path, rows)
    assert read_rows(path) == rows
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("value", [0.1, 1e-45, 1e300, -0.0, 2**53 + 1, 0])
def test_numbers_are_read_exactly(path, value):
    write(path, [row(1, x=value)])
    assert read_rows(path)[0]["x"] == value


@pytest.mark.threat(42)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_for_strict_readers_and_read_as_nan(path, value):
    write(path, [row(1, x=value)])
    assert '"x": null' in path.read_text()
    assert math.isnan(read_rows(path)[0]["x"])
    line = path.read_text()
    write(path, [], after_step=1)
    assert path.read_text() == line


def test_no_file_has_no_rows(path):
    assert read_rows(path) == []
    assert read_rows(str(path)) == []


def test_rows_can_be_read_while_they_are_written(path):
    lines = JsonLines(path, after_step=0)
    for step in (1, 2, 3):
        lines.write(row(step))
        assert [r["step"] for r in read_rows(path)] == list(range(1, step + 1))
    lines.close()


@pytest.mark.threat(42)
@pytest.mark.parametrize("after_step", range(7))
def test_resume_drops_the_rows_behind_its_step(path, after_step):
    rows = [row(step, split) for step in range(1, 6) for split in ("train", "valid")]
    write(path, rows)
    write(path, [], after_step=after_step)
    assert read_rows(path) == [r for r in rows if r["step"] <= after_step]
    assert list(path.parent.iterdir()) == [path]


def test_dropped_rows_are_written_again_and_kept_ones_are_not(path):
    write(path, [row(step, run=1) for step in range(1, 6)])
    write(path, [row(step, run=2) for step in range(1, 8)], after_step=3)
    assert [(r["step"], r["run"]) for r in read_rows(path)] == [
        *((step, 1) for step in (1, 2, 3)),
        *((step, 2) for step in (4, 5, 6, 7)),
    ]


@pytest.mark.threat(42)
def test_first_row_of_a_step_and_split_stays(path):
    first = [row(1, x=1), row(1, "valid", x=2), row(2, x=3)]
    write(path, [*first, row(1, x=4), row(1, "valid", x=5), row(2, x=6)])
    assert read_rows(path) == first


@pytest.mark.threat(42)
@pytest.mark.parametrize("cut", range(1, 16))
def test_torn_last_line_is_skipped_and_then_gone(path, cut):
    write(path, [row(1), row(2), row(3)])
    path.write_text(path.read_text()[: -1 - cut])
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    write(path, [row(3), row(4)], after_step=3)
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3, 4]


def test_last_line_that_lacks_its_end_alone_is_whole(path):
    write(path, [row(1), row(2)])
    path.write_text(path.read_text()[:-1])
    assert [r["step"] for r in read_rows(path)] == [1, 2]
    write(path, [row(3)], after_step=2)
    assert [r["step"] for r in read_rows(path)] == [1, 2, 3]


@pytest.mark.parametrize("line", [0, 1])
def test_torn_line_in_the_middle_raises_and_nothing_is_lost(path, line):
    write(path, [row(1), row(2), row(3)])
    lines = path.read_text().splitlines(keepends=True)
    lines[line] = lines[line][:9] + "\n"
    torn = "".join(lines)
    path.write_text(torn)
    for read in (lambda: read_rows(path), lambda: JsonLines(path, after_step=3)):
        with pytest.raises(UserError, match=f"broken line {line + 1}"):
            read()
    assert path.read_text() == torn


# All writers as one


class Recorder:
    def __init__(self):
        self.rows, self.closed = [], 0

    def write(self, row):
        self.rows.append(row)

    def close(self):
        self.closed += 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3),
        (0.5, 0.5),
        (np.float32(0.1), float(np.float32(0.1))),
        (np.float64(0.1), 0.1),
        (np.int64(7), 7),
        (np.array(7, np.uint8), 7),
        (jnp.float32(1.5), 1.5),
        (jnp.bfloat16(1.5), 1.5),
        (jnp.float16(1.5), 1.5),
        (jnp.int32(7), 7),
        (jnp.uint32(2**32 - 1), 2**32 - 1),
        (jnp.float32(jnp.inf), math.inf),
    ],
    ids=lambda value: f"{getattr(value, 'dtype', type(value).__name__)}-{value}",
)
def test_numbers_become_plain_ones(path, value, expected):
    recorder = Recorder()
    writers = Writers([recorder, JsonLines(path, after_step=0)])
    writers.write(jnp.int32(5), "train", {"x": value})
    writers.close()
    assert recorder.rows == [{"step": 5, "split": "train", "x": expected}]
    assert type(recorder.rows[0]["x"]) is type(expected)
    assert type(recorder.rows[0]["step"]) is int
    if math.isfinite(expected):
        assert read_rows(path) == recorder.rows


def test_every_writer_gets_every_row_and_is_closed():
    recorders = [Recorder(), Recorder()]
    writers = Writers(r for r in recorders)
    writers.write(1, "train", {"loss": 2.0})
    writers.write(1, "valid", {"loss": 3.0, "examples": 4})
    writers.close()
    for recorder in recorders:
        assert recorder.closed == 1
        assert recorder.rows == [
            {"step": 1, "split": "train", "loss": 2.0},
            {"step": 1, "split": "valid", "loss": 3.0, "examples": 4},
        ]


def test_no_writers_write_nothing():
    writers = Writers([])
    writers.write(1, "train", {"loss": 1.0})
    writers.close()


# TensorBoard


def events(folder):
    """The events of the only file in `folder`: records of length, crc, proto, crc."""
    from tensorboardX.proto.event_pb2 import Event

    [file] = folder.iterdir()
    assert file.name.startswith("events.out.tfevents.")
    content, at, found = file.read_bytes(), 0, []
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        found.append(Event.FromString(content[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return found


def test_event_file_has_a_tag_per_split_and_metric(tmp_path):
    writer = TensorBoard(tmp_path / "tensorboard", after_step=0)
    writer.write({"step": 1, "split": "train", "loss": 2.5, "examples_seen": 96})
    ratios = {"update_ratio/head/bias": float("inf"), "update_ratio/x": float("nan")}
    writer.write({"step": 2, "split": "train", "loss": 1.5, **ratios})
    writer.write({"step": 2, "split": "valid", "loss": 0.5})
    writer.close()
    scalars = [
        (event.step, value.tag, value.simple_value)
        for event in events(tmp_path / "tensorboard")
        for value in event.summary.value
    ]
    assert scalars == [
        (1, "train/loss", 2.5),
        (1, "train/examples_seen", 96.0),
        (2, "train/loss", 1.5),
        (2, "valid/loss", 0.5),
    ]


@pytest.mark.parametrize("after_step", [0, 5])
def test_resume_hides_the_points_behind_its_step(tmp_path, after_step):
    writer = TensorBoard(tmp_path / "tensorboard", after_step=after_step)
    writer.write({"step": after_step + 1, "split": "train", "loss": 1.0})
    writer.close()
    starts = [
        event.step
        for event in events(tmp_path / "tensorboard")
        if event.WhichOneof("what") == "session_log"
        and event.session_log.status == event.session_log.START
    ]
    assert starts == [after_step + 1]
