"""Where the processes of a job meet: each one's place in it, and a roll call before jax is asked.

Where a process is missing, jax waits and then aborts; the roll call says which.
"""

import contextlib
import glob
import re
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lsdl.errors import UNREACHABLE, UnreachableError, UserError

MODES = ("off", "on", "auto")
LOOPBACK = ("127.0.0.1", "localhost")
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


def add_flags(add: Callable) -> None:
    """The flags of an entry that may be one of many; `add` is a parser's `add_argument`."""
    add("--distributed", choices=MODES, default="off", help="find the other processes through the "
        "launcher; auto: only if there is one")  # fmt: skip
    add("--coordinator", metavar="HOST:PORT", help="process 0's address, without a launcher")
    add("--num-processes", type=int, metavar="N")
    add("--process-id", type=int, metavar="I")


def flags(arguments: Any) -> dict:
    """What `add_flags` made of a command line, as `processes.initialise` and `speaks` take it."""
    names = ("coordinator", "num_processes", "process_id")
    return {"mode": arguments.distributed} | {name: getattr(arguments, name) for name in names}


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


def roll_call(coordinator: str, num_processes: int, process_id: int, *, wait_s: float) -> None:
    """Return on all processes once all of them have called process 0 at `coordinator`.

    Raises `UnreachableError` after `wait_s` seconds: in process 0 with the numbers of those that
    did not call, in another that did not get through with the reason.
    """
    address = split_address(coordinator)
    if num_processes == 1:
        return
    deadline = time.monotonic() + wait_s
    if process_id == 0:
        _hear_all(address, num_processes, deadline=deadline, wait_s=wait_s)
    else:
        _call(address, num_processes, process_id, deadline=deadline, wait_s=wait_s)


def _hear_all(
    address: tuple[str, int], num_processes: int, *, deadline: float, wait_s: float
) -> None:
    host, port = address
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_server(host, port))
        except OSError as error:
            raise UnreachableError(
                f"Process 0 cannot listen on port {port}: {error.strerror}; "
                "end the job that has it, or choose another --coordinator."
            ) from error
        callers: dict[int, socket.socket] = {}
        told = num_processes
        while len(callers) < num_processes - 1 and told == num_processes:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                caller = stack.enter_context(server.accept()[0])
            except TimeoutError:
                break
            number, told = _read_call(caller) or (0, num_processes)
            if 0 < number < num_processes:
                callers[number] = caller
        missing = sorted(set(range(1, num_processes)) - set(callers))
        answer = b"no\n" if missing or told != num_processes else b"go\n"
        for caller in callers.values():
            with contextlib.suppress(OSError):
                caller.sendall(answer)
    if told != num_processes:
        raise UserError(
            f"Process {number} was told that there are {told} processes and process 0 that there "
            f"are {num_processes}: give all of them the same number."
        )
    if missing:
        named = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        raise UnreachableError(
            f"Only {len(callers) + 1} of {num_processes} processes have met at {host}:{port} "
            f"within {wait_s:g} s, without {named}: see that these run and can reach process 0."
        )


def _server(host: str, port: int) -> socket.socket:
    """Closed to other machines where the job is on one."""
    if host in LOOPBACK:
        return socket.create_server(("127.0.0.1", port))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _read_call(caller: socket.socket) -> tuple[int, int] | None:
    """(process, number of processes) that a caller gives; None if it is no process of lsdl's."""
    caller.settimeout(5)
    with contextlib.suppress(OSError, ValueError):
        with caller.makefile("r", encoding="ascii") as lines:
            name, number, told = lines.readline(100).split()
        return (int(number), int(told)) if name == "lsdl" else None
    return None


def _call(
    address: tuple[str, int],
    num_processes: int,
    process_id: int,
    *,
    deadline: float,
    wait_s: float,
) -> None:
    host, port = address
    pause, why = 0.05, "no time to try"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection(address, timeout=min(left, 5)) as line:
                line.settimeout(left + 5)  # process 0 began to wait at another time
                line.sendall(f"lsdl {process_id} {num_processes}\n".encode())
                answer = line.recv(10)
        except OSError as error:
            answer, why = b"", (error.strerror or str(error))
        if answer == b"no\n":
            raise SystemExit(UNREACHABLE)  # process 0 says why
        if answer == b"go\n":
            return _await_service(address)
        if answer:
            why = "what answers there is not process 0 of this job"
        time.sleep(min(pause, max(deadline - time.monotonic(), 0)))
        pause = min(2 * pause, 1)
    raise UnreachableError(
        f"Process {process_id} of {num_processes} has not reached process 0 at {host}:{port} "
        f"within {wait_s:g} s ({why}): see that process 0 runs there and that nothing between "
        "them closes the port."
    )


def _await_service(address: tuple[str, int]) -> None:
    """Until jax listens where the roll call was: its client waits a second after a refusal."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=5):
            return
        time.sleep(0.05)
