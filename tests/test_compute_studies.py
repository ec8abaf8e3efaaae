"""The studies of computation: forms that give the same numbers, and claims on small tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import clock
from lsdl.planner import chain
from lsdl.studies import backprop_variants, vectorisation


@pytest.fixture
def arrays(key):
    shapes = {"a_BD": (8, 16), "w_DH": (16, 32), "bias_H": (32,), "slope_BH": (8, 32)}
    return {
        name: jax.random.normal(jax.random.fold_in(key, i), shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("form", ["neurons", "by_neuron", "by_example", "vmapped", "product"])
def test_every_form_is_the_layer(form, arrays):
    a_BD, w_DH, bias_H, _ = map(np.asarray, arrays.values())
    expected_BH = np.maximum(a_BD.astype(np.float64) @ w_DH + bias_H, 0)
    found_BH = getattr(vectorisation, form)(a_BD, w_DH, bias_H)
    np.testing.assert_allclose(found_BH, expected_BH, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["neurons_back", "product_back"])
def test_both_gradients_are_the_layers(form, arrays):
    a_BD, w_DH, _, slope_BH = map(np.asarray, arrays.values())
    loss = lambda w_DH, a_BD: (slope_BH * (a_BD @ w_DH)).sum()  # noqa: E731
    expected = jax.grad(loss, (0, 1))(arrays["w_DH"], arrays["a_BD"])
    for gradient, truth in zip(
        getattr(vectorisation, form)(a_BD, w_DH, slope_BH), expected, strict=True
    ):
        np.testing.assert_allclose(gradient, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block", [2, 8])
def test_blocks_are_the_whole(block, arrays):
    a_BD, w_DH = arrays["a_BD"], arrays["w_DH"]
    found_BH = vectorisation.blocked(a_BD, w_DH, block=block)
    np.testing.assert_allclose(found_BH, a_BD @ w_DH, rtol=1e-5, atol=1e-5)
    w_LDD = jnp.stack([w_DH[:, :16], w_DH[:, 16:]])
    found_BD = vectorisation.in_rows(a_BD, w_LDD, rows=block)
    relu = jax.nn.relu
    np.testing.assert_allclose(
        found_BD, relu(relu(a_BD @ w_LDD[0]) @ w_LDD[1]), rtol=1e-5, atol=1e-5
    )


def test_the_chains_program_takes_what_its_segments_say():
    kept = chain.kept(16)
    assert kept in (2, 3)  # the layer's input, and one or two arrays of tanh's slope
    found = chain.program(16, "every:4")
    assert found.activations == pytest.approx(chain.segments(4, 16, kept), rel=0.02)
    assert found.evaluations == 2


def test_calls_take_turns():
    """Each once to compile, until one timing is long enough, and then in rounds, to and fro."""
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = clock.in_turn(calls, rounds=3)
    assert {name: len(seconds) for name, seconds in times.items()} == {"a": 3, "b": 3, "c": 3}
    assert "".join(order) == "abc" + "abc" + "abc" + "cba" + "abc"


def test_a_short_call_is_repeated():
    number = []
    (seconds,) = clock.in_turn({"short": lambda: number.append(0)}, rounds=1, least_s=1e-3)["short"]
    assert len(number) > 10
    assert 0 < seconds < 1e-3


def vectorisation_table():
    seconds = {"neurons": 30, "neurons_back": 50, "by_neuron": 4, "by_example": 3, "vmap": 1}
    seconds |= {"product": 1, "product_back": 2}
    loops = {"seconds_of": seconds, "apart": 1e-7, "products": 1}
    batches = {"forward": [100, 200, 170, 800], "back": [100, 150, 300, 600]}
    blocks = {"seconds_by_block": [5, 1], "apart": 1e-7}
    rows = {"seconds_by_rows": [2, 1, 3], "apart": 0.0}
    table = {"loops": loops, "batches": batches, "blocks": blocks, "rows": rows}
    return [{"part": part, "seed": 0, **row} for part, row in table.items()]


def test_vectorisations_claims_on_a_small_table():
    found = {claim.id: claim for claim in vectorisation.claims(vectorisation_table())}
    assert found["vectors"].measured == 3
    assert found["backward_rate"].measured == 1
    assert found["batch"].measured == 0.85
    assert found["rows_whole"].measured == 3
    assert {id for id, claim in found.items() if not claim.holds} == {"batch", "blocks"}


def backprop_table():
    def counted(n):
        row = {"vanilla": [n, n], "memory_poor": [n * (n + 1) // 2, 1], "shrinking": [1962, 45]}
        root = round(n**0.5)
        row["checkpointed"] = [2 * n - root, 2 * root - 1] if n < 1000 else [1968, 62]
        return row | {"kept_last": [113, 15], "binomial": [4719, 7], "nodes": n, "distance": 0.0}

    def compiled(n):
        row = {"length": n, "kept": 2, "distance": 0.0} if n == 16 else {"length": n, "kept": 2}
        root = round(n**0.5)
        row |= {"none": [2 * n + 3, 1], "full": [n + 3, 2], "sqrt": [2 * root + 4, 3]}
        return row | {"every": [3 * root + 4, 2], "binomial": [2 * root, 4]}

    spacing = {"spaced": 64, "every": [1, 8], "activations": [70, 28]}
    return [
        *(counted(n) for n in (*backprop_variants.SIZES, 1000)),
        *(compiled(n) for n in backprop_variants.LENGTHS),
        *({"poor": [9, 4.5]}, spacing, {"timed": 64, "every": 1.7}),
    ]


def test_backprops_claims_on_a_small_table():
    found = {claim.id: claim for claim in backprop_variants.claims(backprop_table())}
    assert list(found) == list(backprop_variants.EXPECTED)
    assert {id for id, claim in found.items() if not claim.holds} == {"bytes_poor", "time"}
