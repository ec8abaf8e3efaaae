"""How many examples a step takes: one size, or a ramp that grows in the course of the run.

Source: Smith et al. 2018, section 3: a larger batch in place of a smaller rate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lsdl.errors import UserError


@dataclass(frozen=True)
class Phase:
    """The steps from `first_step` on, up to the next phase's or the run's end."""

    first_step: int
    first_example: int  # examples that the steps before it took
    batch_size: int
    factor: int  # batch_size / that of the first phase; so grows the number of microbatches


@dataclass(frozen=True)
class Ramp:
    phases: tuple[Phase, ...]
    total_steps: int

    @property
    def total_examples(self) -> int:
        return self.examples_before(self.total_steps)

    def phase_at(self, step: int) -> Phase:
        """The phase of the step after `step` others."""
        return next(p for p in reversed(self.phases) if p.first_step <= step)

    def batch_size_at(self, step: int) -> int:
        return self.phase_at(step).batch_size

    def examples_before(self, step: int) -> int:
        """What `step` steps take."""
        phase = self.phase_at(step)
        return phase.first_example + (step - phase.first_step) * phase.batch_size

    def step_at(self, examples: float) -> int:
        """The number of steps that take `examples`, to the nearest step."""
        phase = next(p for p in reversed(self.phases) if p.first_example <= examples)
        return phase.first_step + round((examples - phase.first_example) / phase.batch_size)


def make_ramp(
    rule: Sequence[tuple[float, int]], *, batch_size: int, examples: float, total_steps: int
) -> Ramp:
    """Batches of `batch_size`, and from each (percent of the examples, factor) on times `factor`.

    Each phase has its share of the `examples` in whole steps, at least one, and the run is as long
    as they are together. Without a `rule` it has `total_steps`.
    """
    if not rule:
        return Ramp((Phase(0, 0, batch_size, 1),), total_steps)
    _check(rule)
    starts = [0.0, *(percent for percent, _ in rule)]
    ends = [*starts[1:], 100.0]
    phases, step, example = [], 0, 0
    for start, end, factor in zip(starts, ends, [1, *(f for _, f in rule)], strict=True):
        phase = Phase(step, example, batch_size * factor, factor)
        steps = max(1, round((end - start) / 100 * examples / phase.batch_size))
        phases.append(phase)
        step, example = step + steps, example + steps * phase.batch_size
    return Ramp(tuple(phases), step)


def _check(rule: Sequence[tuple[float, int]]) -> None:
    for pair in rule:
        try:
            percent, factor = pair
            good = 0 < percent < 100 and isinstance(factor, int) and factor >= 1
        except (TypeError, ValueError):
            good = False
        if not good:
            raise UserError(
                f"batch_ramp has the part {pair!r}: write (percent, factor), a percent of the "
                "run's examples within (0, 100) and a whole number of at least 1."
            )
    percents = [percent for percent, _ in rule]
    if sorted(set(percents)) != percents:
        raise UserError(f"batch_ramp={tuple(rule)} must be in order: its percents have to rise.")
