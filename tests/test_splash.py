"""The kernel for TPUs, interpreted on CPU: attention on any layout, and no scores kept."""

import functools
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.sharding import Mesh

from lsdl import components
from lsdl.experiment import build
from lsdl.models.attention import attend, has_kernel
from lsdl.planner import hardware, memory
from lsdl.planner.count import count
from lsdl.sharding import splash
from tests import test_analytic
from tests.curves import assert_equal_curves, assert_equal_states, curve
from tests.test_sequence import mesh_of, with_gradients
from tests.tiny import close, jit
from tests.zoo import small


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The kernel runs on CPU, and at every length."""
    make = functools.partial(splash_attention.make_splash_mha, interpret=True)
    monkeypatch.setattr(splash_attention, "make_splash_mha", make)
    monkeypatch.setattr(splash, "SHORTEST", 1)


def never(*given, **fields):
    raise AssertionError("not by the kernel")


def noise(*, length, heads, kv_heads, dtype, batch=4):
    draw = np.random.default_rng(0)
    *arrays, segment = (
        *(draw.standard_normal((batch, length, n, 8)) for n in (heads, kv_heads, kv_heads, heads)),
        (draw.random((batch, length)) < 0.1).cumsum(1).astype(np.int32),
    )
    return *(jnp.asarray(x, dtype) for x in arrays), segment


@pytest.mark.parametrize(
    ("mesh", "length", "heads", "kv_heads", "causal", "segments", "dtype"),
    [
        ("data=1", 130, 2, 1, False, False, "float32"),
        ("data=1", 640, 1, 1, True, False, "float32"),  # two blocks and a half of the largest
        ("data=1", 65, 4, 2, True, True, "bfloat16"),
        ("data=2,fsdp=2,tensor=2", 65, 4, 1, False, True, "float32"),  # on two devices a head
        ("data=2,tensor=4", 128, 3, 3, True, False, "float32"),  # heads that tensor does not divide
        ("data=8", 128, 1, 1, True, False, "float32"),  # 4 rows
    ],
)
def test_the_kernel_is_attention(mesh, length, heads, kv_heads, causal, segments, dtype):
    given = noise(length=length, heads=heads, kv_heads=kv_heads, dtype=dtype)
    given = given if segments else given[:-1]
    mesh = mesh_of(mesh)
    with jax.set_mesh(mesh):
        ours = jax.jit(with_gradients(splash.make_attention(mesh, never), causal=causal))(*given)
    exact = *map(np.float32, given[:4]), *given[4:]
    plain = jit(with_gradients(attend, causal=causal))(*exact)
    bound = 1e-5 if dtype == "float32" else 4e-2
    close(tuple(map(np.float32, ours)), plain, rtol=bound, atol=bound)


@pytest.mark.parametrize(("length", "head_dim"), [(200, 8), (256, 12)])
def test_what_the_kernel_is_not_for_goes_the_plain_way(monkeypatch, length, head_dim):
    monkeypatch.setattr(splash, "SHORTEST", 256)
    x = jnp.zeros((1, length, 2, head_dim))
    plain = mock.Mock(return_value="plain")
    assert splash.make_attention(mesh_of("data=1"), plain)(x, x, x, causal=True) == "plain"
    assert not splash.takes(length, head_dim)
    assert splash.takes(256, 8)


@pytest.mark.parametrize(
    ("of", "dtype", "has"),
    [
        (("tpu", "TPU v5 lite"), "bfloat16", True),
        (("tpu", "TPU7x"), "bfloat16", True),
        (("tpu", "TPU v3"), "bfloat16", False),
        (("tpu", "TPU v5 lite"), "float32", False),
        (("cpu", "cpu"), "bfloat16", False),
    ],
    ids=str,
)
def test_it_is_for_half_precision_on_tpus_since_the_fourth(of, dtype, has):
    assert has_kernel(*of, jnp.dtype(dtype)) is has


# --- in a model -----------------------------------------------------------------------------------

SMALL = ("model.width=16", "model.num_heads=2", "model.kv_heads=1", "remat=none")
RUN = dict(steps=2, noise=True, fast=False)  # in a hurry loops are compiled to run slowly


@functools.cache
def one_device_curve(config):
    return curve(config, devices=1, **RUN)


@pytest.mark.parametrize(("kind", "taken"), [("TPU v5 lite", True), ("TPU v3", False)])
def test_the_mesh_s_devices_choose_it(load, kind, taken):
    device = SimpleNamespace(platform="tpu", device_kind=kind)
    mesh = mock.Mock(spec=Mesh, shape={"sequence": 1}, devices=np.array([device]))
    made = components._make_attention(small(load, "llama"), mesh, jnp.dtype(jnp.bfloat16))
    assert (made is not None) is taken


@pytest.mark.parametrize(
    "layout",
    [
        ("mesh=data=2,fsdp=2,tensor=2", "remat=full"),
        ("mesh=data=4,fsdp=2", "partitioner=shard_map", "remat=names:attn_out"),
        ("mesh=data=8", "partitioner=pmap"),
        ("mesh=data=2,tensor=2,stage=2", "remat=full"),
        ("mesh=data=4,stage=2", "partitioner=shard_map"),
    ],
    ids=" ".join,
)
def test_a_model_trains_with_it_as_on_one_device_without(load, layout):
    expected = one_device_curve(small(load, "llama", *SMALL))
    made = []

    def make(config, mesh, dtype):
        made.append(mesh)
        return splash.make_attention(mesh, never)

    with mock.patch.object(components, "_make_attention", make):
        actual = curve(small(load, "llama", *SMALL, *layout), **RUN)
    assert made
    assert_equal_curves(actual[0], expected[0])
    assert_equal_states(actual[1], expected[1])


# --- in the planner -------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_its_products_count_as_those_of_the_plain_form(mesh):
    batch, length, heads, head_dim = 4, 256, 4, 16
    shapes = ((batch, length, n, head_dim) for n in (heads, 2, 2, heads))
    given = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    mesh = mesh_of(mesh)
    with jax.set_mesh(mesh):
        run = with_gradients(splash.make_attention(mesh, never), causal=True)
        found = count(jax.make_jaxpr(run)(*given).jaxpr).total()
    product = 2 * batch * heads * length * length * head_dim
    # And, once for each query, its result times that result's gradient.
    assert found == 6 * product + product // length


@pytest.mark.parametrize(
    ("target", "precision", "known"),
    [
        ("tpu:v5e:1x1", "bfloat16", True),
        ("tpu:v3:1x1", "bfloat16", False),
        ("tpu:v5e:1x1", "float32", False),
    ],
)
def test_the_closed_forms_know_it(load, monkeypatch, target, precision, known):
    experiment = build(small(load, "llama", *SMALL, f"precision={precision}"), devices=1)
    block, _ = memory.stack_of(experiment, hardware.parse(target))
    assert block.kernel is known
    monkeypatch.setattr(splash, "SHORTEST", 512)
    block, _ = memory.stack_of(experiment, hardware.parse(target))
    assert block.kernel is False


def test_a_block_keeps_no_scores(monkeypatch):
    monkeypatch.setattr(test_analytic, "LENGTH", 128)
    test_analytic.check_lines("llama", "bfloat16", splash.make_attention(mesh_of("data=1"), never))
