"""Processes: how one becomes one of many, and how a test or a laptop starts several."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from lsdl.errors import UserError


def initialise(
    mode: str = "off",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes. Must come before anything else touches a device.

    off: this process is alone. on: jax finds the others through the launcher (Slurm, Open MPI,
    Cloud TPU, Kubernetes). auto: the same, but alone where there is no launcher. The three
    explicit arguments, all or none of them, work everywhere.
    """
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
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif mode != "off":
        try:
            jax.distributed.initialize()
        except ValueError as error:  # jax found no launcher
            if mode == "on":
                raise UserError(
                    "--distributed=on finds no launcher here: give --coordinator, --num-processes "
                    "and --process-id, or leave it out."
                ) from error


def is_main() -> bool:
    """Whether this process speaks for all: prints, writes metrics, owns the run folder."""
    return jax.process_index() == 0


def devices() -> dict:
    """What the job runs on, for the run folder."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"count": jax.device_count(), "kinds": kinds, "processes": jax.process_count()}


def speaks(coordinator: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Whether this process tells the user of an error: one of those that met it does."""
    if jax.distributed.is_initialized():
        return True  # `together` lets one process alone raise it
    return not (coordinator and 0 < (process_id or 0) < (num_processes or 0))


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


def spawn_local(
    command: Sequence[str], *, num_processes: int, devices_per_process: int, env: dict | None = None
) -> list[subprocess.Popen]:
    """Start `python -m COMMAND` as `num_processes` CPU processes of one job on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | (env or {})
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices_per_process)}
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", *command),
                f"--coordinator=127.0.0.1:{port}",
                f"--num-processes={num_processes}",
                f"--process-id={i}",
            ],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(num_processes)
    ]
