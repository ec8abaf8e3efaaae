"""A TPU compiler's refusal of a program that is too large, read."""

import re

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"(\d+(?:\.\d+)?)([KMGT]?)"
# In what words it refuses: needed, and what there is.
REFUSALS = (
    rf"Used {SIZE}B? of {SIZE}B? hbm",
    rf"\({SIZE}B?\) exceeds available HBM \({SIZE}B?\)",
    rf"Requires {SIZE}B?, has {SIZE}B? available",
    rf"{SIZE}B? exceeds {SIZE}B?",
)


def parse(message: str) -> tuple[int, int] | None:
    """(bytes needed, bytes that a program may have) of a device; None if it is no such refusal.

    As exact as the message, which rounds to 1%; it may count temporaries alone.
    """
    for words in REFUSALS if "RESOURCE_EXHAUSTED" in message or "Oom" in message else ():
        if found := re.search(words, message):
            needed, unit, limit, limit_unit = found.groups()
            return round(float(needed) * UNITS[unit]), round(float(limit) * UNITS[limit_unit])
    return None
