"""A state saved under one mesh and number of processes is restored under any, bit for bit."""

import itertools
import json

import jax
import pytest

from lsdl.checkpoint import Checkpoints
from lsdl.errors import STORAGE
from lsdl.launcher import spawn_local
from tests.conftest import ROOT
from tests.faults.moved import STEP, abstract_of, placed, same
from tests.faults.outside import damage, steps

pytestmark = pytest.mark.threat(13)
MESHES = {  # data x fsdp or tensor
    "1x1": (1, ("mesh=data=1",)),
    "8x1": (8, ("mesh=data=8",)),
    "2x4": (8, ("mesh=data=2,fsdp=4",)),
    "4x2": (8, ("mesh=fsdp=4,tensor=2",)),
}


def test_restored_on_all_ordered_pairs_of_meshes(tmp_path, record_property):
    abstract = {
        name: abstract_of(fields, devices=jax.devices()[:count])
        for name, (count, fields) in MESHES.items()
    }
    for saved in MESHES:
        with Checkpoints(tmp_path / saved) as checkpoints:
            checkpoints.save(STEP, placed(abstract[saved]), metrics=None)
    pairs = list(itertools.product(MESHES, MESHES))
    for saved, target in pairs:
        with Checkpoints(tmp_path / saved) as checkpoints:
            state = checkpoints.restore(STEP, abstract[target])
        assert same(state, abstract[target]), (saved, target)
    record_property("mesh_pairs", len(pairs))


def job(folder, do, number, *fields):
    """Run one job of `number` processes; returns (exit codes, stderr of each, what they found)."""
    folder.mkdir(exist_ok=True)
    children = spawn_local(
        ("tests.faults.moved", str(folder), do, " ".join(fields)),
        num_processes=number,
        devices_per_process=4 // number,
        env={"PYTHONPATH": str(ROOT)},
        capture=True,
    )
    try:
        said = [child.communicate(timeout=120)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    found = [folder / f"{do}-{i}.json" for i in range(number)]
    return (
        [child.returncode for child in children],
        said,
        [json.loads(path.read_text()) for path in found if path.exists()],
    )


def moved(folder, saved, targets):
    """Save by some processes, restore by others; {mesh: fields} differ too."""
    codes, said, found = job(folder, "save", saved, "mesh=data=2,fsdp=2")
    assert (codes, found) == ([0] * saved, [True] * saved), said
    assert steps(folder) == [STEP]
    assert not damage(folder / "checkpoints" / str(STEP))
    for target in targets:
        for mesh in ("data=2,fsdp=2", "fsdp=2,tensor=2"):
            codes, said, found = job(folder, "restore", target, f"mesh={mesh}")
            assert (codes, found) == ([0] * target, [True] * target), (saved, target, said)


def test_saved_by_two_processes_and_restored_by_one(tmp_path, record_property):
    codes, said, found = job(tmp_path / "run", "save", 2, "mesh=data=2,fsdp=2")
    assert (codes, found) == ([0, 0], [True, True]), said
    assert not damage(tmp_path / "run" / "checkpoints" / str(STEP))
    abstract = abstract_of(("mesh=data=2,fsdp=4",))
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        assert same(checkpoints.restore(STEP, abstract), abstract)
    record_property("process_pairs", 1)


@pytest.mark.faults
@pytest.mark.parametrize("saved", [1, 2, 4])
def test_saved_and_restored_by_one_two_and_four_processes(tmp_path, record_property, saved):
    moved(tmp_path / "run", saved, [1, 2, 4])
    record_property("process_pairs", 6)


@pytest.mark.threat(5, 44)
def test_a_save_that_fails_in_one_process_ends_the_job(tmp_path):
    """The first time: another process has gone on to other steps meanwhile."""
    codes, said, _ = job(tmp_path / "run", "commit-fails", 2, "mesh=data=2,fsdp=2")
    assert codes == [STORAGE, STORAGE], said
    [line] = [line for line in said[0].splitlines() if line.startswith("lsdl: ")]
    assert "[ENOSPC]" in line
    assert "lsdl: " not in said[1]
    assert steps(tmp_path / "run") == []
