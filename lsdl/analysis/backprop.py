"""Reverse passes over a chain that count: nodes evaluated, and activations stored at once.

A chain is f_i = node(i, f_i-1) for i = 1..n, from an input f_0 that is given and costs nothing. The
way back is b_i = back(i, f_i, b_i+1) for i = n..0, and the b of node i needs that node's f: when to
have it is all that tells one pass from another. Storing an activation counts from then until its
b is made; the one that a forward pass has in hand does not.

Shape letters: N nodes, T events, B batch, D width.
"""

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

NODE, STORE, BACK = "node", "store", "back"
ABSENT, STORED, EVALUATED, USED = range(4)  # the values of `alive`


@dataclass(frozen=True)
class Chain:
    """`length` nodes; `back` gets None for the b behind the last, and 0 for the input."""

    length: int
    node: Callable[[int, Any], Any]
    back: Callable[[int, Any, Any], Any]


@dataclass
class Pass:
    """A reverse pass: what it has stored, what it has done, and the b that it has come to."""

    chain: Chain
    f_0: Any
    b: Any = None
    events: list[tuple[str, int]] = field(default_factory=list)  # (NODE | STORE | BACK, i)
    stored: dict[int, Any] = field(default_factory=dict)
    peak: int = 0  # activations stored, at the most
    evaluations: int = 0

    def forward(self, start: int, end: int, *, keep: Collection[int]) -> None:
        """Evaluate nodes start + 1 to `end` from f_start, and store those of `keep`."""
        f = self.stored[start] if start else self.f_0
        for i in range(start + 1, end + 1):
            f = self.chain.node(i, f)
            self.evaluations += 1
            self.events.append((NODE, i))
            if i in keep:
                self.stored[i] = f
                self.peak = max(self.peak, len(self.stored))
                self.events.append((STORE, i))

    def back(self, i: int) -> None:
        """Make b_i from f_i, which is then forgotten."""
        self.b = self.chain.back(i, self.stored.pop(i) if i else self.f_0, self.b)
        self.events.append((BACK, i))


def vanilla(chain: Chain, f_0: Any) -> Pass:
    """Store everything: n evaluations, n stored."""
    run, n = Pass(chain, f_0), chain.length
    run.forward(0, n, keep=range(1, n + 1))
    for i in range(n, -1, -1):
        run.back(i)
    return run


def memory_poor(chain: Chain, f_0: Any) -> Pass:
    """Store the one that is needed, each from the start: n (n + 1) / 2 evaluations, 1 stored."""
    run = Pass(chain, f_0)
    for i in range(chain.length, 0, -1):
        run.forward(0, i, keep=[i])
        run.back(i)
    run.back(0)
    return run


def checkpointed(
    chain: Chain, f_0: Any, *, ends: Sequence[int] = (), keep_last: bool = False
) -> Pass:
    """Store the ends of segments, and make each segment again when the way back comes to it.

    `ends` rise to n; by default sqrt(n) even segments: 2n - sqrt(n) evaluations, 2 sqrt(n) - 1
    stored. With `keep_last` the forward pass keeps the last segment, which is needed at once.
    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    run, n = Pass(chain, f_0), chain.length
    ends = list(ends) or even(n, round(math.sqrt(n)))
    segments = list(itertools.pairwise([0, *ends]))
    last = range(segments[-1][0], n) if keep_last else ()
    run.forward(0, n, keep={*ends, *last} - {0})
    for start, end in reversed(segments):
        if not (keep_last and end == n):
            run.forward(start, end - 1, keep=range(start, end))
        for i in range(end, start, -1):
            run.back(i)
    run.back(0)
    return run


def even(n: int, segments: int) -> list[int]:
    """The ends of `segments` segments of n nodes whose lengths differ by one at the most."""
    return [n - n * (segments - i) // segments for i in range(1, segments + 1)]


def shrinking(n: int) -> list[int]:
    """The ends of segments each shorter by one than the one before: sqrt(2n) stored, not 2 sqrt(n).

    When the way back comes to an early, long segment, the later checkpoints are gone already.
    """
    segments = math.ceil(math.sqrt(2 * n + 0.25) - 0.5)
    ends = np.cumsum(range(segments, 0, -1))
    return [*(int(end) for end in ends if end < n), n]


def binomial(chain: Chain, f_0: Any, *, slots: int = 0) -> Pass:
    """Store `slots` activations at once, and evaluate the fewest nodes that this allows.

    By default O(log n) slots, of which no node is evaluated more often than there are slots.
    Source: Griewank 1992, "Achieving logarithmic growth of temporal and spatial complexity in
    reverse automatic differentiation"; Griewank and Walther 2000, algorithm 799.
    """
    run = Pass(chain, f_0)

    def reverse(start: int, end: int, slots: int) -> None:
        while end > start:
            middle = start + split(end - start, slots)
            run.forward(start, middle, keep=[middle])
            reverse(middle, end, slots - 1)
            run.back(middle)
            end = middle - 1

    reverse(0, chain.length, slots or least_slots(chain.length))
    run.back(0)
    return run


def reach(slots: int, sweeps: int) -> int:
    """The longest chain that `slots` can reverse, no node evaluated more than `sweeps` times."""
    return math.comb(slots + sweeps, slots) - 1


def least_slots(n: int) -> int:
    """The fewest slots that reverse n nodes in no more sweeps than there are slots."""
    return next(slots for slots in range(1, n + 2) if reach(slots, slots) >= n)


def sweeps(n: int, slots: int) -> int:
    """How often the most repeated of n nodes is evaluated."""
    return next(times for times in range(n + 1) if reach(slots, times) >= n)


def split(n: int, slots: int) -> int:
    """Which of n nodes to store first: behind it a slot is lost, before it a sweep is used up."""
    times = sweeps(n, slots)
    return 1 + min(reach(slots, times - 1), n - 1 - reach(slots - 1, times - 1))


def alive(run: Pass) -> np.ndarray:
    """`state_NT`: ABSENT, STORED, EVALUATED (now) or USED (now, for its b), event by event."""
    steps = [(kind, i) for kind, i in run.events if kind == STORE or i]
    state_NT = np.zeros((run.chain.length, sum(kind != STORE for kind, _ in steps)), np.int32)
    stored, t = set(), -1
    for kind, i in steps:
        if kind == STORE:
            stored.add(i)
            continue
        t += 1
        state_NT[[k - 1 for k in stored], t] = STORED
        state_NT[i - 1, t] = EVALUATED if kind == NODE else USED
        stored.discard(i)
    return state_NT


def picture(run: Pass, name: str):
    """Nodes against events, a `plots.Figure`: what is stored, and what is being done."""
    from lsdl import plots  # matplotlib takes a second, and only a figure needs it

    state_NT = alive(run)
    nodes, events = state_NT.shape
    return plots.heatmap(
        state_NT[::-1],
        title=f"{name}: {run.evaluations} evaluations, {run.peak} stored",
        x="event",
        y="node",
        columns=range(1, events + 1),
        rows=range(nodes, 0, -1),
        z="0 absent, 1 stored, 2 evaluated, 3 used",
        numbers=False,
    )


def numbers(n: int) -> Chain:
    """A chain of n nodes whose f_i is i, and whose way back minds that it gets that one."""

    def back(i: int, f: int, b: int | None) -> int:
        if (i, b) != (f, None if i == n else i + 1):
            raise ValueError(f"b_{i} was made of f_{f} and b_{b}")
        return i

    return Chain(n, lambda i, f: f + 1, back)


def tanh(weight_NDD: np.ndarray) -> Chain:
    """The reference chain: each node is the tanh of x_BD W_i, the loss |f_n|^2 / 2.

    A b is (delta_BD, the gradients of W_n, W_n-1, ... so far); that of the input its gradient.

    The slope of tanh is 1 - f^2, so that the b of a node needs no other f than its own; the
    gradient of W_i+1, which needs f_i and the delta behind it, is made along with b_i.
    """
    n = len(weight_NDD)

    def back(i: int, f_BD: np.ndarray, b: tuple | None) -> tuple:
        gradient_BD, gradients = f_BD, ()
        if i < n:
            delta_BD, gradients = b
            gradients = (*gradients, f_BD.T @ delta_BD)
            gradient_BD = delta_BD @ weight_NDD[i].T
        return (gradient_BD * (1 - f_BD**2) if i else gradient_BD), gradients

    return Chain(n, lambda i, f_BD: np.tanh(f_BD @ weight_NDD[i - 1]), back)
