"""Batches that a run leaves out, as pairs (first, end) of places in the order its seed gives."""

from collections.abc import Sequence

from lsdl.errors import UserError

Skips = tuple[tuple[int, int], ...]


def joined(*lists: Sequence[Sequence[int]]) -> Skips:
    """All that the `lists` leave out, in order and without overlaps."""
    found: list[tuple[int, int]] = []
    for first, end in sorted((first, end) for pairs in lists for first, end in pairs):
        if found and first <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((first, end))
    return tuple(found)


def place(step: int, skips: Skips) -> int:
    """The place of the `step`-th batch that `skips`, which is `joined`, does not leave out."""
    for first, end in skips:
        if step < first:
            break
        step += end - first
    return step


def check(pairs: Sequence) -> Skips:
    """`pairs` joined; `UserError` for what is no list of places."""
    for pair in pairs:
        good = isinstance(pair, tuple | list) and len(pair) == 2
        good = good and all(type(n) is int for n in pair)
        if not good or not 0 <= pair[0] < pair[1] < 2**31:
            raise UserError(
                f"data.skip_batches has the entry {pair!r}: write (FIRST, END), the first batch "
                "that is left out, counted from 0, and the first one after it that is not."
            )
    return joined(pairs)
