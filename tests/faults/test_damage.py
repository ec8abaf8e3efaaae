"""Damage to any file of a checkpoint is found before use: no other numbers are ever restored."""

import random
import shutil

import jax
import numpy as np
import pytest

from lsdl import checkpoint, commits
from lsdl.checkpoint import Checkpoints, check_weights, holds, load_weights
from lsdl.errors import StorageError
from lsdl.rundir import RunDir
from tests.faults.steps import all_files, damage, flip_bit, tree

pytestmark = pytest.mark.threat(6, 7)
STEPS = (2, 4, 6)


def state_of(step):
    draw = np.random.default_rng(step)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "params": {"kernel": normal(40, 100), "bias": normal(100)},
        "model_state": {},
        "step": np.int32(step),
        "key": jax.random.key_data(jax.random.key(step)),
    }


ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state_of(0))


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A run folder with three checkpoints."""
    folder = RunDir(tmp_path_factory.mktemp("damage") / "run")
    folder.create()
    folder.write_config(source="x.py", overrides={}, fields={}, changes={})
    with Checkpoints(folder.checkpoints, keep_latest=3) as checkpoints:
        for step in STEPS:
            checkpoints.save(step, state_of(step), metrics=None)
    return folder.path


@pytest.fixture
def run(template, tmp_path):
    return RunDir(shutil.copytree(template, tmp_path / "run"))


def restored(folder, *, owner=None):
    """The step that is taken, and whether its bits are those that were saved."""
    with Checkpoints(folder.checkpoints, owner=owner) as checkpoints:
        step = checkpoints.latest_step()
        state = checkpoints.restore(step, ABSTRACT)
    same = jax.tree.map(lambda a, b: np.asarray(a).tobytes() == b.tobytes(), state, state_of(step))
    return step, all(jax.tree.leaves(same))


def damaged(template, tmp_path, record_property, *, damages, restores, seed):
    draw = random.Random(seed)
    for i in range(damages):
        folder = RunDir(shutil.copytree(template, tmp_path / "run"))
        root, hit = folder.checkpoints, STEPS[draw.choice((-1, -1, -2)) :]
        told = [damage(root / str(s), draw, other=root / str(STEPS[0])) for s in hit]
        for step in hit:
            assert commits.verify(root / str(step), run=run_id(folder)), (seed, i, told)
        if i % (damages // restores) == 0:
            left = [step for step in STEPS if step not in hit]
            assert restored(folder) == (max(left), True), (seed, i, told)
        shutil.rmtree(folder.path)
    record_property("damages", damages)
    record_property("damages_restored_around", restores)


def run_id(folder):
    return folder.read_config()["id"]


def test_no_damage_is_missed_and_no_other_numbers_are_restored(template, tmp_path, record_property):
    damaged(template, tmp_path, record_property, damages=100, restores=10, seed=0)


@pytest.mark.faults
@pytest.mark.parametrize("seed", range(1, 13))
def test_two_thousand_damages(template, tmp_path, record_property, seed):
    damaged(template, tmp_path, record_property, damages=168, restores=168, seed=seed)


def test_every_file_of_a_checkpoint_is_read(template):
    """So that no place is left where damage is not looked for."""
    for step in STEPS:
        folder = template / "checkpoints" / str(step)
        named = commits.read_manifest(folder).files.keys()
        there = {str(path.relative_to(folder)) for path in all_files(folder)}
        assert there == {*named, commits.MANIFEST}
        assert len(there) > 8


def test_the_owner_moves_aside_what_does_not_verify_and_says_so_in_a_line(run, capfd):
    run.acquire()
    path = run.checkpoints / "6" / "state" / "_METADATA"
    flip_bit(path, random.Random(0))
    before = tree(run.checkpoints / "6")
    assert restored(run, owner=run) == (4, True)
    [line] = capfd.readouterr().err.splitlines()
    [place] = commits.rejected(run.checkpoints)
    for word in ("step 6", "state/_METADATA", "sha256", place):
        assert word in line
    assert tree(run.checkpoints / place) == before
    with Checkpoints(run.checkpoints, owner=run) as checkpoints:  # and another 6 may come
        checkpoints.save(6, state_of(6), metrics=None)
    assert restored(run) == (6, True)
    run.release()


def test_a_reader_moves_nothing(run, capfd):
    flip_bit(run.checkpoints / "6" / "state" / "_METADATA", random.Random(0))
    before = tree(run.path)
    assert restored(run) == (4, True)
    assert "step 6" in capfd.readouterr().err
    with Checkpoints(run.checkpoints) as checkpoints, pytest.raises(StorageError, match="sha256"):
        checkpoints.restore(6, ABSTRACT)  # also if nobody has chosen
    weights = {"params": ABSTRACT["params"], "model_state": {}}
    loaded = load_weights(run.checkpoints, weights)
    np.testing.assert_array_equal(loaded["params"]["kernel"], state_of(4)["params"]["kernel"])
    assert tree(run.path) == before


@pytest.mark.threat(36)
def test_weights_are_not_read_through_a_symlink(run, tmp_path):
    for step in STEPS:
        inner = run.checkpoints / str(step) / "state" / "ocdbt.process_0" / "d"
        path = max(inner.iterdir(), key=lambda path: path.stat().st_size)
        shutil.move(path, tmp_path / path.name)
        path.symlink_to(tmp_path / path.name)
    weights = {"params": ABSTRACT["params"], "model_state": {}}
    for use in (load_weights, check_weights):
        with pytest.raises(StorageError, match="is a symlink"):
            use(run.checkpoints, weights)
    with pytest.raises(StorageError, match="is a symlink"):
        holds(run.checkpoints, "params")
    with pytest.raises(StorageError, match="is a symlink"):
        restored(run)


def test_where_none_verifies_nothing_is_begun_anew(run):
    """A run of a hundred days must not start from its first step because of a bad disk."""
    run.acquire()
    for step in STEPS:
        (run.checkpoints / str(step) / commits.MANIFEST).unlink()
    before = tree(run.path)
    with pytest.raises(StorageError) as error:
        restored(run, owner=run)
    for words in ("None of the 3 checkpoints", "step 6: no manifest.json", "older lsdl"):
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert tree(run.path) == before
    run.release()


def test_processes_that_see_different_folders_are_told_apart(run, monkeypatch):
    """By the digest of the manifest, which all of them compare before they restore."""
    seen = []

    def gathered(digest):
        seen.append(np.stack([digest, digest + (len(seen) > 0)]))
        return seen[-1]

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint.multihost_utils, "process_allgather", gathered)
    checkpoint._check_same(run.checkpoints / "6")
    assert (seen[0] != 0).any()
    with pytest.raises(StorageError, match="Process 1 does not see what process 0 sees"):
        checkpoint._check_same(run.checkpoints / "6")


@pytest.mark.threat(10)
def test_a_step_of_another_run_is_not_gone_on_from(run, template, tmp_path):
    other = RunDir(tmp_path / "other")
    other.create()
    other.write_config(source="x.py", overrides={}, fields={}, changes={})
    shutil.copytree(template / "checkpoints", other.checkpoints)
    with pytest.raises(StorageError, match=f"of the run {run_id(run)}: this is {run_id(other)}"):
        restored(other)


def test_a_run_that_has_lost_its_config_is_not_taken_for_another(run):
    run.config.unlink()
    with pytest.raises(ValueError, match="has checkpoints and no config"):
        run.claim(source="x.py", overrides={}, fields={}, devices={}, total_steps=9)


def test_notes_and_dropped_steps(run):
    run.acquire()
    with Checkpoints(run.checkpoints, keep_latest=9, owner=run) as checkpoints:
        checkpoints.save(8, state_of(8), metrics={"loss": float("nan")}, notes={"skip": [[1, 2]]})
        assert checkpoints.notes(8) == {"skip": [[1, 2]]}
        assert checkpoints.notes(6) == {}
        assert checkpoints.newest(at_most=7) == 6
        assert checkpoints.newest(at_most=1) is None
        checkpoints.drop_after(4)
        assert checkpoints.latest_step() == 4
        checkpoints.save(6, state_of(7), metrics=None)  # the same number, another state
        assert checkpoints.restore(6, ABSTRACT)["step"] == 7
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["2", "4", "6"]
    run.release()
