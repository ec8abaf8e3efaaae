"""The check of an exercise in a notebook: not yet answered, right, or wrong and where."""

import math
from collections.abc import Callable, Mapping
from typing import Any

Judge = Callable[[Mapping[str, Any]], str]


def check(
    answers: Mapping[str, Any], truth: Mapping[str, float] | Judge, *, relative: float = 0.0
) -> None:
    """Compare the reader's answers with what was measured, and say how they stand.

    None is a question left open. `truth`: the numbers, `relative` how far an answer may be from
    its own; or, where many answers are right, a function of all of them that says what is wrong
    with them, "" if nothing. Raises `AssertionError` that names the wrong ones, and keeps the
    truth to itself.
    """
    given = {part: answer for part, answer in answers.items() if answer is not None}
    left = [part for part in answers if part not in given]
    said, wrong = "", []
    if not callable(truth):
        assert answers.keys() == truth.keys(), f"answer these: {'; '.join(truth)}."
        wrong = [p for p in given if not math.isclose(given[p], truth[p], rel_tol=relative)]
    elif not left and (found := truth(given)):
        said, wrong = f" ({found})", given
    assert not wrong, f"think again about: {'; '.join(f'{p} = {given[p]}' for p in wrong)}{said}."
    print(f"Still open: {'; '.join(left)}." if left else "All right.")
