"""Several processes of one job on this machine: started together, watched, ended together."""

import ctypes
import os
import queue
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lsdl.errors import FINISHED, SAVED_AND_STOPPED, STUCK, UNREACHABLE
from lsdl.rendezvous import TOKEN
from lsdl.rollcall import LISTENER

LAUNCHER = "LSDL_LAUNCHER_PID"  # the process that started this one here, and outlives it
NOTICED = (UNREACHABLE, STUCK)  # how a process ends that has seen another one's fault


def end_with_launcher(environ: Mapping[str, str]) -> None:
    """Have the kernel end this process when the launcher on this machine dies, however it dies."""
    if parent := environ.get(LAUNCHER):
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it is dead already
            raise SystemExit(1)


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
    Process 0 gets a socket that listens on a port of the kernel's choice, and all a run token of
    their own. Process 0 writes where the caller does, of the others their stderr is to be read
    (`watch`); `capture`: all that they write is.
    """
    server = socket.create_server(("127.0.0.1", 0), backlog=num_processes)
    port = server.getsockname()[1]
    environment = os.environ | (env or {})
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices_per_process)}
    environment |= {LAUNCHER: str(os.getpid()), TOKEN: secrets.token_hex(16)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    full = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with server:
        return [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", *command),
                    f"--coordinator=127.0.0.1:{port}",
                    f"--num-processes={num_processes}",
                    f"--process-id={i}",
                ],
                env=environment | ({} if i else {LISTENER: str(server.fileno())}),
                pass_fds=() if i else (server.fileno(),),
                text=True,
                errors="replace",
                # Ctrl-C at the terminal reaches the caller alone, which passes it on: once.
                start_new_session=True,
                **(full if capture else quiet if i else {}),
            )
            for i in range(num_processes)
        ]


def watch(children: Sequence[subprocess.Popen], *, grace_s: float = 10) -> int:
    """Stay with the processes of one job until all have ended; returns the job's exit code.

    SIGTERM and SIGINT are passed on to all, stderr lines get their process's number. Once one has
    failed the others have `grace_s` seconds to end by themselves, 3 s once one has seen that
    another is lost or stuck, and 60 s once one has finished. The code is that of the first that
    failed by itself, else of the first; SAVED_AND_STOPPED if all did that.
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
            limit = 60 if code in (0, SAVED_AND_STOPPED) else grace_s
            limit = time.monotonic() + (min(limit, 3) if code in NOTICED else limit)
            deadline = min(deadline or limit, limit)
    return codes, stopped


def _signal(children: Sequence[subprocess.Popen], number: int) -> None:
    for child in children:
        child.send_signal(number)  # nothing where it has ended


def _echo(number: int, lines: Any) -> None:
    for line in lines:
        if line.strip():
            print(f"[{number}] {line}", end="", file=sys.stderr, flush=True)


def _verdict(codes: dict[int, int], stopped: Sequence[int]) -> int:
    """The job's exit code; says who failed, unless all ended alike and so have said it."""
    total = len(codes)
    failed = [i for i, code in codes.items() if code not in (FINISHED, SAVED_AND_STOPPED)]
    if not failed:
        return max(codes.values())
    by_itself = [i for i in failed if codes[i] not in NOTICED and i not in stopped]
    first = (by_itself or failed)[0]
    code = codes[first]
    if not by_itself and stopped:
        others = ", ".join(map(str, stopped))
        said = f"process {others} of {total} did not end with the others and was stopped"
    elif not by_itself and len(set(codes.values())) > 1:
        early = ", ".join(str(i) for i, c in codes.items() if c in (FINISHED, SAVED_AND_STOPPED))
        said = f"process {early} of {total} ended before the others" if early else ""
    elif len(set(codes.values())) > 1 or code < 0:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        said = f"process {first} of {total} {how}{'; the others were stopped' * (total > 1)}"
    else:
        said = ""
    if said:
        print(f"lsdl: {said}", file=sys.stderr)
    return 128 - code if code < 0 else code
