"""The studies that draw slices of the loss surface: laws, and claims on made-up tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import plots
from lsdl.analysis import landscape
from lsdl.studies import digits, dropout_lines, skips
from tests.judging import judged


def test_what_bends_down_is_counted_and_rounding_is_not():
    x_P = np.linspace(-1, 1, 41)
    assert landscape.bent_down(x_P**2) == 0
    assert landscape.bent_down(-(x_P**2)) == 1
    assert landscape.bent_down(x_P**3) == pytest.approx(19 / 39)
    assert landscape.bent_down(x_P + 1e-7 * np.cos(40 * x_P)) == 0


def test_panels_with_the_same_limits_share_their_colours():
    def top(values, **options):
        """How many cells have the last colour."""
        axes = dict(title="t", x="x", y="y", columns=[1, 2], rows=[1], numbers=False)
        return plots.heatmap([values], logz=True, **axes, **options).svg().count("#fde725")

    assert top([1, 10]) == top([1, 1000]) > 0  # each from its lowest to its highest
    assert top([1, 10], limits=(1, 1000)) == top([1, 10]) - 1


# --- skips ----------------------------------------------------------------------------------------


def test_the_low_part_ends_between_the_points():
    x_P = np.linspace(-1, 1, 41)
    assert skips.low_part(x_P, 0.5 * x_P**2) == pytest.approx(2)  # all of the slice
    assert skips.low_part(x_P, 4 * np.abs(x_P)) == pytest.approx(0.5)
    assert skips.low_part(x_P, np.where(x_P > 0, 8 * x_P, 0) + 3) == pytest.approx(1 + 1 / 8)
    assert skips.low_part(x_P, np.where(x_P == 0, 0, 1e12)) == pytest.approx(0, abs=1e-9)
    wave_P = np.where(np.abs(x_P) > 0.5, 0.0, 4 * np.abs(x_P))  # what is low again does not count
    assert skips.low_part(x_P, wave_P) == pytest.approx(0.5)


@pytest.mark.parametrize("skip", [False, True])
def test_a_block_is_what_it_is_said_to_be(skip):
    params = skips.initial(6, skip, jax.random.key(0))
    x_BD = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)

    def dense(layer, x, i=()):
        return x @ np.asarray(layer["kernel"])[i] + np.asarray(layer["bias"])[i]

    h = np.maximum(dense(params["in"], x_BD), 0)
    for i in range(2):
        inner = np.maximum(dense(params["blocks"]["first"], h, i), 0)
        h = np.maximum(dense(params["blocks"]["second"], inner, i) + skip * h, 0)
    expected = dense(params["head"], h)
    np.testing.assert_allclose(skips.logits(skip, params, x_BD), expected, rtol=1e-4, atol=1e-5)


def test_depth_counts_layers_and_skips_cost_no_parameter():
    shapes = [
        jax.eval_shape(lambda key, s=skip: skips.initial(54, s, key), jax.random.key(0))
        for skip in (False, True)
    ]
    assert shapes[0] == shapes[1]
    kernels = shapes[0]["blocks"].values()
    assert 2 + sum(layer["kernel"].shape[0] for layer in kernels) == 54


def test_each_filter_of_a_direction_is_as_long_as_the_nets_own():
    params = skips.initial(6, True, jax.random.key(0))
    found = skips.directions(params, jax.random.split(jax.random.key(1)))
    length = lambda tree: np.linalg.norm(tree["blocks"]["first"]["kernel"], axis=-2)  # noqa: E731
    for own in length(found):
        np.testing.assert_allclose(own, length(params), rtol=1e-5)
    assert length(found).shape == (2, 2, 32)
    first, second = np.asarray(found["in"]["kernel"])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.1
    assert not found["blocks"]["first"]["bias"].any()


def skips_table(*, sharp=20.0, rough=1.0):
    x_P = np.linspace(-1, 1, skips.POINTS)
    rows = []
    for depth in skips.DEPTHS:
        for kind in ("skips", "plain"):
            plain = kind == "plain" and depth > 10
            loss_P = sharp * np.abs(x_P) + rough * np.cos(60 * x_P) if plain else 2 * x_P**2
            rows.append(
                {
                    "depth": depth,
                    "kind": kind,
                    "accuracy": [85.0, 86.0] if plain else [96.0, 97.0],
                    "loss": [[loss_P.tolist()] * 3] * 2,
                    "plane": np.ones((3, 3)).tolist(),
                }
            )
    return rows[::-1]


def test_claims_of_the_skips():
    found = judged(skips, skips_table())
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert found["gap_54"].measured == pytest.approx(11)
    assert found["gap_10"].measured == 0
    found = judged(skips, skips_table(sharp=2.0, rough=0.0))
    assert not found["concave_54_plain"].holds
    assert not found["width_54"].holds


# --- line projections -----------------------------------------------------------------------------


def test_a_dropout_of_nothing_is_the_plain_loss():
    train, _ = digits.load()
    few = digits.rows(train, jnp.arange(20))
    params = digits.Classifier(*dropout_lines.HIDDEN).init(digits.keys(1))
    params = jax.tree.map(lambda leaf: leaf[0], params)
    plain, key = dropout_lines.loss(params, few), jax.random.key(0)
    assert dropout_lines.loss(params, few, key, rate=0.0) == pytest.approx(float(plain))
    drawn = [float(dropout_lines.loss(params, few, key, rate=rate)) for rate in (0.2, 0.2, 0.5)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0] != pytest.approx(float(plain))


def lines_table(**changes):
    x_P = np.linspace(-0.3, 0.3, dropout_lines.POINTS)
    bowl_P, noise_P = x_P**2, x_P**2 + 0.1 * np.cos(99 * x_P)

    def row(rate, scale, gap):
        slices = lambda loss_P: [[loss_P.tolist()] * 12] * 2  # noqa: E731
        return {
            "dropout": rate,
            "train_start": slices(x_P + 2),
            "train_end": slices(scale * bowl_P),
            "valid_start": slices(x_P + 2),
            "valid_end": slices(scale * bowl_P + gap),
            "noisy_end": slices(noise_P),
            "slope_start": [[1.0, -1.0] * 6] * 2,
            "slope_end": [[0.01, -0.01] * 6] * 2,
            "cosine_start": [[0.02, -0.05] * 6] * 2,
        }

    none = row(0.0, 2.0, 0.2) | {"extremes": [[-0.5, 5.0]] * 2}
    return [row(0.2, 1.0, 0.1), none | changes]


def test_claims_of_the_lines():
    found = judged(dropout_lines, lines_table())
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert found["slope"].measured == pytest.approx(100)
    assert found["flat_slices"].measured == pytest.approx(0.05)
    assert found["negative_curvature"].measured == pytest.approx(-0.1)
    assert found["width"].measured == pytest.approx(0.5)
    assert found["gap"].measured == pytest.approx(0.5)
    found = judged(dropout_lines, lines_table(train_end=lines_table()[0]["noisy_end"]))
    assert found["convex_slices"].measured == 0
    assert not found["convex_slices"].holds
    assert set(dropout_lines.figure(lines_table())) == {"centres", "dropout"}
