"""Each process's place in its job, as its launcher tells it by flags and environment."""

import glob
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lsdl.errors import UserError

MODES = ("off", "on", "auto")
TOKEN = "LSDL_RUN_TOKEN"  # what only the processes of one job have in common
SLURM_STEP = (
    *("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID"),
    "SLURM_LOCALID",
)


@dataclass(frozen=True)
class Place:
    """A process's place in its job, as its environment tells it; None: that does not say."""

    launcher: str = ""  # slurm | tpu | kubernetes; "": none
    num_processes: int | None = None
    process_id: int | None = None
    coordinator: str | None = None  # HOST:PORT; None: jax finds it, where there is a launcher
    local_device_ids: tuple[int, ...] | None = None  # of the GPUs it sees; None: as jax does
    token: str = ""  # what this job's processes have in common, and no other job's


def add_flags(add: Callable, *, wait_s: float = 300) -> None:
    """The flags of an entry that may be one of many; `add` is a parser's `add_argument`."""
    add("--distributed", choices=MODES, default="off", help="find the other processes through the "
        "launcher; auto: only if there is one")  # fmt: skip
    add("--coordinator", metavar="HOST:PORT", help="process 0's address, without a launcher")
    add("--num-processes", type=int, metavar="N")
    add("--process-id", type=int, metavar="I")
    add("--wait", type=float, default=wait_s, metavar="S", help="seconds that the other processes "
        f"have to join (default: {wait_s:g})")  # fmt: skip
    add("--heartbeat", type=float, default=30, metavar="S", help="seconds of silence after which "
        "a process counts as lost and all end (default: 30)")  # fmt: skip


def flags(arguments: Any) -> dict:
    """What `add_flags` made of a command line, as `processes.initialise` and `speaks` take it."""
    return {
        "mode": arguments.distributed,
        "coordinator": arguments.coordinator,
        "num_processes": arguments.num_processes,
        "process_id": arguments.process_id,
        "wait_s": arguments.wait,
        "heartbeat_s": arguments.heartbeat,
    }


def place(environ: Mapping[str, str]) -> Place:
    """The place of the process that has `environ`."""
    if "SLURM_JOB_ID" in environ and "SLURM_NTASKS" in environ:
        return _slurm(environ)
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if hosts:
        workers = len(hosts.split(","))
        slices = int(environ.get("MEGASCALE_NUM_SLICES", 1))
        index = int(environ.get("TPU_WORKER_ID", 0))
        index += workers * int(environ.get("MEGASCALE_SLICE_ID", 0))
        return Place("tpu", workers * slices, index)
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Place("kubernetes", process_id=int(environ["JOB_COMPLETION_INDEX"]))
    return Place()


def meeting(
    here: Place,
    mode: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> tuple[str | None, int | None, int | None]:
    """(coordinator, number of processes, this one's): the flags', or else the launcher's.

    Raises `UserError` for flags that do not belong together. All None: this process is alone, or
    jax finds the others.
    """
    explicit = coordinator, num_processes, process_id
    if explicit == (None, None, None):
        if mode == "off" or here.coordinator is None:
            return explicit
        return here.coordinator, here.num_processes, here.process_id
    if None in explicit:
        raise UserError(
            "--coordinator, --num-processes and --process-id belong together: give all three."
        )
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id={process_id} must be within [0, --num-processes={num_processes})."
        )
    return explicit


def run_token(environ: Mapping[str, str]) -> str:
    """What the processes of this one's job have in common, as a word."""
    return "".join((environ.get(TOKEN) or place(environ).token).split())[:64]


def _slurm(environ: Mapping[str, str]) -> Place:
    tasks = int(environ["SLURM_NTASKS"])
    if not all(name in environ for name in SLURM_STEP):
        return Place("slurm", tasks)  # in the job, but not started by srun
    # node[001-003,7],other -> node001
    first = re.match(r"([^,\[]+)(?:\[(\w+))?", environ["SLURM_STEP_NODELIST"])
    # Jobs that share a node differ in their number, so in all likelihood in their port.
    port = 61440 + int(environ["SLURM_JOB_ID"]) % 4096
    return Place(
        "slurm",
        tasks,
        int(environ["SLURM_PROCID"]),
        f"{first[1]}{first[2] or ''}:{port}",
        _share_of_gpus(environ),
        f"slurm-{environ['SLURM_JOB_ID']}",
    )


def _share_of_gpus(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """The GPUs of this task, numbered among those it sees.

    Left alone jax takes one for each task, which leaves most of a node idle if there is one task.
    """
    gpus, on_node = visible_gpus(environ), gpus_on_node(environ)
    if not gpus or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    tasks = _tasks_on_node(environ)
    if gpus < tasks or gpus * tasks == on_node:  # Slurm shows each task its own
        return tuple(range(gpus))
    share, rank = gpus // tasks, int(environ["SLURM_LOCALID"])
    return tuple(range(rank * share, (rank + 1) * share))


def _tasks_on_node(environ: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, such as 4(x3),2: what each node has, in their order."""
    counts = []
    for count, times in re.findall(
        r"(\d+)(?:\(x(\d+)\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    ):
        counts += [int(count)] * int(times or 1)
    return counts[min(int(environ.get("SLURM_NODEID", 0)), len(counts) - 1)]


def visible_gpus(environ: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs this process may use."""
    names = environ.get("CUDA_VISIBLE_DEVICES")
    if names is None:
        return gpus_on_node(environ)
    return len([name for name in names.split(",") if name.strip() not in ("", "-1")])


def gpus_on_node(environ: Mapping[str, str]) -> int:
    """How many NVIDIA GPUs of this node belong to the job."""
    if "SLURM_GPUS_ON_NODE" in environ:
        return int(environ["SLURM_GPUS_ON_NODE"])
    return len(glob.glob("/dev/nvidia[0-9]*"))


def split_address(coordinator: str) -> tuple[str, int]:
    """HOST:PORT -> (HOST, PORT). `UserError` if it is none."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator={coordinator} must be HOST:PORT, such as node001:61440.")
    return host.strip("[]"), int(port)
