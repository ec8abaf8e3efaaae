"""Learning-rate schedules: `step -> value`, all of them optax's."""

from collections import Counter
from collections.abc import Sequence

import optax

from lsdl.errors import UserError, nearest

NAMES = ("constant", "warmup_cosine", "step", "exponential", "polynomial")


def make_schedule(
    name: str,
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    start_factor: float,
    end_factor: float,
    power: float,
    boundaries_percent: Sequence[float],
    step_factor: float,
) -> optax.Schedule:
    """Linear warm-up from `start_factor * peak` over `warmup_steps`, then the schedule `name`.

    warmup_cosine: half a cosine down to `end_factor * peak` (Loshchilov and Hutter 2017, eq. 5).
    step: times `step_factor` at each of `boundaries_percent` of the run. exponential: down to
    `end_factor * peak` at the end, by the same factor each step. polynomial: the part of the run
    that is left, to the `power`, from `peak` down to `end_factor * peak`. constant: `peak`.
    """
    if name not in NAMES:
        raise UserError(f"optim.schedule.name={name!r} is unknown; {nearest(name, NAMES)}")
    if warmup_steps > total_steps:
        raise UserError(
            f"The warm-up of {warmup_steps} steps is longer than the run of {total_steps}: "
            "shorten optim.schedule.warmup_*."
        )
    rest = total_steps - warmup_steps
    if name == "constant" or rest == 0:
        after = optax.constant_schedule(peak)
    elif name == "warmup_cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=end_factor)
    elif name == "exponential":
        if not 0 < end_factor <= 1:
            raise UserError(
                f"optim.schedule.end_factor={end_factor} must be within (0, 1] for exponential."
            )
        after = optax.exponential_decay(peak, rest, end_factor)
    elif name == "polynomial":
        if power <= 0:
            raise UserError(f"optim.schedule.power={power} must be positive.")
        after = optax.polynomial_schedule(peak, end_factor * peak, power, rest)
    else:
        steps = [round(p / 100 * total_steps) - warmup_steps for p in boundaries_percent]
        if min(steps, default=0) < 0:
            raise UserError(
                f"optim.schedule.boundaries_percent={tuple(boundaries_percent)} must lie after "
                f"the warm-up, which ends at {100 * warmup_steps / total_steps:.3g} percent."
            )
        factors = {step: step_factor**count for step, count in Counter(steps).items()}
        after = optax.piecewise_constant_schedule(peak, factors)
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(start_factor * peak, peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
