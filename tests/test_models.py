"""Every model: shapes, parameter counts, logical axes, and the functions that they compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lsdl.models import layers, transformer
from lsdl.models.mlp import Mlp
from lsdl.models.resnet import CifarResNet, ResidualBlock
from lsdl.models.vit import Vit
from lsdl.sharding import rules

vit = functools.partial(Vit, patch=2, width=8, num_layers=2, num_heads=2, mlp_dim=12, num_classes=5)
MODELS = {
    "mlp": functools.partial(Mlp, hidden=(6, 8, 6), num_classes=5),
    "vit": vit,
    "vit stem": functools.partial(vit, stem=1),
    "vit scan": functools.partial(vit, scan_layers=True),
    "vit stem scan": functools.partial(vit, stem=1, scan_layers=True),
    "resnet": functools.partial(CifarResNet, depth=8, num_classes=5, width=4),
}
models = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["mlp", "vit stem", "vit scan", "resnet"])
IMAGE = (8, 8, 3)


# Small programs: compiling them costs more than running them.
jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
    },
)


def images(batch, shape=IMAGE):
    return np.float32(np.random.default_rng(7).standard_normal((batch, *shape)))


def boxed(model, *inputs, **kwargs):
    """The model's variables as shapes, parameters in the boxes that carry their logical axes."""
    return jax.eval_shape(functools.partial(model.init, **kwargs), jax.random.key(0), *inputs)


def shapes(model, shape=IMAGE):
    return boxed(model, images(2, shape), train=False)


def values(model, *inputs, **kwargs):
    """Variables with random values everywhere: no zero bias or unit scale hides its product.

    Drawn by numpy, which needs no compilation as `init` does.
    """
    draw = np.random.default_rng(1).standard_normal

    def make(keys, leaf):
        name, noise = keys[-1].key, np.float32(draw(leaf.shape))
        if name == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[-3:-1]))
        return 1 + abs(noise) / 4 if name in ("scale", "var") else noise / 4

    variables = nn.unbox(boxed(model, *inputs, **kwargs))
    return jax.tree_util.tree_map_with_path(make, variables)


def applied(model, **kwargs):
    return jit(functools.partial(model.apply, **kwargs))


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def paths(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(keys, simple=True, separator="/"): leaf for keys, leaf in flat}


def close(a, b, **kwargs):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **kwargs), a, b)


# --- the contract of every model ------------------------------------------------------------------


@models
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_logits_are_float32_whatever_the_compute(name, dtype, train):
    model = MODELS[name](dtype=dtype)
    apply = functools.partial(model.apply, train=train, mutable=["batch_stats"])
    logits, _ = jax.eval_shape(apply, shapes(model), images(3))
    assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)


@models
def test_parameters_are_float32_whatever_the_compute(name):
    leaves = jax.tree.leaves(shapes(MODELS[name](dtype=jnp.bfloat16)))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def products(jaxpr):
    """The matrix products and convolutions of a program, inner ones included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from products(inner)


@models
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_computed_in_the_dtype(name, dtype):
    model = MODELS[name](dtype=dtype)
    apply = functools.partial(model.apply, train=False)
    jaxpr = jax.make_jaxpr(apply)(nn.unbox(shapes(model)), images(2)).jaxpr
    found = {v.aval.dtype for eqn in products(jaxpr) for v in eqn.invars}
    assert found == {jnp.dtype(dtype)}


@models
def test_every_parameter_has_logical_axes_that_the_rules_know(name):
    split = {logical for table in rules.TABLES.values() for logical, _ in table}
    never_split = {"conv_in", "length", "head_dim", "classes", "layers", None}
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for leaf in jax.tree.leaves(shapes(MODELS[name]())["params"], is_leaf=is_box):
        assert is_box(leaf)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= split | never_split


@some_models
def test_every_parameter_matters(name):
    """A gradient reaches them all, but for the bias of keys, which softmax cancels."""
    model, x = MODELS[name](), images(4)
    variables = values(model, x, train=False)
    params = variables.pop("params")

    def loss(params):
        logits, _ = model.apply({"params": params, **variables}, x, train=True, mutable=True)
        return (logits**2).sum()

    for path, slope in paths(jit(jax.grad(loss))(params)).items():
        assert ("key/bias" in path) == (np.abs(slope).max() < 1e-5), path


@some_models
def test_evaluation_sees_every_example_alone(name):
    model, x = MODELS[name](), images(4)
    variables = values(model, x, train=False)
    apply = applied(model, train=False)
    close(apply(variables, x)[1:3], apply(variables, x[1:3]), rtol=1e-5, atol=1e-6)


# --- parameter counts -----------------------------------------------------------------------------


def resnet_parameters(depth, *, width=16, channels=3, classes=10):
    """He et al. 2016, section 4.2: 3x3 convolutions without biases, option A shortcuts."""
    blocks = (depth - 2) // 6
    total = 9 * channels * width + 2 * width
    for d in (width, 2 * width, 4 * width):
        total += blocks * (2 * 9 * d * d + 2 * 2 * d)
        total -= 9 * d * d // 2 if d > width else 0  # a stage's first convolution has d/2 inputs
    return total + (4 * width + 1) * classes


@pytest.mark.parametrize(
    ("depth", "parameters", "paper_millions"),
    [
        (20, 269_722, 0.27),
        (32, 464_154, 0.46),
        (44, 658_586, 0.66),
        (56, 853_018, 0.85),
        (110, 1_727_962, 1.7),
    ],
)
def test_resnet_parameters(depth, parameters, paper_millions):
    variables = shapes(CifarResNet(depth=depth, num_classes=10), (32, 32, 3))
    assert count(variables["params"]) == parameters == resnet_parameters(depth)
    assert abs(parameters / 1e6 - paper_millions) < 0.03
    # Running mean and variance of every normalisation, beside scale and bias.
    norms = sum(leaf.size for path, leaf in paths(variables["params"]).items() if "norm" in path)
    assert count(variables["batch_stats"]) == norms


@pytest.mark.parametrize("width", [4, 16])
@pytest.mark.parametrize(("channels", "classes"), [(1, 10), (3, 100)])
def test_resnet_parameters_at_any_size(width, channels, classes):
    model = CifarResNet(depth=14, num_classes=classes, width=width)
    expected = resnet_parameters(14, width=width, channels=channels, classes=classes)
    assert count(shapes(model, (8, 8, channels))["params"]) == expected


def vit_parameters(*, patch, width, num_layers, mlp_dim, num_classes, stem, image):
    height, breadth, channels = image
    total, inputs = 0, channels
    for _ in range(stem):
        total += (9 * inputs + 1) * width
        inputs = width
    total += (patch * patch * inputs + 1) * width
    total += height * breadth // patch**2 * width
    attention = 4 * (width + 1) * width
    mlp = (width + 1) * mlp_dim + (mlp_dim + 1) * width
    total += num_layers * (attention + mlp + 2 * 2 * width)
    return total + 2 * width + (width + 1) * num_classes


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("stem", [0, 1, 3])
@pytest.mark.parametrize(
    ("image", "fields"),
    [
        ((8, 8, 1), dict(patch=2, width=96, num_layers=4, mlp_dim=192, num_classes=10)),
        ((32, 24, 3), dict(patch=4, width=64, num_layers=3, mlp_dim=100, num_classes=7)),
    ],
)
def test_vit_parameters(image, fields, stem, scan_layers):
    model = Vit(num_heads=8, stem=stem, scan_layers=scan_layers, **fields)
    assert count(shapes(model, image)["params"]) == vit_parameters(image=image, stem=stem, **fields)


def test_vit_base_parameters():
    """ViT-B/16 at 224 pixels has 86,567,656 with a class token (Dosovitskiy et al. 2021)."""
    model = Vit(patch=16, width=768, num_layers=12, num_heads=12, mlp_dim=3072, num_classes=1000)
    token_and_its_position = 768 + 768
    assert count(shapes(model, (224, 224, 3))["params"]) == 86_567_656 - token_and_its_position


@pytest.mark.parametrize(
    ("hidden", "image", "parameters"),
    [((100,), (28, 28, 1), 79_510), ((), (28, 28, 1), 7850), ((6, 8), (2, 2, 3), 224)],
)
def test_mlp_parameters(hidden, image, parameters):
    assert count(shapes(Mlp(hidden=hidden, num_classes=10), image)["params"]) == parameters


# --- what the models compute ----------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_mlp_is_its_formula(activation):
    model, x = Mlp(hidden=(6, 8), num_classes=5, activation=activation), images(3)
    variables = values(model, x, train=False)
    h = np.asarray(x, np.float64).reshape(3, -1)
    for layer in ("hidden_0", "hidden_1"):
        dense = variables["params"][layer]["dense"]
        h = h @ np.float64(dense["kernel"]) + dense["bias"]
        h = np.maximum(h, 0) if activation == "relu" else np.tanh(h)
    head = variables["params"]["head"]
    logits = h @ np.float64(head["kernel"]) + head["bias"]
    found = applied(model, train=True)(variables, x)
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_its_formula(causal):
    """Vaswani et al. 2017, equation 1, head by head."""
    model = transformer.Attention(num_heads=2, dtype=jnp.float32, causal=causal)
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
            share[t + 1 if causal else 5 :] = 0
            mixed[t, head] = share / share.sum() @ v[:, head]
    expected = mixed @ np.float64(params["out"]["kernel"]) + params["out"]["bias"]
    found = applied(model)({"params": params}, x)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_causal_outputs_ignore_what_comes_later(causal, scan_layers):
    """d y_t / d x_s is exactly 0 for s > t, and for s <= t it is not."""
    stack = transformer.Stack(*(2, 2, 12, 0.0, jnp.float32), causal=causal, scan_layers=scan_layers)
    x = images(2, (5, 8))
    variables = values(stack, x, train=False)
    jacobian = jit(jax.jacrev(lambda x, v: stack.apply(v, x, train=True)))(x, variables)
    reach_BtBs = np.abs(jacobian).max((2, 5))
    for a, b in itertools.product(range(2), repeat=2):
        seen = reach_BtBs[a, :, b]
        if a != b:
            assert (seen == 0).all()
        elif causal:
            assert (seen[np.triu_indices(5, 1)] == 0).all()
            assert (seen[np.tril_indices(5)] > 1e-6).all()
        else:
            assert (seen > 1e-6).all()


def test_vit_patches_see_their_own_pixels_alone():
    """Without layers every patch is embedded by itself, at its own place."""
    model = vit(num_layers=0)
    x = images(1)
    variables = values(model, x, train=False)
    apply = applied(model, train=False, capture_intermediates=True)

    def norm(x):
        return apply(variables, x)[1]["intermediates"]["norm"]["__call__"][0]

    other = x.copy()
    other[0, 2:4, 6:8] += 1
    changed = np.abs(norm(other) - norm(x)).max(-1)[0]
    np.testing.assert_array_equal(np.flatnonzero(changed), [1 * 4 + 3])


@pytest.mark.parametrize(("stride", "features"), [(1, 4), (2, 8), (2, 9)])
def test_residual_shortcut_is_option_a(stride, features):
    """With the branch switched off: subsampled, and padded with zero channels on both sides."""
    block = ResidualBlock(features, stride, jnp.float32, train=False, axis_name=None)
    x = images(2, (6, 6, 4))
    variables = values(block, x)
    variables["params"] = jax.tree.map(np.zeros_like, variables["params"])
    before, after = (features - 4) // 2, (features - 4) - (features - 4) // 2
    shortcut = np.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(before, after)])
    np.testing.assert_array_equal(applied(block)(variables, x), np.maximum(shortcut, 0))


def test_resnet_halves_the_image_twice():
    model = CifarResNet(depth=14, num_classes=5, width=4)
    apply = functools.partial(model.apply, train=False, capture_intermediates=True)
    _, state = jax.eval_shape(apply, shapes(model, (32, 32, 3)), images(2, (32, 32, 3)))
    found = {
        block: outputs["__call__"][0].shape
        for block, outputs in state["intermediates"].items()
        if block.startswith("stage")
    }
    assert found == {
        f"stage_{s}_block_{i}": (2, 32 // 2**s, 32 // 2**s, 4 * 2**s)
        for s, i in itertools.product(range(3), range(2))
    }


# --- scan and rematerialisation -------------------------------------------------------------------


def stacked(params):
    """The unrolled stack's parameters as those of the scanned one."""
    blocks = [params["stack"][f"block_{i}"] for i in range(len(params["stack"]))]
    return params | {"stack": {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}}


def test_scanned_and_unrolled_stacks_are_one_function():
    unrolled, scanned = vit(), vit(scan_layers=True)
    x = images(3)
    params = values(unrolled, x, train=False)["params"]

    def loss(params, model):
        logits = model.apply({"params": params}, x, train=True)
        return (logits**2).sum(), logits

    value = jit(jax.grad(loss, has_aux=True), static_argnums=1)
    slope, logits = value(params, unrolled)
    slope_scanned, logits_scanned = value(stacked(params), scanned)
    close(logits_scanned, logits, rtol=1e-5, atol=1e-5)
    close(slope_scanned, stacked(slope), rtol=1e-4, atol=1e-5)
    assert jax.tree.map(jnp.shape, stacked(params)) == jax.tree.map(
        jnp.shape, nn.unbox(shapes(scanned))["params"]
    )


def test_scanned_parameters_are_split_over_no_layer():
    params = shapes(vit(num_layers=3, scan_layers=True))["params"]["stack"]["blocks"]
    unrolled = shapes(vit(num_layers=3))["params"]["stack"]["block_0"]
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731

    def check(scanned, single):
        assert scanned.names == ("layers", *single.names)
        assert scanned.value.shape == (3, *single.value.shape)

    jax.tree.map(check, params, unrolled, is_leaf=is_box)


def test_scanned_layers_start_from_different_values():
    stack = transformer.Stack(*(2, 2, 12, 0.0, jnp.float32), scan_layers=True)
    make = jit(functools.partial(stack.init, train=False))
    params = nn.unbox(make(jax.random.key(0), images(1, (5, 8))))["params"]["blocks"]
    for path, leaf in paths(params).items():
        assert path.endswith("kernel") != np.array_equal(leaf[0], leaf[1]), path


def grads(model):
    """The gradient as a function of the parameters, and parameters."""
    x = images(4)
    variables = values(model, x, train=False)

    def loss(params):
        rest = {name: value for name, value in variables.items() if name != "params"}
        logits, _ = model.apply(
            {"params": params, **rest},
            x,
            train=True,
            rngs={"dropout": jax.random.key(2)},
            mutable=list(rest),
        )
        return (logits**2).sum()

    return jax.grad(loss), variables["params"]


@functools.cache
def gradient(name, dropout, policy):
    fields = {"resnet": {}, "vit": dict(num_layers=1)}.get(name, dict(dropout=dropout))
    function, params = grads(MODELS[name](remat=policy, **fields))
    return jit(function)(params)


@pytest.mark.parametrize("policy", ["full", "dots"])
@pytest.mark.parametrize(
    ("name", "dropout"), [("mlp", 0.5), ("vit", 0.0), ("vit scan", 0.5), ("resnet", 0.0)]
)
def test_remat_changes_no_number(name, dropout, policy):
    plain = gradient(name, dropout, "none")
    close(gradient(name, dropout, policy), plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "vit", "vit scan", "resnet"])
def test_remat_recomputes_what_it_says(name):
    """full computes the forward products twice; dots none of them."""
    found = {}
    for policy in ("none", "full", "dots"):
        function, params = grads(MODELS[name](remat=policy))
        jaxpr = jax.make_jaxpr(function)(params).jaxpr
        found[policy] = sum(1 for _ in products(jaxpr))
    assert found["none"] == found["dots"] < found["full"]


# --- dropout --------------------------------------------------------------------------------------


def drop(x, *, rate=0.5, train=True, rows=None, key=0):
    module = layers.Dropout(rate, train)
    rngs = {"dropout": jax.random.key(key)}
    if rows is None:
        return jit(lambda x: module.apply({}, x, rngs=rngs))(x)

    def apply(x, rows):
        with layers.example_rows(rows):
            return module.apply({}, x, rngs=rngs)

    return jit(apply)(x, np.array(rows))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_rate_and_mean(rate):
    y = np.asarray(drop(jnp.ones((100, 10, 50)), rate=rate))
    error = 5 * np.sqrt(rate * (1 - rate) / y.size)
    assert abs((y == 0).mean() - rate) < error
    np.testing.assert_allclose(y[y != 0], 1 / (1 - rate), rtol=1e-6)
    assert abs(y.mean() - 1) < error / (1 - rate)


@pytest.mark.parametrize("rows", [[0, 1, 2], [5, 3], [7], [7, 7, 0]])
def test_dropout_mask_belongs_to_the_row(rows):
    """Whatever batch, microbatch or device the row comes in."""
    x = images(8, (3, 20))
    np.testing.assert_array_equal(drop(x[rows], rows=rows), drop(x, rows=range(8))[np.array(rows)])


def test_dropout_rows_count_from_0_by_default():
    x = images(8, (3, 20))
    np.testing.assert_array_equal(drop(x), drop(x, rows=range(8)))


def test_example_rows_end_with_their_block():
    x = images(2, (30,))
    with pytest.raises(RuntimeError), layers.example_rows(jnp.array([4, 5])):  # noqa: PT012
        assert not np.array_equal(drop(x), drop(x, rows=[0, 1]))
        raise RuntimeError
    np.testing.assert_array_equal(drop(x), drop(x, rows=[0, 1]))


def test_dropout_masks_differ_between_rows_keys_and_calls():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            once = layers.Dropout(0.5, True)
            return once(x), once(x), layers.Dropout(0.5, True)(x)

    x = jnp.ones((4, 64))
    found = [
        tuple(np.asarray(mask))
        for key in range(2)
        for call in applied(Twice())({}, x, rngs={"dropout": jax.random.key(key)})
        for mask in call
    ]
    assert len(set(found)) == 2 * 3 * 4


@pytest.mark.parametrize("kwargs", [dict(train=False), dict(rate=0.0)])
def test_dropout_is_off_in_evaluation_and_at_rate_0(kwargs):
    x = images(4)
    np.testing.assert_array_equal(drop(x, **kwargs), x)


def test_dropout_keeps_the_dtype():
    assert drop(jnp.ones((4, 4), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["mlp", "vit scan"])
def test_masks_of_a_model_belong_to_the_row(name):
    model, x = MODELS[name](dropout=0.5), images(6)
    variables = values(model, x, train=False)
    rngs = {"dropout": jax.random.key(3)}

    @jit
    def apply(variables, x, rows):
        with layers.example_rows(rows):
            return model.apply(variables, x, train=True, rngs=rngs)

    whole, some = apply(variables, x, np.arange(6)), np.array([4, 1])
    close(apply(variables, x[some], some), whole[some], rtol=1e-5, atol=1e-5)
    assert not np.allclose(apply(variables, x[some], some + 1), whole[some], atol=1e-3)
    off = applied(model, train=False)(variables, x)
    assert not np.allclose(off, whole, atol=1e-3)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_masks_of_a_stack_are_independent(scan_layers):
    """Where every branch adds 1, the sum is 2 x Binomial(2 layers, 1/2): its variance tells."""
    stack = transformer.Stack(*(4, 2, 12, 0.5, jnp.float32), scan_layers=scan_layers)
    x = np.zeros((64, 5, 8), np.float32)
    variables = values(stack, x, train=False)

    def one(keys, leaf):
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return np.full_like(leaf, path.endswith(("attn/out/bias", "mlp/down/bias")))

    variables = jax.tree_util.tree_map_with_path(one, variables)
    apply = applied(stack, train=True)
    y = apply(variables, x, rngs={"dropout": jax.random.key(0)})
    assert abs(y.mean() - 8) < 0.3
    assert abs(y.var() - 8) < 1.0


# --- batch normalisation --------------------------------------------------------------------------


class Norm(nn.Module):
    train: bool
    axis_name: str | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        fields = dict(train=self.train, axis_name=self.axis_name, dtype=self.dtype)
        return layers.batch_norm(**fields, name="norm")(x)


def test_batch_norm_trains_on_the_batch_and_keeps_running_statistics():
    x = 3 * images(16, (4, 4, 2)) + 1
    variables = values(Norm(train=False), x)
    y, state = Norm(train=True).apply(variables, x, mutable=["batch_stats"])
    mean, var = np.mean(x, (0, 1, 2)), np.var(x, (0, 1, 2))
    scale, bias = (variables["params"]["norm"][n] for n in ("scale", "bias"))
    np.testing.assert_allclose(
        y, (x - mean) / np.sqrt(var + 1e-5) * scale + bias, rtol=1e-4, atol=1e-4
    )
    before, after = variables["batch_stats"]["norm"], state["batch_stats"]["norm"]
    np.testing.assert_allclose(after["mean"], 0.9 * before["mean"] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(after["var"], 0.9 * before["var"] + 0.1 * var, rtol=1e-5)


def test_batch_norm_evaluates_with_the_running_statistics():
    x = 3 * images(16, (4, 4, 2)) + 1
    variables = values(Norm(train=False), x)
    stats, params = variables["batch_stats"]["norm"], variables["params"]["norm"]
    y, state = Norm(train=False).apply(variables, x, mutable=["batch_stats"])
    expected = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    np.testing.assert_allclose(y, expected * params["scale"] + params["bias"], rtol=1e-4, atol=1e-4)
    close(state["batch_stats"]["norm"], stats, rtol=0)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_batch_norm_under_a_manual_axis_sees_the_global_batch(dtype):
    x = jnp.asarray(images(16, (4, 4, 2)), dtype)
    variables = values(Norm(train=False, axis_name="data"), x)
    assert paths(variables).keys() == paths(values(Norm(train=False), x)).keys()
    y, state = Norm(train=True, dtype=dtype).apply(variables, x, mutable=["batch_stats"])

    def shard(x):
        model = Norm(train=True, axis_name="data", dtype=dtype)
        return model.apply(variables, x, mutable=["batch_stats"])

    parts, states = jax.vmap(shard, axis_name="data")(x.reshape(4, 4, 4, 4, 2))
    close(np.float32(parts.reshape(x.shape)), np.float32(y), rtol=1e-2, atol=1e-5)
    for i in range(4):
        close(jax.tree.map(lambda s, i=i: s[i], states), state, rtol=1e-5, atol=1e-6)


def test_resnet_trains_on_the_batch_and_evaluates_on_the_past():
    model, x = MODELS["resnet"](), images(4)
    variables = values(model, x, train=False)
    train = applied(model, train=True, mutable=["batch_stats"])
    both, state = train(variables, x)
    half, _ = train(variables, x[:2])
    assert not np.allclose(both[:2], half, atol=1e-3)
    evaluate = applied(model, train=False)
    logits = evaluate(variables, x)
    assert not np.allclose(evaluate(variables | state, x), logits, atol=1e-3)
    for _ in range(100):
        _, state = train(variables | state, x)
    close(evaluate(variables | state, x), both, rtol=1e-3, atol=1e-3)
