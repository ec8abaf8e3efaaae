"""The transformer block and the models made of it: formulas, counts, and who sees whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lsdl import experiment
from lsdl.models import clip, layers, transformer, vit
from lsdl.models.bert import Bert
from lsdl.models.gpt import Gpt
from lsdl.models.transformer import Style
from tests.tiny import applied, boxed, close, count, images, jit, paths, stacked, values

PLAIN = Style("gelu_tanh", 1e-6)
CAUSAL = Style("gelu_tanh", 1e-6, causal=True)
VOCAB = 24
LLAMA = dict(form="llama", activation="silu", kv_heads=1, tied=False)
FIELDS = dict(
    vocab_size=VOCAB,
    vocab_padded=VOCAB,
    max_length=12,
    width=8,
    num_layers=2,
    num_heads=2,
    mlp_dim=12,
)
gpt2 = functools.partial(Gpt, "gpt2", **FIELDS)
llama = functools.partial(Gpt, **FIELDS | LLAMA)
bert = functools.partial(Bert, **FIELDS)
MODELS = {"gpt2": gpt2, "llama": llama, "bert": bert}
stack = functools.partial(transformer.Stack, *(2, 2, 12, 0.0, jnp.float32))
small_vit = functools.partial(
    vit.Vit, patch=2, width=8, num_layers=2, num_heads=2, mlp_dim=12, num_classes=5
)


def tokens(*shape):
    """Tokens of which no two are the same."""
    return np.arange(np.prod(shape), dtype=np.int32).reshape(shape)


def segments(*lengths):
    """A row of documents of these lengths, the last one padding: (1, sum of the lengths)."""
    numbers = [*range(1, len(lengths)), 0]
    return np.repeat(numbers, lengths)[None].astype(np.int32)


# --- parameter counts -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # Radford et al. 2019; those of the released weights.
        ("lm_gpt2:124m", 124_439_808),
        ("lm_gpt2:350m", 354_823_168),
        ("lm_gpt2:774m", 774_030_080),
        ("lm_gpt2:1.5b", 1_557_611_200),
        # Meta's Llama 3.2 1B, Llama 2 7B, Llama 3 8B and 70B.
        ("lm_llama:1b", 1_235_814_400),
        ("lm_llama:7b", 6_738_415_616),
        ("lm_llama:8b", 8_030_261_248),
        ("lm_llama:70b", 70_553_706_496),
        # Hugging Face's BertForMaskedLM, which has no pooler.
        ("lm_bert:base", 109_514_298),
        ("lm_bert:large", 335_174_458),
        # OpenAI's and OpenCLIP's.
        ("clip:b32", 151_277_313),
        ("clip:b16", 149_620_737),
        ("clip:l14", 427_616_513),
        ("clip:h14", 986_109_441),
    ],
)
def test_language_models_have_the_published_parameters(load, name, parameters):
    """The padding of the vocabulary is left out."""
    built = experiment.build(load(name), devices=1)
    assert built.num_parameters == parameters
    padding = built.module.vocab_padded - built.module.vocab_size
    width = getattr(built.module, "text_width", None) or built.module.width
    tables = 1 if getattr(built.module, "tied", True) else 2
    biases = padding if name.startswith("lm_bert") else 0
    padded = count(built.abstract_state.params) - built.num_parameters
    assert padded == tables * padding * width + biases


@pytest.mark.parametrize(
    ("size", "printed"),
    [
        ("125m", 125e6),
        ("350m", 356e6),  # printed as 350M
        ("760m", 760e6),
        ("1.3b", 1.3e9),
        ("2.7b", 2.65e9),
        ("6.7b", 6.66e9),
        ("13b", 12.85e9),
        ("175b", 174.6e9),
    ],
)
def test_gpt3_is_as_large_as_printed(load, size, printed):
    built = experiment.build(load(f"gpt3:{size}"), devices=1)
    assert built.num_parameters == pytest.approx(printed, rel=0.015)
    width, depth = built.module.width, built.module.num_layers
    block = 12 * width**2 + 13 * width
    assert built.num_parameters == depth * block + (50_257 + 2048 + 2) * width


# --- the block ------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", [PLAIN, CAUSAL], ids=["plain", "causal"])
def test_attention_is_its_formula(style):
    """Vaswani et al. 2017, equation 1, head by head."""
    model = transformer.Attention(num_heads=2, style=style, dtype=jnp.float32)
    x = images(1, (5, 6))
    params = values(model, x)["params"]
    q, k, v = (
        np.float64(x[0]) @ np.float64(params[n]["kernel"]) + params[n]["bias"]
        for n in ("query", "key", "value")
    )
    mixed = np.zeros((5, 6))
    for head in (slice(0, 3), slice(3, 6)):
        for t in range(5):
            score = q[t, head] @ k[:, head].T / np.sqrt(3)
            share = np.exp(score - score.max())
            share[t + 1 if style.causal else 5 :] = 0
            mixed[t, head] = share / share.sum() @ v[:, head]
    expected = mixed @ np.float64(params["out"]["kernel"]) + params["out"]["bias"]
    found = applied(model)({"params": params}, x)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rope_theta", [0.0, 100.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_key_and_value_heads_are_shared_by_neighbouring_query_heads(kv_heads, rope_theta):
    """Plain attention whose key and value kernels repeat each head for its whole group."""
    style = Style("silu", 1e-6, causal=True, bias=False, rope_theta=rope_theta)
    grouped = Style(**style.__dict__ | {"kv_heads": kv_heads})
    make = functools.partial(transformer.Attention, num_heads=4, dtype=jnp.float32)
    x, position = images(2, (5, 16)), np.arange(5)[None]
    params = values(make(style=grouped), x, None, position)["params"]

    def repeated(kernel):
        heads = kernel.reshape(16, kv_heads, 4)
        return np.repeat(heads, 4 // kv_heads, axis=1).reshape(16, 16)

    full = {
        name: {"kernel": repeated(leaf["kernel"]) if name in ("key", "value") else leaf["kernel"]}
        for name, leaf in params.items()
    }
    assert params["key"]["kernel"].shape == (16, 4 * kv_heads)
    found = applied(make(style=grouped))({"params": params}, x, None, position)
    expected = applied(make(style=style))({"params": full}, x, None, position)
    close(found, expected, rtol=1e-5, atol=1e-6)


def test_gated_mlp_is_its_formula():
    """Shazeer 2020, equation 6: (swish(x W) * x V) W2, without biases."""
    model = transformer.Mlp(12, Style("silu", 1e-6, gated=True, bias=False), jnp.float32)
    x = images(2, (3, 8))
    params = values(model, x)["params"]
    gate, up, down = (np.float64(params[name]["kernel"]) for name in ("gate", "up", "down"))
    gated = x @ gate
    expected = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
    close(applied(model)({"params": params}, x), np.float32(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("post_norm", [False, True])
def test_block_normalises_before_or_after(post_norm):
    """Xiong et al. 2020, figure 1: what the block's pieces make of one another."""
    style = Style("gelu", 1e-6, post_norm=post_norm)
    block = transformer.Block(2, 12, 0.0, jnp.float32, style, train=False)
    x = images(2, (5, 8))
    params = values(block, x)["params"]
    pieces = {
        "attn": transformer.Attention(2, style, jnp.float32),
        "mlp": transformer.Mlp(12, style, jnp.float32),
    }
    norm = layers.layer_norm(dtype=jnp.float32, name="norm")
    y = x
    for name, piece in pieces.items():
        normed = lambda y, name=name: norm.apply({"params": params[f"{name}_norm"]}, y)  # noqa: E731
        through = lambda y, name=name, p=piece: p.apply({"params": params[name]}, y)  # noqa: E731
        y = normed(y + through(y)) if post_norm else y + through(normed(y))
    close(applied(block)({"params": params}, x)[0], y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_causal_outputs_ignore_what_comes_later(causal, scan_layers):
    """d y_t / d x_s is exactly 0 for s > t, and for s <= t it is not."""
    model = stack(style=CAUSAL if causal else PLAIN, scan_layers=scan_layers)
    x = images(2, (5, 8))
    variables = values(model, x, train=False)
    jacobian = jit(jax.jacrev(lambda x, v: model.apply(v, x, train=True)[0]))(x, variables)
    reach_BtBs = np.abs(jacobian).max((2, 5))
    within = np.tri(5) if causal else np.ones((5, 5))
    assert_reach(reach_BtBs.reshape(10, 10), np.kron(np.eye(2), within))


def assert_reach(found, expected):
    """Exactly 0 where nothing may be seen, and something everywhere else."""
    assert (found[expected == 0] == 0).all()
    assert (found[expected == 1] > 1e-6).all()


# --- rotary positions -----------------------------------------------------------------------------


def rotated(x, position, theta=100.0):
    """(L, K) features of one head at `position` (L,)."""
    found = transformer.rotary(jnp.asarray(x)[None, :, None], jnp.asarray(position)[None], theta)
    return np.array(found[0, :, 0])


def test_rotary_is_multiplication_by_a_complex_number():
    """Su et al. 2021, equation 13, of the pairs (k, k + K/2)."""
    x, position = images(1, (5, 6))[0], np.array([0, 1, 2, 7, 100])
    turn = np.exp(1j * position[:, None] * 100.0 ** (-np.arange(3) / 3)[None])
    turned = (np.float64(x[:, :3]) + 1j * x[:, 3:]) * turn
    expected = np.concatenate([turned.real, turned.imag], 1)
    np.testing.assert_allclose(rotated(x, position), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(rotated(x, 0 * position), x)


@pytest.mark.parametrize("shift", [1, 3, 50])
def test_rotary_products_depend_on_the_distance_alone(shift):
    query, key = images(2, (5, 8))
    position = np.arange(5)
    product = lambda p: rotated(query, p) @ rotated(key, p).T  # noqa: E731
    np.testing.assert_allclose(product(position + shift), product(position), rtol=1e-4, atol=1e-4)
    moved = rotated(query, position + shift) @ rotated(key, position).T
    assert np.abs(moved - product(position)).max() > 0.1


def test_rotary_keeps_the_norm():
    x = images(1, (5, 8))[0]
    norm = np.linalg.norm(rotated(x, np.arange(5) * 31), axis=1)
    np.testing.assert_allclose(norm, np.linalg.norm(x, axis=1), rtol=1e-5)


# --- segments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(7,), (3, 4), (1, 1, 2, 3, 0), (6, 1)])
def test_positions_restart_with_each_segment(lengths):
    expected = np.concatenate([np.arange(n) for n in lengths])
    np.testing.assert_array_equal(transformer.positions(segments(*lengths))[0], expected)


def reach(model, token, segment):
    """|d hidden[t] / d embedding input[s]| of all places of all rows, the largest of features.

    No two tokens are the same, so that a token's row of the embedding is its input.
    """
    params = values(model, token, segment, train=False)["params"]

    def hidden(embedding, params):
        params = params | {"embedding": embedding}
        out = model.apply({"params": params}, token, segment, train=False)
        return out[0].reshape(token.size, -1)

    jacobian = jit(jax.jacrev(hidden))(params["embedding"], params)
    return np.abs(jacobian).max((1, 3))[:, : token.size]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_token_sees_its_document_up_to_itself(name, packed):
    """d hidden[t] / d input[s] is 0 for s > t, for other documents and for padding.

    BERT sees its whole document.
    """
    token = tokens(2, 7)
    segment = np.concatenate([segments(3, 2, 2), segments(2, 4, 1)]) if packed else None
    found = reach(MODELS[name](), token, segment)
    document = token // 7 * 10 + (0 if segment is None else segment)
    same = document.reshape(1, -1) == document.reshape(-1, 1)
    assert_reach(found, same * (1 if name == "bert" else np.tri(14)))


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_as_each_alone(name):
    """Positions and attention begin anew, and padding changes nothing."""
    model, token = MODELS[name](), tokens(1, 10)
    variables, apply = values(model, token, train=False), applied(model, train=False)
    together = apply(variables, token, segments(3, 5, 2))[0][0]
    close(together[:3], apply(variables, token[:, :3])[0][0], rtol=1e-5, atol=1e-6)
    close(together[3:8], apply(variables, token[:, 3:8])[0][0], rtol=1e-5, atol=1e-6)
    whole = apply(variables, token)[0][0]
    assert np.abs(whole - together)[3:].max() > 1e-2
    close(apply(variables, token, np.ones_like(token))[0][0], whole, rtol=1e-5, atol=1e-6)


# --- language models ------------------------------------------------------------------------------


def test_gpt_is_tied_by_default_and_untied_if_told():
    token = tokens(1, 4)
    for model, tied in ((gpt2(), True), (llama(), False)):
        variables = values(model, token, train=False)
        _, table = applied(model, train=False)(variables, token)
        assert ("output" in variables["params"]) != tied
        np.testing.assert_array_equal(table, variables["params"]["embedding" if tied else "output"])


def test_kernels_start_as_gpt2s():
    """Radford et al. 2019: 0.02, and less by the root of the residual layers where they add."""
    model = gpt2(width=64, num_layers=3, mlp_dim=256, scan_layers=True)
    make = jit(functools.partial(model.init, train=False))
    params = nn.unbox(make(jax.random.key(0), tokens(1, 4)))["params"]
    for path, leaf in paths(params).items():
        if path.endswith("bias"):
            assert not leaf.any()
        elif not path.endswith("scale"):
            residual = path.endswith(("attn/out/kernel", "mlp/down/kernel"))
            std = 0.02 / np.sqrt(2 * 3) if residual else 0.02
            assert np.std(leaf) == pytest.approx(std, rel=0.1), path


def test_bert_predicts_with_the_embedding_and_a_bias():
    model, token = bert(), tokens(2, 4)
    variables = values(model, token, train=False)
    hidden, table, bias = applied(model, train=False)(variables, token)
    assert hidden.shape == (2, 4, 8)
    np.testing.assert_array_equal(table, variables["params"]["embedding"])
    np.testing.assert_array_equal(bias, variables["params"]["head_bias"])
    features = applied(model, train=False, features=True)(variables, token)
    assert features.shape == hidden.shape
    assert np.abs(features - hidden).max() > 0.1


# --- ViT ------------------------------------------------------------------------------------------


def test_vit_patches_see_their_own_pixels_alone():
    """Without layers every patch is embedded by itself, at its own place."""
    model = small_vit(num_layers=0)
    x = images(1)
    variables = values(model, x, train=False)
    apply = applied(model, train=False, capture_intermediates=True)

    def encoded(x):
        return apply(variables, x)[1]["intermediates"]["encoder"]["__call__"][0]

    other = x.copy()
    other[0, 2:4, 6:8] += 1
    changed = np.abs(encoded(other) - encoded(x)).max(-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(changed), [1 + 1 * 4 + 3])  # after the class token


def test_vit_pools_read_the_tokens_that_they_name():
    """Each from the encoder's tokens; in evaluation DeiT's two heads are averaged."""
    x = images(3)
    for pool, number in vit.CLASS_TOKENS.items():
        model = small_vit(pool=pool)
        variables = values(model, x, train=False)
        apply = applied(model, train=False, capture_intermediates=True)
        logits, kept = apply(variables, x)
        encoded = kept["intermediates"]["encoder"]["__call__"][0]
        assert encoded.shape == (3, 16 + number, 8)
        read = {"head": encoded.mean(1) if pool == "mean" else encoded[:, 0]}
        if pool == "distill":
            read["distill_head"] = encoded[:, 1]
        heads = {name: variables["params"][name] for name in read}
        both = [y @ heads[n]["kernel"] + heads[n]["bias"][None] for n, y in read.items()]
        close(logits, sum(both) / len(both), rtol=1e-5, atol=1e-5)
        trained = applied(model, train=True)(variables, x)
        close(trained, tuple(both) if len(both) == 2 else both[0], rtol=1e-5, atol=1e-5)


# --- CLIP -----------------------------------------------------------------------------------------


small_clip = functools.partial(
    clip.Clip,
    embed_dim=6,
    vocab_size=VOCAB,
    vocab_padded=VOCAB,
    max_length=8,
    vision_patch=4,
    text_width=8,
    vision_width=12,
    **{f"{tower}_num_layers": 1 for tower in ("text", "vision")},
    **{f"{tower}_num_heads": 2 for tower in ("text", "vision")},
    **{f"{tower}_mlp_dim": 12 for tower in ("text", "vision")},
)
CAPTION = np.array([[3, 5, VOCAB - 1, 0, 0, 0], [7, 8, 9, 4, 2, VOCAB - 1]], np.int32)


def test_clip_reads_a_caption_at_its_end():
    model, x = small_clip(), images(2)
    variables = values(model, x, CAPTION, train=False)
    apply = applied(model, train=False)
    _, text, *_ = apply(variables, x, CAPTION)
    other = CAPTION.copy()
    other[0, 3:] = [11, 12, 13]  # after the end
    np.testing.assert_array_equal(apply(variables, x, other)[1], text)
    other[:, 1] = 6
    assert (np.abs(apply(variables, x, other)[1] - text).max(1) > 1e-3).all()


def test_clip_features_have_unit_length_and_each_tower_sees_its_own_input():
    model, x = small_clip(), images(2)
    variables = values(model, x, CAPTION, train=False)
    image, text, *_ = applied(model, train=True)(variables, x, CAPTION)
    for features in (image, text):
        assert features.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    one = functools.partial(applied, model, train=False)
    close(one(method="encode_image")(variables, x), image, rtol=1e-5, atol=1e-6)
    close(one(method="encode_text")(variables, CAPTION), text, rtol=1e-5, atol=1e-6)


def test_clip_scale_is_at_most_100():
    model, x = small_clip(bias_init=-10.0), images(2)
    variables = values(model, x, CAPTION, train=False)
    apply = applied(model, train=False)
    for log_scale, scale in ((0.0, 1.0), (np.log(10), 10.0), (9.0, 100.0)):
        variables["params"]["log_scale"] = np.float32(log_scale)
        *_, found, bias = apply(variables, x, CAPTION)
        assert found == pytest.approx(scale, rel=1e-5)
        assert bias == variables["params"]["bias"]


@pytest.mark.parametrize("bias", [0.0, -10.0])
def test_clip_starts_at_its_scale_and_bias(key, bias):
    """The bias is the sigmoid loss's alone: without one there is no such parameter."""
    model = small_clip(scale_init=20.0, bias_init=bias)

    def start(key):
        variables = model.init(key, images(1), CAPTION[:1], train=False)
        return nn.unbox({n: variables["params"].get(n) for n in ("log_scale", "bias")})

    found = jit(start)(key)
    assert np.exp(found["log_scale"]) == pytest.approx(20, rel=1e-5)
    assert found["bias"] == (bias or None)


# --- scan and rematerialisation -------------------------------------------------------------------


def slopes(model, variables, *inputs):
    """The outputs, and the gradient of the sum of the first one's squares."""

    def loss(params):
        out = model.apply({"params": params}, *inputs, train=True)
        first = out[0] if isinstance(out, tuple) else out
        return (first**2).sum(), first

    return jit(jax.grad(loss, has_aux=True))(variables["params"])


CASES = {
    "vit": (small_vit, (images(3),), "encoder"),
    "gpt2": (gpt2, (tokens(2, 7), np.concatenate([segments(3, 2, 2)] * 2)), None),
    "llama": (llama, (tokens(2, 7), np.concatenate([segments(3, 2, 2)] * 2)), None),
    "bert": (functools.partial(bert, dropout=0.0), (tokens(2, 7),), None),
}


def scanned_params(params, owner):
    if owner:
        return params | {owner: scanned_params(params[owner], None)}
    return params | {"stack": stacked(params["stack"])}


@pytest.mark.parametrize("name", CASES)
def test_scanned_and_unrolled_stacks_are_one_function(name):
    make, inputs, owner = CASES[name]
    variables = values(make(), *inputs, train=False)
    slope, out = slopes(make(), variables, *inputs)
    scanned = {"params": scanned_params(variables["params"], owner)}
    policies = ("none", "full", "dots") if name == "llama" else ("none",)
    for remat in policies:
        model = make(scan_layers=True, remat=remat)
        assert jax.tree.map(jnp.shape, scanned) == jax.tree.map(
            jnp.shape, nn.unbox(boxed(model, *inputs, train=False))
        )
        found_slope, found = slopes(model, scanned, *inputs)
        close(found, out, rtol=1e-5, atol=1e-5)
        close(found_slope, scanned_params(slope, owner), rtol=1e-4, atol=1e-4)


def test_scanned_parameters_are_split_over_no_layer():
    def params(**fields):
        shapes = boxed(small_vit(num_layers=3, **fields), images(2), train=False)
        return shapes["params"]["encoder"]["stack"]

    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731

    def check(scanned, single):
        assert scanned.names == ("layers", *single.names)
        assert scanned.value.shape == (3, *single.value.shape)

    jax.tree.map(check, params(scan_layers=True)["blocks"], params()["block_0"], is_leaf=is_box)


def test_scanned_layers_start_from_different_values():
    make = jit(functools.partial(stack(style=PLAIN, scan_layers=True).init, train=False))
    params = nn.unbox(make(jax.random.key(0), images(1, (5, 8))))["params"]["blocks"]
    for path, leaf in paths(params).items():
        assert path.endswith("kernel") != np.array_equal(leaf[0], leaf[1]), path


@pytest.mark.parametrize("scan_layers", [False, True])
def test_masks_of_a_stack_are_independent(scan_layers):
    """Where every branch adds 1, the sum is 2 x Binomial(2 layers, 1/2): its variance tells."""
    model = transformer.Stack(4, 2, 12, 0.5, jnp.float32, PLAIN, scan_layers=scan_layers)
    x = np.zeros((64, 5, 8), np.float32)
    variables = values(model, x, train=False)

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return np.full_like(leaf, path.endswith(("attn/out/bias", "mlp/down/bias")))

    variables = jax.tree_util.tree_map_with_path(one, variables)
    apply = applied(model, train=True)
    y, _ = apply(variables, x, rngs={"dropout": jax.random.key(0)})
    assert abs(y.mean() - 8) < 0.3
    assert abs(y.var() - 8) < 1.0
