"""A mixture of experts: the way of each token, in the order of its sequence, on any layout."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError
from lsdl.experiment import build
from lsdl.models import convert, moe
from lsdl.models.gpt import Gpt
from lsdl.models.layers import ACTIVATIONS
from lsdl.models.moe import Experts
from lsdl.models.transformer import Mixture, Mlp, Style
from lsdl.planner.count import count as count_flops
from lsdl.sampling import sample
from lsdl.sharding import mesh as meshes
from lsdl.tasks import Language
from tests.curves import assert_equal_curves, assert_equal_states, curve
from tests.tiny import applied, close, count, images, jit, stacked, values
from tests.zoo import small

B, L, D, F = 3, 10, 6, 8
EXPERTS = {"one each": (4, 1, 1.0), "two each": (4, 2, 0.75), "three each": (5, 3, 1.25)}
SIZES = dict(vocab_size=19, vocab_padded=24, max_length=L, width=8, num_layers=2, num_heads=2)
SIZES |= dict(mlp_dim=12, num_experts=4, experts_per_token=2, capacity_factor=0.75)
gpt2 = functools.partial(Gpt, "gpt2", **SIZES)
llama = functools.partial(Gpt, "llama", **SIZES, kv_heads=1, activation="silu", tied=False)
TOKENS = np.random.default_rng(3).integers(19, size=(B, L))


def style(experts=None, **fields):
    fields = dict(activation="gelu", norm_eps=1e-6) | fields
    return Style(**fields, experts=experts and Experts(*experts))


def mixture(experts, **fields):
    return Mixture(F, style(experts, **fields), jnp.float32)


def routed(logits, real=None, experts=(4, 2, 1.0)):
    logits = np.asarray(logits, np.float32)
    real = np.ones(len(logits), bool) if real is None else np.array(real)
    return jax.device_get(moe.route(logits, real, Experts(*experts)))


# --- one sequence ---------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_with_room_for_all_is_the_mlp(gated):
    fields = dict(gated=gated, bias=not gated)
    plain, x = Mlp(F, style(**fields), jnp.float32), images(B, (L, D))
    variables = values(plain, x)
    expert = {
        "experts": jax.tree.map(lambda leaf: leaf[None], variables["params"]),
        "router": {"logits": {"kernel": np.ones((D, 1), np.float32)}},
    }
    y, told = applied(mixture((1, 1, 1.0), **fields))({"params": expert}, x)
    np.testing.assert_allclose(y, applied(plain)(variables, x), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(told["balance"], 1)
    np.testing.assert_array_equal(told["dropped"], 0)


def token_by_token(params, x_LD, real_L, number, each, capacity):
    """The mixture as a loop, in float64."""
    params = jax.tree.map(np.float64, params)
    taken, y_LD, lost = np.zeros(number, int), np.zeros(x_LD.shape), 0
    for i in np.flatnonzero(real_L):
        odds = np.exp(x_LD[i] @ params["router"]["logits"]["kernel"])
        best = np.argsort(-odds)[:each]
        gates = odds[best] / (odds.sum() if each == 1 else odds[best].sum())
        for e, gate in zip(best, gates, strict=True):
            if taken[e] == capacity:
                lost += 1
                continue
            taken[e] += 1
            kernels = {n: layer["kernel"][e] for n, layer in params["experts"].items()}
            biases = {n: layer["bias"][e] for n, layer in params["experts"].items()}
            hidden = np.float64(ACTIVATIONS["gelu"](x_LD[i] @ kernels["up"] + biases["up"]))
            y_LD[i] += gate * (hidden @ kernels["down"] + biases["down"])
    return y_LD, lost / (each * max(real_L.sum(), 1))


@pytest.mark.parametrize("case", EXPERTS)
def test_a_mixture_is_a_loop_over_the_tokens(case):
    model, x = mixture(EXPERTS[case]), images(B, (L, D))
    segment = np.array([[1] * L, [1] * 4 + [2] * 4 + [0] * 2, [0] * L])
    variables = values(model, x)
    y, told = applied(model)(variables, x, segment)
    number, each, factor = EXPERTS[case]
    capacity = int(np.ceil(each * L / number * factor))
    for row in range(B):
        expected, lost = token_by_token(
            variables["params"], x[row], segment[row] > 0, number, each, capacity
        )
        np.testing.assert_allclose(y[row], expected, rtol=1e-4, atol=1e-5)
        assert told["dropped"][row] == pytest.approx(lost)
    assert told["dropped"][0] > 0  # or the rule were not tested


@pytest.mark.parametrize(
    ("experts", "length", "capacity"),
    [((8, 2, 1.0), 128, 32), ((8, 2, 1.25), 128, 40), ((8, 1, 1.1), 10, 2), ((2, 2, 4.0), 10, 10)],
)
def test_capacity_is_the_even_share_times_the_factor(experts, length, capacity):
    assert Experts(*experts).capacity(length) == capacity


def test_an_expert_takes_the_first_that_choose_it_and_drops_the_rest():
    # Each row: most probable first. Four experts of one slot for two tokens' four choices.
    first_and_second = [(0, 1), (0, 2), (1, 3), (3, 0)]
    logits = np.full((4, 4), -9.0)
    for token, (first, second) in enumerate(first_and_second):
        logits[token, first], logits[token, second] = 2.0, 1.0
    one = routed(logits, experts=(4, 2, 0.5))
    # Token 0's second choice is before token 2's first.
    np.testing.assert_array_equal(one.slot_N, [0, 1, 4, 2, 4, 3, 4, 4])
    np.testing.assert_array_equal(one.choice_S, [0, 1, 3, 5])
    assert one.dropped == pytest.approx(4 / 8)
    gate = 1 / (1 + np.exp(-1))
    np.testing.assert_allclose(one.gate_Lk, [[gate, 1 - gate]] * 4, rtol=1e-6)
    # Without its first token the second one finds its first choice free; padding takes nothing.
    late = routed(logits, [False, True, True, True], experts=(4, 2, 0.5))
    np.testing.assert_array_equal(late.slot_N, [4, 4, 0, 2, 1, 3, 4, 4])


def test_balance_is_1_for_even_experts_and_their_number_for_a_single_one():
    even = np.tile(2e-3 * np.eye(4), (5, 1))
    assert routed(even, experts=(4, 1, 1.0)).balance == pytest.approx(1, rel=1e-5)
    assert routed(np.zeros((6, 4)), experts=(4, 2, 1.0)).balance == pytest.approx(1)
    single = np.tile([99.0, 0, 0, 0], (6, 1))
    assert routed(single, experts=(4, 1, 1.0)).balance == pytest.approx(4)


def test_balance_is_experts_times_shares_times_mean_probabilities():
    logits = np.random.default_rng(0).standard_normal((9, 4))
    real = np.arange(9) < 7
    odds = np.exp(logits[:7])
    probability = odds / odds.sum(1, keepdims=True)
    share = np.bincount(probability.argmax(1), minlength=4) / 7
    expected = 4 * (share * probability.mean(0)).sum()
    assert routed(logits, real, (4, 1, 1.0)).balance == pytest.approx(expected, rel=1e-5)


def test_rows_travel_there_and_back_and_so_do_their_derivatives():
    x, g = images(2, (6, 3)), images(2, (4, 3))
    there = np.array([[5, 6, 0, 2], [6, 6, 6, 1]])
    back = np.array([[2, 4, 3, 4, 4, 0], [4, 3, 4, 4, 4, 4]])

    def plain(x):
        padded = jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1)
        return jnp.take_along_axis(padded, there[..., None], axis=1)

    move = lambda x: moe._move(x, there, back)  # noqa: E731
    y, pull = jax.vjp(move, x)
    expected, plain_pull = jax.vjp(plain, x)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(pull(g)[0], plain_pull(g)[0])
    slopes = [jax.grad(lambda x, f=f: (f(x) ** 3).sum()) for f in (move, plain)]
    curved = [jax.jvp(slope, (x,), (jnp.cos(x),))[1] for slope in slopes]  # and their Hessians'
    np.testing.assert_allclose(*curved, rtol=1e-6)


def test_routing_is_in_float32_whatever_the_precision():
    x = images(B, (L, D)).astype(jnp.bfloat16)
    model = Mixture(F, style((4, 2, 1.0)), jnp.bfloat16)
    variables = values(model, x)
    y, told = applied(model)(variables, x)
    assert y.dtype == jnp.bfloat16
    assert told["balance"].dtype == jnp.float32
    _, exact = applied(mixture((4, 2, 1.0)))(variables, x.astype(jnp.float32))
    np.testing.assert_array_equal(told["balance"], exact["balance"])
    with jax.default_matmul_precision("bfloat16"):  # as under config.precision=bfloat16
        program = jax.make_jaxpr(model.apply)(variables, x)
    products = [eqn for eqn in program.eqns if eqn.primitive.name == "dot_general"]
    (router,) = [eqn for eqn in products if eqn.outvars[0].aval.shape == (B, L, 4)]
    assert set(router.params["precision"]) == {jax.lax.Precision.HIGHEST}


# --- the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [gpt2, llama])
def test_no_token_is_touched_by_a_later_one(make):
    """Neither its hidden state nor its gradient, though experts are full and drop tokens."""
    model = make()
    variables = values(model, TOKENS, train=False)
    apply = applied(model, train=False)
    hidden, _, routing = apply(variables, TOKENS)
    assert (routing["dropped"] > 0).all()
    for place in range(1, L):
        other = TOKENS.copy()
        other[:, place:] = (other[:, place:] + 7) % 19
        changed = np.abs(apply(variables, other)[0] - hidden).max(-1)
        assert (changed[:, :place] == 0).all()
        assert (changed[:, place] > 0).all()

    def reach(embedding):  # of each token from each, by tokens that are all different
        params = {**variables["params"], "embedding": embedding}
        return model.apply({"params": params}, np.arange(L)[None], train=False)[0][0].sum(-1)

    grad_LVD = jit(jax.jacrev(reach))(variables["params"]["embedding"])
    assert (np.triu(np.abs(grad_LVD[:, :L]).max(-1), 1) == 0).all()


def test_a_sequence_is_routed_alike_in_any_company():
    model = gpt2()
    variables = values(model, TOKENS, train=False)
    apply = applied(model, train=False)
    hidden, _, routing = apply(variables, TOKENS)
    for row in range(B):
        alone, _, of_one = apply(variables, TOKENS[row : row + 1])
        np.testing.assert_allclose(alone[0], hidden[row], rtol=1e-5, atol=1e-6)
        close(of_one, jax.tree.map(lambda x, row=row: x[row : row + 1], routing), rtol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_a_scanned_stack_is_the_unrolled_one(remat):
    unrolled, scanned = llama(), llama(scan_layers=True, remat=remat)
    params = values(unrolled, TOKENS, train=False)["params"]
    both = [params, {**params, "stack": stacked(params["stack"])}]

    def loss(model, params):
        hidden, _, routing = model.apply({"params": params}, TOKENS, train=True)
        return (hidden**2).sum() + routing["balance"].sum(), (hidden, routing)

    results = []
    for model, own in zip((unrolled, scanned), both, strict=True):
        grad, out = jit(jax.grad(functools.partial(loss, model), has_aux=True))(own)
        results.append((grad["embedding"], *out))
    close(*results, rtol=1e-4, atol=1e-5)
    assert results[0][2]["balance"].shape == (B, 2)


def test_the_parameters_are_those_of_the_experts_and_the_routers():
    shapes = lambda model: jax.eval_shape(  # noqa: E731
        functools.partial(model.init, train=False), jax.random.key(0), TOKENS
    )
    dense = count(shapes(gpt2(num_experts=0, experts_per_token=0, capacity_factor=0.0)))
    width, wide, number, layers = 8, 12, 4, 2
    mlp = 2 * width * wide + wide + width
    assert count(shapes(gpt2())) == dense + layers * ((number - 1) * mlp + number * width)


def test_flops_are_those_of_the_slots_and_the_router():
    number, each, factor = experts = (4, 2, 0.75)
    model, x = mixture(experts), images(B, (L, D))
    program = jax.jit(model.apply).trace(values(model, x), x).jaxpr.jaxpr
    slots = number * int(np.ceil(each * L / number * factor))
    assert count_flops(program).total() == 2 * B * (slots * 2 * D * F + L * D * number)


def test_an_expert_starts_as_a_dense_layer_does():
    model = mixture((16, 2, 1.0))
    kernel = jit(model.init)(jax.random.key(0), images(1, (L, 64)))["params"]["experts"]["up"]
    each = nn.unbox(kernel)["kernel"]
    np.testing.assert_allclose(np.std(each, axis=(1, 2)), 1 / 8, rtol=0.2)
    assert len(np.unique(np.mean(each, axis=(1, 2)))) == 16


def test_a_model_of_experts_generates():
    model = gpt2()
    variables = values(model, TOKENS, train=False)
    fields = dict(num_tokens=4, max_length=L, vocab_size=19, temperature=0, top_k=0)
    drawn = list(sample(model.apply, variables, [1, 2], **fields, key=jax.random.key(0)))
    hidden, table, _ = model.apply(variables, np.array([[1, 2, *drawn]]), train=False)
    # The window is of L tokens, and of so many are its experts' slots; hence a shorter one here.
    assert len(drawn) == 4
    assert max(drawn) < 19
    assert np.isfinite(hidden @ table.T).all()


def test_the_loss_adds_balance_as_a_sum_over_examples():
    window = {"token": jax.ShapeDtypeStruct((L + 1,), jnp.int32)}
    draw = np.random.default_rng(0)
    hidden, table = np.float32(draw.standard_normal((B, L, D))), np.float32(np.eye(19, D))
    routing = {
        "balance": np.float32(draw.random((B, 2))),
        "dropped": np.float32(draw.random((B, 2))),
    }
    batch = {"token": draw.integers(19, size=(B, L + 1)), "weight": np.float32([1, 1, 0])}
    plain, weight = Language(window, 19, ()).loss((hidden, table), batch)[:2]
    task = Language(window, 19, (), balance=0.5)
    loss, same, metrics = jax.device_get(task.loss((hidden, table, routing), batch))
    assert same == weight == 2 * L
    told = {name: x[:2].sum() * L for name, x in routing.items()}
    assert loss == pytest.approx(float(plain) + 0.5 * told["balance"], rel=1e-6)
    for name in ("balance", "dropped"):
        assert metrics[name] == pytest.approx(told[name] / 2, rel=1e-6)
    one = lambda tree, r: jax.tree.map(lambda x: x[r : r + 1], tree)  # noqa: E731
    rows = [task.loss((one(hidden, r), table, one(routing, r)), one(batch, r))[0] for r in range(B)]
    assert float(sum(rows)) == pytest.approx(float(loss), rel=1e-6)


# --- layouts --------------------------------------------------------------------------------------

LAYOUTS = [
    ("mesh=fsdp=8",),
    ("mesh=data=2,expert=4",),
    ("mesh=expert=4,tensor=2", "remat=full"),
    ("mesh=fsdp=2,expert=4", "accum=2"),
    ("mesh=data=8", "partitioner=shard_map", "accum=2", "remat=dots"),
    ("mesh=data=8", "partitioner=pmap"),
    ("mesh=sequence=2,expert=4",),
    ("mesh=data=2,expert=4", "model.scan_layers=true", "remat=full"),
]


@pytest.fixture(scope="module")
def one_device():
    return functools.lru_cache(lambda config: curve(config, devices=1, steps=2, noise=True))


@pytest.mark.parametrize("layout", LAYOUTS, ids=" ".join)
def test_every_layout_gives_the_one_device_steps(load, one_device, layout):
    scanned = [o for o in layout if o.startswith("model.")]
    expected = one_device(small(load, "experts", *scanned))
    actual = curve(small(load, "experts", *layout), steps=2, noise=True)
    names = ("loss", "balance", "dropped", "grad_norm", "update_norm", "param_norm")
    assert_equal_curves(actual[0], expected[0], names)
    assert_equal_states(actual[1], expected[1])
    assert (expected[0]["dropped"] > 0).all()


def test_tokens_travel_to_their_experts_and_back_and_nothing_else_travels():
    """With the batch split over the experts' axis: two all-to-alls forward, two backward."""
    mesh = meshes.make_mesh(meshes.parse_mesh("expert=4,data=2", 8))
    rules = (("experts", "expert"), ("batch", ("data", "expert")), ("batch", "data"))
    model, x = mixture((8, 2, 1.25)), images(8, (L, D))
    boxed = jax.eval_shape(model.init, jax.random.key(0), x)
    placed = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    rows = NamedSharding(mesh, P(("data", "expert")))
    given = jax.tree.map(
        lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to),
        (nn.unbox(boxed), jax.ShapeDtypeStruct(x.shape, x.dtype)),
        (placed, rows),
    )
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        loss = lambda params, x: (model.apply(params, x)[0] ** 2).sum()  # noqa: E731
        grad = jit(jax.grad(loss, argnums=(0, 1)), out_shardings=(placed, rows))
        program = grad.lower(*given).compile().as_text()
    calls = re.findall(r"= .*? ([a-z]+-[a-z-]+?)(?:-start)?\(", program)
    travels = [c for c in calls if c in ("all-to-all", "all-gather", "collective-permute")]
    assert travels == ["all-to-all"] * 4


# --- what does not fit ----------------------------------------------------------------------------

WRONG = {
    "more than there are": (("model.experts_per_token=9",), "from 1 to model.num_experts=8"),
    "none of a token": (("model.experts_per_token=0",), "from 1 to model.num_experts=8"),
    "no room": (("model.capacity_factor=0.0",), "capacity_factor=0.0 must be positive"),
    "negative": (("model.num_experts=-1",), "num_experts=-1 must not be negative"),
    "left over": (("model.num_experts=0",), "must be 0 for model.num_experts=0"),
    "mesh": (("mesh=expert=8", "model.num_experts=12"), "divisible by 8"),
    "stages": (("mesh=data=4,stage=2",), "must be 0 with stage=2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_told(load, case):
    overrides, message = WRONG[case]
    with pytest.raises(UserError, match=re.escape(message)):
        build(load("stdlib_gpt:experts,smoke", *overrides))


def test_balance_without_experts_is_told(load):
    with pytest.raises(UserError, match=r"must be 0 without model\.num_experts"):
        build(load("stdlib_gpt:smoke", "loss.balance=0.1"))


def test_experts_are_not_converted():
    with pytest.raises(UserError, match="num_experts=4 has no counterpart"):
        convert.counterpart(gpt2(), {"params": {}})
