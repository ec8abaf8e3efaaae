"""Every model: shapes, parameter counts, logical axes, and the functions that they compute."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lsdl.models import layers
from lsdl.models.mlp import Mlp
from lsdl.models.resnet import ResidualBlock, ResNet, cifar
from lsdl.models.vit import CLASS_TOKENS, SIZES, Vit
from lsdl.sharding import rules
from tests.tiny import applied, boxed, close, count, images, jit, paths, values

vit = functools.partial(Vit, patch=2, width=8, num_layers=2, num_heads=2, mlp_dim=12, num_classes=5)


def CifarResNet(depth, **fields):
    return ResNet(**cifar(depth) | fields)


MODELS = {
    "mlp": functools.partial(Mlp, hidden=(6, 8, 6), num_classes=5),
    "vit": vit,
    "vit mean": functools.partial(vit, pool="mean"),
    "vit stem": functools.partial(vit, stem=1),
    "vit scan": functools.partial(vit, scan_layers=True),
    "vit stem scan": functools.partial(vit, stem=1, scan_layers=True),
    "resnet": functools.partial(CifarResNet, depth=8, num_classes=5, width=4),
}
models = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["mlp", "vit stem", "vit scan", "resnet"])
IMAGE = (8, 8, 3)


def shapes(model, shape=IMAGE):
    return boxed(model, images(2, shape), train=False)


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


@some_models
def test_without_classes_a_model_returns_what_its_head_reads(name):
    model, x = MODELS[name](), images(3)
    variables = values(model, x, train=False)
    features = applied(MODELS[name](num_classes=0), train=False)(variables, x)
    head = variables["params"]["head"]
    logits = applied(model, train=False)(variables, x)
    assert features.dtype == jnp.float32
    close(features @ head["kernel"] + head["bias"][None], logits, rtol=1e-5, atol=1e-5)


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


def vit_parameters(*, patch, width, num_layers, mlp_dim, num_classes, image, stem=0, pool="class"):
    height, breadth, channels = image
    total, inputs = 0, channels
    for _ in range(stem):
        total += (9 * inputs + 1) * width
        inputs = width
    total += (patch * patch * inputs + 1) * width
    total += (height * breadth // patch**2 + 2 * CLASS_TOKENS[pool]) * width  # token, position
    attention = 4 * (width + 1) * width
    mlp = (width + 1) * mlp_dim + (mlp_dim + 1) * width
    total += num_layers * (attention + mlp + 2 * 2 * width)
    heads = 2 if pool == "distill" else 1
    return total + 2 * width + heads * (width + 1) * num_classes


@pytest.mark.parametrize("pool", CLASS_TOKENS)
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("stem", [0, 1, 3])
@pytest.mark.parametrize(
    ("image", "fields"),
    [
        ((8, 8, 1), dict(patch=2, width=96, num_layers=4, mlp_dim=192, num_classes=10)),
        ((32, 24, 3), dict(patch=4, width=64, num_layers=3, mlp_dim=100, num_classes=7)),
    ],
)
def test_vit_parameters(image, fields, stem, scan_layers, pool):
    fields = fields | dict(stem=stem, pool=pool)
    model = Vit(num_heads=8, scan_layers=scan_layers, **fields)
    assert count(shapes(model, image)["params"]) == vit_parameters(image=image, **fields)


@pytest.mark.parametrize(
    ("size", "pool", "parameters"),
    [
        # The class token's: those of the papers' public weights.
        ("ti16", "class", 5_717_416),
        ("s16", "class", 22_050_664),
        ("b16", "class", 86_567_656),
        ("b32", "class", 88_224_232),
        ("l16", "class", 304_326_632),
        ("h14", "class", 632_045_800),
        # Without the class token and its position.
        ("b16", "mean", 86_567_656 - 2 * 768),
        # DeiT's, with the distillation token (Touvron et al. 2021, table 5: 6M, 22M, 87M).
        ("ti16", "distill", 5_910_800),
        ("s16", "distill", 22_436_432),
        ("b16", "distill", 87_338_192),
    ],
)
def test_vit_parameters_at_the_published_sizes(size, pool, parameters):
    model = Vit(**SIZES[size], num_classes=1000, pool=pool, scan_layers=True)
    assert count(shapes(model, (224, 224, 3))["params"]) == parameters


@pytest.mark.parametrize(("size", "millions"), [("g14", 1011), ("G14", 1843)])
def test_largest_vits_are_as_large_as_printed(size, millions):
    """Zhai et al. 2022, table 2, which counts no head."""
    model = Vit(**SIZES[size], num_classes=0, pool="mean", scan_layers=True)
    assert abs(count(shapes(model, (224, 224, 3))["params"]) / 1e6 - millions) < 2


@pytest.mark.parametrize(
    ("hidden", "image", "parameters"),
    # 79,510: the Fashion-MNIST example of the lectures.
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


@pytest.mark.parametrize(("stride", "features"), [(1, 4), (2, 8), (2, 9)])
def test_residual_shortcut_is_option_a(stride, features):
    """With the branch switched off: subsampled, and padded with zero channels on both sides."""
    fields = dict(block="basic", shortcut="pad", norm="batch", zero_gamma=False, dropout=0.0)
    block = ResidualBlock(
        features, stride, **fields, dtype=jnp.float32, train=False, axis_name=None
    )
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


def test_gelu_and_its_slope_are_exact():
    """Hendrycks and Gimpel 2016, section 2: x P(X <= x); the slope by differences in float64."""
    x = np.linspace(-9, 9, 400)
    exact = lambda x: np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])  # noqa: E731
    slope = (exact(x + 1e-6) - exact(x - 1e-6)) / 2e-6
    found, back = jit(jax.vmap(jax.value_and_grad(layers.gelu)))(np.float32(x))
    np.testing.assert_allclose(found, exact(x), rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose(back, slope, rtol=1e-5, atol=2e-6)
    assert layers.ACTIVATIONS["gelu"](jnp.ones(2, jnp.bfloat16)).dtype == jnp.bfloat16


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
