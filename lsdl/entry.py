"""The frame of an entry that may be one of many processes: signals, errors, the exit code."""

import argparse
import sys
from collections.abc import Callable

from lsdl import interruption
from lsdl.errors import INTERRUPTED, UserError, refuse
from lsdl.rendezvous import flags


def framed(work: Callable[[argparse.Namespace, list[str]], int], parser, argv) -> int:
    """The exit code of `work(arguments, overrides)`, with its errors told in one sentence."""
    with interruption.owner(leaves=True):
        arguments, overrides = parser.parse_known_args(argv)
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


def leave(code: int) -> None:
    """End the process of an entry with `code`, and with the other processes of its job."""
    processes = sys.modules.get("lsdl.processes")  # not there: nothing was begun
    processes.leave(code) if processes else sys.exit(code)
