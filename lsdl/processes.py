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

# What the launchers set for every process: if any of these is there, jax finds the others itself.
_CLUSTER = (
    "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_SLICE_ID",
)


def initialise(
    mode: str = "off",
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Join the other processes. Must come before anything else touches a device.

    off: this process is alone. on: jax finds the launcher (Slurm, Open MPI, Cloud TPU, Kubernetes).
    auto: on under a launcher with more than one process, off elsewhere. The three explicit
    arguments, all or none of them, work everywhere.
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
    elif mode == "on" or (mode == "auto" and any(name in os.environ for name in _CLUSTER)):
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process speaks for all: prints, writes metrics, owns the run folder."""
    return jax.process_index() == 0


def devices() -> dict:
    """What the job runs on, for the run folder."""
    kinds = sorted({device.device_kind for device in jax.devices()})
    return {"count": jax.device_count(), "kinds": kinds, "processes": jax.process_count()}


def agree(work: Callable[[], Any]) -> Any:
    """Run `work` on process 0 alone; if it raises a `UserError`, every process leaves with it.

    Returns what `work` returned on process 0, None elsewhere.
    """
    result, error = None, None
    if is_main():
        try:
            result = work()
        except UserError as raised:
            error = raised
    if jax.process_count() > 1:
        code = np.int32(error.exit_code if error else 0)
        code = int(multihost_utils.broadcast_one_to_all(code))
        if code and not error:
            raise SystemExit(code)
    if error:
        raise error
    return result


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
