"""What goes around an optimiser: plateaus, the change to another one, SAM, averaged parameters.

And the readers of what it keeps in `opt_state`: the rate that was applied, the averages.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from lsdl.optim.links import unit_norm


@dataclass(frozen=True)
class Plateau:
    """`patience` means over `window` steps, none of them below the best by more than `threshold`.

    The rate is then multiplied by `factor`.
    """

    factor: float
    threshold: float
    window: int
    patience: int

    def link(self) -> optax.GradientTransformationExtraArgs:
        return contrib.reduce_on_plateau(
            self.factor,
            patience=self.patience,
            rtol=0.0,
            atol=self.threshold,
            accumulation_size=self.window,
        )


@dataclass(frozen=True)
class Switch:
    """To the optimiser `name`, at the step `at` or (0) where `detector` first sees a plateau."""

    name: str
    rate_factor: float
    at: int
    detector: Plateau | None


class SwitchState(NamedTuple):
    count: jax.Array
    on: jax.Array
    scale: jax.Array  # rate_factor once it is on
    detector: Any
    first: Any
    second: Any


def switched(
    first: optax.GradientTransformation, second: optax.GradientTransformation, switch: Switch
) -> optax.GradientTransformationExtraArgs:
    """`first`, then for good `second`, whose moments start there and whose schedules go on."""
    first, second = map(optax.with_extra_args_support, (first, second))
    detector = None if switch.at else switch.detector.link()

    def init(params):
        seen = detector.init(params) if detector else optax.EmptyState()
        start = (jnp.zeros((), jnp.int32), jnp.zeros((), bool), jnp.ones(()))
        return SwitchState(*start, seen, first.init(params), second.init(params))

    def update(updates, state, params=None, *, value, **extra):
        seen, on = state.detector, state.count >= switch.at
        if detector:
            _, seen = detector.update((), seen, value=value)
            on = seen.scale < 1
        extra |= {"value": value}

        def before():
            new, inner = first.update(updates, state.first, params, **extra)
            return new, inner, state.second

        def after():
            inner = _at(state.second, state.count)
            new, inner = second.update(updates, inner, params, **extra)
            return new, state.first, inner

        new, *inner = jax.lax.cond(on, after, before)
        scale = jnp.where(on, switch.rate_factor, 1.0).astype(state.scale.dtype)
        return new, SwitchState(optax.safe_increment(state.count), on, scale, seen, *inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _at(opt_state: Any, count: jax.Array) -> Any:
    """`opt_state` with its schedules at step `count`; moments count from their own first."""
    clock = optax.ScaleByScheduleState
    move = lambda node: clock(count) if isinstance(node, clock) else node  # noqa: E731
    return jax.tree.map(move, opt_state, is_leaf=lambda node: isinstance(node, clock))


def sam(
    inner: optax.GradientTransformationExtraArgs, rho: float, first: list
) -> optax.GradientTransformationExtraArgs:
    """`inner` on the gradient at w + rho g / ||g||: two gradients a step.

    `first` are links that the gradient g passes before. Source: Foret et al. 2021, algorithm 1.
    """
    adversary = optax.chain(*first, unit_norm(), optax.sgd(rho))

    def wrapped(**extra):
        # optax's passes its optimiser no arguments, and takes none but grad_fn.
        update = lambda u, s, p=None: inner.update(u, s, p, **extra)  # noqa: E731
        optimizer = optax.GradientTransformation(inner.init, update)
        return contrib.sam(optimizer, adversary, sync_period=2, opaque_mode=True)

    def update(updates, state, params=None, *, grad_fn, **extra):
        tx = wrapped(grad_fn=grad_fn, **extra)
        return tx.update(updates, state, params, grad_fn=grad_fn)

    return optax.GradientTransformationExtraArgs(wrapped().init, update)


def given(
    inner: optax.GradientTransformationExtraArgs, *names: str
) -> optax.GradientTransformationExtraArgs:
    """`inner` with these extra arguments alone: the line search refuses what it does not know."""

    def update(updates, state, params=None, **extra):
        return inner.update(updates, state, params, **{name: extra[name] for name in names})

    return optax.GradientTransformationExtraArgs(inner.init, update)


class EmaState(NamedTuple):
    average: Any


def ema(decay: float) -> optax.GradientTransformation:
    """The last link: a <- d a + (1 - d) w of the parameters after the update, from the first ones.

    Source: Polyak and Juditsky 1992, with the exponential weights of Tan and Le 2019.
    """

    def init(params):
        return EmaState(jax.tree.map(jnp.copy, params))  # a buffer of its own, to be donated

    def update(updates, state, params=None):
        after = optax.apply_updates(params, updates)
        return updates, EmaState(optax.incremental_update(after, state.average, 1 - decay))

    return optax.GradientTransformation(init, update)


def averages(opt_state: Any) -> EmaState | contrib.ScheduleFreeState | None:
    """The state of the link that averages the parameters; None: there is none."""
    found = _nodes(opt_state, EmaState, contrib.ScheduleFreeState)
    return found[0] if found else None


def evaluated(opt_state: Any, params: Any) -> Any:
    """The parameters to evaluate: the averages that `opt_state` keeps, or `params`."""
    found = averages(opt_state)
    if isinstance(found, EmaState):
        return found.average
    return params if found is None else contrib.schedule_free_eval_params(found, params)


def waits(opt_state: Any) -> bool:
    """Whether a plateau of the loss would change the rate, or the optimiser."""
    return bool(_nodes(opt_state, contrib.ReduceLROnPlateauState))


def rate(opt_state: Any, scheduled: jax.Array) -> jax.Array:
    """The rate of the step that left `opt_state`: the schedule's, as plateaus changed it.

    Or the one that a line search found.
    """
    searched = optax.ScaleByZoomLinesearchState
    for node in _nodes(opt_state, contrib.ReduceLROnPlateauState, SwitchState, searched):
        scheduled = node.learning_rate if isinstance(node, searched) else scheduled * node.scale
    return scheduled


def _nodes(opt_state: Any, *kinds: type) -> list:
    """The outermost parts of `opt_state` that are of `kinds`."""
    found = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, kinds))
    return [node for node in found if isinstance(node, kinds)]
