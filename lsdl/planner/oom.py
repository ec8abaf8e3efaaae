"""A TPU compiler's refusal of a program that is too large, read."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
SIZE = r"([\d.]+)([KMGT]?)"
# In what words it refuses (libtpu 0.0.42 to 0.0.52).
REFUSALS = (
    rf"required for (?P<temporaries>HLO temporaries) \({SIZE}\) exceeds available HBM \({SIZE}\)",
    rf"Ran out of memory in memory space hbm\. Used {SIZE} of {SIZE} hbm",
    rf"Requires {SIZE}, has {SIZE} available",
)


@dataclass(frozen=True)
class Refusal:
    """What a program takes of a device's memory, and what a program may have, to 1%."""

    needed_bytes: int
    limit_bytes: int
    temporaries: bool  # the need is of temporaries alone


def parse(message: str) -> Refusal | None:
    """The numbers of the error `message`; None if it is no such refusal."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for words in REFUSALS:
        if found := re.search(words, message):
            needed, unit, limit, limit_unit = found.groups()[-4:]
            temporaries = "temporaries" in found.groupdict()
            sizes = float(needed) * UNITS[unit], float(limit) * UNITS[limit_unit]
            return Refusal(*map(round, sizes), temporaries)
    return None


def numbers(refusal: Refusal, state_bytes: int, batch_bytes: int) -> dict[str, Any]:
    """plan.json's bytes of one device, whose inputs are `state_bytes` and `batch_bytes`.

    Those are of the arrays themselves, without what a TPU pads them with.
    """
    argument = state_bytes + batch_bytes
    if refusal.temporaries:
        temporary, needed = refusal.needed_bytes, argument + refusal.needed_bytes
    else:
        temporary, needed = refusal.needed_bytes - argument, refusal.needed_bytes
    return {
        "argument_bytes": argument,
        "temporary_bytes": temporary,
        "output_bytes": state_bytes,
        "aliased_bytes": state_bytes,
        "needed_bytes": needed,
        "limit_bytes": refusal.limit_bytes,
        "fits": False,
    }


def dumped(dump: Path, ending: str) -> Path:
    """The file of that ending that the compiler wrote of the train step into the folder `dump`.

    Raises `FileNotFoundError` if there is none.
    """
    found = sorted(dump.glob(f"*jit_train_step*.{ending}"))
    if not found:
        raise FileNotFoundError(f"The compiler wrote no {ending} of the train step.")
    return found[-1]
