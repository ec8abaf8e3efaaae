"""Studies of how a fit starts, where it goes and what it is worth: laws, and claims on tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import plots
from lsdl.analysis import blocks, noise
from lsdl.data.folds import folds
from lsdl.errors import UserError
from lsdl.optim.groups import path
from lsdl.studies import (
    bias_variance,
    digits,
    initialisation,
    local_connectivity,
    mpo_icons,
    saddle_escape,
)
from tests.judging import judged, lost

# --- saddles and basins ---------------------------------------------------------------------------


def test_the_well_has_the_slope_of_the_smaller_quadratic():
    def value(x):
        return np.minimum(50 * x**2, (x - 3) ** 2) / 2

    x = np.array([-2.0, -0.3, 0.2, 0.36, 0.4, 2.9])
    slope, wide = saddle_escape.well(x)
    np.testing.assert_allclose(slope, (value(x + 1e-6) - value(x - 1e-6)) / 2e-6, rtol=1e-4)
    assert wide.tolist() == [True, False, False, False, True, True]
    assert not saddle_escape.well(np.linspace(-1, 1, 9) * saddle_escape.START)[1].any()


def escapes():
    deviation = np.array(saddle_escape.DEVIATIONS[1:])
    steps = 50 - np.log(deviation) / math.log(1.1)
    noise = {d: 0.9 if d >= 8 else 0.0 for d in saddle_escape.NOISE["deviations"]}
    limit = {r: 1.0 if r > 0.04 else 0.0 for r in saddle_escape.LIMIT["rates"]}
    return [
        {"id": "saddle", "escape": [[[2_000] * 7, *([step] * 7 for step in steps)]] * 2},
        {"id": "noise", "share": [list(noise.values())] * 2},
        {"id": "limit", "share": [list(limit.values())] * 2},
    ]


def test_claims_of_the_escapes():
    found = judged(saddle_escape, escapes())
    assert not lost(found)
    assert found["logarithm"].measured == pytest.approx(1)
    assert found["strong_noise"].measured == pytest.approx(0.9)
    table = escapes()
    table[0]["escape"][0][0][3] = 1_999  # one run of the first seed leaves without noise
    table[2]["share"] = [[0.0] * 8] * 2
    assert lost(judged(saddle_escape, table)) == {"without_noise", "above_the_limit"}


# --- a plane with an icon -------------------------------------------------------------------------


def test_the_heart_is_symmetric_and_stands_on_its_tip():
    icon = mpo_icons.heart(16)
    assert (icon == icon[:, ::-1]).all()
    rows = icon.sum(1)
    assert np.flatnonzero(rows)[0] < 3
    assert rows[:4].max() < rows[8:14].max()
    assert min(icon.sum(), (~icon).sum()) >= 2 * mpo_icons.CELLS


def test_a_planes_axes_are_at_right_angles():
    draw = np.random.default_rng(0)
    plane = mpo_icons.Plane(
        *({"w": draw.normal(size=(3, 4)), "b": draw.normal(size=4)} for _ in "ORU")
    )

    def away(*at):
        moved = mpo_icons.params_at(plane, jnp.array(at))
        return jax.tree.map(jnp.subtract, moved, plane.origin)

    right, up, both = away(1.0, 0.0), away(0.0, 1.0), away(2.0, -1.0)
    assert abs(noise.cosine(right, up)) < 1e-5
    expected = 4 * noise.square(right) + noise.square(up)
    assert noise.square(both) == pytest.approx(float(expected), rel=1e-5)


def test_claims_of_the_icon():
    icon = mpo_icons.heart(16).ravel()
    row = {
        "size": 16,
        "loss": [np.where(icon, 0.2, 9.0).tolist()] * 2,
        "accuracy": [np.where(icon, 0.95, 0.4).tolist()] * 2,
    }
    found = judged(mpo_icons, [row])
    assert not lost(found)
    assert found["accuracy"].measured == pytest.approx(55)
    assert found["overlap"].measured == 1
    assert mpo_icons.overlap(icon, np.full(256, 0.1)) == pytest.approx(icon.mean())
    assert lost(judged(mpo_icons, [row | {"loss": [[0.2] * 256] * 2}])) == {"outside", "overlap"}


# --- bias, variance and noise ---------------------------------------------------------------------


def test_the_terms_are_the_error():
    draw = np.random.default_rng(0)
    h_DP, mean_P = draw.standard_normal((40, 7)) ** 3, draw.standard_normal(7)
    terms = bias_variance.decomposed(h_DP, mean_P, np.zeros_like(h_DP), 0.0)
    assert terms.error == pytest.approx(terms.bias + terms.variance, rel=1e-12)
    noisy_DP = 0.5 * draw.standard_normal((200_000, 7))
    terms = bias_variance.decomposed(np.zeros_like(noisy_DP), mean_P, noisy_DP, 0.25)
    assert terms.variance == 0
    assert terms.error == pytest.approx(terms.bias + terms.noise, rel=0.01)


def test_the_penalty_shrinks_to_ridge_regression():
    draw = np.random.default_rng(1)
    x_DN, y_DN = draw.uniform(-1, 1, (2, 30)), draw.standard_normal((2, 30))
    for penalty in (0.0, 0.3):
        c_DK = bias_variance.fitted(x_DN, y_DN, 4, penalty)
        for x_N, y_N, c_K in zip(x_DN, y_DN, c_DK, strict=True):
            v_NK = np.polynomial.chebyshev.chebvander(x_N, 4)
            moments_KK = v_NK.T @ v_NK + penalty * np.eye(5)
            np.testing.assert_allclose(c_K, np.linalg.solve(moments_KK, v_NK.T @ y_N), rtol=1e-9)


def test_claims_of_the_terms():
    degrees, penalties = np.array(bias_variance.DEGREES), np.array(bias_variance.PENALTIES)
    row = {
        "degree_bias": 1.0 / degrees,
        "degree_variance": 0.1 * degrees,
        "degree_noise": 0.5 + 0 * degrees,
        "penalty_bias": penalties,
        "penalty_variance": 1 / penalties,
        "penalty_noise": 0.5 + 0 * penalties,
    }
    for group in ("degree", "penalty"):
        terms = (row[f"{group}_{name}"] for name in ("bias", "variance", "noise"))
        row[f"{group}_error"] = 1.01 * sum(terms)
    table = [{name: [value_T.tolist()] * 2 for name, value_T in row.items()}]
    found = judged(bias_variance, table)
    assert not lost(found)
    assert found["identity"].measured == pytest.approx(0.01 / 1.01)
    assert found["bias"].measured == pytest.approx(1 / 9)
    assert found["variance"].measured == pytest.approx(9)
    assert found["ridge_bias"].measured == pytest.approx(1e5)
    table[0]["degree_error"] = [[2.0] * 15] * 2
    assert lost(judged(bias_variance, table)) == {"identity"}


# --- initialisation -------------------------------------------------------------------------------


def test_layers_scale_the_gradient_by_the_root_of_half_the_gain(key):
    draw = np.random.default_rng(0)
    batch = digits.Split(
        jnp.asarray(draw.standard_normal((64, 64)), jnp.float32), jnp.arange(64) % 10
    )

    @jax.jit
    def norm(key, gain):
        gradient = jax.grad(initialisation.loss)(initialisation.drawn(key, gain, depth=9), batch)
        return jnp.linalg.norm(gradient.w_LDD[0])

    he, inverse = norm(key, 2.0), norm(key, 1.0)
    assert 2**3 < he / inverse < 2**5  # 8 layers above the first


def test_units_that_start_alike_have_one_gradient(key):
    net = digits.Classifier(32)
    params = jax.tree.map(lambda x: x[0], net.init(key[None]))
    train, _ = digits.load()
    assert initialisation.apart(params) > 0.5
    same = initialisation.alike(params)
    assert initialisation.apart(same) == 0
    gradient = jax.grad(net.loss)(same, train)
    assert float(initialisation.apart(gradient)) < 1e-5


def test_claims_of_the_initialisation():
    def falling(epochs, count):  # reaches 1 after `epochs`
        return np.maximum(0.3, 2.3 - 1.3 * np.arange(count) / epochs).tolist()

    def norms(depth):
        first = np.array([1.0, 2 ** (depth // 2), 4.0 ** (depth // 2)])
        return np.broadcast_to(first[:, None, None], (3, 2, depth - 1)).tolist()

    table = [
        {"id": "depth-22", "inverse": [falling(50, 61)] * 2, "he": [falling(10, 61)] * 2},
        {"id": "depth-30", "inverse": [[2.3] * 31] * 2, "he": [falling(10, 31)] * 2},
        {
            "id": "symmetry",
            "distance": [[0.0, 1e-15]] * 2,
            "accuracy_he": [0.96] * 2,
            "accuracy_alike": [0.3] * 2,
        },
    ]
    for row, depth in zip(table, (22, 30), strict=False):
        row["norms"] = norms(depth)
    found = judged(initialisation, table)
    assert not lost(found)
    assert found["late_22"].measured == pytest.approx(5)
    assert found["vanishing_30"].measured == found["exploding_30"].measured == 1
    assert initialisation.epochs_to([2.3] * 61) == 60
    table[1]["he"] = [[2.3] * 31] * 2
    assert lost(judged(initialisation, table)) == {"trains_30"}


# --- the size of a net, and of an error -----------------------------------------------------------


def test_blocks_are_a_dense_layer_with_zeros_and_half_the_products():
    draw = np.random.default_rng(0)
    x_BD = jnp.asarray(draw.standard_normal((5, 6)), jnp.float32)
    w_GIO = jnp.asarray(draw.standard_normal((3, 2, 4)), jnp.float32)
    w_DF = blocks.block_diagonal(w_GIO)
    assert w_DF.shape == (6, 12)
    np.testing.assert_array_equal(w_DF[2:4, 4:8], w_GIO[1])
    assert (w_DF != 0).sum() == w_GIO.size
    np.testing.assert_allclose(blocks.block_dense(x_BD, w_GIO), x_BD @ w_DF, rtol=1e-5)
    assert local_connectivity.products(jnp.matmul, x_BD, w_DF) == 5 * 6 * 12
    assert local_connectivity.products(blocks.block_dense, x_BD, w_GIO) == 5 * 6 * 12 / 3


def test_a_narrowed_net_is_narrow_and_stays_so(key):
    net = digits.Classifier(16)
    params = jax.tree.map(lambda x: x[0], net.init(key[None]))
    narrow = local_connectivity.narrowed(params, jnp.array(4))
    gradient = jax.grad(net.loss)(narrow, digits.load()[0])
    for tree in (narrow, gradient):
        leaves = {path(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(tree)}
        assert not leaves["hidden_0/dense/kernel"][:, 4:].any()
        assert not leaves["hidden_0/dense/bias"][4:].any()
        assert not leaves["head/kernel"][4:].any()
        assert leaves["head/kernel"][:4].any()
    whole = local_connectivity.narrowed(params, jnp.array(16))
    jax.tree.map(np.testing.assert_array_equal, whole, params)


@pytest.mark.parametrize(("count", "examples"), [(2, 7), (5, 50), (10, 1257)])
def test_folds_partition_the_examples_and_each_class(count, examples):
    label = np.random.default_rng(0).integers(3, size=examples)
    parts = folds(label, count, seed=1)
    assert len(parts) == count
    held = np.concatenate([held for _, held in parts])
    assert sorted(held) == list(range(examples))
    sizes = np.array([np.bincount(label[held], minlength=3) for _, held in parts])
    assert np.ptp(sizes.sum(1)) <= 1
    assert np.ptp(sizes, axis=0).max() <= 1
    for kept, held in parts:
        assert sorted([*kept, *held]) == list(range(examples))
    other = folds(label, count, seed=2)
    assert any((a[1].tolist() != b[1].tolist()) for a, b in zip(parts, other, strict=True))


def test_no_fold_is_empty():
    with pytest.raises(UserError, match="4 folds of 3 examples"):
        folds(np.zeros(3), 4, seed=0)


def test_claims_of_the_sizes():
    accuracy = np.array([0.3, 0.5, 0.8, 0.93, 0.96, 0.97, 0.97, 0.97])
    fold = np.random.default_rng(0).normal(0.93, 0.02, (2, 5, 10))
    table = [
        {"id": "layers", "apart": [1e-16] * 2, "dense": 32, "blocks": 16},
        {"id": "tasks", "local_dense": [0.02] * 2, "local_blocks": [0.01] * 2}
        | {"long_range_dense": [0.02] * 2, "long_range_blocks": [1.0] * 2},
        {"id": "widths", "accuracy": [accuracy.tolist(), (accuracy + 0.03).tolist()]},
        {"id": "folds", "accuracy": fold.tolist(), "missed": [0, 0], "seen": [9, 9, 9] * 3 + [9]},
    ]
    found = judged(local_connectivity, table)
    assert not lost(found)
    assert found["enough"].measured == 12  # 16 and 8
    assert found["more"].measured == pytest.approx((1 + 4) / 2)
    assert found["cost"].measured == 10
    table[2]["accuracy"] = [[0.5] * 8] * 2
    assert lost(judged(local_connectivity, table)) == {"enough", "more"}


def test_a_summary_is_the_mean_between_the_extremes():
    mean, least, most = plots.summary([[1.0, 5.0], [3.0, 4.0], [2.0, 0.0]])
    assert (mean.tolist(), least.tolist(), most.tolist()) == ([2, 3], [1, 0], [3, 5])
    figure = plots.bars({"He": plots.summary([0.5, 0.7])}, title="t", x="accuracy")
    assert "0.6" in figure.svg()
