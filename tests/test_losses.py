"""Losses in chunks and on split batches: the same value and gradients, less memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from lsdl import losses
from lsdl.experiment import build
from lsdl.sharding import mesh as meshes

VOCAB, PADDED = 11, 16


@functools.cache
def language(batch=3, length=10, width=5):
    draw = np.random.default_rng(0)
    normal = lambda *shape: jnp.array(draw.normal(size=shape), jnp.float32)  # noqa: E731
    arrays = (normal(batch, length, width), normal(PADDED, width), normal(PADDED))
    target_BL = jnp.array(draw.integers(VOCAB, size=(batch, length)))
    weight_BL = jnp.array(draw.random((batch, length)) < 0.7, jnp.float32)
    return arrays, target_BL, weight_BL


def token_sums(arrays, target_BL, weight_BL, **options):
    hidden_BLD, table_VD, bias_V = arrays
    return losses.token_cross_entropy(
        hidden_BLD, table_VD, target_BL, weight_BL, vocab_size=VOCAB, bias_V=bias_V, **options
    )


def assert_close(actual, expected, rtol=1e-5):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        # What is zero but for rounding: the softmax's gradient to a bias of all its logits.
        np.testing.assert_allclose(a, b, rtol=rtol, atol=max(rtol * np.abs(b).max(), 1e-6))


def test_cross_entropy_is_minus_the_log_of_the_softmax():
    arrays, target_BL, weight_BL = language()
    hidden, table, bias = (np.array(x, np.float64) for x in arrays)
    logits = (hidden @ table.T + bias)[..., :VOCAB]
    probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(probability, np.array(target_BL)[..., None], -1)[..., 0]
    sums = token_sums(*language())
    assert_close(sums["cross_entropy"], -(np.log(chosen) * weight_BL).sum())
    correct = logits.argmax(-1) == target_BL
    assert float(sums["accuracy"]) == (correct * weight_BL).sum()
    log_z = np.log(np.exp(logits).sum(-1))
    with_z = token_sums(*language(), z_loss=0.1)
    assert_close(with_z["loss"] - with_z["cross_entropy"], 0.1 * (log_z**2 * weight_BL).sum())


@pytest.mark.parametrize("chunk", [1, 3, 5, 9])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    arrays, target_BL, weight_BL = language()

    def loss(arrays, chunk):
        sums = token_sums(arrays, target_BL, weight_BL, z_loss=0.1, chunk=chunk)
        return sums["loss"], sums

    whole = jax.value_and_grad(loss, has_aux=True)(arrays, 0)
    assert_close(jax.value_and_grad(loss, has_aux=True)(arrays, chunk), whole)


@pytest.mark.parametrize("chunk", [0, 3])
def test_the_hessian_is_that_of_the_formula(chunk):
    arrays, target_BL, weight_BL = language()

    def formula(arrays):
        hidden_BLD, table_VD, bias_V = arrays
        logits_BLV = jnp.einsum("BLD,VD->BLV", hidden_BLD, table_VD) + bias_V[None, None]
        logits_BLV = jax.nn.log_softmax(logits_BLV[..., :VOCAB])
        return -(jax.nn.one_hot(target_BL, VOCAB) * logits_BLV * weight_BL[..., None]).sum()

    def loss(arrays):
        return token_sums(arrays, target_BL, weight_BL, chunk=chunk)["loss"]

    vector = jax.tree.map(jnp.cos, arrays)
    along = lambda of: jax.jvp(jax.grad(of), (arrays,), (vector,))[1]  # noqa: E731
    assert_close(along(loss), along(formula), rtol=1e-4)


def test_padded_rows_of_the_table_have_no_probability_and_no_gradient():
    arrays, target_BL, weight_BL = language()
    loss = lambda arrays: token_sums(arrays, target_BL, weight_BL)["loss"]  # noqa: E731
    _, table, bias = jax.grad(loss)(arrays)
    assert not table[VOCAB:].any()
    assert not bias[VOCAB:].any()
    assert table[:VOCAB].any(1).all()


def test_positions_of_weight_0_have_no_gradient():
    arrays, target_BL, weight_BL = language()
    loss = lambda arrays: token_sums(arrays, target_BL, weight_BL, chunk=3)["loss"]  # noqa: E731
    hidden = jax.grad(loss)(arrays)[0]
    np.testing.assert_array_equal(np.abs(hidden).sum(-1) > 0, np.array(weight_BL) > 0)


def temporary_bytes(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    return jax.jit(function).lower(*arrays).compile().memory_analysis().temp_size_in_bytes


def test_a_step_with_chunked_cross_entropy_needs_an_eighth_of_the_memory(load):
    """8 windows of 1,024 tokens and GPT-2's vocabulary, compiled and never run."""
    small = ("width=64", "num_layers=1", "num_heads=2", "mlp_dim=128")

    def needed(chunk):
        given = (*(f"model.{field}" for field in small), "batch_size=8", "precision=float32")
        config = load("lm_gpt2:smoke", *given, f"loss.chunk={chunk}", "mesh=data=1")
        built = build(config, devices=jax.devices()[:1])
        step = built.train_step.lower(built.abstract_state, built.abstract_batch).compile()
        return step.memory_analysis().temp_size_in_bytes

    whole = needed(0)
    assert whole > 8192 * 50_304 * 4
    assert needed(32) <= whole / 8


@functools.cache
def pairs(batch=24, width=6):
    draw = np.random.default_rng(1)

    def unit():
        x = draw.normal(size=(batch, width))
        return jnp.array(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)

    weight_B = jnp.ones(batch).at[-3:].set(0.0)
    return (unit(), unit(), jnp.float32(5.0), jnp.float32(-0.5)), jnp.arange(batch), weight_B


def pair_loss(arrays, row_B, weight_B, **options):
    sums = losses.contrastive(*arrays, row_B, weight_B, **options)
    return sums["loss"], sums


def test_info_nce_is_the_mean_of_two_cross_entropies():
    (image, text, scale, bias), *_ = pairs()
    logits = np.array(scale * image @ text.T + bias, np.float64)[:-3, :-3]
    rows, columns = (np.log(np.exp(logits).sum(axis)) - np.diag(logits) for axis in (1, 0))
    loss, sums = pair_loss(*pairs(), form="softmax")
    assert_close(loss, (rows + columns).sum() / 2)
    assert float(sums["accuracy"]) == (logits.argmax(1) == np.arange(len(logits))).sum()


def test_sigmoid_loss_is_a_yes_or_no_of_each_pair():
    (image, text, scale, bias), *_ = pairs()
    logits = np.array(scale * image @ text.T + bias, np.float64)[:-3, :-3]
    sign = 2 * np.eye(len(logits)) - 1
    assert_close(pair_loss(*pairs(), form="sigmoid")[0], np.log1p(np.exp(-sign * logits)).sum())


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_contrastive_chunks_change_neither_loss_nor_gradients(form, chunk):
    value = lambda c: jax.value_and_grad(pair_loss, has_aux=True)(  # noqa: E731
        *pairs(), form=form, chunk=c
    )
    assert_close(value(chunk), value(0))


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
@pytest.mark.parametrize("chunk", [0, 1])
def test_rows_on_8_devices_give_the_loss_and_gradients_of_one(form, chunk):
    """Under manual axes each device has 3 of the 24 rows and gathers the others' features."""
    grid = meshes.make_mesh(meshes.parse_mesh("data=8", 8))

    def local(arrays, row_B, weight_B):
        arrays = jax.tree.map(lambda x: x if x.ndim else lax.pcast(x, "data", to="varying"), arrays)
        value_and_grad = jax.value_and_grad(pair_loss, has_aux=True)
        ((loss, sums), grads) = value_and_grad(arrays, row_B, weight_B, form=form, chunk=chunk)
        scalars = lax.psum((loss, sums, *grads[2:]), "data")
        return scalars[:2], (*grads[:2], *scalars[2:])

    split = (P("data"), P("data"), P(), P())
    mapped = jax.shard_map(
        local,
        mesh=grid,
        in_specs=(split, P("data"), P("data")),
        out_specs=(P(), split),
    )
    arrays, row_B, weight_B = pairs()
    with jax.set_mesh(grid):
        actual = jax.jit(mapped)(arrays, row_B, weight_B)
    expected = jax.value_and_grad(pair_loss, has_aux=True)(arrays, row_B, weight_B, form=form)
    assert_close(actual, expected)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_chunked_contrastive_memory_does_not_grow_with_the_square_of_the_batch(form):
    def needed(batch, chunk):
        def loss(image, text, row, weight):
            one = jnp.float32(1.0)
            arrays = (image, text, one, one)
            return pair_loss(arrays, row, weight, form=form, chunk=chunk)[0]

        features = ((batch, 32), jnp.float32)
        shapes = (features, features, ((batch,), jnp.int32), ((batch,), jnp.float32))
        return temporary_bytes(jax.grad(loss, argnums=(0, 1)), *shapes)

    assert needed(8192, 64) <= needed(8192, 0) / 8
    assert needed(8192, 64) <= 3 * needed(4096, 64)
