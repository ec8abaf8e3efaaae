"""Minima and what is learnt in them: laws of their volume, and the studies on made-up tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import descent, volume
from lsdl.errors import UserError
from lsdl.models.mlp import Mlp
from lsdl.studies import digits, flat_sharp, minefield, mixup, random_labels, sam
from tests.judging import judged

# --- radii and volumes ----------------------------------------------------------------------------

CURVED = {"a": np.float32([[1.0, 4.0]]), "b": np.float32([9.0])}  # of a bowl, in 3 dims
CUT = 0.125


def bowl(params):
    return sum(jax.tree.leaves(jax.tree.map(lambda c, w: (c * w**2).sum() / 2, CURVED, params)))


CENTRE = jax.tree.map(lambda c: jnp.zeros_like(jnp.asarray(c)), CURVED)


def directions_of(count):
    """Of length 1, drawn with equal density everywhere: a matrix, and the same as a stack."""
    draw = np.random.default_rng(0).normal(size=(count, 3)).astype(np.float32)
    draw /= np.linalg.norm(draw, axis=1, keepdims=True)
    return draw, {"a": jnp.asarray(draw[:, None, :2]), "b": jnp.asarray(draw[:, 2:])}


def test_a_bowl_has_its_exact_radii_and_volume():
    count = 2_000
    draw, directions = directions_of(count)
    losses = volume.stacked_losses(bowl, CENTRE, directions, at_a_time=500)
    found = volume.radii(losses, count, cut=CUT, tolerance=1e-4)
    exact_K = np.sqrt(2 * CUT / (draw**2 @ np.array([1.0, 4.0, 9.0])))
    np.testing.assert_allclose(found.radius_K, exact_K, rtol=2e-4)
    assert not (found.floored_K | found.open_K).any()
    # The ellipsoid of the half axes sqrt(2 cut / c).
    exact = math.log10(4 / 3 * math.pi * math.prod(math.sqrt(2 * CUT / c) for c in (1, 4, 9)))
    volumes = volume.volume(found.radius_K, 3)
    assert volumes.mean == pytest.approx(exact, abs=0.02)
    assert volumes.typical < volumes.mean


def test_directions_drawn_one_by_one_give_the_same_radii():
    _, directions = directions_of(4)
    of_stack = volume.radii(volume.stacked_losses(bowl, CENTRE, directions), 4, cut=CUT)
    direction = lambda i: jax.tree.map(lambda d: d[i], directions)  # noqa: E731
    losses = volume.drawn_losses(jax.jit(bowl), CENTRE, direction)
    np.testing.assert_allclose(
        volume.radii(losses, 4, cut=CUT).radius_K, of_stack.radius_K, rtol=1e-5
    )


def test_the_first_wall_counts_and_not_the_ground_behind_it():
    wave = lambda r_K: np.where(r_K < 2, r_K, 0.0)  # noqa: E731
    assert volume.radii(wave, 2, cut=1.0).radius_K == pytest.approx(1, rel=1e-3)


def test_limits_of_the_search_are_told():
    slopes_K = np.array([1e9, 1.0, 1e-9, np.nan])
    found = volume.radii(
        lambda r_K: np.where(r_K > 0, slopes_K * r_K, 0), 4, cut=1.0, low=1e-2, high=10.0
    )
    assert found.radius_K == pytest.approx([1e-2, 1.0, 10.0, 1e-2], rel=1e-3)
    assert found.floored_K.tolist() == [True, False, False, True]
    assert found.open_K.tolist() == [False, False, True, False]
    with pytest.raises(UserError, match="no basin"):
        volume.radii(lambda r_K: 1 + r_K, 2, cut=0.5)
    with pytest.raises(ValueError, match="make no search"):
        volume.radii(lambda r_K: r_K, 2, cut=0.5, low=0.0)


def test_a_ball_has_the_volume_of_a_ball():
    found = volume.volume(np.full(5, 2.0), 3)
    assert found.typical == pytest.approx(math.log10(4 / 3 * math.pi * 8))
    assert found.mean == pytest.approx(found.typical)
    assert found.error == pytest.approx(0, abs=1e-9)
    orders, error = volume.orders_between(np.full(5, 2.0), np.full(5, 0.02), 6762)
    assert orders == pytest.approx(2 * 6762)
    assert error == pytest.approx(0, abs=1e-9)


# --- the minefield --------------------------------------------------------------------------------


def test_claims_of_the_minefield():
    row = {"parameters": 6762, "good_train": [100.0] * 2, "bad_train": [100.0, 99.0]}
    row |= {"good_valid": [99.0] * 2, "bad_valid": [40.0, 44.0], "tanh_valid": [99.0, 97.0]}
    for cut, ratio in {"0.1": 100, "0.5": 1.1}.items():
        row[f"good_radius_{cut}"] = [[0.1 * ratio, 0.2 * ratio]] * 2
        row[f"bad_radius_{cut}"] = [[0.2, 0.1]] * 2
    found = judged(minefield, [row])
    assert found["orders"].measured == pytest.approx(2 * 6762)
    assert found["orders_0.5"].measured == pytest.approx(6762 * math.log10(1.1))
    holds = {name for name, claim in found.items() if claim.holds}
    assert holds == found.keys() - {"bad_train", "good_valid_tanh", "orders_0.5"}


def test_the_poison_is_learnt_at_its_share_of_the_loss():
    """A logit alone, of points that contradict each other: sigmoid(z) is the share that says 1."""
    here = jnp.zeros((1, 2))
    train, poison = (minefield.Points(here, jnp.array([label])) for label in (1, 0))
    net = Mlp((), 2)
    start = {"head": {"kernel": jnp.zeros((1, 2, 2)), "bias": jnp.zeros((1, 2))}}
    phases = ((400, 1e-2, 0.25),)
    params = minefield._trained(train, poison, start, phases=phases, net=net)
    said = jax.nn.softmax(minefield._logits(jax.tree.map(lambda x: x[0], params), here, net))
    assert said[0, 1] == pytest.approx(0.75, abs=0.01)


# --- flat and sharp -------------------------------------------------------------------------------


def test_claims_of_flat_and_sharp():
    table = []
    for rate in flat_sharp.RATES:
        row = {"recipe": "descent", "rate": rate, "phi": [2.0, 3.0], "valid": [95.0, 94.0]}
        edge = 2 / rate
        table.append(row | {"batch": "full", "curvature": [edge, 1.02 * edge]})
        small = {"batch": "small", "curvature": [0.8 * edge, 0.7 * edge], "phi": [1.0, 1.0]}
        table.append(row | small | {"valid": [95.4, 94.4]})
    keskar = {"recipe": "keskar", "phi": [0.03, 0.03], "valid": [96.0, 97.0]}
    table += [keskar | {"batch": "full"}, keskar | {"batch": "small", "phi": [0.02, 0.01]}]
    found = judged(flat_sharp, table)
    assert found["edge_0.4"].measured == pytest.approx(1.01)
    assert found["flatter_0.2"].measured == pytest.approx((0.8 + 0.7 / 1.02) / 2)
    assert found["valid_0.2"].measured == pytest.approx(0.4)
    assert found["phi"].measured == pytest.approx(2.5)
    assert found["keskar_phi"].measured == pytest.approx(2.25)
    assert [name for name, claim in found.items() if not claim.holds] == ["keskar_phi"]


# --- random labels --------------------------------------------------------------------------------


def test_claims_of_random_labels():
    curve = lambda epochs, valid: {  # noqa: E731
        "train": [[10.0] * epochs + [100.0, 100.0]] * 2,
        "valid": [[9.0] * epochs + [valid, 0.0]] * 2,
    }
    rows = {"true": (8, 97.0), "20%": (20, 90.0), "50%": (20, 70.0), "100%": (24, 12.0)}
    rows["gaussian"] = (12, 9.0)
    table = [{"kind": kind} | curve(*row) for kind, row in rows.items()]
    found = judged(random_labels, table)
    assert all(claim.holds for claim in found.values())
    assert found["slower"].measured == pytest.approx(3)
    assert found["falling"].measured == pytest.approx(7)
    assert found["gaussian_faster"].measured == pytest.approx(0.5)
    table[3]["train"] = [[98.0] * 20 + [99.0]] * 2
    table[3]["valid"] = [[12.0] * 21] * 2
    assert not judged(random_labels, table)["random_train"].holds


def test_a_share_of_the_labels_is_drawn_from_all_ten():
    label_N = np.array(digits.load()[0].label_N)
    np.testing.assert_array_equal(random_labels.noisy(label_N, 0.0, 0), label_N)
    wrong = (random_labels.noisy(label_N, 0.4, 0) != label_N).mean()
    assert wrong == pytest.approx(0.36, abs=0.04)
    assert (random_labels.noisy(label_N, 0.4, 1) != random_labels.noisy(label_N, 0.4, 0)).any()


# --- SAM and MixUp --------------------------------------------------------------------------------


def arm(valid, train=100.0, wrong=100.0, **more):
    at = lambda value: [[0.0, value], [0.0, value + 1]]  # noqa: E731
    return {"valid": at(valid), "train": at(train), "wrong": at(wrong)} | more


def test_claims_of_sam():
    clean = {0.0: (96.0, 8.0), 0.1: (97.0, 4.0), 0.5: (98.0, 2.0)}
    table = [
        arm(valid, labels="clean", rho=rho, curvature=[c, c]) for rho, (valid, c) in clean.items()
    ]
    for rho, valid in {0.0: 76.0, 0.1: 77.0, 0.5: 74.0}.items():
        table.append(arm(valid, train=100 - 2 * rho, labels="noise", rho=rho))
    found = judged(sam, table)
    assert found["valid"].measured == pytest.approx(2)
    assert found["curvature"].measured == pytest.approx(0.25)
    assert found["interpolation"].measured == pytest.approx(99.5)
    assert [name for name, claim in found.items() if not claim.holds] == ["noise_0.1"]


def test_claims_of_mixup():
    table = [{"arm": "equation", "sum": 0.0, "share": {"1": [0.0, 0.5], "8": [0.4, 1.0]}}]
    clean = {"plain": 96.0, "mixup1": 97.0, "mixup8": 97.5, "shift": 98.0, "unshifted": 97.0}
    noise = {"plain": (76.0, 100.0), "mixup1": (75.0, 90.0), "mixup8": (78.0, 80.0)}
    table += [arm(valid, labels="clean", arm=name) for name, valid in clean.items()]
    table += [
        arm(valid, wrong=wrong, labels="noise", arm=name) for name, (valid, wrong) in noise.items()
    ]
    found = judged(mixup, table)
    assert found["valid_shift"].measured == pytest.approx(1)
    assert found["memorised"].measured == pytest.approx(10)
    assert [name for name, claim in found.items() if not claim.holds] == ["noise_8"]
    table[0]["share"]["8"][1] = 1.25
    assert judged(mixup, table)["share"].measured == pytest.approx(0.25)


def test_shifted_digits_are_the_digits_moved_by_a_pixel_each_way():
    raw_ND, _ = descent.examples("digits", "train")
    image_VND, _ = mixup.shifted()
    np.testing.assert_allclose(image_VND.mean((0, 1)), 0, atol=1e-3)
    assert 0.9 < image_VND.std((0, 1)).min() <= image_VND.std((0, 1)).max() < 1.01
    whole_VND = mixup.moved(raw_ND)
    image_VHW = whole_VND[:, 7].reshape(9, 8, 8)
    padded_HW = np.pad(raw_ND[7].reshape(8, 8), 1)
    moves = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
    wanted = [padded_HW[1 + d : 9 + d, 1 + r : 9 + r] for d, r in moves]
    for image_HW in image_VHW:
        assert sum((image_HW == other).all() for other in wanted) == 1
    assert (whole_VND[0] == raw_ND).all()


def test_a_step_goes_down_the_gradient_uphill_as_the_optimizers_sam_does(monkeypatch):
    """One batch of one step, by hand; Foret et al. 2021, equation 3."""
    (images, label_N), valid = digits.load()
    monkeypatch.setattr(sam, "LOOKS", 1)
    params_S = sam.NET.init(digits.keys(1))
    id_B = np.arange(sam.BATCH)
    given = (images[None], label_N[None], id_B[None, None], 0 * id_B[None, None], digits.keys(1))
    found, _ = sam.train(params_S, *given, valid, rho=0.5, alpha=0.0)
    gradient = jax.jit(jax.grad(sam.NET.loss))
    params, batch = jax.tree.map(lambda x: x[0], params_S), digits.rows(digits.load()[0], id_B)
    down = gradient(params, batch)
    length = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(down)))
    above = jax.tree.map(lambda w, g: w + 0.5 * g / length, params, down)
    wanted = jax.tree.map(lambda w, g: w - sam.RATE * g, params, gradient(above, batch))
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a[0], b, atol=1e-6)
