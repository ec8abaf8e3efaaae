"""What was compiled before: read again only where it was written, by whom, and as it was."""

import os
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache as jaxs

from lsdl import compile_cache
from lsdl.metrics import read_rows
from tests.conftest import CONFIGS, ROOT

RUN = (
    *("--config", f"{CONFIGS / 'digits_mlp.py'}:smoke", "--config.total_steps=4"),
    *("--config.optim.schedule.warmup_steps=2", "--config.log.every_steps=1"),
    *("--config.log.tensorboard=false", "--config.checkpoint.every_steps=2"),
)
UNSET = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


@pytest.fixture
def home(monkeypatch, tmp_path):
    """An empty cache of the user's, as if jax had been told of none; afterwards jax has its own."""
    given = jax.config.jax_compilation_cache_dir
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(compile_cache, "_folder", None)
    monkeypatch.setattr(compile_cache, "LEAST_S", 0.0)
    jax.config.update("jax_compilation_cache_dir", None)
    jaxs.reset_cache()
    yield tmp_path / "home"
    jax.config.update("jax_compilation_cache_dir", given)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    jaxs.reset_cache()


def again(home):
    """As the next process does."""
    compile_cache._folder = None
    jax.config.update("jax_compilation_cache_dir", None)
    jaxs.reset_cache()
    compile_cache.use()


def compiled():
    """A program of its own that jax has not in memory."""
    jax.clear_caches()
    return jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.eye(7)).sum()


def entries():
    return compile_cache._entries(compile_cache.root() / compile_cache.key())


def hits(work):
    seen = []
    listener = lambda event, **_: seen.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        work()
    finally:
        jax.monitoring.unregister_event_listener(listener)
    return seen.count("/jax/compilation_cache/cache_hits")


def test_what_was_sealed_is_read_again(home):
    compile_cache.use()
    assert hits(compiled) == 0
    compile_cache.seal()
    kept = len(entries())
    again(home)
    assert hits(compiled) == kept > 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in (home / "lsdl/compiled").iterdir())


@pytest.mark.threat(33)
@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "link", "unsealed", "lost"])
def test_what_is_not_what_was_written_is_gone_before_it_is_read(home, capsys, damage):
    compile_cache.use()
    right = compiled()
    compile_cache.seal()
    assert entries()
    for entry in entries():
        for_byte = bytearray(entry.read_bytes())
        digest = entry.with_name(entry.name + compile_cache.DIGEST)
        if damage == "flip":
            for_byte[len(for_byte) // 2] ^= 16
            entry.write_bytes(for_byte)
        elif damage == "truncate":
            os.truncate(entry, len(for_byte) - 1)
        elif damage == "empty":
            entry.write_bytes(b"")
        elif damage == "link":
            entry.rename(home / entry.name)
            entry.symlink_to(home / entry.name)
        elif damage == "unsealed":  # killed between the two
            digest.unlink()
        else:
            entry.unlink()
    capsys.readouterr()
    again(home)
    assert not entries()
    assert not list(compile_cache.root().glob("*/*"))  # no digest outlives its entry
    told = capsys.readouterr().err
    assert ("had changed since it was written" in told) == (damage not in ("unsealed", "lost"))
    assert told.count("\n") <= 1
    assert hits(lambda: jax.block_until_ready(compiled())) == 0
    assert compiled() == right


@pytest.mark.threat(34)
@pytest.mark.parametrize("of", ["root", "folder"])
@pytest.mark.parametrize("how", ["open to others", "a link", "of another"])
def test_a_folder_that_others_can_write_is_not_used(home, capsys, monkeypatch, of, how):
    root, folder = compile_cache.root(), compile_cache.root() / compile_cache.key()
    place = root if of == "root" else folder
    folder.parent.parent.mkdir(parents=True)
    root.mkdir(mode=0o700)
    folder.mkdir(mode=0o700)
    if how == "open to others":
        place.chmod(0o770)
    elif how == "a link":
        place.rename(home / "elsewhere")
        place.symlink_to(home / "elsewhere")
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        place = root  # both are
    compile_cache.use()
    assert jax.config.jax_compilation_cache_dir is None
    told = capsys.readouterr().err
    assert told.startswith(f"lsdl: Nothing compiled is kept: {place} ")
    assert told.count("\n") == 1


def test_what_the_user_has_set_stays(home, monkeypatch):
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        compile_cache.use()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(home / "own"))
    compile_cache.use()
    compile_cache.seal()
    assert jax.config.jax_compilation_cache_dir == str(home / "own")
    assert not compile_cache.root().exists()


@pytest.mark.threat(33)
def test_another_processor_or_jax_has_another_folder(monkeypatch):
    here = compile_cache.key()
    with monkeypatch.context() as patch:
        patch.setattr(compile_cache, "_features", lambda: ["avx2"])
        there = compile_cache.key()
        patch.setattr(jax, "__version__", "0.0.1")
        older = compile_cache.key()
    assert len({here, there, older}) == 3
    assert compile_cache.key() == here


def test_the_oldest_goes_first_also_of_another_jax(home, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 250)
    root = compile_cache.root()
    for age, name in enumerate(("a", "b", "c")):
        folder = root / f"jax-{name}"
        folder.mkdir(parents=True)
        (folder / f"jit-{name}-cache").write_bytes(bytes(100))
        os.utime(folder / f"jit-{name}-cache", (1000 - age, 1000 - age))
    root.chmod(0o700)
    compile_cache.use()
    assert sorted(path.name for path in root.glob("*/*")) == ["jit-a-cache", "jit-b-cache"]


@pytest.mark.threat(33)
def test_a_run_that_reads_what_one_before_compiled_takes_the_same_steps(tmp_path):
    env = {name: value for name, value in os.environ.items() if name not in UNSET}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "home"), "JAX_NUM_CPU_DEVICES": "1"}

    def rows(name, **more):
        command = (sys.executable, "-m", "lsdl.train", *RUN, "--workdir", tmp_path / name)
        done = subprocess.run(command, cwd=ROOT, env=env | more, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "cache" not in done.stderr
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("home/lsdl/compiled/*/*")}
        times = ("step_time_s", "examples_per_s", "wall_s", "time_s")
        found = read_rows(tmp_path / name / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in times} for row in found], kept

    cold, kept = rows("cold")
    assert any("train_step" in path.name for path in kept)
    warm, left = rows("warm")
    assert left == kept  # nothing was compiled that is worth keeping
    never, _ = rows("never", JAX_ENABLE_COMPILATION_CACHE="false")
    assert cold == warm == never


@pytest.mark.threat(33)
def test_what_another_is_still_writing_is_compiled_without_a_word(home):
    compile_cache.use()
    right = compiled()
    for entry in entries():
        os.truncate(entry, entry.stat().st_size // 2)  # after `use` has looked
    with warnings.catch_warnings(record=True) as told:
        assert compiled() == right
    assert not told
