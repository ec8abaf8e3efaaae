"""Times that can be compared: of several calls in turn, on a machine that others use as well."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def in_turn(
    calls: Mapping[str, Callable[[], Any]], *, rounds: int, least_s: float = 0.0
) -> dict[str, list[float]]:
    """{name: seconds of one call, round by round}; each round has them all.

    So a slow while slows them all. Every other round goes the other way, since what ran before
    leaves the caches as it does.
    A call that takes less than `least_s` is repeated until it takes as long, and the mean counts.
    Each is called once before, untimed, to compile.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    repeats = {name: _repeats(call, least_s) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            times[name].append(_mean(calls[name], repeats[name]))
    return times


def _repeats(call: Callable[[], Any], least_s: float) -> int:
    repeats = 1
    while _mean(call, repeats) * repeats < least_s:
        repeats *= 2
    return repeats


def _mean(call: Callable[[], Any], repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return (time.perf_counter() - began) / repeats
