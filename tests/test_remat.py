"""Rematerialisation changes memory and work, as much as it says, and never a number."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from lsdl import experiment
from lsdl.errors import UserError
from lsdl.models import remat, transformer
from lsdl.models.alexnet import AlexNet
from lsdl.models.bert import Bert
from lsdl.models.clip import Clip
from lsdl.models.efficientnet import EfficientNet
from lsdl.models.gpt import Gpt
from lsdl.models.inception import Inception
from lsdl.models.mlp import Mlp
from lsdl.models.msra import Msra
from lsdl.models.regnet import RegNet
from lsdl.models.resnet import ResNet
from lsdl.models.vit import Vit
from lsdl.planner import chain as reference
from lsdl.planner import collectives, count, residuals
from tests.curves import curve
from tests.test_layouts import assert_equal_runs
from tests.tiny import boxed, close, images, jit, values
from tests.zoo import small

slow = pytest.mark.slow
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
    n = 12 if policy == "binomial" else 5
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


# --- models ---------------------------------------------------------------------------------------

TOKENS = np.arange(3 * 6, dtype=np.int32).reshape(3, 6)
TEXT = dict(vocab_size=24, vocab_padded=24, max_length=12)
LAYERS = dict(width=8, num_layers=5, num_heads=2, mlp_dim=12)
CLIP = {f"{tower}_{k}": v for tower in ("vision", "text") for k, v in LAYERS.items()}
gpt = functools.partial(Gpt, **TEXT, **LAYERS)
vit = functools.partial(Vit, patch=2, **LAYERS, num_classes=5)
experts = dict(num_experts=4, experts_per_token=2, capacity_factor=0.75)
resnet = functools.partial(ResNet, depths=(3, 2), width=4, num_classes=5, stem="cifar")
msra = functools.partial(Msra, 5, depths=(2, 1), widths=(6, 8), stem_width=4, hidden=(6, 8))
alexnet = functools.partial(AlexNet, 5, widths=(4, 8, 6, 6, 4), hidden=(6, 8))
MODELS = {  # and inputs
    "mlp": (functools.partial(Mlp, (6, 8, 6, 8, 6), 5, norm="batch", dropout=0.5), images(16)),
    "resnet": (resnet, images(4)),
    "resnet plain": (functools.partial(resnet, shortcut="none", norm="group"), images(4)),
    "resnet wide": (
        functools.partial(resnet, block="preact", widening=2, dropout=0.3),
        images(4),
    ),
    "alexnet": (alexnet, images(2, (67, 67, 3))),
    "msra": (msra, images(2, (16, 16, 3))),
    "inception": (functools.partial(Inception, 5, width_factor=1 / 16), images(2, (32, 32, 3))),
    "efficientnet": (
        functools.partial(EfficientNet, 5, width_factor=0.3, depth_factor=0.3),
        images(2, (32, 32, 3)),
    ),
    "regnet": (
        functools.partial(RegNet, depths=(1, 2), widths=(8, 16), group_width=4, num_classes=5),
        images(2, (16, 16, 3)),
    ),
    "vit": (functools.partial(vit, dropout=0.5), images(2)),
    "vit scan": (functools.partial(vit, dropout=0.5, scan_layers=True), images(2)),
    "gpt": (functools.partial(gpt, "gpt2", dropout=0.5), TOKENS),
    "gpt scan": (functools.partial(gpt, "gpt2", dropout=0.5, scan_layers=True), TOKENS),
    "llama scan": (functools.partial(gpt, "llama", kv_heads=1, scan_layers=True), TOKENS),
    "experts": (functools.partial(gpt, "gpt2", dropout=0.5, **experts), TOKENS),
    "experts scan": (
        functools.partial(gpt, "llama", kv_heads=1, scan_layers=True, **experts),
        TOKENS,
    ),
    "bert scan": (functools.partial(Bert, **TEXT, **LAYERS, scan_layers=True), TOKENS),
    "clip": (functools.partial(Clip, 8, **TEXT, vision_patch=2, **CLIP), images(3), TOKENS),
}
NESTED = ("full", "every:2", "sqrt", "poor", "binomial")
OWN = {  # the policies that keep what they find by name, or by kind
    "mlp": ("names:dense", "dots"),
    "resnet": ("names:conv", "offload:conv"),
    "gpt scan": ("names:attn_out,mlp_up", "offload:query,mlp_hidden", "dots"),
    "llama scan": ("names:key,value,attn_proj,mlp_gate",),
    "gpt": (),
    "experts scan": (),
}
ALL_PRODUCTS = {"dots", "names:dense", "names:conv", "offload:conv"}  # of their models are kept
QUICK = {
    *(("mlp", policy) for policy in ("every:2", "binomial", "names:dense")),
    ("gpt scan", "every:2"),
    ("resnet plain", "every:2"),
}


def cases():
    for name in MODELS:
        nested = NESTED if name in OWN else ("every:2", "binomial")
        for policy in (*nested, *OWN.get(name, ())):
            yield pytest.param(name, policy, marks=() if (name, policy) in QUICK else slow)


def loss_of(name, policy):
    """The loss as a function of the parameters, which is the statistics' too; and parameters."""
    make, *given = MODELS[name]
    model = make(remat=policy)
    variables = values(model, *given, train=False)
    rest = {name: value for name, value in variables.items() if name != "params"}

    def loss(params):
        out, state = model.apply(
            {"params": params, **rest},
            *given,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=list(rest),
        )
        return sum((x**2).sum() for x in jax.tree.leaves((out, state)))

    return loss, variables["params"]


@functools.cache
def model_slopes(name, policy):
    loss, params = loss_of(name, policy)
    # Many norms of few numbers: rounding, which differs where code is compiled in a hurry, grows.
    compiled = jax.jit if name == "efficientnet" else jit
    return compiled(jax.value_and_grad(loss))(params)


@functools.cache
def products(name, policy):
    """FLOPs of the model's gradient, and those that are computed again."""
    loss, params = loss_of(name, policy)
    flops = count.count(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)
    again = count.recomputed(flops)
    return flops.total() - again, again


@pytest.mark.parametrize(("name", "policy"), list(cases()))
def test_a_policy_changes_no_number_of_a_model(name, policy):
    """Dropout's masks, batch norm's statistics and routing included, and no parameter's name."""
    same(model_slopes(name, policy), model_slopes(name, "none"))
    model, again = products(name, policy)
    assert model == products(name, "none")[0]
    assert (again > 0) == (policy not in ALL_PRODUCTS)


def test_work_of_a_scanned_stack_is_the_blocks_less_what_nobody_asks_for():
    """The MLP's last product, where the layer's result is not computed for another layer."""
    (batch, length), (n, width, wide) = TOKENS.shape, (5, 8, 12)
    last = 2 * batch * length * width * wide
    block = 2 * batch * length * (4 * width**2 + 2 * length * width) + 2 * last
    for policy in ("full", "every:2", "sqrt", "binomial"):
        again = remat.evaluations(policy, n) - n
        expected = again * block - remat.unneeded(policy, n) * last
        assert products("gpt scan", policy)[1] == expected, policy
    # One after another, what comes last in a segment is nobody's: the compiler drops it too.
    assert products("gpt", "every:2")[1] == 4 * block - 2 * last


GPT_NAMES = {"query", "key", "value", "attn_out", "attn_proj", "mlp_up", "mlp_hidden", "mlp_out"}


def names_in(name):
    with remat.recording() as names:
        loss, params = loss_of(name, "none")
        jax.eval_shape(loss, params)
    return names


def test_the_names_of_a_model_are_documented():
    assert names_in("gpt scan") == GPT_NAMES
    assert names_in("llama scan") == GPT_NAMES | {"mlp_gate"}
    assert names_in("mlp") == {"dense"}
    assert names_in("resnet") == {"conv"}
    assert {*GPT_NAMES, "mlp_gate", "dense", "conv"} == set(remat.NAMES)


@pytest.mark.parametrize(
    ("names", "saved"),
    [
        ("query,value", 0),  # they come out of one product with the keys
        ("query,key,value", 3 * 8 * 8),
        ("attn_out", 6 * 8),  # of the weights with the values
        ("attn_proj", 8 * 8),
        ("mlp_up", 8 * 12),
        ("mlp_hidden", 0),  # the activation's slope needs mlp_up
        ("mlp_out", 0),  # no gradient is made of it
    ],
)
def test_what_is_kept_by_name_saves_its_product(names, saved):
    """In multiply-adds of a token: of width 8, 12 in the MLP, with 6 tokens to attend to."""
    found = products("gpt scan", "full")[1] - products("gpt scan", f"names:{names}")[1]
    assert found == 5 * TOKENS.size * 2 * saved


# --- experiments ----------------------------------------------------------------------------------


def test_an_experiment_knows_its_names_and_refuses_others(load):
    built = experiment.build(small(load, "gpt2", "remat=names:attn_out"), devices=1)
    assert set(built.activation_names) == GPT_NAMES
    with pytest.raises(UserError, match=r"names:conv.*'conv'.*attn_out, attn_proj, key"):
        experiment.build(small(load, "gpt2", "remat=names:conv"), devices=1)


SAME = ("model.num_layers=4", "model.scan_layers=true", "rules=fsdp")
LAYOUTS = [
    ("mesh=data=2,fsdp=4", "remat=sqrt"),
    ("mesh=data=2,fsdp=4", "remat=binomial"),
    ("mesh=fsdp=8", "partitioner=shard_map", "remat=sqrt"),
    ("mesh=fsdp=8", "partitioner=shard_map", "remat=binomial", "accum=2"),
    ("mesh=fsdp=8", "partitioner=shard_map", "remat=every:2", "model.scan_layers=false"),
]


@slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_a_layout_gives_the_one_device_steps(load, layout):
    noise = dict(steps=2, noise=True)
    scan = [field for field in layout if field.startswith("model.")]
    expected = curve(small(load, "gpt2", *SAME, *scan), devices=1, **noise)
    assert_equal_runs(curve(small(load, "gpt2", *SAME, *layout), **noise), expected)


@slow
def test_by_hand_a_layers_parameters_are_gathered_each_time_that_it_is_computed(load):
    """And the bill's lower bound says so: none gathers the whole of a segment at once."""
    for policy in ("full", "sqrt", "every:2"):
        config = small(load, "gpt2", *SAME, *LAYOUTS[2][:2], f"remat={policy}")
        built = experiment.build(config, devices=jax.devices())
        rows = collectives.of_experiment(built)
        (gathers,) = (row for row in rows if row["kind"] == "all-gather")
        assert gathers["ratio"] == pytest.approx(1, abs=0.01), policy


# --- memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [pytest.param(16, marks=slow), 64, pytest.param(256, marks=slow)])
def test_the_reference_chain_takes_what_the_sources_say(n):
    """Of activations: x <- tanh(x W) under gradients to its input; XLA's CPU compiler."""
    arrays = jax.eval_shape(lambda: reference.arrays(n))
    unit = arrays[1].size * arrays[1].dtype.itemsize

    def temporary(policy):
        slope = jax.grad(functools.partial(reference.loss, policy=policy), argnums=1)
        return jax.jit(slope).lower(*arrays).compile().memory_analysis().temp_size_in_bytes / unit

    # tanh's slope is kept, in jax 0.10 as two arrays.
    each = 2 if jax.__version_info__ < (0, 11) else 1
    assert temporary("none") == pytest.approx(each * n + 1, rel=0.01)
    assert temporary("full") == pytest.approx(n + 2, rel=0.01)
    nested = temporary("sqrt")
    assert nested <= 2 * math.sqrt(n) + 8
    assert temporary("binomial") < nested


def test_what_a_layer_keeps_is_read_from_its_jaxpr():
    """Two dense layers and tanh: what the second product and tanh's slope are made of."""

    def layer(params, x):
        constant = jnp.exp(jnp.arange(8.0))[None]
        return jnp.tanh(x @ params["a"] * constant) @ params["b"]

    shape = jax.ShapeDtypeStruct
    params = {"a": shape((4, 8), jnp.float32), "b": shape((8, 4), jnp.float32)}
    x = shape((16, 4), jnp.float32)
    wide = 16 * 8 * 4
    each = 2 if jax.__version_info__ < (0, 11) else 1  # of tanh's slope, its result among them
    assert residuals.saved(layer, params, x) in (each * wide, (each + 1) * wide)
    assert residuals.saved(jax.checkpoint(layer), params, x) == 0


def test_bytes_of_a_scan_by_hand():
    bytes_of = functools.partial(residuals.scan_bytes, carry_bytes=1, residual_bytes=9)
    assert bytes_of("none", 16) == 16 * 10
    assert bytes_of("full", 16) == 16 + 10
    assert bytes_of("every:4", 16) == 4 + 40
    assert bytes_of("every:5", 16) == 3 + 50
    assert bytes_of("sqrt", 16) == 4 + 4 + 10
    assert bytes_of("binomial", 64) == 4 + 4 + 3 + 10
    assert bytes_of("dots", 16, kept_bytes=5) == 16 * 6 + 10 - 5


BATCH, LENGTH, WIDTH = 32, 64, 64


@functools.cache
def gpt_bytes(policy, n, length=LENGTH):
    """Of a scanned stack's gradient: temporary bytes compiled, and those of the formula."""
    style = transformer.Style("gelu_tanh", 1e-5, causal=True)
    fields = dict(num_heads=4, mlp_dim=4 * WIDTH, dropout=0.0, dtype=jnp.float32, style=style)
    stack = transformer.Stack(n, **fields, remat=policy, scan_layers=True)
    block = transformer.Block(**fields, train=True)
    x = jax.ShapeDtypeStruct((BATCH, length, WIDTH), jnp.float32)

    def loss(params, x):
        return (stack.apply({"params": params}, x, train=True)[0] ** 2).sum()

    def layer(params, x):
        return block.apply({"params": params}, x)[0]

    params = nn.unbox(boxed(stack, x, train=True)["params"])
    one = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params["blocks"])
    keep = remat.cut(policy, n).keep
    compiled = jax.jit(jax.grad(loss)).lower(params, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes, residuals.scan_bytes(
        policy,
        n,
        carry_bytes=x.size * x.dtype.itemsize,
        residual_bytes=residuals.saved(layer, one, x),
        kept_bytes=residuals.saved(jax.checkpoint(layer, policy=keep), one, x) if keep else 0,
    )


@slow
@pytest.mark.parametrize("policy", ["none", "full", "dots", "sqrt", "every:2", "every:4"])
def test_a_gpt_stack_takes_its_carries_and_residuals(policy):
    found, expected = gpt_bytes(policy, 16)
    assert found == pytest.approx(expected, rel=0.15)


@slow
def test_the_best_number_of_segments_is_the_formulas():
    """It is not always the root: a block keeps far more than it hands on."""
    n = 48
    divisors = [k for k in range(1, n + 1) if n % k == 0]
    least = divisors[:5]
    found, expected = zip(*(gpt_bytes(f"every:{k}", n, length=16) for k in least), strict=True)
    best = {
        name: least[np.argmin(values)] for name, values in (("found", found), ("formula", expected))
    }
    assert abs(divisors.index(best["found"]) - divisors.index(best["formula"])) <= 1
    assert math.sqrt(n) > 2 * best["formula"]
