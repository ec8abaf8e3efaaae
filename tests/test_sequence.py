"""Attention over a length that the mesh splits is attention, and costs what the split promises."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from lsdl.errors import UserError
from lsdl.experiment import build
from lsdl.models.attention import attend
from lsdl.planner import hlo
from lsdl.sharding import sequence
from lsdl.sharding.mesh import make_mesh, num_devices, parse_mesh
from tests.curves import assert_equal_curves, assert_equal_states, curve
from tests.tiny import FAST, close, jit
from tests.zoo import small

FORMS = ("ring", "gather")


def mesh_of(text):
    size = num_devices(text)
    return make_mesh(parse_mesh(text, size), jax.devices()[:size])


def with_gradients(attention, *, causal):
    """`(query, key, value, gradient of the result, segment) -> result, gradients`."""

    def run(query_BLHK, key_BLGK, value_BLGK, d_out_BLHK, segment_BL=None):
        forward = functools.partial(attention, causal=causal, segment_BL=segment_BL)
        out_BLHK, pull = jax.vjp(forward, query_BLHK, key_BLGK, value_BLGK)
        return out_BLHK, *pull(d_out_BLHK)

    return run


def noise(*, length, heads, kv_heads, batch=4):
    draw = np.random.default_rng(0)
    *arrays, segment = (
        *(draw.standard_normal((batch, length, n, 8)) for n in (heads, kv_heads, kv_heads, heads)),
        (draw.random((batch, length)) < 0.1).cumsum(1),
    )
    return *map(np.float32, arrays), segment.astype(np.int32)


# --- the same numbers -----------------------------------------------------------------------------


@functools.cache
def one_device(heads, kv_heads, causal):
    *arrays, segment = noise(length=16, heads=heads, kv_heads=kv_heads)
    run = jit(with_gradients(attend, causal=causal))
    return run(*arrays), run(*arrays, segment)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mesh", "heads", "kv_heads"),
    [
        ("sequence=8", 2, 2),
        ("data=2,sequence=4", 4, 1),
        ("data=2,sequence=2,tensor=2", 4, 2),
        ("sequence=2,tensor=4", 4, 2),  # each key-value head is needed on two devices
        ("tensor=4,sequence=2", 12, 6),  # two of each three that a device has are shared
    ],
)
def test_attention_and_its_gradients_are_those_of_one_device(mesh, heads, kv_heads, form, causal):
    *arrays, segment = noise(length=16, heads=heads, kv_heads=kv_heads)
    mesh = mesh_of(mesh)
    run = with_gradients(sequence.make_attention(mesh, form), causal=causal)
    both = jit(lambda *arrays: (run(*arrays[:-1]), run(*arrays)))
    with jax.set_mesh(mesh):
        actual = both(*arrays, segment)
    close(actual, one_device(heads, kv_heads, causal), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_costs_about_the_precision_that_it_costs_one_device(form):
    *arrays, segment = noise(length=64, heads=2, kv_heads=2)
    arrays = [jnp.bfloat16(4 * x) for x in arrays]  # scores of some size
    exact = jit(with_gradients(attend, causal=True))(*map(jnp.float32, arrays), segment)

    def error(mesh, attention):
        with jax.set_mesh(mesh):
            found = jit(with_gradients(attention, causal=True))(*arrays, segment)
        assert {x.dtype for x in found} == {jnp.dtype("bfloat16")}
        return [np.linalg.norm(np.float32(a) - b) for a, b in zip(found, exact, strict=True)]

    mesh = mesh_of("sequence=8")
    split = error(mesh, sequence.make_attention(mesh, form))
    whole = error(mesh_of("sequence=1"), attend)
    # The parts of a gradient are rounded before they are summed up (gather).
    assert np.all(np.array(split) < 1.5 * np.array(whole))


@functools.cache
def one_device_curve(config):
    return curve(config, devices=1, noise=True)


UNROLLED = ("model.scan_layers=false", "remat=none")
GATHER = "sequence_attention=gather"


@pytest.mark.parametrize(
    ("name", "same", "layout"),
    [
        ("gpt2", (), ("mesh=sequence=8",)),
        ("gpt2", (), ("mesh=data=2,sequence=2,tensor=2", "remat=full")),
        ("gpt2", (), ("mesh=data=2,sequence=4", "accum=2", GATHER)),
        ("llama", UNROLLED, ("mesh=data=2,sequence=4",)),
        ("llama", UNROLLED, ("mesh=fsdp=2,sequence=2,tensor=2", GATHER)),
        ("llama", UNROLLED, ("mesh=sequence=2,tensor=4", "remat=full")),
        ("bert", (), ("mesh=data=2,sequence=4",)),
        ("vit mean", (), ("mesh=data=2,sequence=4",)),
    ],
    ids=str,
)
def test_a_model_trains_as_on_one_device(load, name, same, layout):
    actual = curve(small(load, name, *same, *layout), noise=True)
    expected = one_device_curve(small(load, name, *same))
    assert_equal_curves(actual[0], expected[0])
    assert_equal_states(actual[1], expected[1])


# --- memory and traffic ---------------------------------------------------------------------------


def compiled(mesh, attention, *, length, causal, batch=1, backward=True, segments=False):
    """The program of `attention`, and of its gradients, on 2 heads of 16 features in float32."""
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    shape = (batch, length, 2, 16)
    x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place(sequence.HEADS_SPEC))
    segment = jax.ShapeDtypeStruct(shape[:2], jnp.int32, sharding=place(sequence.SEGMENT_SPEC))
    run = with_gradients(attention, causal=causal)
    outputs = slice(None) if backward else slice(1)
    with jax.set_mesh(mesh):
        program = jax.jit(lambda *args: run(*args)[outputs], out_shardings=x.sharding)
        return program.lower(*(x,) * 4, *(segment,) * segments).compile()


def temporaries(devices, form=None, *, causal, length=1024):
    """Bytes of a device's intermediate results, gradients included."""
    mesh = mesh_of(f"sequence={devices}")
    attention = sequence.make_attention(mesh, form) if form else attend
    program = compiled(mesh, attention, length=length, causal=causal)
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_a_ring_of_n_has_an_nth_of_the_memory_and_less(causal):
    whole = temporaries(1, causal=causal)
    two, four, eight = (temporaries(n, "ring", causal=causal) for n in (2, 4, 8))
    assert whole > 3 * 2 * 1024**2 * 4  # scores, weights and a gradient
    assert four < whole / 4
    assert eight < whole / 8
    # A block of scores is (L / n)^2: were those of all n visits kept, this would be a half.
    assert four < 0.3 * two
    assert eight < 0.3 * four


def test_a_context_that_one_device_cannot_hold_fits_a_ring():
    limit = 2**24  # bytes
    assert temporaries(1, causal=True) > limit
    assert temporaries(8, "ring", causal=True) < limit / 16
    assert temporaries(8, "ring", causal=True, length=4096) < limit  # four times the context


def traffic(mesh, form, **fields):
    """{(kind, axis, bytes of each array): how often} of the program."""
    mesh = mesh_of(mesh)
    text = compiled(mesh, sequence.make_attention(mesh, form), **fields).as_text()
    counts = Counter()
    for one in hlo.collectives(text, mesh.shape):
        counts.update({(one.kind, one.axis, part): one.times for part in set(one.parts)})
        assert len(one.parts) == 1
    return dict(counts)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize(("mesh", "n"), [("data=2,sequence=4", 4), ("sequence=4,tensor=2", 4)])
def test_a_ring_sends_keys_and_values_n_minus_1_times(mesh, n, causal):
    same = dict(length=64, batch=2, causal=causal)
    part = 2 * 64 * 2 * 16 * 4 // 8  # of either: bytes of all over devices
    permute = ("collective-permute", "sequence")
    forward = {(*permute, part): 2 * (n - 1)}
    assert traffic(mesh, "ring", backward=False, **same) == forward
    # Backward they travel again, and their gradients with them: those once more, home.
    assert traffic(mesh, "ring", **same) == {(*permute, part): 2 * (2 * (n - 1) + n)}
    assert traffic(mesh, "ring", backward=False, segments=True, **same) == forward | {
        (*permute, 2 * 64 * 4 // (8 if "data" in mesh else 4)): n - 1
    }


@pytest.mark.parametrize("mesh", ["data=2,sequence=4", "sequence=4,tensor=2"])
def test_gathering_sends_the_length_once_and_no_other_dim(mesh):
    same = dict(length=64, batch=2, causal=True)
    part = 2 * 64 * 2 * 16 * 4 // 8
    forward = {("all-gather", "sequence", 4 * part): 2}
    assert traffic(mesh, "gather", backward=False, **same) == forward
    backward = {("reduce-scatter", "sequence", part): 2}
    assert traffic(mesh, "gather", **same) == forward | backward


def test_hidden_states_stay_where_they_are(load):
    # In the chunks of the loss, too: each is spread over all devices.
    long = ("data.seq_len=64", "model.max_length=64", "loss.chunk=16", "model.num_layers=1")
    config = small(load, "gpt2", "mesh=sequence=8", *long)
    experiment = build(config, devices=jax.devices())
    step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    text = step.compile(compiler_options=FAST).as_text()
    hidden = config.batch_size * 64 * config.model.width * 4
    found = hlo.collectives(text, experiment.mesh.shape)
    large = {one.kind for one in found if one.nbytes() >= hidden // 8}
    # Keys and values, and the gradients of parameters that all parts of a sequence share.
    assert large <= {"collective-permute", "all-reduce"}


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("gpt2", ("data.seq_len=6",), ["data.seq_len=6", "divisible by 4", "axis sequence"]),
        ("vit class", (), ["patches and class tokens=17", "divisible by 4", "axis sequence"]),
        ("mlp", (), ["sequence=4", "model mlp"]),
        ("clip", (), ["sequence=4", "model clip"]),
        ("gpt2", ("sequence_attention=rings",), ["sequence_attention='rings'", "'ring'"]),
        ("gpt2", ("partitioner=shard_map",), ["partitioner=shard_map", "sequence=4"]),
    ],
)
def test_what_cannot_be_split_is_refused(load, name, overrides, words):
    config = small(load, name, "mesh=data=2,sequence=4", *overrides)
    with pytest.raises(UserError) as error:
        build(config, devices=jax.devices())
    assert [word for word in words if word not in str(error.value)] == []
