"""An audit finds the first step whose bits are not what they were, and a changed row."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl import auditing, digests
from lsdl.audit import main
from lsdl.errors import FINISHED, STUCK
from tests.faults import poison

RUN = ("total_steps=9", "checkpoint.every_steps=4", "eval.every_steps=9", "log.tensorboard=false")
RUN += ("guard.audit_every_steps=2", "log.every_steps=1")
FLAGS = tuple(f"--config.{field}" for field in RUN)


@pytest.fixture(scope="module")
def audited(tmp_path_factory):
    """A run folder whose steps 2, 4, 6 and 8 are audited."""
    from lsdl.train import main as train
    from tests.conftest import CONFIGS

    workdir = tmp_path_factory.mktemp("audited") / "run"
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    assert train(["--config", config, f"--workdir={workdir}", *FLAGS]) == FINISHED
    return workdir


def written(workdir):
    return [json.loads(line) for line in (workdir / "audit.jsonl").read_text().splitlines()]


@pytest.mark.threat(19)
def test_a_replay_gives_the_same_bits(audited, capsys):
    assert [row["step"] for row in written(audited)] == [2, 4, 6, 8]
    assert main([str(audited), "--steps", "1:9"]) == FINISHED
    assert "4 audited steps, 2 to 8: the same bits." in capsys.readouterr().out
    assert main([str(audited), "--steps", "5:8"]) == FINISHED  # from the checkpoint of step 4


@pytest.mark.threat(19, 44)
def test_a_flipped_bit_is_found_at_the_audited_step_after_it(train, monkeypatch, tmp_path, capfd):
    with monkeypatch.context() as patch:
        poison.bit(patch, 3, lambda step: step == 4)  # after the fifth step
        assert train("digits_mlp:smoke", f"--workdir={tmp_path}", *FLAGS)[0] == FINISHED
    assert main([str(tmp_path), "--steps", "1:9"]) == STUCK
    assert "Step 6 is not what it was: " in capfd.readouterr().err
    assert main([str(tmp_path), "--steps", "1:5"]) == FINISHED


@pytest.mark.threat(19)
def test_a_changed_row_breaks_the_chain(audited, tmp_path, capsys):
    workdir = tmp_path / "copy"
    workdir.mkdir()
    (workdir / "config.json").write_text((audited / "config.json").read_text())
    rows = written(audited)
    rows[1]["loss"] = rows[2]["loss"]
    (workdir / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(workdir), "--steps", "1:9"]) == STUCK
    assert "has a line 2 that is not what was written" in capsys.readouterr().err
    for gone in range(3):  # a row that is left out
        left = [row for i, row in enumerate(written(audited)) if i != gone]
        (workdir / "audit.jsonl").write_text("".join(json.dumps(row) + "\n" for row in left))
        assert main([str(workdir), "--steps", "1:9"]) == STUCK


@pytest.mark.threat(19)
def test_a_resumed_run_goes_on_with_the_chain(train, audited, tmp_path):
    short = [f.replace("total_steps=9", "total_steps=5") for f in FLAGS]
    assert train("digits_mlp:smoke", f"--workdir={tmp_path}", *short)[0] == FINISHED
    assert train("digits_mlp:smoke", f"--workdir={tmp_path}", *FLAGS)[0] == FINISHED
    assert [row["step"] for row in auditing.read(tmp_path / "audit.jsonl")] == [2, 4, 6, 8]


@pytest.mark.threat(13, 19)
def test_a_digest_is_of_the_bits_alone(load):
    draw = np.random.default_rng(0).standard_normal
    tree = {"a": np.float32(draw((16, 8))), "b": np.float32(draw(8)), "c": np.int32(3)}
    of = jax.jit(digests.of_tree)
    whole = np.asarray(of(tree))
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    for spec in (P("x", "y"), P("y", "x"), P(("x", "y")), P(None, "y")):
        split = tree | {"a": jax.device_put(tree["a"], NamedSharding(mesh, spec))}
        np.testing.assert_array_equal(of(split), whole)


@pytest.mark.threat(19)
def test_every_single_bit_counts():
    values = np.float32(np.random.default_rng(1).standard_normal(12))
    of = jax.jit(jax.vmap(lambda x: digests.of_tree({"w": x})))
    flips = np.arange(12 * 32)
    bits = np.tile(values.view(np.uint32), (len(flips), 1))
    bits[flips, flips // 32] ^= np.uint32(1) << np.uint32(flips % 32)
    found = np.asarray(of(jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.float32)))
    one = np.asarray(digests.of_tree({"w": values}))
    assert (found != one).all(-1).all()
    assert len(np.unique(found, axis=0)) == len(flips)
    swapped = values.copy()
    swapped[[2, 7]] = values[[7, 2]]
    assert (np.asarray(digests.of_tree({"w": swapped})) != one).any()
