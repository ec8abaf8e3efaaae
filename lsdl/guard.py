"""The guard of a step: what is not finite changes nothing, and neither does a spike if watched for.

In the step: `judge`, by scalars that are there before the update, and `unless_bad`, which then
makes it or leaves it. On the host: `Verdicts`, which reads one when two more steps are sent.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsdl.errors import NotFiniteError

SPIKES = ("off", "skip", "rewind")
# Of the standard deviation of logarithms. A loss that rises by less than 12% (at 6 sigmas) is none:
# in a window of nearly equal losses any other would be, as would a batch with one odd example.
LEAST_STD = 0.02
IN_A_ROW, SPIKED = "skipped_in_a_row", "spiked"  # metrics that the host reads and does not write
BROKEN = -1  # in place of IN_A_ROW: the update is not finite, though the gradient is


@dataclass(frozen=True)
class Rule:
    """What a step has to keep to, and what happens if it does not."""

    spikes: str = "off"  # of SPIKES
    window: int = 128
    sigmas: float = 6.0
    limit: int = 5  # steps in a row that may be left out
    rewind_steps: int = 100
    branches: bool = False  # the step; see `unless_bad`

    @property
    def watches(self) -> bool:
        return self.spikes != "off"


class Window(NamedTuple):
    """Logarithms of the last W accepted steps' losses and gradient norms."""

    losses_W: jax.Array
    norms_W: jax.Array
    count: jax.Array  # int32: of all accepted steps


class Guard(NamedTuple):
    """What the guard remembers; its arrays are part of the state."""

    skipped: jax.Array  # int32: steps that changed nothing
    in_a_row: jax.Array  # int32: of them, those without another one since
    window: Window | tuple[()]  # (): spikes are not watched for


def init(rule: Rule) -> Guard:
    zero = jnp.zeros((), jnp.int32)
    empty = jnp.zeros((rule.window if rule.watches else 0,), jnp.float32)
    window = Window(empty, empty.copy(), zero.copy()) if rule.watches else ()
    return Guard(zero, zero.copy(), window)


class Verdict(NamedTuple):
    good: jax.Array  # bool: the step counts
    spiked: jax.Array  # bool
    guard: Guard  # after the step


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, *, model_state: Any, rule: Rule
) -> Verdict:
    """Whether a step counts, known before its update is made.

    It does if its loss, its gradient's norm and the collections of `model_state` are finite, and if
    it is no spike: neither loss nor norm lies `sigmas` standard deviations above the mean of the
    window. Both are of logarithms, since the noise of either is multiplicative and has a heavy
    tail. The window has to be half full for that, and a step that does not count does not enter it.
    Source: OLMo's SkipStepOptimizer (Groeneveld et al. 2024), there without logarithms.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    for leaf in jax.tree.leaves(model_state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            good &= jnp.all(jnp.isfinite(leaf))
    spiked, window = jnp.zeros((), bool), ()
    if rule.watches:
        seen = _log(loss), _log(grad_norm)
        spiked = good & _spiked(guard.window, seen, rule)
        good &= ~spiked
        window = _entered(guard.window, seen, good)
    skipped = guard.skipped + (~good).astype(jnp.int32)
    in_a_row = jnp.where(good, 0, guard.in_a_row + 1)
    return Verdict(good, spiked, Guard(skipped, in_a_row, window))


def chosen(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` after a step that counts, else `old`, bit for bit.

    `good` does not wait for `new`, so that each new array still takes its old one's memory.
    """
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(good, a, b), new, old)


def unless_bad(
    good: jax.Array, move: Callable, gradient: Any, *old: Any, rule: Rule
) -> tuple[Any, Any]:
    """`move(gradient, *old) -> (new, numbers)` after a step that counts, else `old` and zeros.

    Neither form takes memory beside that of `move`: an accelerator's compiler fuses a select into
    what writes the new arrays, while that of a CPU would copy the old ones first; it does better
    with a branch, for which a GPU would have to wait for its host.
    """
    shapes = jax.eval_shape(move, gradient, *old)[1]

    def stay(gradient, *old):
        return old, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    if rule.branches:
        return lax.cond(good, move, stay, gradient, *old)
    return chosen(good, move(gradient, *old), stay(gradient, *old))


def told(verdict: Verdict, update_norm: jax.Array) -> dict[str, jax.Array]:
    """The metrics of a verdict: how many steps were left out so far, and what `Verdicts` reads."""
    broken = verdict.good & ~jnp.isfinite(update_norm)
    return {
        "skipped_steps": verdict.guard.skipped,
        IN_A_ROW: jnp.where(broken, BROKEN, verdict.guard.in_a_row),
        SPIKED: verdict.spiked,
    }


def _log(value: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(value.astype(jnp.float32), jnp.finfo(jnp.float32).tiny))


def _spiked(window: Window, seen: tuple[jax.Array, jax.Array], rule: Rule) -> jax.Array:
    filled = jnp.minimum(window.count, rule.window)
    inside_W = jnp.arange(rule.window) < filled
    number = jnp.maximum(filled, 1)
    above = jnp.zeros((), bool)
    for values_W, value in zip(window[:2], seen, strict=True):
        mean = jnp.sum(values_W, where=inside_W) / number
        std = jnp.sqrt(jnp.sum(jnp.square(values_W - mean), where=inside_W) / number)
        above |= value > mean + rule.sigmas * jnp.maximum(std, LEAST_STD)
    return above & (filled >= rule.window // 2)


def _entered(window: Window, seen: tuple[jax.Array, jax.Array], good: jax.Array) -> Window:
    at = window.count % len(window.losses_W)
    entered = [
        values_W.at[at].set(jnp.where(good, value, values_W[at]))
        for values_W, value in zip(window[:2], seen, strict=True)
    ]
    return Window(*entered, window.count + good.astype(jnp.int32))


class Verdicts:
    """Reads what became of each step when two more are sent: the devices never wait for it.

    All processes read the same numbers after the same steps.
    """

    def __init__(self, rule: Rule):
        self._rule = rule
        self._sent: deque[tuple[int, dict]] = deque()

    def sent(self, step: int, metrics: dict[str, Any]) -> int | None:
        """After `step` is sent: the step to rewind from, if one that has been read asks for it.

        Raises `NotFiniteError` for more than `limit` steps in a row that did not count, and for
        one whose update is not finite: it is in the state, which must not be saved.
        """
        self._sent.append((step, metrics))
        return self._read(2)

    def settle(self) -> int | None:
        """The same once all steps that were sent are done: before anything is saved."""
        return self._read(0)

    def _read(self, left: int) -> int | None:
        while len(self._sent) > left:
            step, metrics = self._sent.popleft()
            in_a_row = int(jax.device_get(metrics[IN_A_ROW]))
            if not in_a_row:
                continue
            metrics = jax.device_get(metrics)
            if in_a_row == BROKEN:
                raise NotFiniteError(_broken(step, metrics))
            if self._rule.spikes == "rewind" and metrics[SPIKED]:
                return step
            if in_a_row > self._rule.limit:
                raise NotFiniteError(_too_many(step, in_a_row, metrics))
        return None


REST = "in another --workdir; the newest checkpoint, if there is one, has the state before."


def _broken(step: int, metrics: dict[str, Any]) -> str:
    return (
        f"The update of step {step:,} is not finite (update_norm {metrics['update_norm']:.6g}), "
        f"though its gradient is (grad_norm {metrics['grad_norm']:.6g}): lower the learning rate, "
        f"{metrics['learning_rate']:.6g} there, or raise optim.eps, {REST}"
    )


def _too_many(step: int, in_a_row: int, metrics: dict[str, Any]) -> str:
    values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    wrong = [name for name, value in values.items() if not np.isfinite(value)]
    what = "were spikes" if metrics[SPIKED] else "were not finite"
    shown = ", ".join(f"{name} {values[name]:.6g}" for name in wrong or values)
    mend = "lower optim.schedule.peak, or set optim.clip_norm,"
    if in_a_row == step:
        mend = "as no step was good, look at the model and its data first, and begin anew"
    return (
        f"{in_a_row} steps in a row up to step {step:,} {what} and changed nothing (the last: "
        f"{shown}): {mend} {REST}"
    )
