"""The check of an exercise in a notebook: not yet answered, right, or wrong and where."""

import math
from collections.abc import Mapping


def check(answers: Mapping[str, float | None], truth: Mapping[str, float], *, relative=0.0) -> None:
    """Compare the reader's numbers with those that were measured, and say how they stand.

    None is a question left open. `relative`: how far an answer may be from the truth. Raises
    `AssertionError` that names the wrong ones, and keeps the truth to itself.
    """
    assert answers.keys() == truth.keys(), f"answer these: {', '.join(truth)}."
    given = {part: answer for part, answer in answers.items() if answer is not None}
    wrong = [
        p for p, answer in given.items() if not math.isclose(answer, truth[p], rel_tol=relative)
    ]
    assert not wrong, f"think again about: {'; '.join(f'{p} = {given[p]}' for p in wrong)}."
    left = [part for part in truth if part not in given]
    print(f"Still open: {', '.join(left)}." if left else "All right.")
