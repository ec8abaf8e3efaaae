"""The frame of the entries, which may be one of many processes: signals, errors, the exit code."""

import argparse
import contextlib
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


def start(main: Callable[[], int]) -> NoReturn:
    """Run the entry `main`, and end the process with its code."""
    try:
        number = os.environ.get(DEVICES, "1")
        if not (number.isascii() and number.isdecimal()):
            raise UserError(f"{DEVICES}={number!r} must be a whole number: write {DEVICES}=8.")
        code = main()
    except UserError as error:
        code = refuse(error)
    except BrokenPipeError:
        if not _unread():
            raise
        code = UNREAD
    leave(code)


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
        except Exception:
            from lsdl.processes import explain

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
