"""What goes wrong, and the exit code of each: one list for all entries."""

import sys

FINISHED = 0
DOES_NOT_FIT = 1  # the plan is not for the target it was made for
BAD_INPUT = 2
NO_COMPILER = 3  # for the devices of a target
UNREACHABLE = 69  # the processes of the job did not find one another
STUCK = 71  # no answer within the time there was for it
LOCKED = 73
SAVED_AND_STOPPED = 75  # SIGTERM: the state is saved, start the same command again
INTERRUPTED = 130  # Ctrl-C: the state is saved as well


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
    """Another trainer owns the workdir."""

    exit_code = LOCKED


def refuse(error: UserError) -> int:
    """Tell the user, on one line of stderr; returns the exit code to leave with."""
    print(f"lsdl: {' '.join(str(error).splitlines())}", file=sys.stderr)
    return error.exit_code


def nearest(word: str, choices) -> str:
    """`word`'s best match among `choices` as a hint for an error message, or the whole list."""
    import difflib

    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(choices)}."
