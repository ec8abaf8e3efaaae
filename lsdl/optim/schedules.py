"""Learning-rate schedules: `step -> value`, optax's wherever it has them."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import optax

from lsdl.errors import UserError, nearest

SCALINGS = {"none": 0.0, "linear": 1.0, "sqrt": 0.5}  # the batch's exponent
WARMUPS = ("linear", "constant")
MOST_RESTARTS = 100


@dataclass(frozen=True)
class Shape:
    """What a schedule is after its warm-up; each one reads its own fields of these."""

    end_factor: float  # last rate / peak
    low_factor: float  # lowest rate of a cycle / peak
    power: float
    boundaries: tuple[int, ...]  # steps after the warm-up
    step_factor: float  # at each boundary
    decay_factor: float  # each step's
    cycle_factor: float  # a cycle's length / the one's before
    rise_percent: float
    period_steps: int
    growth: float  # alpha of exp_growth


def make_schedule(
    name: str,
    *,
    peak: float,
    base: float,
    total_steps: int,
    warmup_steps: int,
    warmup_form: str,
    start_factor: float,
    shape: Shape,
) -> optax.Schedule:
    """The schedule `name`, after a warm-up of `warmup_steps` to its first rate.

    The warm-up is linear from `start_factor * base`, or constant at `base` (both: Goyal et al.
    2017, section 2.2). The schedules are the functions in `SCHEDULES`.
    """
    if name not in SCHEDULES:
        raise UserError(f"optim.schedule.name={name!r} is unknown; {nearest(name, SCHEDULES)}")
    if warmup_form not in WARMUPS:
        raise UserError(
            f"optim.schedule.warmup_form={warmup_form!r} is unknown; "
            f"{nearest(warmup_form, WARMUPS)}"
        )
    if warmup_steps > total_steps:
        raise UserError(
            f"The warm-up of {warmup_steps} steps is longer than the run of {total_steps}: "
            "shorten optim.schedule.warmup_*."
        )
    if name in WITH_PERIOD and not shape.period_steps:
        raise UserError(
            f"optim.schedule.name={name} needs optim.schedule.period_{{steps,epochs,...}}: "
            f"{WITH_PERIOD[name]}."
        )
    rest = total_steps - warmup_steps
    after = optax.constant_schedule(peak)
    if rest:
        after = SCHEDULES[name](peak, rest, shape)
    if warmup_steps == 0:
        return after
    first = peak * (shape.low_factor if name in FROM_LOW and rest else 1)
    if warmup_form == "constant":
        warmup = optax.constant_schedule(base)
    else:
        warmup = optax.linear_schedule(start_factor * base, first, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def scaled(peak: float, *, scaling: str, batch_size: int, base_batch: int) -> float:
    """The peak for `batch_size`, where `peak` is that for `base_batch`.

    linear: Goyal et al. 2017, section 2.1. sqrt: Krizhevsky 2014, section 5.
    """
    if scaling not in SCALINGS:
        raise UserError(
            f"optim.schedule.scaling={scaling!r} is unknown; {nearest(scaling, SCALINGS)}"
        )
    if (scaling == "none") != (base_batch == 0):
        raise UserError(
            f"optim.schedule.scaling={scaling} and optim.schedule.base_batch={base_batch} must be "
            "given together: the peak is scaled from its base batch."
        )
    if base_batch < 0:
        raise UserError(f"optim.schedule.base_batch={base_batch} must be at least 1.")
    return peak * (batch_size / base_batch) ** SCALINGS[scaling] if base_batch else peak


def growth_root(rate: float, *, weight_decay: float, momentum: float) -> float:
    """Alpha: SGD with these equals SGD without decay at the rate `rate * alpha**(-2t - 1)`.

    For losses that do not see their weights' scale. The larger root of
    x^2 - (1 + momentum - weight_decay * rate) x + momentum. Source: Li and Arora 2020.
    """
    b = 1 + momentum - weight_decay * rate
    if b <= 0 or b * b < 4 * momentum:
        raise UserError(
            f"optim.schedule.growth_decay={weight_decay} with a peak of {rate:g} must be at most "
            f"{(1 - math.sqrt(momentum)) ** 2 / rate:g} at momentum {momentum}: beyond it the "
            "weights oscillate and no growing rate stands for them."
        )
    return (b + math.sqrt(b * b - 4 * momentum)) / 2


def _within_0_1(field: str, value: float, name: str) -> None:
    if not 0 < value <= 1:
        raise UserError(f"optim.schedule.{field}={value} must be within (0, 1] for {name}.")


def _constant(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """`peak`."""
    return optax.constant_schedule(peak)


def _cosine(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """Half a cosine down to `end_factor * peak` (Loshchilov and Hutter 2017, eq. 5)."""
    return optax.cosine_decay_schedule(peak, steps, alpha=shape.end_factor)


def _exponential(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """Times `decay_factor` each step; if that is 0, down to `end_factor * peak` at the end."""
    if shape.decay_factor:
        _within_0_1("decay_factor", shape.decay_factor, "exponential")
        return _geometric(peak, math.log(shape.decay_factor))
    _within_0_1("end_factor", shape.end_factor, "exponential")
    return optax.exponential_decay(peak, steps, shape.end_factor)


def _exp_growth(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """`peak * alpha**(-2t - 1)` (ExpLR, Li and Arora 2020)."""
    log = -2 * math.log(shape.growth)
    if math.log(max(peak, 1e-30)) + log * steps > 85:
        raise UserError(
            f"optim.schedule.name=exp_growth reaches 10^{log * steps / math.log(10):.0f} times the "
            f"peak in {steps} steps, more than float32 holds: shorten the run or lower "
            "optim.schedule.growth_decay."
        )
    return _geometric(peak / shape.growth, log)


def _geometric(first: float, log_factor: float) -> optax.Schedule:
    # The logarithm is taken once, in float64: float32 powers drift over thousands of steps.
    return lambda step: first * jnp.exp(log_factor * jnp.maximum(step, 0))


def _step(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """Times `step_factor` at each boundary, which belongs to what follows it."""
    factors = {b: shape.step_factor**count for b, count in Counter(shape.boundaries).items()}
    return optax.piecewise_constant_schedule(peak, factors)


def _polynomial(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """The part of the run that is left, to the `power`, from `peak` to `end_factor * peak`."""
    if shape.power <= 0:
        raise UserError(f"optim.schedule.power={shape.power} must be positive.")
    return _down(peak, shape.end_factor * peak, shape.power, steps)


def _down(first: float, last: float, power: float, steps: int) -> optax.Schedule:
    # Not optax's: under jit its 1 - step / steps may end a rounding below 0, whose power is NaN.
    def schedule(step):
        left = jnp.clip(steps - step, 0, steps) / steps
        return last + (first - last) * left**power

    return schedule


def _inverse_time(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """`peak / (1 + t / period)` (Robbins and Monro 1951)."""
    return lambda step: peak / (1 + jnp.maximum(step, 0) / shape.period_steps)


def _rsqrt(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """`peak / sqrt(1 + t / period)`: with a warm-up as long, Vaswani et al. 2017, eq. 3."""
    return lambda step: peak / jnp.sqrt(1 + jnp.maximum(step, 0) / shape.period_steps)


def _wsd(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """`peak`, and over the last period linearly down to `end_factor * peak` (Hu et al. 2024)."""
    if shape.period_steps > steps:
        raise UserError(
            f"optim.schedule.period_*: the decay of {shape.period_steps} steps is longer than the "
            f"{steps} steps after the warm-up."
        )
    decay = _down(peak, shape.end_factor * peak, 1.0, shape.period_steps)
    stable = optax.constant_schedule(peak)
    return optax.join_schedules([stable, decay], [steps - shape.period_steps])


def _cyclical(amplitude: Callable) -> Callable:
    """From `low_factor * peak` up to `peak` in one period, down in the next (Smith 2017).

    `amplitude(shape)(step, cycle)` is what becomes of the cycle's height.
    """

    def make(peak: float, steps: int, shape: Shape) -> optax.Schedule:
        low, period = shape.low_factor * peak, shape.period_steps
        height = amplitude(shape)

        def schedule(step):
            cycle, place = jnp.divmod(jnp.maximum(step, 0), 2 * period)
            up = 1 - jnp.abs(place / period - 1)
            return low + (peak - low) * up * height(step, cycle)

        return schedule

    return make


def _decaying(shape: Shape) -> Callable:
    _within_0_1("decay_factor", shape.decay_factor, "exp_range")
    decay = _geometric(1.0, math.log(shape.decay_factor))
    return lambda step, cycle: decay(step)


def _sgdr(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """Cosines from `peak` to `end_factor * peak`, the first a period long, each next one times
    `cycle_factor` (warm restarts: Loshchilov and Hutter 2017).
    """
    if shape.cycle_factor < 1:
        raise UserError(f"optim.schedule.cycle_factor={shape.cycle_factor} must be at least 1.")
    cycles, covered = [], 0
    while covered <= steps:
        length = round(shape.period_steps * shape.cycle_factor ** len(cycles))
        cycles.append(length)
        covered += length
        if len(cycles) > MOST_RESTARTS:
            raise UserError(
                f"optim.schedule.period_*: cycles of {shape.period_steps} steps restart more than "
                f"{MOST_RESTARTS} times in {steps} steps: lengthen the period."
            )
    ends = dict(init_value=peak, peak_value=peak, warmup_steps=0, end_value=shape.end_factor * peak)
    return optax.sgdr_schedule([dict(decay_steps=length, **ends) for length in cycles])


def _one_cycle(peak: float, steps: int, shape: Shape) -> optax.Schedule:
    """Half cosines: `low_factor * peak` to `peak` in `rise_percent` of the steps, then to
    `end_factor * peak` (Smith and Topin 2018).
    """
    _within_0_1("low_factor", shape.low_factor, "one_cycle")
    if not 0 < shape.rise_percent < 100:
        raise UserError(f"optim.schedule.rise_percent={shape.rise_percent} must be in (0, 100).")
    low, end = shape.low_factor, shape.end_factor
    factors = dict(div_factor=1 / low, final_div_factor=low / end if end else math.inf)
    return optax.cosine_onecycle_schedule(steps, peak, shape.rise_percent / 100, **factors)


SCHEDULES = {
    "constant": _constant,
    "plateau": _constant,  # which a link of the optimiser's chain multiplies
    "cosine": _cosine,
    "warmup_cosine": _cosine,  # its older name: any schedule has a warm-up
    "step": _step,
    "exponential": _exponential,
    "exp_growth": _exp_growth,
    "polynomial": _polynomial,
    "inverse_time": _inverse_time,
    "rsqrt": _rsqrt,
    "wsd": _wsd,
    "triangular": _cyclical(lambda shape: lambda step, cycle: 1.0),
    "triangular2": _cyclical(lambda shape: lambda step, cycle: jnp.exp2(-1.0 * cycle)),
    "exp_range": _cyclical(_decaying),
    "sgdr": _sgdr,
    "one_cycle": _one_cycle,
}
NAMES = tuple(SCHEDULES)
CYCLICAL = ("triangular", "triangular2", "exp_range")
FROM_LOW = (*CYCLICAL, "one_cycle")  # whose first rate is not the peak
WITH_PERIOD = {
    "inverse_time": "after which the rate is half the peak",
    "rsqrt": "after which the rate is the peak over sqrt(2)",
    "wsd": "the decay at the end",
    **dict.fromkeys(CYCLICAL, "half a cycle"),
    "sgdr": "the first cycle",
}
