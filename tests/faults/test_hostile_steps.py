"""Steps that a stranger has made and signed: their digests are right, what they say is not."""

import json
import pickle
import shutil
import time

import jax
import numpy as np
import pytest

from lsdl import commits
from lsdl.checkpoint import Checkpoints, check_weights, holds, load_weights, save_weights
from lsdl.errors import UserError
from tests.faults.test_strangers import DEEP, MARK, peak_bytes

WEIGHTS = {"params": {"a": np.arange(4.0, dtype=np.float32), "b": np.ones(3, np.float32)}}
ABSTRACT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), WEIGHTS)
HUGE = 2**62


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "checkpoints"
    save_weights(folder, WEIGHTS)
    return folder


def resigned(folder, change):
    """The step of `folder`, changed and committed again, as its own author would."""
    step, staged = folder / "0", folder / f"{commits.SAVING}0-0123456789ab-1"
    step.rename(staged)
    (staged / commits.MANIFEST).unlink()
    change(staged / "state")
    commits.commit(staged, commits.Manifest(0, None, "0123456789ab"), fence=lambda: None)
    return folder


def metadata(edit):
    def change(state):
        path = state / "_METADATA"
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return change


def replaced(content):
    def change(state):
        path = state / "_METADATA"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def huge_shapes(state):
    """Of every file that tells a shape as JSON."""
    for path in state.rglob("*"):
        if path.is_file() and b'"shape"' in path.read_bytes():
            found = path.read_bytes()
            for shape in (b"[4]", b"[3]", b"[\n 4\n ]"):
                found = found.replace(shape, b"[%d]" % HUGE)
            path.write_bytes(found)
        if path.is_file() and b"write_shape" in path.read_bytes():
            path.write_bytes(path.read_bytes().replace(b"[4]", b"[%d]" % HUGE))


def renamed_keys(found):
    text = json.dumps(found).replace('"b"', '"../../b"')
    return json.loads(text)


def absolute_keys(found):
    return json.loads(json.dumps(found).replace('"b"', '"/etc/passwd"'))


def without_data(state):
    for path in state.iterdir():
        if path.is_dir() and path.name != "array_metadatas":
            shutil.rmtree(path)


def emptied(state):
    shutil.rmtree(state)
    state.mkdir()


HOSTILE = {
    "deep": replaced(DEEP),
    "deep list": replaced("[" * 100_000),
    "NaN": replaced("NaN"),
    "list": replaced("[]"),
    "number": replaced("7"),
    "pickle": replaced(pickle.dumps({"tree_metadata": {}})),
    "not text": replaced(b"\xff\xfe"),
    "no tree": metadata(lambda found: {}),
    "other types": metadata(lambda found: found | {"tree_metadata": 7}),
    "names upwards": metadata(renamed_keys),
    "absolute names": metadata(absolute_keys),
    "huge shapes": huge_shapes,
    "no arrays": without_data,
    "nothing": lambda state: [
        shutil.rmtree(p) if p.is_dir() else p.unlink() for p in state.iterdir()
    ],
}


@pytest.mark.threat(35, 37)
@pytest.mark.parametrize("case", HOSTILE)
def test_a_signed_step_that_lies_is_refused_or_gives_the_arrays_asked_for(good, tmp_path, case):
    folder = resigned(shutil.copytree(good, tmp_path / "checkpoints"), HOSTILE[case])
    refused = []
    before = peak_bytes()
    began = time.monotonic()
    for read in (
        lambda: load_weights(folder, ABSTRACT),
        lambda: check_weights(folder, ABSTRACT),
        lambda: holds(folder, "params"),
        lambda: Checkpoints(folder).restore(0, ABSTRACT),
    ):
        try:
            found = read()
        except UserError as error:
            refused.append(str(error))
        else:
            if isinstance(found, dict):
                assert jax.tree.map(np.shape, found) == jax.tree.map(np.shape, WEIGHTS)
    assert time.monotonic() - began < 20  # 1 s each, on a machine with nothing else to do
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)
    assert peak_bytes() - before < 200 * 2**20
    assert not list(tmp_path.rglob(MARK))


def test_what_is_signed_again_unchanged_is_read(good, tmp_path):
    folder = resigned(shutil.copytree(good, tmp_path / "checkpoints"), lambda state: None)
    found = load_weights(folder, ABSTRACT)
    np.testing.assert_array_equal(found["params"]["a"], WEIGHTS["params"]["a"])
