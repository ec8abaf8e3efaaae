"""Rematerialisation changes memory and work, as much as it says, and never a number."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lsdl.errors import UserError
from lsdl.models import remat
from lsdl.planner import count
from tests.tiny import close, jit

POLICIES = [
    *("none", "full", "dots", "dots_no_batch", "names:wide", "offload:wide", "sqrt", "every:2"),
    *("every:3", "every:50", "poor", "binomial"),
]


# --- what a policy is -----------------------------------------------------------------------------


def test_every_policy_is_known():
    assert [remat.check(policy) for policy in (*POLICIES, "auto")] == [*POLICIES, "auto"]


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("ful", "'full'"),
        ("", "choose from"),
        ("full:2", "must be written full"),
        ("sqrt:", "must be written sqrt"),
        ("every", "must be written every:k"),
        ("every:0", "number of layers"),
        ("every:two", "number of layers"),
        ("names", "must be written names:a,b"),
        ("names:", "must be written names:a,b"),
        ("names:a,,b", "list names with commas"),
    ],
)
def test_what_is_no_policy_is_an_error(policy, says):
    with pytest.raises(UserError) as error:
        remat.check(policy)
    assert f"remat={policy!r}" in str(error.value)
    assert says in str(error.value)


def test_names_are_recorded_while_they_are_traced():
    with remat.recording() as seen:
        jax.eval_shape(lambda x: remat.name(x, "one") + remat.name(x, "two"), jnp.ones(3))
    jax.eval_shape(lambda x: remat.name(x, "three"), jnp.ones(3))
    assert seen == {"one", "two"}
    remat.check_names("full", set())
    remat.check_names("names:two,one", seen)
    with pytest.raises(UserError, match=r"names:one,tow.*'tow'.*one, two"):
        remat.check_names("names:one,tow", seen)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_segments_and_tail_are_all_the_layers(policy):
    for n in (*range(2, 20), 23, 64, 96, 97):
        segment, inside, tail, _ = remat.cut(policy, n)
        assert segment >= 1
        assert (n - tail) % segment == 0
        assert 0 <= tail < n
        assert remat.check(inside) == inside


# --- scan -----------------------------------------------------------------------------------------

B, D = 4, 6


def body(carry, x):
    kernel, shift = x
    wide = remat.name(carry @ kernel, "wide")
    return jnp.tanh(wide + shift[None]), wide.sum()


def chain(policy, carry, xs):
    carry, ys = remat.scan(body, carry, xs, policy=policy)
    return (carry**2).sum() + (ys**2).sum()


def inputs(n):
    draw = np.random.default_rng(n).standard_normal
    return np.float32(draw((B, D))), (np.float32(draw((n, D, D))) / 3, np.float32(draw((n, D))))


def same(found, expected):
    """The loss, and the gradients, within 1e-6 of their largest number."""
    for a, b in zip(found, expected, strict=True):
        largest = max(np.abs(x).max() for x in jax.tree.leaves(b))
        close(a, b, rtol=0, atol=1e-6 * largest)


@functools.cache
def slopes(policy, n):
    return jit(jax.value_and_grad(functools.partial(chain, policy), argnums=(0, 1)))(*inputs(n))


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_scan_gives_the_same_numbers(policy):
    for n in (1, 5) if policy != "binomial" else (1, 5, 12):
        same(slopes(policy, n), slopes("none", n))


def test_a_scan_without_a_policy_is_that_of_jax():
    carry, xs = inputs(3)
    expected = lax.scan(body, carry, xs)
    jax.tree.map(np.testing.assert_array_equal, remat.scan(body, carry, xs), expected)


@functools.cache
def evaluated(policy, n):
    """Products of the forward and backward pass, and those computed again, in layers."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs(n))
    program = jax.make_jaxpr(jax.grad(functools.partial(chain, policy), argnums=(0, 1)))(*shapes)
    flops, layer = count.count(program.jaxpr), 2 * B * D * D
    again = count.recomputed(flops)
    return (flops.total() - again) / layer, again / layer


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_work_is_what_the_formula_says(policy, n):
    if policy == "poor" and n > 7:
        n = 6  # what is traced grows as n^2
    model, again = evaluated(policy, n)
    assert model == 3 * n
    kept = policy.startswith("dots") or policy in ("names:wide", "offload:wide")
    assert again == (0 if kept else remat.evaluations(policy, n) - n)


def test_the_formula_is_that_of_the_sources():
    """Chen et al. 2016: one forward pass more, two of nested segments; the lectures: n(n+1)/2."""
    for n in (1, 2, 9, 16, 30, 96):
        count = functools.partial(remat.evaluations, n=n)
        assert count("none") == n
        assert count("full") == count("every:1") == 2 * n
        assert count("every:4") == n + (n // 4 * 4 or n)
        assert 2 * n <= count("sqrt") <= 3 * n
        assert count("poor") == n * (n + 1) // 2
        assert count("binomial") <= n * (1 + math.ceil(math.log(n, 4) + 1e-9))
