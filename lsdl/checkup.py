"""What `lsdl.doctor` looks at: each process reports, and process 0 finds what does not fit.

Reports travel through jax's coordination service, not by a collective: they arrive where
collectives hang, and where the processes do not have equally many devices.
"""

import contextlib
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl import processes
from lsdl.commits import FEWEST
from lsdl.data.shards import Shard
from lsdl.diagnosis import counted, findings, grouped, names, table
from lsdl.errors import STUCK, UserError
from lsdl.experiment import Experiment
from lsdl.rendezvous import gpus_on_node, place, visible_gpus
from lsdl.rundir import commit, versions
from lsdl.sharding import mesh as meshes

WORDS = 2**18  # int32 that each device gives to a collective: 1 MiB
SKEW_S = 1.0  # clocks further apart than this make logs and file times hard to follow


def examine(
    make: Callable[[], Experiment] | None, *, mode: str, workdir: Path | None, wait_s: float
) -> int:
    """Look at everything, print it in process 0; returns how many findings, alike in all processes.

    `make` builds the experiment that is to run, `mode` is --distributed, or `explicit`.
    """
    with deadline(wait_s, "the start of the devices"):
        jax.devices()
    with deadline(wait_s, "opening the config, the data and the workdir"):
        experiment, problems = problems_of(make) if make else (None, [])
        if experiment:
            problems += problems_of(experiment.check_data)[1]
        mine = report(
            mode,
            workdir=workdir,
            checkpoint_bytes=checkpoint_bytes(experiment) if experiment else 0,
            mesh=dict(experiment.mesh.shape) if experiment else None,
            problems=problems,
        )
    texts = processes.to_main("lsdl-doctor-report", json.dumps(mine), wait_s=wait_s)
    reports = [json.loads(text) for text in texts]
    found = []
    if reports:
        found = findings(reports)
        print(table(reports), flush=True)
    with deadline(wait_s, "an all-reduce"):
        found += _measure(experiment, reports)
    if reports:
        for sentence in found:
            print(f"lsdl: {sentence}", file=sys.stderr)
        print("All is well." if not found else f"{counted(len(found), 'finding')}.", flush=True)
    return int(processes.from_main("lsdl-doctor-verdict", str(len(found))))


def _measure(experiment: Experiment | None, reports: Sequence[dict]) -> list[str]:
    """Collectives and clocks, where all processes have equally many devices."""
    alike = len({r["devices"] for r in reports}) == 1
    known = all(r["mesh"] and r["mesh"] == reports[0]["mesh"] for r in reports)
    plan = json.loads(processes.from_main("lsdl-doctor-plan", json.dumps([alike, known])))
    if not plan[0]:
        return []
    if plan[1]:
        mesh = experiment.mesh
    else:
        mesh = meshes.make_mesh(meshes.parse_mesh("data=-1", jax.device_count()))
    found = []
    for axis in (axis for axis, size in mesh.shape.items() if size > 1):
        result, problems = problems_of(lambda axis=axis: time_collective(mesh, axis))
        if problems:
            found.append(f"The all-reduce over {axis} fails: {problems[0]}")
        elif not result[1]:
            found.append(f"The all-reduce over {axis} gives wrong sums.")
        elif processes.is_main():
            size = mesh.shape[axis]
            print(f"{axis}={size}: all-reduce of 1 MiB per device in {1e3 * result[0]:.1f} ms")
    if jax.process_count() > 1:
        offsets = clock_offsets()
        worst = max(range(len(offsets)), key=lambda i: abs(offsets[i][0]))
        offset, bound = offsets[worst]
        said = f"process {worst}'s clock is {offset:+.3f} s (within {bound:.3f} s) from process 0's"
        if processes.is_main():
            print(f"clocks: {said}, the furthest")
        if abs(offset) - bound > SKEW_S:
            found.append(f"Clocks differ: {said}: start a time service on its machine.")
    texts = processes.to_main("lsdl-doctor-measured", json.dumps(found))
    sentences = grouped((s, i) for i, text in enumerate(texts) for s in json.loads(text))
    return [f"{sentence} (process {names(numbers)})" for sentence, numbers in sentences]


@contextlib.contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """End this process with one sentence if the body takes longer: a hang has no exception."""

    def stop():
        where = platform.node()
        print(f"lsdl: on {where} {what} took more than {seconds:g} s.", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STUCK)

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def report(
    mode: str,
    *,
    workdir: Path | None,
    checkpoint_bytes: int,
    mesh: dict | None,
    problems: Sequence[str],
) -> dict:
    """What this process sees, as JSON; `problems` are those that its caller has met."""
    here = place(os.environ)
    found = list(problems)
    free = None
    if workdir:
        found += filter(None, [check_folder(workdir)])
        folder = _existing(workdir)
        free = shutil.disk_usage(folder).free
        if free < checkpoint_bytes:
            found.append(
                f"{folder} has {free / 1e9:.1f} GB free and the run's checkpoints may need "
                f"{checkpoint_bytes / 1e9:.1f} GB: choose another --workdir, or keep fewer."
            )
        if not _is_shared(folder):
            found.append(
                f"{folder} is not the folder that process 0 has by that name: checkpoints need "
                "one that all processes share; choose another --workdir."
            )
    device = jax.local_devices()[0]
    return {
        "process": jax.process_index(),
        "processes": jax.process_count(),
        "host": platform.node(),
        "devices": jax.local_device_count(),
        "kind": device.device_kind,
        "platform": device.platform,
        "asked_platform": os.environ.get("JAX_PLATFORMS", ""),
        "gpus_visible": visible_gpus(os.environ),
        "gpus_on_node": gpus_on_node(os.environ),
        "mesh": mesh,
        "mode": mode,
        "launcher": here.launcher,
        "expected_processes": here.num_processes,
        "expected_id": here.process_id,
        "versions": {
            "Python": platform.python_version(),
            **versions(),
            "lsdl": commit() or "outside git",
        },
        "free": free,
        "problems": found,
    }


def check_folder(path: Path) -> str | None:
    """Why no file can be written, renamed and deleted where `path` is or will be; None: it can."""
    folder = _existing(path)
    first, second = (folder / f".lsdl-doctor-{platform.node()}-{os.getpid()}-{i}" for i in range(2))
    try:
        with open(first, "w") as file:
            file.write("lsdl")
            file.flush()
            os.fsync(file.fileno())
        os.replace(first, second)
        second.unlink()
    except OSError as error:
        return f"The workdir {path} cannot be used: {error.strerror}; choose another --workdir."
    return None


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _is_shared(folder: Path) -> bool:
    """Whether `folder` is process 0's: whether the file is seen that process 0 leaves there.

    True where process 0 cannot write: that is another problem.
    """
    mark = folder / f".lsdl-doctor-{platform.node()}-{os.getpid()}-mark"
    if processes.is_main():
        try:
            mark.write_text("")
        except OSError:
            mark = folder
    mark = Path(processes.from_main("lsdl-doctor-mark", str(mark)))
    until = time.monotonic() + 5  # a network folder's listing may be some seconds old
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    processes.barrier("lsdl-doctor-seen")
    if processes.is_main() and mark != folder:
        mark.unlink()
    return seen


def time_collective(mesh: Mesh, axis: str) -> tuple[float, bool]:
    """Seconds of an all-reduce of 1 MiB per device over `axis`, the best of 3; whether it is right.

    Whole numbers, so that right means equal.
    """
    ids = np.arange(mesh.size, dtype=np.int32).reshape(tuple(mesh.shape.values()))
    pattern = np.arange(WORDS, dtype=np.int32) % 7
    every = P(*mesh.axis_names)
    summed = P(*(None if name == axis else name for name in mesh.axis_names))
    given = jax.make_array_from_callback(
        (*ids.shape, WORDS),
        NamedSharding(mesh, every),
        lambda index: ids[index[:-1]][..., None] + pattern,
    )
    with jax.set_mesh(mesh):
        add = jax.jit(
            jax.shard_map(lambda x: jax.lax.psum(x, axis), in_specs=every, out_specs=summed)
        )
        seconds = []
        for _ in range(4):  # the first one compiles
            began = time.perf_counter()
            result = jax.block_until_ready(add(given))
            seconds.append(time.perf_counter() - began)
    sums = ids.sum(axis=mesh.axis_names.index(axis), keepdims=True)
    right = all(
        np.array_equal(part.data, sums[part.index[:-1]][..., None] + pattern * mesh.shape[axis])
        for part in result.addressable_shards
    )
    return min(seconds[1:]), right


def clock_offsets(rounds: int = 5) -> list[tuple[float, float]]:
    """[(offset, bound)] in seconds of each process's clock from process 0's.

    No process leaves a gather before all have entered it, which bounds the offset from both
    sides; the bound is the two processes' mean time in the gather. The best of `rounds`.
    """
    best = [(0.0, np.inf)] * jax.process_count()
    gather = lambda *times: multihost_utils.process_allgather(  # noqa: E731
        np.frombuffer(np.array(times, np.float64).tobytes(), np.uint8)  # jax has no float64 here
    ).reshape(jax.process_count(), -1)
    gather(0, 0)  # compiles
    for _ in range(rounds):
        entered = time.time()
        gather(0, 0)
        times = np.ascontiguousarray(gather(entered, time.time())).view(np.float64)
        middle, half = times.mean(axis=1), (times[:, 1] - times[:, 0]) / 2
        found = zip((middle - middle[0]).tolist(), (half + half[0]).tolist(), strict=True)
        best = [min(pair, key=lambda p: p[1]) for pair in zip(best, found, strict=True)]
    return best


def checkpoint_bytes(experiment: Experiment) -> int:
    """What the checkpoints of a run may need at one time, uncompressed."""
    leaves = jax.tree.leaves(experiment.abstract_state)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return state * (max(experiment.keep_latest + experiment.keep_best, FEWEST) + 1)


def shards_compared(shards: Sequence[Shard]) -> str:
    """What has been read of a data set's files, each as its digest says."""
    size = sum(shard.bytes for shard in shards)
    return (
        f"{len(shards)} files of {size:,} bytes are as their digests say (a file's first reading "
        "makes its digest)."
    )


def loader_alone(experiment: Experiment, batches: int) -> str:
    """How fast the training loader is with nothing beside it, as a sentence."""
    stream = experiment.train_loader().batches(0, batches + 1)
    jax.block_until_ready(next(stream))  # opens the data
    began = time.perf_counter()
    for batch in stream:
        jax.block_until_ready(batch)
    rate = batches * experiment.batch_size / (time.perf_counter() - began)
    return (
        f"{experiment.name}: {rate:,.0f} examples/s from the loader alone, {batches} batches of "
        f"{experiment.batch_size} sent to the devices. Nothing was trained."
    )


def problems_of(work: Callable[[], object]) -> tuple[object, list[str]]:
    """What `work` returns, and the sentence it ended with instead, if it did."""
    try:
        return work(), []
    except UserError as error:
        return None, [" ".join(str(error).split())]
    except Exception as error:
        return None, [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
