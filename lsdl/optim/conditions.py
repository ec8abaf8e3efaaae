"""Whether SGD has to converge under a schedule: Robbins and Monro's conditions, by its name.

Source: Robbins and Monro 1951; the first two alone do not suffice: 1/sqrt(t) meets them.
"""

from dataclasses import dataclass

from lsdl.optim.schedules import CYCLICAL, Shape


@dataclass(frozen=True)
class Conditions:
    """What holds for a schedule whose rule goes on for ever, whatever the length of the run."""

    to_zero: bool  # the rate tends to 0
    sum_infinite: bool  # so do not the rates' sums: any distance can be covered
    squares_finite: bool  # the noise's share of the way stays bounded
    reason: str

    @property
    def all(self) -> bool:
        return self.to_zero and self.sum_infinite and self.squares_finite


HARMONIC = Conditions(True, True, True, "about 1/t: the harmonic series, and that of 1/t^2")
ROOT = Conditions(True, True, False, "about 1/sqrt(t): its squares are the harmonic series")


def conditions(name: str, shape: Shape) -> Conditions:
    """Of the schedule `name`, by the form of its rule; numbers only tell which case of it."""
    if name == "inverse_time":
        return HARMONIC
    if name == "rsqrt":
        return ROOT
    if name == "constant":
        return _stays("it stays at its peak")
    if name == "step":
        return _stays("after the last boundary it stays where it is")
    if name == "plateau":
        reason = "a loss that is bounded below has plateaus without end: a geometric series"
        return Conditions(True, False, True, reason)
    if name == "exp_growth":
        if shape.growth < 1:
            return Conditions(False, True, False, "it grows without bound")
        return _stays("without a growth_decay it stays at its peak")
    if name == "exponential":
        return _falls(shape.decay_factor or shape.end_factor, "the rate")
    if name in CYCLICAL:
        return _cyclical(name, shape)
    if name == "sgdr":
        return Conditions(False, True, False, "every restart is back at the peak")
    if shape.end_factor:  # cosine, polynomial, wsd, one_cycle
        return _stays(f"after the run it stays at {shape.end_factor:g} of its peak")
    return Conditions(True, False, True, "it is 0 from the end of the run on: a finite sum")


def _stays(reason: str) -> Conditions:
    return Conditions(False, True, False, f"{reason}, and does not tend to 0")


def _falls(factor: float, what: str) -> Conditions:
    if factor == 1:
        return _stays(f"{what} times 1 each step")
    return Conditions(True, False, True, f"{what} is a geometric series: a finite sum")


def _cyclical(name: str, shape: Shape) -> Conditions:
    if name == "triangular":
        return _stays("every cycle reaches the peak")
    if shape.low_factor:
        return _stays(f"it stays above {shape.low_factor:g} of its peak")
    if name == "triangular2":
        return _falls(0.5, "the cycles' height")
    return _falls(shape.decay_factor, "the cycles' height")


def lines(found: Conditions) -> list[str]:
    """The conditions, for people."""
    rows = (
        ("rate to 0", found.to_zero),
        ("sum of rates infinite", found.sum_infinite),
        ("sum of squares finite", found.squares_finite),
    )
    verdict = "all met" if found.all else "not all met"
    head = f"SGD's conditions (Robbins and Monro 1951), the rule going on for ever: {verdict}"
    return [head, *(f"  {what:22} {'yes' if holds else 'no'}" for what, holds in rows),
            f"  because {found.reason}"]  # fmt: skip
