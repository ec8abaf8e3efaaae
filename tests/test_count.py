"""FLOPs counted in a program: the closed forms of products, and what surrounds them."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError
from lsdl.models import efficientnet, regnet, resnet, vit
from lsdl.models.transformer import Block, Style
from lsdl.planner.count import OUTSIDE, by_module, count, recomputed
from lsdl.planner.tree import paths
from lsdl.sharding.mesh import make_mesh


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def trace(function, *args):
    return jax.jit(function).trace(*args).jaxpr.jaxpr


def flops(function, *args):
    return count(trace(function, *args)).total()


def dense(x, w):
    return x @ w


# Products


def test_product_is_two_for_each_multiply_add():
    assert flops(dense, array(5, 3), array(3, 7)) == 2 * 5 * 3 * 7
    assert flops(dense, array(5), array(5)) == 2 * 5
    assert flops(jnp.outer, array(5), array(3)) == 0  # a product of numbers, not of matrices


def test_attention_is_two_products_of_all_pairs():
    B, L, S, H, K = 2, 6, 5, 3, 4
    attend = jax.nn.dot_product_attention
    shapes = array(B, L, H, K), array(B, S, H, K), array(B, S, H, K)
    assert flops(attend, *shapes) == 2 * (2 * B * H * L * S * K)
    causal = lambda q, k, v: attend(q, k, v, is_causal=True)  # noqa: E731
    shapes = (array(B, L, H, K),) * 3
    assert flops(causal, *shapes) == flops(attend, *shapes)
    grouped = array(B, L, H, K), array(B, L, 1, K), array(B, L, 1, K)
    assert flops(attend, *grouped) == flops(attend, *shapes)


def test_all_else_counts_nothing():
    work = lambda x: jnp.sort(jax.nn.softmax(jnp.exp(x) * x + jnp.cumsum(x, 0)).sum(0))  # noqa: E731
    assert flops(work, array(16, 16)) == 0
    assert flops(lambda x: jax.random.normal(jax.random.key(0), x.shape) + x, array(4, 4)) == 0


def convolve(stride, padding, groups, dilation):
    def convolve(image_BHWC, kernel_HWIO):
        return lax.conv_general_dilated(
            image_BHWC,
            kernel_HWIO,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    return convolve


CONVOLUTIONS = {  # (image, channels, size, outputs, stride, padding, groups, dilation), (out, law)
    "plain": ((8, 6, 3, 10, 1, "SAME", 1, 1), 8),
    "strided": ((8, 6, 3, 10, 2, "SAME", 1, 1), 4),
    "pointwise strided": ((8, 6, 1, 10, 2, "SAME", 1, 1), 4),
    "patches": ((8, 6, 4, 10, 4, "VALID", 1, 1), 2),
    "grouped": ((8, 6, 3, 10, 1, "SAME", 2, 1), 8),
    "grouped and strided": ((8, 6, 3, 10, 2, "SAME", 2, 1), 4),
    "depthwise": ((8, 6, 3, 6, 1, "SAME", 6, 1), 8),
    "depthwise with a multiplier": ((8, 6, 5, 12, 2, "SAME", 6, 1), 4),
    "dilated": ((8, 6, 3, 10, 1, "SAME", 1, 2), 8),
    "dilated and strided": ((7, 6, 3, 10, 2, "SAME", 1, 2), 4),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution_and_its_two_gradients_count_the_same(case):
    (size, channels, taps, outputs, stride, padding, groups, dilation), out = CONVOLUTIONS[case]
    B = 2
    function = convolve(stride, padding, groups, dilation)
    shapes = array(B, size, size, channels), array(taps, taps, channels // groups, outputs)
    forward = 2 * B * out**2 * taps**2 * (channels // groups) * outputs
    assert flops(function, *shapes) == forward
    loss = lambda x, w: (function(x, w) ** 2).sum()  # noqa: E731
    assert flops(jax.grad(loss, argnums=1), *shapes) == 2 * forward
    assert flops(jax.grad(loss, argnums=(0, 1)), *shapes) == 3 * forward


def test_transposed_convolution_counts_no_spread_zeros():
    transposed = lambda x, w: lax.conv_transpose(x, w, (2, 2), "SAME")  # noqa: E731
    assert flops(transposed, array(2, 5, 5, 6), array(4, 4, 6, 3)) == 2 * 2 * 5**2 * 4**2 * 6 * 3


# What surrounds them

X, W = array(4, 8), array(8, 8)
ONCE = 2 * 4 * 8 * 8


def scan(body, length):
    return lambda x, w: lax.scan(lambda x, _: (body(x, w), None), x, None, length=length)[0]


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), tangents[0] @ primals[1]))


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))

AROUND = {
    "jit": (jax.jit(dense), 1),
    "remat": (jax.checkpoint(dense), 1),
    "custom_jvp": (with_jvp, 1),
    "custom_vjp": (with_vjp, 1),
    "gradient of custom_vjp": (jax.grad(lambda x, w: (with_vjp(x, w) ** 2).sum(), (0, 1)), 3),
    "vmap": (lambda x, w: jax.vmap(dense, (0, None))(x[:, None], w), 1),
    "scan": (scan(dense, 5), 5),
    "scan in scan": (scan(scan(dense, 5), 3), 15),
    "fori_loop": (lambda x, w: lax.fori_loop(0, 6, lambda _, x: x @ w, x), 6),
    "cond": (lambda x, w: lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), 2),
    "switch": (lambda x, w: lax.switch(0, [lambda: x, lambda: x @ w, lambda: x]), 1),
    "while": (lambda x, w: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x + 1, x) @ w, 1),
}


@pytest.mark.parametrize("case", AROUND)
def test_transformations_and_loops_count_what_they_run(case):
    function, times = AROUND[case]
    assert flops(function, X, W) == times * ONCE


@pytest.mark.parametrize(
    "loop",
    [
        lambda x, w: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x),
        lambda x, w: lax.while_loop(lambda x: (x @ w)[0, 0] < 9, lambda x: x + 1, x),
        lambda x, w: lax.fori_loop(0, x[0, 0].astype(int), lambda _, x: x @ w, x),
    ],
)
def test_product_in_a_loop_of_unknown_length_is_refused(loop):
    with pytest.raises(UserError, match="while, which does not say how often"):
        flops(loop, X, W)


def test_kernel_is_refused():
    from jax.experimental import pallas

    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = x_ref[...] @ w_ref[...]

    with pytest.raises(UserError, match="pallas_call"):
        flops(pallas.pallas_call(kernel, out_shape=X), X, W)


@pytest.mark.parametrize("devices", [None, 64])
def test_manual_shards_count_for_all_devices(devices):
    mesh = make_mesh({"data": 8 if devices is None else devices}, devices)
    rows = array(128, 8)
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(sharded, rows, W) == flops(dense, rows, W) == 2 * 128 * 8 * 8


def test_what_devices_do_alike_counts_once():
    mesh = make_mesh({"data": 4, "tensor": 2}, 8)
    sharded = jax.shard_map(dense, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    rows = array(128, 8)
    assert flops(sharded, rows, W) == flops(dense, rows, W)


# Gradients and rematerialisation


class Stack(nn.Module):
    """Dense layers, one after another or scanned, rematerialised or not."""

    widths: tuple[int, ...]
    remat: bool = False
    scanned: bool = False

    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer) if self.remat else Layer
        if self.scanned:
            split = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            return nn.scan(layer, length=len(self.widths), **split)(8, name="layers")(x)[0]
        for i, width in enumerate(self.widths):
            x, _ = layer(width, name=f"layer_{i}")(x)
        return x


class Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Dense(8, name="first")(x)
        return nn.relu(self.second(x)), None

    def second(self, x):
        return nn.Dense(self.width, name="second")(x)


def gradient(model, x):
    """{module: FLOPs}, and those of the recomputation, of the gradient by the parameters."""
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    loss = lambda params, x: (model.apply({"params": params}, x) ** 2).sum()  # noqa: E731
    counted = count(trace(jax.grad(loss), params, x))
    modules = by_module(counted, set(paths(params)), root=type(model).__name__)
    return {"/".join(path): n for path, n in modules.items() if n}, recomputed(counted)


def test_gradient_of_dense_layers_is_two_more_forwards_without_the_first_input():
    modules, again = gradient(Stack((6, 8)), X)
    assert again == 0
    assert modules == {
        "layer_0/first": 2 * 2 * 4 * 8 * 8,  # forward and kernel: nobody asks for the input's
        "layer_0/second": 3 * 2 * 4 * 8 * 6,
        "layer_1/first": 3 * 2 * 4 * 6 * 8,
        "layer_1/second": 3 * 2 * 4 * 8 * 8,
    }


def test_rematerialisation_is_told_apart():
    plain, _ = gradient(Stack((8, 8, 8)), X)
    modules, again = gradient(Stack((8, 8, 8), remat=True), X)
    assert sum(modules.values()) - again == sum(plain.values())
    assert again == 3 * 2 * ONCE
    assert modules.keys() == plain.keys()
    assert modules["layer_1/first"] == plain["layer_1/first"] + ONCE


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_layers_count_as_many(remat):
    modules, again = gradient(Stack((8, 8, 8), remat, scanned=True), X)
    unrolled, unrolled_again = gradient(Stack((8, 8, 8), remat), X)
    # The scan's body is the same for all layers: the first input's gradient is computed too.
    assert modules == {
        "layers/first": sum(n for name, n in unrolled.items() if "first" in name) + ONCE,
        "layers/second": sum(n for name, n in unrolled.items() if "second" in name),
    }
    assert again == unrolled_again


def test_work_outside_the_model_has_a_row_of_its_own():
    def loss(params, x):
        hidden = Stack((8,)).apply({"params": params}, x)
        with jax.named_scope("layer_0"):  # a name that a module has, too
            return (hidden @ hidden.T).sum()

    params = jax.eval_shape(Stack((8,)).init, jax.random.key(0), X)["params"]
    modules = by_module(count(trace(loss, params, X)), set(paths(params)), root="Stack")
    assert modules[OUTSIDE] == 2 * 4 * 4 * 8
    assert modules.total() == modules[OUTSIDE] + 2 * ONCE


def test_modules_keep_the_order_of_the_program():
    params = jax.eval_shape(Stack((8, 8)).init, jax.random.key(0), X)["params"]
    apply = lambda params, x: Stack((8, 8)).apply({"params": params}, x)  # noqa: E731
    modules = by_module(count(trace(apply, params, X)), set(paths(params)), root="Stack")
    names = ["/".join(path) for path in modules]
    inside = [f"layer_{i}/{name}" for i in range(2) for name in ("first", "second")]
    assert [name for name in names if "/" in name] == inside
    assert names.index("layer_0") < names.index("layer_0/first") < names.index("layer_1")


def test_transformer_block_is_two_a_parameter_and_token_and_attention():
    B, L, D, F = 2, 10, 16, 40
    block = Block(4, F, 0.0, jnp.float32, Style("gelu", 1e-6), train=False)
    params = jax.eval_shape(block.init, jax.random.key(0), array(B, L, D))["params"]
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim == 2)
    assert kernels == 4 * D * D + 2 * D * F
    forward = lambda params, x: block.apply({"params": nn.unbox(params)}, x)[0]  # noqa: E731
    assert flops(forward, nn.unbox(params), array(B, L, D)) == B * (2 * kernels * L + 4 * L * L * D)


# Multiply-adds of one image of 224 x 224, in 1e9, as torchvision prints them (`_ops` of its
# published weights, made with PyTorch's own counter).
PUBLISHED = {
    "resnet 18": (lambda: resnet.ResNet(num_classes=1000, **resnet.SIZES["18"]), 1.814),
    "resnet 50": (lambda: resnet.ResNet(num_classes=1000, **resnet.SIZES["50"]), 4.089),
    "vit b16": (lambda: vit.Vit(num_classes=1000, **vit.SIZES["b16"]), 17.564),
    "vit l16": (lambda: vit.Vit(num_classes=1000, scan_layers=True, **vit.SIZES["l16"]), 61.555),
    "efficientnet b0": (lambda: efficientnet.EfficientNet(1000), 0.386),
    "regnet y_400mf": (lambda: regnet.RegNet(num_classes=1000, **regnet.SIZES["y_400mf"]), 0.402),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    make, published = PUBLISHED[name]
    model, image = make(), array(1, 224, 224, 3)
    init = lambda image: model.init(jax.random.key(0), image, train=False)  # noqa: E731
    variables = nn.unbox(jax.eval_shape(init, image))
    forward = flops(lambda v, x: model.apply(v, x, train=False), variables, image)
    assert round(forward / 2e9, 3) == published
