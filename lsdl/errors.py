"""What goes wrong, and the exit code of each: one list for all entries."""

import contextlib
import os
import sys
import threading
from typing import NoReturn

from lsdl.secrecy import hidden

FINISHED = 0
DOES_NOT_FIT = 1  # the plan is not for the target it was made for
BAD_INPUT = 2
NO_COMPILER = 3  # for the devices of a target
DATA = 65  # a data set on disk is not what was prepared: a shard or a record is damaged
NO_DATA = 66  # a data set is not there
UNREACHABLE = 69  # the processes of the job did not find one another
NOT_FINITE = 70  # too many steps in a row had no finite loss or gradient
STUCK = 71  # no step within the time there was for it; or an audit that found other bits
LOCKED = 73  # another trainer owns the workdir, or it cannot be written
STORAGE = 74  # a checkpoint could not be written or read: disk full, I/O error, none that verifies
DISAGREE = 78  # the processes of a job were not started with the same config, code or data
SAVED_AND_STOPPED = 75  # SIGTERM: the state is saved, start the same command again
INTERRUPTED = 130  # Ctrl-C: the state is saved as well
UNREAD = 141  # nobody reads what is printed any more, as behind `| head`
TERMINATED = 143  # a second SIGTERM: gone at once, the newest save stands


class UserError(ValueError):
    """The user can mend this: one sentence with the value given, the rule and the fix.

    Entries print the sentence without a traceback and leave with `exit_code`.
    """

    exit_code = BAD_INPUT


class NoCompilerError(UserError):
    """What compiles for a target is not installed, or does not fit the jax that is."""

    exit_code = NO_COMPILER


class UnreachableError(UserError):
    """A process of the job is missing, or cannot be reached."""

    exit_code = UNREACHABLE


class LockedError(UserError):
    """Another trainer owns the workdir, or it cannot be written."""

    exit_code = LOCKED


class DataError(UserError):
    """A data set on disk is damaged."""

    exit_code = DATA


class NoDataError(UserError):
    """A data set is not there."""

    exit_code = NO_DATA


class NotFiniteError(UserError):
    """Too many steps in a row were not finite."""

    exit_code = NOT_FINITE


class StuckError(UserError):
    """Something did not come within its time, or an audit found other bits."""

    exit_code = STUCK


class StorageError(UserError):
    """A checkpoint cannot be written, or read."""

    exit_code = STORAGE


class DisagreeError(UserError):
    """The processes of a job were not started alike."""

    exit_code = DISAGREE


def refuse(error: UserError) -> int:
    """Tell the user, on one line of stderr, no secrets; returns the exit code to leave with."""
    print(f"lsdl: {hidden(' '.join(str(error).splitlines()))}", file=sys.stderr)
    return error.exit_code


def end(code: int, sentence: str = "") -> NoReturn:
    """End this process with `code` from any of its threads, also while another hangs in C++."""
    if sentence:
        with contextlib.suppress(OSError):
            os.write(2, f"\nlsdl: {sentence}\n".encode())  # a progress bar may stand in the line
    # The one that hangs may hold stdout.
    flush = threading.Thread(target=sys.stdout.flush, daemon=True)
    flush.start()
    flush.join(timeout=1)
    os._exit(code)


def nearest(word: str, choices) -> str:
    """`word`'s best match among `choices` as a hint for an error message, or the whole list."""
    import difflib

    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(choices)}."
