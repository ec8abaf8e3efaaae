"""The reverse passes that count: the lectures' numbers as laws, and the gradients they lead to."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import backprop

PASSES = {
    "vanilla": backprop.vanilla,
    "memory_poor": backprop.memory_poor,
    "checkpointed": backprop.checkpointed,
    "keeping the last": functools.partial(backprop.checkpointed, keep_last=True),
    "shrinking": lambda chain, f_0: backprop.checkpointed(
        chain, f_0, ends=backprop.shrinking(chain.length)
    ),
    "binomial": backprop.binomial,
    "3 slots": functools.partial(backprop.binomial, slots=3),
}
each_pass = pytest.mark.parametrize("run", PASSES.values(), ids=PASSES.keys())


def cost(run, n):
    done = run(backprop.numbers(n), 0)  # which minds the order of the way back
    assert done.b == 0
    assert not done.stored
    return done.evaluations, done.peak


@pytest.mark.parametrize("n", [16, 36, 64, 100, 144])
def test_the_lectures_counts(n):
    k = math.isqrt(n)
    assert cost(backprop.vanilla, n) == (n, n)
    assert cost(backprop.memory_poor, n) == (n * (n + 1) // 2, 1)
    assert cost(backprop.checkpointed, n) == (2 * n - k, 2 * k - 1)
    assert cost(PASSES["keeping the last"], n) == (2 * n - 2 * k + 1, 2 * k - 1)


def test_the_pilots_counts():
    assert cost(backprop.checkpointed, 64) == (120, 15)
    assert cost(PASSES["keeping the last"], 64) == (113, 15)
    assert cost(backprop.checkpointed, 1000) == (1968, 62)


@each_pass
@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_any_length_is_reversed(run, n):
    evaluations, stored = cost(run, n)
    assert n <= evaluations <= n * (n + 1) // 2
    assert 1 <= stored <= n


@pytest.mark.parametrize("n", [10, 64, 1000])
def test_shrinking_segments_store_a_root_of_2n(n):
    evaluations, stored = cost(PASSES["shrinking"], n)
    assert evaluations < 2 * n
    assert stored == math.ceil(math.sqrt(2 * n + 0.25) - 0.5)


@functools.cache
def fewest(n, slots):
    """By trying every node that could be stored first."""
    if n == 0 or slots == 0:
        return 0 if n == 0 else math.inf
    return min(m + fewest(n - m, slots - 1) + fewest(m - 1, slots) for m in range(1, n + 1))


def test_no_pass_with_as_many_slots_evaluates_less_than_the_binomial():
    for n in range(1, 40):
        for slots in range(1, n + 1):
            found = cost(functools.partial(backprop.binomial, slots=slots), n)
            assert found == (fewest(n, slots), slots)
            times = backprop.sweeps(n, slots)  # Griewank and Walther 2000
            closed_form = times * (n + 1) - math.comb(slots + times, slots + 1)
            assert closed_form == fewest(n, slots)


@pytest.mark.parametrize("n", [10, 100, 1000, 10_000])
def test_the_binomial_takes_a_logarithm_of_memory(n):
    evaluations, stored = cost(backprop.binomial, n)
    assert stored <= math.log2(n)
    assert evaluations <= n * math.log2(n)


def test_even_segments_differ_by_one_at_the_most():
    for n in range(1, 30):
        for segments in range(1, n + 1):
            lengths = np.diff([0, *backprop.even(n, segments)])
            assert (len(lengths), sum(lengths)) == (segments, n)
            assert max(lengths) - min(lengths) <= 1


@each_pass
def test_the_gradients_are_those_of_autodiff(run):
    rng, n = np.random.default_rng(0), 9
    weight_NDD, x_BD = rng.normal(size=(n, 4, 4)) / 2, rng.normal(size=(6, 4))

    def loss(weight_NDD, x_BD):
        for weight_DD in weight_NDD:
            x_BD = jnp.tanh(x_BD @ weight_DD)
        return (x_BD**2).sum() / 2

    with jax.enable_x64(True):
        expected_NDD, expected_BD = jax.grad(loss, (0, 1))(weight_NDD, x_BD)
    gradient_BD, gradients = run(backprop.tanh(weight_NDD), x_BD).b
    np.testing.assert_allclose(gradients[::-1], expected_NDD, rtol=1e-9)
    np.testing.assert_allclose(gradient_BD, expected_BD, rtol=1e-9)


@each_pass
def test_what_is_counted_is_what_is_called(run):
    chain, calls = backprop.numbers(20), []

    def node(i, f):
        calls.append(i)
        return chain.node(i, f)

    counted = run(backprop.Chain(20, node, chain.back), 0)
    assert counted.evaluations == len(calls)
    assert [i for kind, i in counted.events if kind == backprop.NODE] == calls


def test_the_way_back_minds_its_order():
    wrong = backprop.Pass(backprop.numbers(3), 0)
    wrong.forward(0, 3, keep=[2, 3])
    with pytest.raises(ValueError, match="b_2 was made of f_2 and b_None"):
        wrong.back(2)


@each_pass
def test_the_picture_is_what_happened(run):
    done = run(backprop.numbers(12), 0)
    state_NT = backprop.alive(done)
    assert (state_NT == backprop.EVALUATED).sum() == done.evaluations
    node, time = np.nonzero(state_NT == backprop.USED)
    assert node[np.argsort(time)].tolist() == list(range(11, -1, -1))
    held_T = np.isin(state_NT, (backprop.STORED, backprop.USED)).sum(0)
    assert held_T[time].max() <= done.peak
    assert (held_T <= done.peak).all()
    assert held_T.max() >= done.peak - 1  # the one evaluated in this event may be stored by it


def test_the_picture_of_a_short_pass():
    # Nodes down, events across: f_1, f_2, b_2, f_1, b_1 of the memory-poor pass.
    state_NT = backprop.alive(backprop.memory_poor(backprop.numbers(2), 0))
    assert state_NT.tolist() == [[2, 0, 0, 2, 3], [0, 2, 3, 0, 0]]
