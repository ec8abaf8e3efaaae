"""The convolutional models: published counts and tables, and the functions that they compute."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import NamedSharding

from lsdl import experiment
from lsdl.errors import UserError
from lsdl.models import alexnet, efficientnet, inception, layers, msra, regnet, resnet
from lsdl.models.alexnet import AlexNet
from lsdl.models.efficientnet import EfficientNet
from lsdl.models.inception import Inception
from lsdl.models.msra import Msra
from lsdl.models.regnet import RegNet
from lsdl.models.resnet import ResidualBlock, ResNet
from lsdl.sharding import mesh as meshes
from lsdl.sharding import partition, placement, rules
from tests.tiny import applied, boxed, close, count, images, jit, paths, values

thin_alexnet = functools.partial(AlexNet, widths=(4, 8, 6, 6, 4), hidden=(6, 8))
thin_msra = functools.partial(Msra, depths=(2, 1), widths=(6, 8), stem_width=4, hidden=(6, 8))
MODELS = {  # and the side of the smallest images that say something
    "resnet": (functools.partial(ResNet, depths=(1, 1), width=4), 16),
    "resnet group": (
        functools.partial(ResNet, depths=(1, 1), width=4, block="bottleneck", norm="group"),
        16,
    ),
    "resnet none": (
        functools.partial(ResNet, depths=(2,), width=4, stem="cifar", shortcut="none"),
        8,
    ),
    "resnet preact": (
        functools.partial(
            ResNet, depths=(1, 2), width=4, block="preact", stem="cifar", widening=2, dropout=0.3
        ),
        16,
    ),
    "alexnet": (thin_alexnet, 67),
    "alexnet bn": (functools.partial(thin_alexnet, batch_norm=True), 67),
    "alexnet c1": (functools.partial(AlexNet, widths=(4, 6), hidden=(6, 8), batch_norm=True), 8),
    "msra": (thin_msra, 16),
    "inception": (functools.partial(Inception, width_factor=1 / 16, stem_multiplier=2), 32),
    "inception plain": (functools.partial(Inception, width_factor=1 / 16, batch_norm=False), 32),
    "efficientnet": (functools.partial(EfficientNet, width_factor=0.3, depth_factor=0.3), 32),
    "regnet": (functools.partial(RegNet, depths=(1, 2), widths=(8, 16), group_width=4), 16),
}
models = pytest.mark.parametrize("name", MODELS)
BLIND = {
    "alexnet bn": "conv/bias",
    "alexnet c1": ("conv/bias", "dense_0/bias", "dense_1/bias"),
}


def tiny(name, batch=4, **fields):
    """The model and images for it."""
    make, side = MODELS[name]
    return make(num_classes=5, **fields), images(batch, (side, side, 3))


def parameters(model, side):
    return boxed(model, np.zeros((1, side, side, 3), np.float32), train=False)["params"]


# --- published sizes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "side", "expected"),
    [
        (AlexNet(1000), 227, 60_965_224),
        (AlexNet(1000), 224, 60_965_224),
        # C1 of Keskar et al. 2017, as its authors' code has it: by hand, layer by layer.
        (AlexNet(10, (64, 64), (384, 192), True), 32, 1_757_834),
        # Of He et al. 2015's tables: by hand, layer by layer.
        (Msra(1000, **msra.SIZES["14"]), 224, 74_993_896),
        (Msra(1000, **msra.SIZES["22"]), 224, 183_327_080),
        (Msra(1000, **msra.SIZES["30"]), 224, 79_192_296),
        (ResNet(num_classes=1000, **resnet.SIZES["18"]), 224, 11_689_512),
        (ResNet(num_classes=1000, **resnet.SIZES["34"]), 224, 21_797_672),
        (ResNet(num_classes=1000, **resnet.SIZES["50"]), 224, 25_557_032),
        (ResNet(num_classes=1000, **resnet.SIZES["101"]), 224, 44_549_160),
        (ResNet(num_classes=1000, **resnet.SIZES["152"]), 224, 60_192_808),
        # As counted everywhere; "36.5M" in Zagoruyko and Komodakis 2016, table 5.
        (ResNet(num_classes=10, **resnet.wide(28, 10)), 32, 36_479_194),
        (ResNet(num_classes=10, **resnet.wide(16, 4)), 32, 2_748_890),
        (EfficientNet(1000, **efficientnet.SIZES["b0"]), 224, 5_288_548),
        (EfficientNet(1000, **efficientnet.SIZES["b3"]), 300, 12_233_232),
        (RegNet(num_classes=1000, **regnet.SIZES["y_400mf"]), 224, 4_344_144),
        (RegNet(num_classes=1000, **regnet.SIZES["y_4gf"]), 224, 20_646_656),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_published_parameter_counts(model, side, expected):
    assert count(parameters(model, side)) == expected


# Params in K = 1,024 and operations in millions, as the lecture prints them.
TABLE = {
    "stem": (2.7, 34),
    "conv": (112, 360),  # with its reduction
    "mixed_3a": (159, 128),
    "mixed_3b": (380, 304),
    "mixed_4a": (364, 73),
    "mixed_4b": (437, 88),
    "mixed_4c": (463, 100),
    "mixed_4d": (580, 119),
    "mixed_4e": (840, 170),
    "mixed_5a": (1072, 54),
    "mixed_5b": (1388, 71),
    "head": (1000, 1),
}
# Rows that do not follow from their own filter counts: what does. (The stem's K is 1,000.)
WRONG_PARAMS = {
    "stem": 2.648,
    "mixed_4c": 497.5,
    "mixed_4d": 590.5,
    "mixed_5a": 1018.0,
    "mixed_5b": 1409.0,
}
WRONG_OPS = {"mixed_5a": 51.1}


def inception_rows():
    """{row: (weights, multiply-adds)} of the published network, biases not counted."""
    model, image = Inception(1000), np.zeros((1, 224, 224, 3), np.float32)
    apply = functools.partial(model.apply, train=False, capture_intermediates=True)
    variables = boxed(model, image, train=False)
    _, state = jax.eval_shape(apply, variables, image)
    weights, positions = {}, {}
    for path, leaf in paths(variables["params"]).items():
        if path.split("/")[-1] == "value" and path.split("/")[-2] == "kernel":
            row = path.split("/")[0].replace("reduce", "conv")
            weights[row] = weights.get(row, 0) + leaf.size
    for row in weights:
        (output,) = state["intermediates"][row]["__call__"]
        positions[row] = int(np.prod(output.shape[1:-1]))  # of every convolution of the row
    return {row: (weights[row], weights[row] * positions[row]) for row in weights}


@pytest.fixture(scope="module")
def rows():
    return inception_rows()


def test_inception_has_the_rows_of_its_table(rows):
    assert rows.keys() == TABLE.keys()


@pytest.mark.parametrize("row", TABLE)
def test_inception_row_by_row(rows, row):
    printed_params, printed_ops = TABLE[row]
    params, ops = rows[row][0] / 1024, rows[row][1] / 1e6
    params_off, ops_off = abs(params / printed_params - 1), abs(ops / printed_ops - 1)
    assert (params_off > 0.01) == (row in WRONG_PARAMS)
    # Rows of few millions are printed without a decimal.
    assert (ops_off > 0.015 and abs(ops - printed_ops) > 0.5) == (row in WRONG_OPS)
    if row in WRONG_PARAMS:
        assert params == pytest.approx(WRONG_PARAMS[row], rel=1e-3)
    if row in WRONG_OPS:
        assert ops == pytest.approx(WRONG_OPS[row], rel=1e-3)


def test_inception_totals(rows):
    printed_params, printed_ops = zip(*TABLE.values(), strict=True)
    assert sum(printed_params) == pytest.approx(6797.7)
    assert sum(printed_ops) == 1502
    params, ops = zip(*rows.values(), strict=True)
    assert round(sum(params) / 1e6, 2) == 6.98
    # What is missing from 1,502 is 5a's.
    assert round(sum(ops) / 1e6, 1) == 1498.7


@pytest.mark.parametrize(("multiplier", "weights"), [(8, 2_712), (0, 9_408)])
def test_the_first_layer_of_inception_is_separable(multiplier, weights):
    stem = parameters(Inception(10, stem_multiplier=multiplier), 32)["stem"]
    kernels = [leaf for path, leaf in paths(nn.unbox(stem)).items() if path.endswith("kernel")]
    assert count(kernels) == weights


# You et al. 2017, table 2, with its labels of weights and biases put right.
NORMS = {
    "layer_0/conv": (1.867, 0.098),
    "layer_1/conv": (5.543, 0.160),
    "layer_2/conv": (9.406, 0.196),
    "layer_3/conv": (8.146, 0.196),
    "layer_4/conv": (6.651, 0.160),
    "dense_0": (30.72, 6.4),
    "dense_1": (20.48, 6.4),
    "head": (20.24, 0.316),
}


def test_alexnet_starts_from_the_norms_of_the_lecture():
    @jax.jit
    def norms(key):
        variables = AlexNet(1000).init(key, jnp.zeros((1, 227, 227, 3)), train=False)
        return jax.tree.map(lambda p: jnp.linalg.norm(p.ravel()), nn.unbox(variables["params"]))

    found = paths(norms(jax.random.key(0)))
    assert len(found) == 2 * len(NORMS)
    for layer, (weights, biases) in NORMS.items():
        assert found[f"{layer}/kernel"] == pytest.approx(weights, rel=5e-3)
        assert found[f"{layer}/bias"] == pytest.approx(biases, rel=5e-3)


# --- the contract of every model ------------------------------------------------------------------


@models
@pytest.mark.parametrize("train", [False, True])
def test_logits_and_parameters_are_float32_whatever_the_compute(name, train):
    model, x = tiny(name, 3, dtype=jnp.bfloat16)
    variables = boxed(model, x, train=False)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    rngs = {"dropout": jax.random.key(0)}
    apply = functools.partial(model.apply, train=train, rngs=rngs, mutable=["batch_stats"])
    logits, _ = jax.eval_shape(apply, variables, x)
    assert (logits.shape, logits.dtype) == ((3, 5), jnp.float32)


@models
def test_every_parameter_has_logical_axes_that_the_rules_know(name):
    model, x = tiny(name)
    split = {logical for table in rules.TABLES.values() for logical, _ in table}
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)  # noqa: E731
    for leaf in jax.tree.leaves(boxed(model, x, train=False)["params"], is_leaf=is_box):
        assert is_box(leaf)
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= split | {"conv_in", "classes", None}


@models
def test_without_classes_features_come_out(name):
    make, side = MODELS[name]
    model, x = make(num_classes=0), images(3, (side, side, 3))
    variables = boxed(model, x, train=False)
    features = jax.eval_shape(functools.partial(model.apply, train=False), variables, x)
    whole, _ = tiny(name)
    head = boxed(whole, x, train=False)["params"].pop("head")
    assert "head" not in variables["params"]
    assert features.dtype == jnp.float32
    assert features.shape == (3, nn.unbox(head)["kernel"].shape[0])


# Of Inception without batch norm a thin copy has channels that never fire.
@pytest.mark.parametrize("name", [name for name in MODELS if name != "inception plain"])
def test_training_reaches_every_parameter_and_moves_every_statistic(name):
    model, x = tiny(name)
    variables = values(model, x, train=False)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        rngs = {"dropout": jax.random.key(0)}
        given = {"params": params, **rest}
        logits, state = model.apply(given, x, train=True, rngs=rngs, mutable=list(rest))
        return (logits**2).sum(), state

    slope, state = jit(jax.grad(loss, has_aux=True))(params)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(slope))
    for path, leaf in paths(slope).items():
        assert np.isfinite(leaf).all(), path
        # Batch norm takes away the mean, and with it the last bias before it.
        blind = path.endswith(BLIND.get(name, "project_norm/bias"))
        assert blind == (np.abs(leaf).max() < 1e-6 * largest), path
    assert bool(rest) == (name not in ("resnet group", "alexnet", "msra"))
    for old, new in zip(jax.tree.leaves(rest), jax.tree.leaves(state), strict=True):
        assert np.isfinite(new).all()
        assert not np.allclose(old, new)


@pytest.mark.parametrize(
    "name",
    ["resnet", "resnet preact", "alexnet", "msra", "inception plain", "efficientnet", "regnet"],
)
def test_evaluation_sees_every_example_alone_and_draws_nothing(name):
    model, x = tiny(name)
    variables = values(model, x, train=False)
    evaluate = applied(model, train=False)
    logits = evaluate(variables, x)
    assert not np.allclose(logits[0], logits[1], rtol=1e-3)
    other = np.concatenate([x[:1], 2 * x[1:] + 1])
    close(evaluate(variables, other)[0], logits[0], rtol=1e-5, atol=1e-6)


def equations(jaxpr):
    """The primitives of a program, inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from equations(inner)


def traced(name, *, train=True, **fields):
    model, x = tiny(name, **fields)
    variables = values(model, x, train=False)
    rngs = {"dropout": jax.random.key(0)}

    def loss(params):
        given = variables | {"params": params}
        return model.apply(given, x, train=train, rngs=rngs, mutable=["batch_stats"])[0].sum()

    program = jax.make_jaxpr(loss, axis_env=[("data", 2)])
    return list(equations(program(variables["params"]).jaxpr))


@pytest.mark.parametrize(
    "name",
    ["resnet", "resnet preact", "alexnet bn", "alexnet c1", "inception", "efficientnet", "regnet"],
)
def test_every_batch_norm_averages_over_the_manual_axis(name):
    model, x = tiny(name)
    norms = len(jax.tree.leaves(boxed(model, x, train=False)["batch_stats"])) // 2
    sums = [e for e in traced(name, axis_name="data") if e.startswith("psum")]
    assert len(sums) == norms


# --- residual networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_kept_is_what_was_given(dtype):
    x = jnp.array([0.0, -0.0, 1 / 3, -7.0, jnp.inf, -jnp.inf, jnp.nan, 1e38, 2e-38], dtype)
    found, slope = jit(jax.vmap(jax.value_and_grad(layers.kept)))(x)
    np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(x).view(np.uint8))
    np.testing.assert_array_equal(slope, np.ones(len(x)))


def test_a_block_is_computed_once_however_many_follow_it():
    """XLA's operations grow with the blocks alone, where each reader computed the sum again."""

    def operations(depth):
        model = ResNet(depths=(depth,), width=4, num_classes=5, stem="cifar")
        x = images(4, (8, 8, 3))
        variables = values(model, x, train=False)
        loss = lambda v: model.apply(v, x, train=False).sum()  # noqa: E731
        return jax.jit(jax.grad(loss)).lower(variables).compile().as_text().count(" maximum(")

    two, four, six = map(operations, (2, 4, 6))
    assert six - four == four - two > 0


def block(features=8, stride=1, **fields):
    plain = dict(block="basic", shortcut="projection", norm="batch", zero_gamma=False, dropout=0.0)
    mode = dict(dtype=jnp.float32, train=False, axis_name=None)
    return ResidualBlock(features, stride, **plain | mode | fields)


@pytest.mark.parametrize("norm", resnet.WORDS["norm"])
@pytest.mark.parametrize("kind", resnet.WORDS["block"])
@pytest.mark.parametrize("train", [False, True])
def test_zero_gamma_makes_a_block_the_identity(norm, kind, train):
    x = np.maximum(images(2, (6, 6, 8)), 0)  # what a block sees comes out of a relu
    model = block(norm=norm, block=kind, train=train, zero_gamma=True)
    variables = nn.unbox(model.init(jax.random.key(0), x))
    y, _ = applied(model, mutable=True)(variables, x)
    np.testing.assert_array_equal(y, x)
    scales = [v["scale"].mean() for k, v in variables["params"].items() if k.startswith("norm")]
    assert scales == [1.0] * (len(scales) - 1) + [0.0]
    plain = model.clone(zero_gamma=False)
    y, _ = applied(plain, mutable=True)(nn.unbox(plain.init(jax.random.key(0), x)), x)
    assert not np.allclose(y, x, atol=0.1)


def convolved(x, kernel, stride):
    same, dims = [(len(kernel) // 2,) * 2] * 2, ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, same, dimension_numbers=dims)
    return np.asarray(y)


@pytest.mark.parametrize(("stride", "features"), [(1, 4), (1, 8), (2, 4)])
@pytest.mark.parametrize("shortcut", resnet.WORDS["shortcut"])
def test_a_preact_block_is_its_formula(stride, features, shortcut):
    """He et al. 2016b, figure 4(e): x + W1 relu(norm(W0 relu(norm(x)))), and no relu after it."""
    x = images(2, (6, 6, 4))
    model = block(features, stride, block="preact", shortcut=shortcut)
    variables = values(model, x)
    params, past = variables["params"], variables["batch_stats"]

    def active(x, name):
        z = (x - past[name]["mean"]) / np.sqrt(past[name]["var"] + 1e-5)
        return np.maximum(z * params[name]["scale"] + params[name]["bias"], 0)

    first = active(x, "norm_0")
    inner = active(convolved(first, params["conv_0"]["kernel"], stride), "norm_1")
    seen = x if (stride, features) == (1, 4) else first
    if "shortcut" in params:
        seen = convolved(seen, params["shortcut"]["kernel"], stride)
    elif shortcut == "pad":
        extra = (features - 4) // 2
        seen = np.pad(seen[:, ::stride, ::stride], [(0, 0)] * 3 + [(extra, extra)])
    expected = convolved(inner, params["conv_1"]["kernel"], 1)
    expected = expected if shortcut == "none" else expected + seen
    found = applied(model)(variables, x)
    assert found.min() < 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    projected = shortcut == "projection" and (stride, features) != (1, 4)
    assert params.keys() == {"conv_0", "conv_1", "norm_0", "norm_1", *["shortcut"] * projected}


@pytest.mark.parametrize("kind", resnet.WORDS["block"])
def test_dropout_comes_before_the_last_convolution(kind):
    """Zagoruyko and Komodakis 2016, section 2.4: inside the block, and never on its shortcut."""
    x = np.maximum(images(2, (6, 6, 8)), 0)
    model = block(block=kind, train=True, dropout=0.5)
    variables = values(model, x)
    keys = {"rngs": {"dropout": jax.random.key(0)}, "mutable": True}
    run = lambda model, given: jit(lambda v: model.apply(v, x, **keys)[0])(given)  # noqa: E731
    assert not np.allclose(run(model, variables), run(model.clone(dropout=0.0), variables))
    last = max(name for name in variables["params"] if name.startswith("conv"))
    silent = {**variables["params"], last: jax.tree.map(np.zeros_like, variables["params"][last])}
    silent = {**variables, "params": silent}
    np.testing.assert_array_equal(run(model, silent), run(model.clone(dropout=0.0), silent))


def test_a_wide_net_has_its_widths_and_one_norm_at_the_end():
    """Zagoruyko and Komodakis 2016, table 1: a stem of 16, stages of 16k, 32k and 64k."""
    model = ResNet(num_classes=10, **resnet.wide(16, 4))
    params = nn.unbox(parameters(model, 8))
    assert params["stem"]["kernel"].shape == (3, 3, 3, 16)
    ends = [params[f"stage_{i}_block_1"]["conv_1"]["kernel"].shape for i in range(3)]
    assert ends == [(3, 3, d, d) for d in (64, 128, 256)]
    assert len([name for name in params if name.startswith("stage")]) == 6
    assert "stem_norm" not in params
    assert params["final_norm"]["scale"].shape == (256,)


@pytest.mark.parametrize(
    ("shortcut", "extra"), [("projection", 8 * 4 + 2 * 8), ("pad", 0), ("none", 0)]
)
def test_shortcuts_cost_what_they_say(shortcut, extra):
    """From 4 channels to 8, at half the resolution."""
    x = images(2, (6, 6, 4))
    params = boxed(block(stride=2, shortcut=shortcut), x)["params"]
    convolutions = 9 * 4 * 8 + 9 * 8 * 8
    assert count(params) == convolutions + 2 * 2 * 8 + extra


def test_without_a_shortcut_nothing_passes_a_silent_branch():
    model, x = block(shortcut="none"), images(2, (6, 6, 8))
    variables = values(model, x)
    evaluate = applied(model)
    assert np.abs(evaluate(variables, x)).max() > 0.1
    silent = variables | {"params": jax.tree.map(np.zeros_like, variables["params"])}
    np.testing.assert_array_equal(evaluate(silent, x), 0)


def test_projection_subsamples_at_the_even_places():
    """Where the pad shortcut does and where a 3x3 convolution of stride 2 is centred."""
    model, x = block(stride=2), images(2, (6, 6, 4))
    variables = values(model, x)
    silent = {"conv_0", "conv_1", "norm_0", "norm_1"}
    params = variables["params"]
    quiet = {k: jax.tree.map(np.zeros_like, v) if k in silent else v for k, v in params.items()}
    y = applied(model)({**variables, "params": quiet}, x)
    z = x[:, ::2, ::2] @ params["shortcut"]["kernel"][0, 0]
    stats, norm = variables["batch_stats"]["shortcut_norm"], params["shortcut_norm"]
    z = (z - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
    np.testing.assert_allclose(y, np.maximum(z, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_strided_convolutions_are_centred_where_the_shortcut_looks(kind):
    """The first place of an image of even size sees rows 0 and 1, not 2, as in the originals."""
    model, x = block(stride=2, block=kind), images(1, (8, 8, 4))
    variables = values(model, x)
    if kind == "basic":  # there the second convolution looks around too
        kernel = variables["params"]["conv_1"]["kernel"]
        kernel[[0, 2]] = kernel[:, [0, 2]] = 0
    evaluate = applied(model)
    y = evaluate(variables, x)
    seen = []
    for row in range(4):
        other = x.copy()
        other[:, row] += 1
        seen.append(not np.allclose(evaluate(variables, other)[:, 0], y[:, 0], atol=1e-5))
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("kind", ["group", "layer"])
def test_group_and_layer_norm_are_their_formula(kind):
    class Norm(nn.Module):
        @nn.compact
        def __call__(self, x):
            mode = dict(train=True, axis_name=None, dtype=jnp.float32)
            return layers.feature_norm(kind, x.shape[-1], **mode, name="norm")(x)

    x = 3 * images(2, (5, 4, 12)) + 1
    params = values(Norm(), x)["params"]
    groups = {"group": 2, "layer": 1}[kind]  # the largest power of 2 that leaves two channels each
    grouped = x.reshape(2, 20, groups, -1)
    mean = grouped.mean((1, 3), keepdims=True)
    z = (grouped - mean) / np.sqrt(grouped.var((1, 3), keepdims=True) + 1e-5)
    expected = z.reshape(x.shape) * params["norm"]["scale"] + params["norm"]["bias"]
    found = applied(Norm())({"params": params}, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 32), (256, 32), (48, 8), (16, 8), (6, 1), (1, 1)]
)
def test_group_norm_has_32_groups_where_each_has_two_channels(channels, groups):
    mode = dict(train=True, axis_name=None, dtype=jnp.float32, name="norm")
    assert layers.feature_norm("group", channels, **mode).num_groups == groups


@pytest.mark.parametrize(("std", "expected"), [(0.01, 0.01), (0.0, 1 / np.sqrt(64))])
def test_the_last_layer_starts_as_the_recipe_says(std, expected):
    model = ResNet(depths=(1,), width=64, num_classes=100, stem="cifar", head_std=std)
    variables = jax.jit(functools.partial(model.init, train=False))(jax.random.key(0), images(1))
    assert np.std(nn.unbox(variables)["params"]["head"]["kernel"]) == pytest.approx(
        expected, rel=0.05
    )


@pytest.mark.parametrize("depth", [2, 9, 21, -4])
def test_cifar_depths_are_6n_plus_2(depth):
    with pytest.raises(UserError, match="6n \\+ 2"):
        resnet.cifar(depth)


@pytest.mark.parametrize("depth", [4, 9, 20, -2])
def test_wide_depths_are_6n_plus_4(depth):
    with pytest.raises(UserError, match="6n \\+ 4"):
        resnet.wide(depth, 4)


# --- AlexNet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "extra"), [(227, 0), (224, 3), (64, 3), (67, 0), (70, 1)])
def test_alexnet_pads_to_where_its_strides_end(side, extra):
    before, after = alexnet.tiling_padding(side)
    assert before + after == extra
    assert 0 <= after - before <= 1
    assert (side + extra - 11) % 4 == 0


def test_alexnet_sees_every_pixel_it_pads_for():
    """At 64 pixels, unlike without padding, the last row and column still count."""
    model, x = tiny("alexnet", 1, dropout=0.0)
    x = x[:, :64, :64]
    variables = values(model, x, train=False)
    evaluate = applied(model, train=False)
    other = x.copy()
    other[:, -1] += 10
    assert np.abs(evaluate(variables, other) - evaluate(variables, x)).max() > 1e-4


def test_alexnet_refuses_images_that_its_pools_use_up():
    model = thin_alexnet(num_classes=5)
    with pytest.raises(UserError, match="63 x 80 pixels is too small"):
        boxed(model, images(1, (63, 80, 3)), train=False)


def test_local_response_norm_is_its_formula():
    """Krizhevsky et al. 2012, section 3.3."""
    x = 100 * images(2, (3, 3, 7))
    expected = np.empty_like(x)
    for channel in range(7):
        near = x[..., max(0, channel - 2) : channel + 3]
        total = (near.astype(np.float64) ** 2).sum(-1)
        expected[..., channel] = x[..., channel] / (2 + 1e-4 * total) ** 0.75
    np.testing.assert_allclose(alexnet.local_response_norm(x), expected, rtol=1e-5)


def test_batch_norm_takes_the_place_of_local_response_norm():
    def windows(name):
        return [e for e in traced(name, train=False) if e.startswith("reduce_window_sum")]

    assert windows("alexnet")
    assert not windows("alexnet bn")


# --- plain nets of He et al. 2015 -----------------------------------------------------------------


@pytest.mark.parametrize("size", msra.SIZES)
def test_a_plain_net_has_as_many_layers_as_it_is_called(size):
    model = Msra(1000, **msra.SIZES[size])
    kernels = [leaf for leaf in jax.tree.leaves(parameters(model, 224)) if leaf.ndim > 1]
    assert len(kernels) == int(size)


@pytest.mark.parametrize("side", [1, 4, 6, 7, 19])
def test_a_pyramid_holds_the_largest_of_each_bin(side):
    x, bins = images(2, (side, side, 3)), (6, 3, 1)
    found, expected = np.asarray(msra.pyramid_pool(x, bins)), []
    for n in bins:
        for row, column in itertools.product(range(n), repeat=2):
            held = [
                x[:, i, j]
                for i, j in itertools.product(range(side), repeat=2)
                if all(
                    (at + 1) * n > k * side and at * n < (k + 1) * side
                    for at, k in ((i, row), (j, column))
                )
            ]
            expected.append(np.max(held, axis=0))
    np.testing.assert_array_equal(found, np.concatenate(expected, -1))


def test_each_layer_of_a_plain_net_scales_the_signal_by_the_root_of_its_gain():
    """Biases are 0 and relus keep a factor, so that the logits have one of gain^(layers / 2)."""

    def logits(gain):
        model, x = tiny("msra", gain=gain)
        variables = jit(functools.partial(model.init, train=False))(jax.random.key(0), x)
        return applied(model, train=False)(nn.meta.unbox(variables), x)

    layers = sum(leaf.ndim > 1 for leaf in jax.tree.leaves(parameters(thin_msra(5), 16)))
    close(logits(2.0), 2 ** (layers / 2) * logits(1.0), rtol=1e-5, atol=1e-6)


# --- layers ---------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A convolution with groups between two without."""

    groups: int
    features: int = 8

    @nn.compact
    def __call__(self, x):
        fields = dict(dtype=jnp.float32)
        x = jnp.tanh(layers.conv(8, 3, name="before", **fields)(x))
        x = nn.with_logical_constraint(x, ("batch", None, None, None))
        grouped = dict(groups=self.groups, stride=2, name="grouped")
        x = jnp.tanh(layers.conv(self.features, 3, **grouped, **fields)(x))
        x = nn.with_logical_constraint(x, ("batch", None, None, None))
        return layers.conv(8, 1, name="after", **fields)(x)


@pytest.mark.parametrize(("groups", "features"), [(1, 8), (2, 8), (4, 12), (8, 8), (8, 24)])
def test_groups_of_a_convolution_see_their_own_inputs(groups, features):
    model, x = Grouped(groups, features), images(2)
    variables = values(model, x)
    params = variables["params"]

    def convolve(x, layer, stride=1):
        kernel, bias = layer["kernel"], layer["bias"]
        numbers = ("NHWC", "HWIO", "NHWC")
        window = (stride, stride)
        x = lax.conv_general_dilated(x, kernel, window, "SAME", dimension_numbers=numbers)
        return np.asarray(x) + bias

    h = jnp.tanh(convolve(x, params["before"]))
    parts = [
        jax.tree.map(lambda p, i=i: np.split(p, groups, axis=-1)[i], params["grouped"])
        for i in range(groups)
    ]
    pieces = zip(np.split(h, groups, axis=-1), parts, strict=True)
    h = jnp.tanh(np.concatenate([convolve(x, p, 2) for x, p in pieces], axis=-1))
    expected = convolve(h, params["after"])
    np.testing.assert_allclose(applied(model)(variables, x), expected, rtol=1e-4, atol=1e-5)


@functools.cache
def grouped_gradient(groups, mesh, table):
    model, x = Grouped(groups), images(8)
    shapes, variables = boxed(model, x), values(model, x)
    number = meshes.num_devices(mesh)
    grid = meshes.make_mesh(meshes.parse_mesh(mesh, number), jax.devices()[:number])
    shardings, _ = placement.tree_shardings(shapes, grid, rules.TABLES[table])
    rows = NamedSharding(grid, partition.BATCH_SPEC)
    program = partition.program(
        jax.grad(lambda variables, x: (model.apply(variables, x) ** 2).sum()),
        mesh=grid,
        rules=rules.TABLES[table],
        precision="float32",
        out_shardings=shardings,
    )
    return paths(program(jax.device_put(variables, shardings), jax.device_put(x, rows)))


@pytest.mark.parametrize("groups", [2, 8])
@pytest.mark.parametrize(
    ("mesh", "table"),
    [
        ("data=2,fsdp=2,tensor=2", "fsdp_tp"),
        ("data=2,tensor=4", "tp"),
        ("fsdp=8", "fsdp"),
        ("data=8", "dp"),
    ],
)
def test_grouped_convolutions_have_one_gradient_on_every_layout(groups, mesh, table):
    expected = grouped_gradient(groups, "data=1", "dp")
    for path, leaf in grouped_gradient(groups, mesh, table).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_squeeze_and_excite_is_its_formula():
    model, x = layers.SqueezeExcite(2, "relu", jnp.float32), images(2, (4, 4, 6))
    variables = values(model, x)
    reduce, expand = (variables["params"][n] for n in ("reduce", "expand"))
    h = np.maximum(x.mean((1, 2)) @ reduce["kernel"] + reduce["bias"], 0)
    gate = 1 / (1 + np.exp(-(h @ expand["kernel"] + expand["bias"])))
    found = applied(model)(variables, x)
    np.testing.assert_allclose(found, x * gate[:, None, None], rtol=1e-4, atol=1e-5)


def test_a_whole_example_is_dropped_by_its_row():
    x = images(64, (3, 3, 2))
    rngs = {"dropout": jax.random.key(0)}
    drop = layers.Dropout(0.25, train=True, whole=True)

    @jit
    def apply(x, rows):
        with layers.example_rows(rows):
            return drop.apply({}, x, rngs=rngs)

    y = apply(x, np.arange(64))
    kept = np.any(y != 0, axis=(1, 2, 3))
    assert 0.5 < kept.mean() < 0.95
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    some = np.array([5, 60, 2])
    np.testing.assert_array_equal(apply(x[some], some), y[some])


@pytest.mark.parametrize("name", ["alexnet", "msra", "inception plain"])
def test_masks_of_a_model_belong_to_the_row(name):
    """Two batches that differ in one row alone agree in every other."""
    model, x = tiny(name, dropout=0.5)
    variables = values(model, x, train=False)
    apply = applied(model, train=True, rngs={"dropout": jax.random.key(1)})
    first, second = apply(variables, x), apply(variables, np.concatenate([x[:3], x[:1]]))
    close(first[:3], second[:3], rtol=1e-5, atol=1e-6)
    assert not np.allclose(second[3], second[0], atol=1e-4)  # the same image with another mask


def test_efficientnet_skips_branches_at_random():
    model, x = tiny("efficientnet", dropout=0.0, drop_path=0.9)
    variables = values(model, x, train=False)

    @jit
    def apply(key):
        mode = dict(train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        return model.apply(variables, x, **mode)[0]

    first, again, *others = (apply(jax.random.key(seed)) for seed in (0, 0, 1, 2, 3))
    np.testing.assert_array_equal(first, again)
    assert not all(np.allclose(first, other, atol=1e-3) for other in others)


@pytest.mark.parametrize(
    ("channels", "factor", "expected"),
    [
        (32, 1.0, 32),
        (40, 1.1, 48),
        (24, 0.45, 16),
        (16, 0.25, 8),
        (24, 0.5, 16),
        (320, 1.4, 448),
        (112, 1.2, 136),
    ],
)
def test_scaled_widths_are_multiples_of_8(channels, factor, expected):
    assert efficientnet.scaled_width(channels, factor) == expected


# --- configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "peak", "first", "warmup"),
    [
        ("128", 0.05, 0.05, 0.0),
        ("256", 0.1, 0.1, 0.0),
        ("8k", 3.2, 0.1, 5.0),
        ("64k", 25.6, 0.1, 5.0),
    ],
)
def test_the_rate_of_goyal_grows_with_the_batch(load, batch, peak, first, warmup):
    built = experiment.build(load(f"imagenet_resnet50:{batch}", "mesh=data=1"), devices=1)
    rises = round(warmup / 90 * built.total_steps)
    assert float(built.schedule(rises)) == pytest.approx(peak)
    assert float(built.schedule(0)) == pytest.approx(first, rel=1e-5)
    assert load(f"imagenet_resnet50:{batch}").optim.schedule.warmup_epochs == warmup


def test_the_rate_of_a_wide_net_falls_at_epochs_60_120_and_160(load):
    """Zagoruyko and Komodakis 2016, section 3: from 0.1, by 0.2."""
    built = experiment.build(load("cifar10_wrn", "mesh=data=1"), devices=1)
    rates = [float(built.schedule(round(e * built.total_steps / 200))) for e in (0, 61, 121, 161)]
    assert rates == pytest.approx([0.1, 0.02, 0.004, 0.0008])
    assert float(built.schedule(round(59 * built.total_steps / 200))) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("imagenet_alexnet:16k", "16k,lars"),
        ("imagenet_resnet50:256,8k", "256 and 8k exclude one another"),
        ("cifar10_resnet:56,plain,20", "20 and 56 exclude one another"),
        ("cifar10_wrn:16-4,28-10", "16-4 and 28-10 exclude one another"),
    ],
)
def test_variants_that_do_not_go_together_are_refused(load, config, words):
    with pytest.raises(UserError, match=words):
        load(config)


@pytest.mark.parametrize(
    ("config", "override", "words"),
    [
        ("cifar10_resnet:smoke", "norm=btach", "did you mean 'batch'"),
        ("cifar10_resnet:smoke", "depths=(2, 0)", "at least 1"),
        ("cifar10_wrn:smoke", "block=preacts", "did you mean 'preact'"),
        ("cifar10_wrn:smoke", "widening=0", "at least 1"),
        ("cifar10_wrn:smoke", "dropout=1.0", r"within \[0, 1\)"),
        ("cifar10_resnet:smoke", "head_std=-1.0", "not be negative"),
        ("cifar10_resnet:smoke,plain", "zero_gamma=true", "needs a shortcut"),
        ("imagenet_alexnet:smoke", "widths=(8, 8, 8)", "must hold 5 widths, or the 2 of C1"),
        ("imagenet_msra:smoke", "gain=0.0", "must be positive"),
        ("imagenet_msra:smoke", "pyramid=(6, 0)", "at least 1"),
        ("imagenet_msra:smoke", "stem_pool=0", "at least 1"),
        ("imagenet_msra:smoke", "widths=(8,)", "as long as"),
        ("imagenet_efficientnet:smoke", "width_factor=0.0", "must be positive"),
        ("imagenet_efficientnet:smoke", "drop_path=1.0", r"within \[0, 1\)"),
        ("imagenet_regnet:smoke", "depths=(1, 1)", "as long as"),
        ("imagenet_regnet:smoke", "group_width=7", "divisible by 7"),
        ("fashion_mnist_mlp:smoke", "name=alexnet", "model alexnet has no field"),
        ("fashion_mnist_mlp:smoke", "name=regnet", "model regnet has no field"),
    ],
)
def test_fields_of_a_convnet_out_of_range_are_refused(load, config, override, words):
    with pytest.raises(UserError, match=words):
        experiment.build(load(config, f"model.{override}"))


def test_configs_have_the_published_models(load):
    assert load("fashion_mnist_mlp").model.to_dict() == {
        "name": "mlp",
        "hidden": (100,),
        "activation": "elu",
        "norm": "none",
        "dropout": 0.0,
    }
    for depth, plain in itertools.product((20, 56, 110), (False, True)):
        model = load(f"cifar10_resnet:{depth}" + ",plain" * plain).model
        assert model.depths == ((depth - 2) // 6,) * 3
        assert model.shortcut == ("none" if plain else "pad")
    preact = load("cifar10_resnet:preact18").model
    assert (preact.depths, preact.width, preact.block) == ((2, 2, 2, 2), 64, "preact")
    assert (preact.stem, preact.shortcut) == ("cifar", "projection")
    assert inception.MODULES["5b"] == (384, 192, 384, 48, 128, 128)
