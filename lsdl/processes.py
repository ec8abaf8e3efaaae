"""Processes: how one becomes one of many, and how a laptop or a test starts several."""

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.experimental import multihost_utils

from lsdl.errors import SAVED_AND_STOPPED, UNREACHABLE, UnreachableError, UserError
from lsdl.rendezvous import LOOPBACK, place, roll_call, split_address

LAUNCHER = "LSDL_LAUNCHER_PID"  # the process that started this one here, and outlives it


def initialise(
    mode: str = "off",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_s: float = 300,
) -> None:
    """Join the other processes. Must come before anything else touches a device.

    off: this process is alone. on: the launcher says where the others are (Slurm, Open MPI, Cloud
    TPU, Kubernetes). auto: the same, but alone where there is no launcher. The three explicit
    arguments, all or none of them, work everywhere.

    Raises `UnreachableError` if the others are not there within `wait_s` seconds, under Slurm and
    with explicit arguments: elsewhere jax waits for them, five minutes, and aborts.
    """
    _end_with_launcher()
    here = place(os.environ)
    explicit = (coordinator, num_processes, process_id)
    if any(value is not None for value in explicit):
        if None in explicit:
            raise UserError(
                "--coordinator, --num-processes and --process-id belong together: give all three."
            )
        if not 0 <= process_id < num_processes:
            raise UserError(
                f"--process-id={process_id} must be within [0, --num-processes={num_processes})."
            )
    elif mode == "off":
        return
    elif here.coordinator:
        coordinator, num_processes, process_id = (
            *(here.coordinator, here.num_processes),
            here.process_id,
        )
    else:
        _initialise_by_jax(mode)
        return
    roll_call(coordinator, num_processes, process_id, wait_s=wait_s)
    local = split_address(coordinator)[0] in LOOPBACK
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        here.local_device_ids,
        coordinator_bind_address=coordinator if local else None,
    )


def _initialise_by_jax(mode: str) -> None:
    try:
        jax.distributed.initialize()
    except ValueError as error:  # jax found no launcher
        if mode == "on":
            raise UserError(
                "--distributed=on finds no launcher here: give --coordinator, --num-processes "
                "and --process-id, or leave it out."
            ) from error


def _end_with_launcher() -> None:
    """Have the kernel end this process when the launcher on this machine dies, however it dies."""
    if parent := os.environ.get(LAUNCHER):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it is dead already
            raise SystemExit(1)


def is_main() -> bool:
    """Whether this process speaks for all: prints, writes metrics, owns the run folder."""
    return jax.process_index() == 0


def devices() -> dict:
    """What the job runs on, for the run folder."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"count": jax.device_count(), "kinds": kinds, "processes": jax.process_count()}


def speaks(
    error: UserError,
    *,
    mode: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
) -> bool:
    """Whether this process tells the user of `error`: one of those that met it does."""
    if jax.distributed.is_initialized():
        return True  # `together` lets one process alone raise it
    if isinstance(error, UnreachableError):
        return True  # process 0 may not be there to say it
    if coordinator:
        return not 0 < (process_id or 0) < (num_processes or 0)
    return mode == "off" or not place(os.environ).process_id


def together(work: Callable[[], Any], *, main_alone: bool = False) -> Any:
    """Run `work` on every process, or on process 0 alone; if it fails on one, all of them leave.

    The first process that failed raises what it met, and so speaks; the others exit with its code.
    Returns what `work` returned here.
    """
    result, error = None, None
    if is_main() or not main_alone:
        try:
            result = work()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        code = error.exit_code if isinstance(error, UserError) else 1 if error else 0
        codes = multihost_utils.process_allgather(np.int32(code))
        failed = np.flatnonzero(codes)
        if len(failed) and failed[0] != jax.process_index():
            raise SystemExit(int(codes[failed[0]]))
    if error:
        raise error
    return result


def same_on_all(value: bool) -> bool:
    """Process 0's `value`, so that all processes take the same branch."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))


# Texts by jax's coordination service, which needs no device and no collective. jax has no public
# name for it; orbax uses the same one.
def _service() -> Any:
    return distributed.global_state.client


def from_main(key: str, text: str, *, wait_s: float = 60) -> str:
    """Process 0's `text`, in all processes, which leave if it does not come. A key serves once."""
    if jax.process_count() == 1:
        return text
    if is_main():
        _service().key_value_set(key, text)
    try:
        return _service().blocking_key_value_get(key, int(1000 * wait_s))
    except jax.errors.JaxRuntimeError as error:
        raise SystemExit(UNREACHABLE) from error  # process 0 says why, or is gone


def to_main(key: str, text: str, *, wait_s: float = 60) -> list[str]:
    """In process 0 the `text` of all processes, by their number; in the others []."""
    if jax.process_count() == 1:
        return [text]
    if not is_main():
        _service().key_value_set(f"{key}/{jax.process_index()}", text)
        return []
    texts = [text]
    for i in range(1, jax.process_count()):
        try:
            texts.append(_service().blocking_key_value_get(f"{key}/{i}", int(1000 * wait_s)))
        except jax.errors.JaxRuntimeError as error:
            raise UnreachableError(
                f"Process {i} of {jax.process_count()} has not reported within {wait_s:g} s: see "
                "its output."
            ) from error
    return texts


def barrier(key: str, *, wait_s: float = 60) -> None:
    """Wait until all processes have come here. A key serves once."""
    if jax.process_count() > 1:
        _service().wait_at_barrier(key, int(1000 * wait_s))


def spawn_local(
    command: Sequence[str],
    *,
    num_processes: int,
    devices_per_process: int,
    env: dict | None = None,
    capture: bool = False,
) -> list[subprocess.Popen]:
    """Start `python -m COMMAND` as `num_processes` CPU processes of one job on this machine.

    Each has `devices_per_process` virtual devices, and dies with the process that calls this.
    Process 0 writes where that one does, of the others their stderr is to be read (`watch`);
    `capture`: all that they write is.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | (env or {})
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices_per_process)}
    environment[LAUNCHER] = str(os.getpid())
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    full = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", *command),
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={num_processes}",
                f"--process-id={i}",
            ],
            env=environment,
            text=True,
            errors="replace",
            # Ctrl-C at the terminal reaches the caller alone, which passes it on: once, not twice.
            start_new_session=True,
            **(full if capture else quiet if i else {}),
        )
        for i in range(num_processes)
    ]


def watch(children: Sequence[subprocess.Popen], *, grace_s: float = 10) -> int:
    """Stay with the processes of one job until all have ended; returns the job's exit code.

    SIGTERM and SIGINT are passed on to all, stderr lines get their process's number. Once one has
    failed the others have `grace_s` seconds to end by themselves, and 60 s once one has finished.
    The code is that of the first that failed, SAVED_AND_STOPPED if all did that.
    """
    ended: queue.SimpleQueue = queue.SimpleQueue()
    threads = [
        threading.Thread(target=_echo, args=(i, child.stderr), daemon=True)
        for i, child in enumerate(children)
        if child.stderr
    ]
    for i, child in enumerate(children):
        wait = lambda i=i, child=child: ended.put((i, child.wait()))  # noqa: E731
        threads.append(threading.Thread(target=wait, daemon=True))
    previous = {
        number: signal.signal(number, lambda number, _: _signal(children, number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        for thread in threads:
            thread.start()
        codes, stopped = _codes(ended, children, grace_s=grace_s)
    finally:
        _signal(children, signal.SIGKILL)
        for number, handler in previous.items():
            signal.signal(number, handler)
    for thread in threads:
        thread.join(timeout=1)
    return _verdict(codes, stopped)


def _codes(
    ended: queue.SimpleQueue, children: Sequence[subprocess.Popen], *, grace_s: float
) -> tuple[dict[int, int], list[int]]:
    """{process: how it ended}, in that order, and those that had to be stopped."""
    codes: dict[int, int] = {}
    stopped: list[int] = []
    deadline = None
    while len(codes) < len(children):
        left = None if deadline is None else max(deadline - time.monotonic(), 0)
        try:
            i, code = ended.get(timeout=left)
        except queue.Empty:
            stopped = [i for i in range(len(children)) if i not in codes]
            _signal(children, signal.SIGKILL)
            deadline = None
            continue
        codes[i] = code
        if not stopped:
            limit = time.monotonic() + (60 if code in (0, SAVED_AND_STOPPED) else grace_s)
            deadline = min(deadline or limit, limit)
    return codes, stopped


def _signal(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        child.send_signal(number)  # nothing where it has ended


def _echo(number: int, lines: Any) -> None:
    for line in lines:
        print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def _verdict(codes: dict[int, int], stopped: Sequence[int]) -> int:
    """The job's exit code; says who failed, unless all ended alike and so have said it."""
    total = len(codes)
    failed = [i for i, code in codes.items() if code not in (0, SAVED_AND_STOPPED)]
    if not failed:
        return max(codes.values())
    first, code = failed[0], codes[failed[0]]
    if first in stopped:  # no other one had failed
        others = ", ".join(map(str, stopped))
        print(
            f"lsdl: process {others} of {total} did not end with the others and was stopped",
            file=sys.stderr,
        )
    elif len(set(codes.values())) > 1 or code < 0:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        rest = "; the others were stopped" if total > 1 else ""
        print(f"lsdl: process {first} of {total} {how}{rest}", file=sys.stderr)
    return 128 - code if code < 0 else code
