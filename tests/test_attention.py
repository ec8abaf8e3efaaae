"""Attention by a kernel: which devices take it, for what, and that the planner counts it alike.

That its numbers are those of the plain form is seen where there is a GPU: `benchmarks.run` lays
the two loss curves over each other before it times anything.
"""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from lsdl import experiment
from lsdl.models import attention
from lsdl.planner.count import count
from tests.tiny import close, jit

B, L, H, G, K = 2, 6, 4, 2, 16


@pytest.mark.parametrize("optim", ["adamw", "newton_cg", "ggn_cg"])
def test_newtons_methods_differentiate_no_kernel(load, optim):
    damped = (
        ()
        if optim == "adamw"
        else ("optim.damping=0.1", "optim.weight_decay=0.0", "optim.clip_norm=0.0")
    )
    config = load("digits_vit:smoke", "mesh=data=1", f"optim.name={optim}", *damped)
    with mock.patch.object(attention, "kernel", return_value=attention.cudnn):
        module = experiment.build(config, devices=jax.devices()[:1]).module
    assert (module.attention is attention.cudnn) == (optim == "adamw")


@pytest.fixture
def traceable():
    """Kernels can be traced where there is no cuDNN."""
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", return_value=91_000):
        yield


def device(platform="gpu", capability="9.0"):
    return SimpleNamespace(platform=platform, compute_capability=capability)


@pytest.mark.parametrize(
    ("of", "dtype", "kernel"),
    [
        (device(), jnp.bfloat16, attention.cudnn),
        (device(capability="8.0"), jnp.bfloat16, attention.cudnn),
        (device(capability="12.1"), jnp.bfloat16, attention.cudnn),
        (device(), jnp.float32, None),
        (device(capability="7.0"), jnp.bfloat16, None),
        (device("tpu"), jnp.bfloat16, None),
        (SimpleNamespace(platform="gpu"), jnp.bfloat16, None),  # not NVIDIA's
    ],
    ids=["H100", "A100", "GB10", "float32", "V100", "TPU", "no capability"],
)
def test_the_kernel_is_for_half_precision_on_nvidia_gpus_since_ampere(of, dtype, kernel):
    assert attention.kernel(of, jnp.dtype(dtype)) is kernel


def test_cpus_take_a_long_causal_sequence_in_blocks():
    assert attention.kernel(jax.devices()[0], jnp.dtype(jnp.float32)) is attention.blocked


@pytest.mark.parametrize("segments", [False, True])
def test_blocks_are_the_plain_form_with_fewer_products_and_count_as_it_does(segments):
    draw = np.random.default_rng(0)
    given = [jnp.float32(draw.standard_normal(x.shape)) for x in (*arrays(256), *arrays(256)[:1])]
    segment_BL = jnp.int32(draw.integers(0, 2, (B, 256))) if segments else None
    fields = dict(causal=True, segment_BL=segment_BL)

    def with_gradients(form):
        def run(*given):
            y_BLHK, pull = jax.vjp(functools.partial(form, **fields), *given[:3])
            return y_BLHK, *pull(given[3])

        return run

    found, plain = (jit(with_gradients(f))(*given) for f in (attention.blocked, attention.attend))
    close(found, plain, rtol=1e-5, atol=1e-5)
    runs = [with_gradients(form) for form in (attention.blocked, attention.attend)]
    counted = [count(jax.make_jaxpr(run)(*given).jaxpr).total() for run in runs]
    assert counted[0] == counted[1] == 6 * (2 * B * H * 256 * 256 * K)
    assert done(runs[0], *given) < 0.7 * done(runs[1], *given)


@pytest.mark.parametrize(("length", "causal"), [(252, True), (258, True), (256, False)])
def test_what_is_short_odd_or_sees_all_is_no_matter_of_blocks(length, causal):
    ours, plain = (
        done(lambda *given, form=form: form(*given, causal=causal), *arrays(length))
        for form in (attention.blocked, attention.attend)
    )
    assert ours == plain


def done(run, *given):
    """The operations of the program, as the compiler counts them."""
    return jax.jit(run).lower(*given).cost_analysis()["flops"]


def arrays(length=L, head_dim=K):
    shapes = (B, length, H, head_dim), (B, length, G, head_dim), (B, length, G, head_dim)
    return [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]


def traced(form, *given, **fields):
    """The jaxpr of the output and of the gradients."""

    def loss(*given):
        return form(*given, **fields).astype(jnp.float32).sum()

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2))).trace(*given).jaxpr.jaxpr


@pytest.mark.parametrize("causal", [False, True])
def test_its_products_count_as_those_of_the_plain_form(traceable, causal):
    ours, plain = (
        traced(form, *arrays(), causal=causal) for form in (attention.cudnn, attention.attend)
    )
    assert "dot_product_attention_bwd" in str(ours)
    assert "dot_product_attention" not in str(plain)
    assert count(ours).total() == count(plain).total() == 6 * (2 * B * H * L * L * K)


@pytest.mark.parametrize("segments", [False, True])
@pytest.mark.parametrize(("length", "head_dim", "taken"), [(6, 16, 1), (6, 12, 0), (6, 136, 0)])
def test_heads_that_it_does_not_take_go_the_plain_way(traceable, length, head_dim, segments, taken):
    segment_BL = jnp.zeros((B, length), jnp.int32) if segments else None
    given = arrays(length, head_dim)
    program = traced(attention.cudnn, *given, causal=True, segment_BL=segment_BL)
    assert ("dot_product_attention" in str(program)) == bool(taken)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("segments", [False, True])
def test_what_an_odd_length_is_filled_up_with_is_seen_by_no_other(segments, causal):
    """By the plain form in the kernel's place, which takes the same arguments."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (B, 7, H, K), (B, 7, G, K), (B, 7, G, K)
    given = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]
    segment_BL = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 2, 2, 2, 2, 3, 3]]) if segments else None
    plain = attention.attend(*given, causal=causal, segment_BL=segment_BL)
    seen = []

    def kernel(*given, implementation, **fields):
        seen.append((given[0].shape[1], implementation))
        return original(*given, implementation="xla", **fields)

    original = jax.nn.dot_product_attention
    with mock.patch.object(jax.nn, "dot_product_attention", kernel):
        found = attention.cudnn(*given, causal=causal, segment_BL=segment_BL)
    assert seen == [(8, "cudnn")]
    assert jnp.allclose(found, plain, atol=1e-6)
