"""Schedules against their formulas, written out in float64 numpy; and SGD's conditions by sums."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.errors import UserError
from lsdl.experiment import build
from lsdl.optim import schedules
from lsdl.optim.conditions import conditions
from lsdl.optim.wrappers import Plateau

SHAPE = schedules.Shape(
    end_factor=0.05,
    low_factor=0.2,
    power=2.0,
    boundaries=(100, 150),
    step_factor=0.1,
    decay_factor=0.0,
    cycle_factor=2.0,
    rise_percent=30.0,
    period_steps=30,
    growth=0.999,
)
RUN = dict(
    peak=0.3, base=0.3, total_steps=200, warmup_steps=0, warmup_form="linear", start_factor=0.0
)
DECAYING = ("exp_range",)  # needs a decay_factor


def make_schedule(name, **given):
    run = {key: given.pop(key, value) for key, value in RUN.items()}
    if "peak" in run and run["peak"] != 0.3 and run["base"] == 0.3:
        run["base"] = run["peak"]
    if name in DECAYING:
        given = {"decay_factor": 0.99} | given
    return schedules.make_schedule(name, **run, shape=dataclasses.replace(SHAPE, **given))


def cycles(t, s, height):
    """Smith 2017, section 3.1, in his own words: x and cycle from the step."""
    cycle = math.floor(1 + t / (2 * s.period_steps))
    x = abs(t / s.period_steps - 2 * cycle + 1)
    return s.low_factor + (1 - s.low_factor) * max(0, 1 - x) * height(cycle)


def one_cycle(t, rest, s):
    rise = int(s.rise_percent / 100 * rest)
    half = lambda a, b, part: a + (b - a) * (1 - math.cos(math.pi * part)) / 2  # noqa: E731
    if t < rise:
        return half(s.low_factor, 1.0, t / rise)
    return half(1.0, s.end_factor, min((t - rise) / (rest - rise), 1))


def sgdr(t, s):
    start, k = 0, 0
    while t >= start + (length := round(s.period_steps * s.cycle_factor**k)):
        start, k = start + length, k + 1
    return s.end_factor + (1 - s.end_factor) * (1 + math.cos(math.pi * (t - start) / length)) / 2


def cosine(t, rest, s):
    return s.end_factor + (1 - s.end_factor) * (1 + math.cos(math.pi * min(t / rest, 1))) / 2


# (t: steps after the warm-up, rest: how many there are, Shape) -> rate / peak
FORMULAS = {
    "constant": lambda t, rest, s: 1.0,
    "cosine": cosine,
    "warmup_cosine": cosine,
    "step": lambda t, rest, s: s.step_factor ** sum(t >= b for b in s.boundaries),
    "exponential": lambda t, rest, s: s.decay_factor**t or s.end_factor ** (t / rest),
    "exp_growth": lambda t, rest, s: s.growth ** (-2 * t - 1),
    "polynomial": lambda t, rest, s: (
        s.end_factor + (1 - s.end_factor) * (1 - min(t / rest, 1)) ** s.power
    ),
    "plateau": lambda t, rest, s: 1.0,  # until a link of the chain sees one: test_optimizers
    "inverse_time": lambda t, rest, s: s.period_steps / (s.period_steps + t),
    "rsqrt": lambda t, rest, s: math.sqrt(s.period_steps / (s.period_steps + t)),
    "wsd": lambda t, rest, s: (
        1 - (1 - s.end_factor) * min(max(0, 1 - (rest - t) / s.period_steps), 1)
    ),
    "triangular": lambda t, rest, s: cycles(t, s, lambda cycle: 1.0),
    "triangular2": lambda t, rest, s: cycles(t, s, lambda cycle: 0.5 ** (cycle - 1)),
    "exp_range": lambda t, rest, s: cycles(t, s, lambda cycle: s.decay_factor**t),
    "sgdr": lambda t, rest, s: sgdr(t, s),
    "one_cycle": one_cycle,
}


def formula(name, step, *, warmup=0, start=0.0, peak=0.3, total=200, **given):
    if name in DECAYING:
        given = {"decay_factor": 0.99} | given
    shape = dataclasses.replace(SHAPE, **given)
    low = shape.low_factor if name in schedules.FROM_LOW else 1
    if step < warmup:
        return peak * (start + (low - start) * step / warmup)
    return peak * FORMULAS[name](step - warmup, total - warmup, shape)


def every(schedule, steps):
    return np.asarray(jax.jit(jax.vmap(schedule))(jnp.asarray(steps)), np.float64)


def test_every_schedule_has_a_formula():
    assert FORMULAS.keys() == set(schedules.NAMES)


CASES = [
    *((name, {}) for name in schedules.NAMES),
    ("cosine", dict(end_factor=0.0)),
    ("cosine", dict(end_factor=1.0, peak=2e-3)),
    ("polynomial", dict(power=1.5, end_factor=0.0)),
    ("polynomial", dict(power=1.0)),
    ("exponential", dict(end_factor=1.0)),
    ("exponential", dict(end_factor=1e-4, peak=5.0)),
    ("exponential", dict(decay_factor=0.97)),
    ("exp_growth", dict(growth=1.0)),
    ("exp_growth", dict(growth=0.99)),
    ("step", dict(boundaries=())),
    ("step", dict(boundaries=(200,))),
    ("step", dict(boundaries=(50, 120, 120), step_factor=0.2)),
    ("inverse_time", dict(period_steps=1)),
    ("rsqrt", dict(period_steps=1)),
    ("wsd", dict(period_steps=1, end_factor=0.0)),
    ("triangular", dict(low_factor=0.0, period_steps=1)),
    ("exp_range", dict(decay_factor=1.0)),
    ("sgdr", dict(cycle_factor=1.0, end_factor=0.0)),
    ("sgdr", dict(cycle_factor=1.5, period_steps=7)),
    ("one_cycle", dict(rise_percent=45.0, end_factor=0.0)),
]


@pytest.mark.parametrize("warmup", [0, 50])
@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
def test_schedule_is_its_formula(name, given, warmup):
    schedule = make_schedule(name, warmup_steps=warmup, start_factor=0.5, **given)
    truth = np.array(
        [formula(name, step, warmup=warmup, start=0.5, **given) for step in range(201)]
    )
    np.testing.assert_allclose(
        every(schedule, range(201)), truth, rtol=1e-6, atol=1e-6 * truth.max()
    )


@pytest.mark.parametrize("name", schedules.NAMES)
def test_schedule_is_the_same_untraced(name):
    schedule = make_schedule(name, warmup_steps=10)
    steps = [0, 3, 9, 10, 11, 100, 149, 150, 199]
    alone = [float(schedule(step)) for step in steps]
    np.testing.assert_allclose(every(schedule, steps), alone, rtol=1e-6, atol=1e-8)


# --- named points ---------------------------------------------------------------------------------


def test_step_falls_at_half_and_at_three_quarters(load):
    """The defaults, in a whole run: the boundary belongs to what follows it."""
    fields = ("name=step", "peak=0.3", "warmup_steps=10")
    fields = (f"optim.schedule.{field}" for field in fields)
    experiment = build(load("digits_mlp:smoke", "total_steps=200", *fields))
    rates = every(experiment.schedule, [98, 99, 100, 149, 150, 199])
    np.testing.assert_allclose(rates, [0.3, 0.3, 0.03, 0.03, 0.003, 0.003], rtol=1e-6)


@pytest.mark.parametrize("given", ["steps=(32, 48)", "epochs=(2.0, 3.7)"])
def test_boundaries_may_be_listed_in_steps_and_epochs(load, given):
    """An epoch of digits is 13 steps of 96; CIFAR's ResNet falls at 32k and 48k of 64k steps."""
    fields = ("name=step", "peak=1.0", "warmup_steps=0", f"boundaries_{given}")
    fields = (f"optim.schedule.{field}" for field in fields)
    experiment = build(load("digits_mlp:smoke", "total_steps=64", *fields))
    falls = np.flatnonzero(np.diff(every(experiment.schedule, range(64)))) + 1
    assert falls.tolist() == ([32, 48] if "steps" in given else [26, 48])


def test_cosine_at_its_ends_and_its_middle():
    schedule = make_schedule("cosine", end_factor=0.1, peak=2.0)
    np.testing.assert_allclose(every(schedule, [0, 100, 200]), [2.0, 1.1, 0.2], rtol=1e-6)


def test_boundaries_on_the_same_step_both_count():
    assert make_schedule("step", boundaries=(180, 180))(199) == pytest.approx(0.003, rel=1e-6)


def test_triangular2_halves_its_height_each_cycle():
    schedule = make_schedule("triangular2", low_factor=0.0, peak=1.0)
    np.testing.assert_allclose(every(schedule, [30, 90, 150, 60]), [1, 0.5, 0.25, 0], atol=1e-6)


def test_noam_is_rsqrt_after_a_warm_up_as_long():
    """Vaswani et al. 2017, eq. 3, up to its constant."""
    schedule = make_schedule("rsqrt", warmup_steps=40, period_steps=40)
    steps = np.arange(1, 200)
    truth = 0.3 * math.sqrt(40) * np.minimum(steps**-0.5, steps * 40**-1.5)
    np.testing.assert_allclose(every(schedule, steps), truth, rtol=2e-6)


def test_exponential_growth_is_that_of_the_published_run():
    """1.481 an epoch: PreResNet-32 on CIFAR-10 (Li and Arora 2020, figure 1)."""
    alpha = schedules.growth_root(0.1, weight_decay=5e-4, momentum=0.9)
    assert alpha == pytest.approx(0.9994977, abs=5e-8)
    roots = np.roots([1, -(1 + 0.9 - 5e-4 * 0.1), 0.9])
    assert alpha == pytest.approx(max(roots), rel=1e-12)
    schedule = make_schedule("exp_growth", growth=alpha, peak=0.1, total_steps=391)
    assert schedule(391) / schedule(0) == pytest.approx(1.4812, abs=5e-5)
    assert schedule(0) == pytest.approx(0.1 / alpha, rel=1e-6)


def test_growth_without_decay_is_none():
    assert schedules.growth_root(0.1, weight_decay=0.0, momentum=0.9) == pytest.approx(1.0)


# --- warm-up and scaling --------------------------------------------------------------------------


@pytest.mark.parametrize("name", schedules.NAMES)
def test_warm_up_runs_from_0_to_the_first_rate(name):
    schedule = make_schedule(name, warmup_steps=10, growth=1.0)
    rates = every(schedule, range(11))
    first = 0.06 if name in schedules.FROM_LOW else 0.3
    np.testing.assert_allclose(rates, np.linspace(0, first, 11), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", schedules.NAMES)
def test_warm_up_may_fill_the_run(name):
    rates = every(make_schedule(name, warmup_steps=200), (0, 50, 199))
    np.testing.assert_allclose(rates, [0, 0.075, 0.2985], rtol=1e-6)


@pytest.mark.parametrize(
    ("start", "form", "expected"),
    [
        (0.0, "linear", [0, 1.6, 3.2]),
        (1.0, "linear", [0.1, 1.65, 3.2]),  # Goyal's gradual warm-up
        (0.0, "constant", [0.1, 0.1, 3.2]),  # and his constant one
    ],
)
def test_warm_up_starts_from_the_base_rate(start, form, expected):
    peak = schedules.scaled(0.1, scaling="linear", batch_size=8192, base_batch=256)
    schedule = make_schedule(
        "constant", peak=peak, base=0.1, warmup_steps=10, start_factor=start, warmup_form=form
    )
    np.testing.assert_allclose(every(schedule, [0, 5, 10]), expected, rtol=3e-6)


@pytest.mark.parametrize(
    ("scaling", "batch", "peak"),
    [
        # Goyal et al. 2017, table 4: 0.1 at 256
        *(("linear", k * 256, 0.1 * k) for k in (0.5, 1, 2, 4, 8, 32, 256)),
        ("sqrt", 8192, 0.1 * 32**0.5),
        ("sqrt", 256, 0.1),
        ("sqrt", 64, 0.05),
    ],
)
def test_scaled_peaks(scaling, batch, peak):
    found = schedules.scaled(0.1, scaling=scaling, batch_size=batch, base_batch=256)
    assert found == pytest.approx(peak, rel=1e-12)


def test_a_run_says_its_scaled_peak(load):
    fields = ("scaling=linear", "base_batch=32", "peak=0.5", "warmup_steps=5")
    fields = (f"optim.schedule.{field}" for field in fields)
    experiment = build(load("digits_mlp:smoke", *fields))
    assert experiment.schedule(5) == pytest.approx(1.5, rel=1e-6)
    (note,) = (note for note in experiment.notes if "peak" in note)
    assert "1.5: 0.5 scaled (linear) from a batch of 32 to 96" in note


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("warmup_cosin", {}, "did you mean 'warmup_cosine'"),
        ("cosine", dict(warmup_steps=201), "longer than the run of 200"),
        ("constant", dict(warmup_steps=201), "longer than the run of 200"),
        ("constant", dict(warmup_form="linaer"), "warmup_form='linaer'.*did you mean 'linear'"),
        ("exponential", dict(end_factor=0.0), r"must be within \(0, 1\]"),
        ("exponential", dict(end_factor=1.5), r"must be within \(0, 1\]"),
        ("exponential", dict(decay_factor=1.5), r"decay_factor=1.5 must be within \(0, 1\]"),
        ("exp_range", dict(decay_factor=0.0), r"decay_factor=0.0 must be within \(0, 1\]"),
        ("polynomial", dict(power=0.0), "power=0.0 must be positive"),
        ("rsqrt", dict(period_steps=0), "needs optim.schedule.period_.*sqrt"),
        ("sgdr", dict(period_steps=0), "needs optim.schedule.period_.*the first cycle"),
        ("sgdr", dict(cycle_factor=0.5), "cycle_factor=0.5 must be at least 1"),
        ("sgdr", dict(period_steps=1, cycle_factor=1.0), "more than 100 times in 200 steps"),
        ("wsd", dict(period_steps=201), "the decay of 201 steps is longer than the 200"),
        ("one_cycle", dict(low_factor=0.0), r"low_factor=0.0 must be within \(0, 1\]"),
        ("one_cycle", dict(rise_percent=100.0), "rise_percent=100.0 must be"),
        ("exp_growth", dict(growth=0.5), "more than float32 holds"),
    ],
)
def test_bad_schedules_are_errors(name, given, words):
    with pytest.raises(UserError, match=words):
        make_schedule(name, **given)


def test_growth_of_an_oscillating_run_is_an_error():
    with pytest.raises(UserError, match=r"growth_decay=0.1 .*at most 0.00263"):
        schedules.growth_root(1.0, weight_decay=0.1, momentum=0.9)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("scaling=linear",), "scaling=linear and optim.schedule.base_batch=0 must be given"),
        (("base_batch=256",), "scaling=none and optim.schedule.base_batch=256 must be given"),
        (("scaling=linear", "base_batch=-1"), "base_batch=-1 must be at least 1"),
        (("scaling=cubic", "base_batch=8"), "scaling='cubic' is unknown"),
        (("name=exp_growth",), "needs optim.name=sgd, not adamw"),
        (("period_steps=3", "period_epochs=1.0"), "say the same duration"),
        (("period_steps=0",), "period_steps=0 must be positive"),
        (("boundaries_steps=(3,)", "boundaries_epochs=(1.0,)"), "say the same: give one"),
        (("boundaries_steps=('a',)",), "boundaries_steps=.* must hold numbers"),
    ],
)
def test_bad_fields_are_errors(load, given, words):
    with pytest.raises(UserError, match=words):
        build(load("digits_vit:smoke", *(f"optim.schedule.{field}" for field in given)))


# --- SGD's conditions -----------------------------------------------------------------------------

# As the schedule's rule goes on: what the numbers choose is part of the case.
FOR_EVER = [
    *((name, {}) for name in schedules.NAMES if name not in ("exp_growth", "plateau")),
    ("cosine", dict(end_factor=0.0)),
    ("polynomial", dict(end_factor=0.0)),
    ("wsd", dict(end_factor=0.0)),
    ("one_cycle", dict(end_factor=0.0)),
    ("exponential", dict(end_factor=1.0)),
    ("exponential", dict(decay_factor=0.97)),
    ("triangular2", dict(low_factor=0.0)),
    ("exp_range", dict(low_factor=0.0)),
    ("exp_range", dict(low_factor=0.0, decay_factor=1.0)),
    ("exp_growth", dict(growth=0.9999)),
    ("exp_growth", dict(growth=1.0)),
]


@pytest.mark.parametrize(("name", "given"), FOR_EVER, ids=str)
def test_conditions_are_those_of_the_partial_sums(name, given):
    """Between n and 2n steps the sum of 1/t grows as much as between 2n and 4n; of less, less."""
    n = 2**13
    # Those that end do so well before n; restarts are laid out as far as the run goes.
    total = 4 * n if name == "sgdr" else 500
    rates = every(make_schedule(name, total_steps=total, **given), range(4 * n))
    early, late = rates[n : 2 * n], rates[2 * n :]
    grows = lambda a, b: b.sum() > 0.95 * a.sum() and b.sum() > 0  # noqa: E731
    shape = dataclasses.replace(
        SHAPE, **({"decay_factor": 0.99} if name in DECAYING else {}) | given
    )
    found = conditions(name, shape)
    assert found.to_zero == (late.max() <= 0.75 * early.max())
    assert found.sum_infinite == grows(early, late)
    assert found.squares_finite == (not grows(early**2, late**2))
    assert found.reason


@pytest.mark.parametrize("end_factor", [0.0, 0.1])
def test_a_plateau_is_followed_by_another(end_factor):
    """A loss with a lower bound falls by the threshold finitely often."""
    link = Plateau(0.5, 0.1, 1, 4).link()
    update = jax.jit(lambda state, value: link.update({}, state, value=value)[1])
    state, scales = link.init({}), []
    for t in range(200):
        state = update(state, jnp.asarray(1 / (1 + t)))
        scales.append(float(state.scale))
    assert scales[-1] < 1e-10
    found = conditions("plateau", dataclasses.replace(SHAPE, end_factor=end_factor))
    assert (found.to_zero, found.sum_infinite, found.squares_finite) == (True, False, True)
    assert "plateau" in found.reason


def test_only_one_over_t_meets_all_three():
    """1/sqrt(t) is what the square's condition is for."""
    met = [name for name in schedules.NAMES if conditions(name, SHAPE).all]
    assert met == ["inverse_time"]
    root = conditions("rsqrt", SHAPE)
    assert (root.to_zero, root.sum_infinite, root.squares_finite) == (True, True, False)
