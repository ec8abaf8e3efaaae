"""The frame of the entries, which may be one of many processes: signals, errors, the exit code."""

import argparse
import contextlib
import importlib.util
import os
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from lsdl import interruption
from lsdl.errors import INTERRUPTED, UNREAD, UserError, refuse
from lsdl.rendezvous import flags, meeting, place, run_token
from lsdl.rollcall import excuse

DEVICES = "JAX_NUM_CPU_DEVICES"  # read when jax is imported, and what is no number fails there
CUDA = ("jax_cuda12_plugin", "jax_cuda13_plugin")


def start(main: Callable[[], int]) -> NoReturn:
    """Run the entry `main`, and end the process with its code."""
    try:
        number = os.environ.get(DEVICES, "1")
        if not (number.isascii() and number.isdecimal() and int(number)):
            raise UserError(
                f"{DEVICES}={number!r} must be a whole number of at least 1: write {DEVICES}=8."
            )
        _check_platforms(os.environ.get("JAX_PLATFORMS", ""))
        code = main()
    except UserError as error:
        code = refuse(error)
    except BrokenPipeError:
        if not _unread():
            raise
        code = UNREAD
    except RuntimeError as error:
        if not (sentence := _no_backend(error)):
            raise
        code = refuse(UserError(sentence))
    leave(code)


def _check_platforms(asked: str) -> None:
    """Raise `UserError` for CUDA without jax's plugin for it, where jax only fails an assertion."""
    if "cuda" in asked.split(",") and not any(map(importlib.util.find_spec, CUDA)):
        raise UserError(
            f"JAX_PLATFORMS={asked} needs jax's plugin for CUDA, which is not installed: unset it, "
            "or pip install -e '.[cuda]'."
        )


def _no_backend(error: BaseException) -> str:
    """The sentence for devices that cannot be had, "" if `error` is another."""
    if not isinstance(error, RuntimeError) or "Unable to initialize backend" not in str(error):
        return ""
    asked = os.environ.get("JAX_PLATFORMS", "")
    return f"JAX_PLATFORMS={asked} cannot be had here ({str(error).splitlines()[0]}): unset it."


def _unread() -> bool:
    """Whether stdout is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def framed(work: Callable[[argparse.Namespace, list[str]], int], parser, argv) -> int:
    """The exit code of `work(arguments, overrides)`, with its errors told in one sentence."""
    with interruption.owner(leaves=True) as stop:
        arguments, overrides = parser.parse_known_args(argv)
        stop.farewell = lambda code: _excuse(code, **flags(arguments))
        try:
            return work(arguments, overrides)
        except UserError as error:
            from lsdl.processes import speaks

            if speaks(error, **flags(arguments)):
                refuse(error)
            return error.exit_code
        except KeyboardInterrupt:
            print("\nInterrupted. The same command goes on from the newest save.", file=sys.stderr)
            return INTERRUPTED
        except SystemExit as left:  # another process tells why
            return left.code if isinstance(left.code, int) else int(left.code is not None)
        except Exception as error:
            from lsdl.processes import explain

            if sentence := _no_backend(error):
                return refuse(UserError(sentence))
            return explain()


def _excuse(
    code: int,
    *,
    mode: str,
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    **_: float,
) -> None:
    """Tell the others that this process leaves, while it has not met them yet."""
    with contextlib.suppress(UserError):
        met_at = meeting(place(os.environ), mode, coordinator, num_processes, process_id)
        if None not in met_at:
            excuse(*met_at, code=code, token=run_token(os.environ))


def leave(code: int) -> NoReturn:
    """End the process of an entry with `code`, and with the other processes of its job.

    Past the interpreter's own end: a thread of C++ that asks for Python during it aborts the
    process ("terminate called without an active exception") after all was done.
    """
    if cache := sys.modules.get("lsdl.compile_cache"):
        cache.seal()
    if processes := sys.modules.get("lsdl.processes"):  # none: nothing was begun
        processes.leave(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
