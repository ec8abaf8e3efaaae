"""Loss surfaces: what a direction is, and that a point's loss is the loss there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl import step as steps
from lsdl.analysis import batch_statistics, landscape
from lsdl.analysis.curvature import dot, random_like
from lsdl.experiment import build
from lsdl.loop import evaluate
from lsdl.sharding import mesh as meshes

KEY = jax.random.key(0)


class Net(nn.Module):
    """Two layers of ReLUs, with biases, and BatchNorm between them if `norm`."""

    norm: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(16, name="in", use_bias=not self.norm)(x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train, epsilon=1e-12, name="norm")(x)
        return nn.Dense(4, name="out")(nn.relu(x))


DIMS = {"in/kernel": (1,), "out/kernel": (1,)}
DIMS |= dict.fromkeys(("in/bias", "out/bias", "norm/scale", "norm/bias"))


def sums_of(net):
    def sums(variables, batch):
        logits = net.apply(variables, batch["x"])
        loss_B = -jax.nn.log_softmax(logits)[jnp.arange(len(logits)), batch["y"]]
        return {"loss": (loss_B * batch["weight"]).sum(), "weight": batch["weight"].sum()}

    return sums


def batches(count=3, size=8):
    draw = np.random.default_rng(1)
    found = []
    for i in range(count):
        weight_B = np.ones(size, np.float32)
        weight_B[: 3 * (i == 0)] = 0
        x = np.float32(draw.normal(size=(size, 5)) + 1)
        found.append({"x": x, "y": draw.integers(4, size=size), "weight": weight_B})
    return jax.tree.map(jnp.asarray, found)


def variables_of(net):
    found = net.init(KEY, jnp.zeros((1, 5)))
    draw = np.random.default_rng(2)
    noisy = lambda x: x + jnp.float32(0.2 * draw.normal(size=x.shape))  # noqa: E731
    return {**found, "params": jax.tree.map(noisy, found["params"])}


def slow(net, variables, directions, point, found):
    """The mean loss at one point, the plain way."""
    move = lambda w, *ds: w + sum(float(c) * d for c, d in zip(point, ds, strict=True))  # noqa: E731
    params = jax.tree.map(move, variables["params"], *directions)
    parts = [sums_of(net)({**variables, "params": params}, batch) for batch in found]
    return sum(float(p["loss"]) for p in parts) / sum(float(p["weight"]) for p in parts)


POINTS = landscape.grid(landscape.line(-1, 1, 5), landscape.line(-2, 2, 3))


@pytest.mark.parametrize(("chunk", "at_a_time"), [(64, 1), (4, 3)])
def test_a_point_has_the_loss_of_its_parameters(chunk, at_a_time):
    net = Net()
    variables = variables_of(net)
    directions = [random_like(variables["params"], jax.random.key(i)) for i in (1, 2)]
    ticks = []
    found = landscape.surface(
        sums_of(net),
        variables,
        directions,
        POINTS,
        batches(),
        chunk=chunk,
        at_a_time=at_a_time,
        tick=lambda: ticks.append(1),
    )
    wanted = [slow(net, variables, directions, point, batches()) for point in POINTS]
    np.testing.assert_allclose(found["loss"], wanted, rtol=1e-5)
    assert len(ticks) == 3 * -(-15 // chunk)


def test_a_grid_goes_through_the_centre_row_by_row():
    assert (landscape.line(-1, 1, 51)[25] == 0).all()
    assert POINTS.shape == (15, 2)
    assert POINTS[:5, 1].tolist() == [-2] * 5
    assert POINTS[:5, 0].tolist() == [-1, -0.5, 0, 0.5, 1]
    assert POINTS[7].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["digits_vit:smoke", "digits_bn_mlp:smoke"])
def test_the_centre_is_evaluations_loss_to_the_last_bit(load, name):
    small = [f"model.{field}" for field in ("width=16", "num_layers=1", "num_heads=4")]
    small = small if "vit" in name else []
    experiment = build(load(name, *small), devices=jax.devices()[:1])
    state = experiment.init()
    variables = steps.variables_of(state)
    eval_step = steps.make_eval_step(experiment.module.apply, experiment.task)

    def sums(variables, batch):
        rest = {name: x for name, x in variables.items() if name != "params"}
        return eval_step(state.replace(params=variables["params"], model_state=rest), batch)

    loader = experiment.eval_loader("valid")
    found = landscape.surface(
        sums,
        variables,
        [random_like(variables["params"], KEY)],
        landscape.line(-1, 1, 3),
        list(loader.batches(0, loader.num_batches)),
    )
    assert found["loss"][1] == evaluate(experiment, state, "valid")["loss"]
    assert found["loss"][0] != found["loss"][1] != found["loss"][2]


def lengths(tree, name, axis):
    layer, leaf = name.split("/")
    return np.linalg.norm(np.asarray(tree[layer][leaf]), axis=axis)


def test_each_filter_of_a_normalised_direction_is_as_long_as_its_own():
    params = variables_of(Net())["params"]
    drawn = random_like(params, KEY)
    found = landscape.filter_normalised(drawn, params, DIMS)
    for name in ("in/kernel", "out/kernel"):
        np.testing.assert_allclose(lengths(found, name, 0), lengths(params, name, 0), rtol=1e-5)
    assert not found["in"]["bias"].any()
    assert not found["out"]["bias"].any()
    scaled = landscape.filter_normalised(drawn, params, DIMS, vectors="scale")
    for name in ("in/bias", "out/bias"):
        assert lengths(scaled, name, None) == pytest.approx(lengths(params, name, None), rel=1e-5)
    whole = landscape.tensor_normalised(drawn, params)
    for name in DIMS.keys() - {"norm/scale", "norm/bias"}:
        assert lengths(whole, name, None) == pytest.approx(lengths(params, name, None), rel=1e-5)
        wanted = drawn[name.split("/")[0]][name.split("/")[1]]
        cosine = landscape.cosine({"": whole[name.split("/")[0]][name.split("/")[1]]}, {"": wanted})
        assert cosine == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("names", "dims"),
    [
        (("embed", "mlp"), (1,)),
        ((None, None, "conv_in", "conv_out"), (3,)),
        (("vocab", "embed"), (0,)),
        (("length", "embed"), (0,)),
        (("layers", "embed", "heads"), (0, 2)),
        (("experts", "embed", "mlp"), (0, 2)),
        (("layers", "experts", "mlp", "embed"), (0, 1, 3)),
        (("embed",), None),
        (("layers", "embed"), None),
        ((), None),
    ],
)
def test_filters_are_told_from_the_roles_of_dims(names, dims):
    assert landscape.filter_dims(names) == dims


def filter_surface(net, variables):
    directions = [
        landscape.filter_normalised(
            random_like(variables["params"], key), variables["params"], DIMS
        )
        for key in jax.random.split(KEY)
    ]
    return landscape.surface(sums_of(net), variables, directions, POINTS, batches())["loss"]


def test_a_net_with_scaled_layers_has_the_same_filter_normalised_surface():
    variables = variables_of(Net())
    params = variables["params"]
    scaled = {
        "in": jax.tree.map(lambda w: 8 * w, params["in"]),
        "out": params["out"] | {"kernel": params["out"]["kernel"] / 8},
    }
    before = filter_surface(Net(), variables)
    np.testing.assert_allclose(filter_surface(Net(), {"params": scaled}), before, rtol=1e-4)
    assert np.ptp(before) > 0.5
    drawn = [random_like(params, key) for key in jax.random.split(KEY)]
    plain = [
        landscape.surface(sums_of(Net()), {"params": p}, drawn, POINTS, batches())["loss"]
        for p in (params, scaled)
    ]
    assert abs(plain[0] - plain[1]).max() > 0.5  # what the normalisation is for


def recalibrated(net):
    inputs = (jnp.concatenate([batch["x"] for batch in batches()]),)
    return lambda variables: batch_statistics.recalibrated(net.apply, variables, inputs)


def test_filters_of_any_scale_before_batch_norm_have_the_same_surface():
    net = Net(norm=True)
    variables = recalibrated(net)(variables_of(net))
    scale_H = jnp.float32(np.random.default_rng(3).uniform(0.2, 5, 16))
    kernel = variables["params"]["in"]["kernel"] * scale_H[None]
    averages = variables["batch_stats"]["norm"]
    scaled = {
        "params": variables["params"] | {"in": {"kernel": kernel}},
        "batch_stats": {
            "norm": {"mean": averages["mean"] * scale_H, "var": averages["var"] * scale_H**2}
        },
    }
    before = filter_surface(net, variables)
    np.testing.assert_allclose(filter_surface(net, scaled), before, rtol=2e-4)
    assert np.ptp(before) > 0.5


def test_recalibration_gives_each_point_the_statistics_of_its_own_parameters():
    net = Net(norm=True)
    variables = recalibrated(net)(variables_of(net))
    zeros = jax.tree.map(jnp.zeros_like, variables["params"])
    longer = zeros | {"in": variables["params"]["in"]}  # along which the net does not change
    points = landscape.line(0, 4, 3)
    common = (sums_of(net), variables, [longer], points, batches())
    with_own = landscape.surface(*common, recalibrate=recalibrated(net))["loss"]
    np.testing.assert_allclose(with_own, with_own[0], rtol=1e-4)
    assert with_own[0] == pytest.approx(landscape.surface(*common)["loss"][0], rel=1e-5)
    assert np.ptp(landscape.surface(*common)["loss"]) > 0.1


def test_the_difference_leads_from_one_net_to_the_other():
    net = Net()
    start, end = variables_of(net), net.init(jax.random.key(9), jnp.zeros((1, 5)))
    direction = landscape.difference(start["params"], end["params"])
    x_P1 = landscape.line(-0.5, 1.5, 9)
    loss_P = landscape.surface(sums_of(net), start, [direction], x_P1, batches())["loss"]
    assert loss_P[2] == pytest.approx(slow(net, start, [], (), batches()), rel=1e-5)
    assert loss_P[6] == pytest.approx(slow(net, end, [], (), batches()), rel=1e-5)
    found = landscape.barrier(x_P1[:, 0], loss_P)
    straight = np.linspace(loss_P[2], loss_P[6], 5)
    assert found == pytest.approx((loss_P[2:7] - straight).max(), abs=1e-9)
    assert landscape.barrier(np.linspace(-1, 2, 31), np.linspace(3, 1, 31)) == pytest.approx(0)
    hump = 4 - np.linspace(-1, 3, 41) ** 2
    assert landscape.barrier(np.linspace(0, 1, 41), hump) == pytest.approx(4)


def test_a_trajectory_in_a_plane_is_found_there_in_its_own_shape():
    like = variables_of(Net())["params"]
    a, b, centre = (random_like(like, jax.random.key(i)) for i in range(3))
    coordinates = np.float32([(5, 0), (3, 1), (1, 1.5), (0.5, -0.5), (0, 0)])
    place = lambda x, y: jax.tree.map(lambda c, u, v: c + x * u + y * v, centre, a, b)  # noqa: E731
    trajectory = [place(*point) for point in coordinates]
    found = landscape.principal(trajectory, centre)
    assert found.shares.sum() == pytest.approx(1, abs=1e-5)
    assert found.shares[0] > found.shares[1] > 0
    for params, point in zip(trajectory, found.points_TQ, strict=True):
        move = lambda c, u, v, p=point: c + p[0] * u + p[1] * v  # noqa: E731
        again = jax.tree.map(move, centre, *found.directions)
        apart = landscape.difference(again, params)
        assert float(dot(apart, apart)) < 1e-6
    assert landscape.cosine(*found.directions) == pytest.approx(0, abs=1e-5)
    for direction in found.directions:
        assert float(dot(direction, direction)) == pytest.approx(1, rel=1e-5)


SPECS = {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}


def test_every_layout_gives_the_same_surface():
    net = Net()
    params = variables_of(net)["params"]
    params["in"]["kernel"] = jnp.pad(params["in"]["kernel"], ((0, 1), (0, 0)))
    found = [batch | {"x": jnp.pad(batch["x"], ((0, 0), (0, 1)))} for batch in batches()]

    def surface(params, found):
        drawn = [random_like(params, key) for key in jax.random.split(KEY)]
        drawn = [landscape.filter_normalised(d, params, DIMS) for d in drawn]
        return landscape.surface(sums_of(net), {"params": params}, drawn, POINTS, found)["loss"]

    alone = surface(params, found)
    for layout in ("data=8", "data=2,fsdp=2,tensor=2"):
        mesh = meshes.make_mesh(meshes.parse_mesh(layout, 8), jax.devices())
        place = lambda x, spec, mesh=mesh: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
        split = {n: {k: place(x, SPECS[k]) for k, x in leaf.items()} for n, leaf in params.items()}
        rows = [{k: place(x, P(("data", "fsdp"))) for k, x in b.items()} for b in found]
        np.testing.assert_allclose(surface(split, rows), alone, rtol=1e-5)
