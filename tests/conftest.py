"""Every test sees 8 virtual CPU devices, its own run folders, and the project's data and caches."""

import gc
import importlib.metadata
import json
import os
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["LSDL_DATA_DIR"] = str(ROOT / ".cache" / "data")
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(
    ROOT / ".cache" / f"jax-{importlib.metadata.version('jaxlib')}"
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
if os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS"):  # as in `make test`: compile quickly
    quick = ["--xla_cpu_parallel_codegen_split_count=1"]
    if importlib.metadata.version("jaxlib") < "0.11":  # later compilers do not have it
        quick.append("--xla_cpu_use_fusion_emitters=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *quick]).strip()

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

CONFIGS = ROOT / "configs"


def pytest_addoption(parser):
    parser.addoption("--shard", default="1/1", help="k/n: the k-th of n parts of what is selected")
    parser.addoption("--rewrite-golden", action="store_true", help="rewrite tests/golden")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    lines = (ROOT / "tests" / "slow.txt").read_text().splitlines()
    slow = {line for line in lines if not line.startswith("#")}
    for item in items:
        if item.nodeid in slow:
            item.add_marker(pytest.mark.slow)
    if list(config.args) == config.getini("testpaths"):  # the whole suite was collected
        gone = slow - {item.nodeid for item in items}
        if gone:
            raise pytest.UsageError(f"tests/slow.txt names no test: {sorted(gone)}")
    # Of the long fault tests every part has as many, to one.
    long = [item.nodeid for item in items if item.get_closest_marker("faults")]
    kept = of_shard(config.getoption("--shard"), [item.nodeid for item in items], long)
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in kept])
        items[:] = [item for item in items if item.nodeid in kept]


def of_shard(shard, names, long):
    """Those of `names` in the shard `k/n`; `rest`: the `long` ones that no part has run."""
    if shard == "rest":
        parts = json.loads((ROOT / "tests" / "faults" / "results.json").read_text())
        return set(long) - {name for part in parts.values() for name in part["ran"]}
    part, parts = map(int, shard.split("/"))
    place = {name: i for i, name in enumerate(long)}
    share = {name: place.get(name, zlib.crc32(name.encode())) % parts for name in names}
    return {name for name in names if share[name] == part - 1}


def pytest_collection_finish(session):
    """What is loaded by now lives to the end: searching it for garbage took 7 % of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture
def key():
    return jax.random.key(0)


@pytest.fixture
def load():
    """`load("digits_vit:smoke", "batch_size=8", ...)`: a shipped config with overrides."""
    from lsdl import config

    def load(name, *overrides):
        file, _, arg = name.partition(":")
        path = f"{CONFIGS / file}.py" + (f":{arg}" if arg else "")
        return config.load(path, [f"--config.{o}" for o in overrides])[0]

    return load


@pytest.fixture
def train(capfd):
    """`train("digits_vit:smoke", "--workdir=...", ...) -> (exit code, stdout, stderr)`."""
    from lsdl.train import main

    def train(name, *arguments):
        file, _, arg = name.partition(":")
        path = f"{CONFIGS / file}.py" + (f":{arg}" if arg else "")
        capfd.readouterr()
        code = main(["--config", path, *map(str, arguments)])
        return code, *capfd.readouterr()

    return train
