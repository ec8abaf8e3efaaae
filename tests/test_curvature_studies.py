"""The studies of curvature and rates: their closed forms, and claims on small tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsdl.analysis import descent, logistic, quadratic
from lsdl.optim.schedules import growth_root
from lsdl.studies import adam_minimum, explr, sgd_conditions, whitening


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def norms(tx, h_D, steps):
    h_D = jnp.asarray(h_D)
    run = descent.descend(
        tx, lambda x_D, _: h_D * x_D, jnp.ones_like(h_D), jnp.arange(steps), record=jnp.linalg.norm
    )
    return np.asarray(run[1])


@pytest.mark.parametrize("kappa", [4.0, 12.0])
def test_gradient_descent_contracts_by_its_rate(kappa, x64):
    norm_T = norms(optax.sgd(2 / (1 + kappa)), [1.0, kappa], 30)
    ratio_T = norm_T[1:] / norm_T[:-1]
    np.testing.assert_allclose(ratio_T, quadratic.gradient_rate(kappa), rtol=1e-12)


@pytest.mark.parametrize("kappa", [4.0, 12.0])
def test_heavy_ball_contracts_by_the_root_of_its_momentum(kappa, x64):
    rate, momentum = quadratic.heavy_ball(1.0, kappa)
    assert momentum**0.5 == pytest.approx((kappa**0.5 - 1) / (kappa**0.5 + 1))
    # With double roots, |x_t| is t r^t times a number that tends to a constant.
    norm_T = norms(optax.sgd(rate, momentum), [1.0, kappa], 200) / np.arange(1, 201)
    assert (norm_T[180] / norm_T[80]) ** 0.01 == pytest.approx(momentum**0.5, rel=1e-3)


@pytest.mark.parametrize(("kappa", "momentum"), [(12.0, 0.0), (12.0, 0.9), (300.0, 0.9)])
def test_the_rate_of_a_momentum_is_what_a_run_has(kappa, momentum, x64):
    expected = quadratic.momentum_rate(kappa, momentum)
    if momentum == 0:
        assert expected == pytest.approx(quadratic.gradient_rate(kappa), rel=1e-3)
    # Where the roots are complex every rate is as good: take the middle of these.
    rate = 2 / (1 + kappa) if momentum == 0 else 4 / (1 + kappa**0.5) ** 2
    norm_T = norms(optax.sgd(rate, momentum or None), [1.0, kappa], 400)
    slope = np.polyfit(np.arange(300), np.log(norm_T[100:]), 1)[0]
    assert math.exp(slope) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("kappa", "contraction"), [(4, 0.36), (12, 121 / 169)])
def test_a_sweep_contracts_by_the_square_of_a_step(kappa, contraction):
    path = quadratic.coordinate_descent(
        quadratic.rotated(kappa, 45), np.array([1.0, 0.5]), sweeps=9
    )
    norm_S = np.linalg.norm(path[2::2], axis=1)
    np.testing.assert_allclose(norm_S[1:] / norm_S[:-1], contraction, atol=1e-12)
    assert contraction == pytest.approx(quadratic.gradient_rate(kappa) ** 2, abs=1e-12)


def test_one_sweep_solves_a_diagonal_quadratic():
    path = quadratic.coordinate_descent(quadratic.rotated(12, 0), np.array([1.0, 0.5]), sweeps=1)
    assert np.abs(path[-1]).max() == 0


def test_the_rotated_quadratics_are_the_lectures():
    np.testing.assert_allclose(quadratic.rotated(4, 45), [[2.5, 1.5], [1.5, 2.5]])
    np.testing.assert_allclose(quadratic.rotated(12, -45), [[6.5, -5.5], [-5.5, 6.5]])


def test_whitening_leaves_the_condition_number_1(rng):
    x_NF = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)) + [[1e3, 0, -5, 2]]
    forms = whitening.transforms(x_NF)
    kappas = {n: whitening.kappa(descent.with_bias(f(x_NF))) for n, f in forms.items()}
    assert kappas["whitened"] == pytest.approx(1, abs=1e-6)
    assert kappas["raw"] > kappas["centred"] > kappas["whitened"] + 0.1
    standard_NF = forms["standardised"](x_NF)
    np.testing.assert_allclose((standard_NF.mean(0), standard_NF.std(0) - 1), 0, atol=1e-9)


def test_the_course_of_least_squares_is_that_of_gradient_descent(rng, x64):
    x_NF, y_NC = rng.normal(size=(30, 5)), rng.normal(size=(30, 2))
    spectrum_F, excess_F = whitening.modes(x_NF, y_NC)
    moment_FF, cross_FC = x_NF.T @ x_NF / 30, x_NF.T @ y_NC / 30
    loss = lambda w_FC: ((x_NF @ w_FC - y_NC) ** 2).sum() / 30  # noqa: E731
    _, loss_T = descent.descend(
        optax.sgd(0.5 / spectrum_F[0]),
        lambda w_FC, _: 2 * (moment_FF @ w_FC - cross_FC),
        jnp.zeros((5, 2)),
        jnp.arange(40),
        record=loss,
    )
    best = loss(np.linalg.lstsq(x_NF, y_NC)[0])
    course = [whitening.excess(spectrum_F, excess_F, t) for t in range(1, 41)]
    np.testing.assert_allclose(np.asarray(loss_T) - best, course, atol=1e-12)
    for share in (0.5, 0.1, 1e-2):
        steps = whitening.steps_to(spectrum_F, excess_F, share)
        goal = share * whitening.excess(spectrum_F, excess_F, 0)
        assert whitening.excess(spectrum_F, excess_F, steps) <= goal
        assert whitening.excess(spectrum_F, excess_F, steps - 1) > goal


def test_the_largest_eigenvalue_is_found(rng, key, x64):
    a_DD = rng.normal(size=(6, 6))
    hessian_DD = a_DD @ a_DD.T
    params = {"u": jnp.zeros(2), "v": jnp.zeros((2, 2))}

    def loss(params):
        x_D = jnp.concatenate([params["u"], params["v"].ravel()])
        return x_D @ hessian_DD @ x_D / 2

    found = descent.largest_eigenvalue(loss, params, key, steps=300)
    assert float(found) == pytest.approx(np.linalg.eigvalsh(hessian_DD)[-1], rel=1e-6)


def test_a_constant_rate_keeps_its_share_of_the_noise(key):
    rate_TA = np.full((1_000, 1), 0.1, np.float32)
    square_TA = np.asarray(sgd_conditions._squares(key, rate_TA))
    assert square_TA[-500:].mean() == pytest.approx(0.1 / 1.9, rel=0.05)


def test_the_rates_are_the_lectures():
    t = np.arange(1.0, 101)
    rate_TA = np.asarray(sgd_conditions.rates(100))
    for rate_T, form in zip(rate_TA.T, (0.1 + 0 * t, 1 / t, t**-0.5, np.exp(-t)), strict=True):
        np.testing.assert_allclose(rate_T, form, rtol=1e-5, atol=1e-30)


def test_subsets_are_fresh_and_without_repetition():
    id_TB = descent.subsets(0, 20, size=8, steps=2_000)
    assert all(len(set(row)) == 8 for row in id_TB.tolist())
    share = np.bincount(id_TB.ravel(), minlength=20) / 2_000
    np.testing.assert_allclose(share, 8 / 20, atol=0.05)


def test_the_minimum_has_no_gradient(rng, x64):
    x_ND = descent.with_bias(rng.normal(size=(40, 3)))
    y_NC = np.eye(3)[rng.integers(3, size=40)]
    best = logistic.minimum(jnp.asarray(x_ND), jnp.asarray(y_NC), decay=0.1)
    run = lambda w_DC, _: jax.grad(logistic.loss)(w_DC, x_ND, y_NC, decay=0.1)  # noqa: E731
    rate = 1 / logistic.largest_curvature(jnp.asarray(x_ND), decay=0.1)
    (w_DC, _), _ = descent.descend(optax.sgd(rate), run, jnp.zeros((4, 3)), jnp.arange(500))
    assert float(jnp.abs(run(w_DC, 0)).max()) < 1e-9
    assert float(best) == pytest.approx(
        float(logistic.loss(w_DC, x_ND, y_NC, decay=0.1)), abs=1e-12
    )


def test_adams_first_steps_are_the_closed_forms(x64):
    row = adam_minimum._eps()
    gradient = np.array(row["gradients"])
    np.testing.assert_allclose(row["outside"], gradient / (gradient + 1e-8), rtol=1e-9)
    np.testing.assert_allclose(row["inside"], gradient / (gradient**2 + 1e-8) ** 0.5, rtol=1e-9)


def test_the_network_does_not_heed_the_scale_of_a_weight(rng, x64):
    params = {
        "w_DH": rng.normal(size=(3, explr.HIDDEN)),
        "w_HC": rng.normal(size=(explr.HIDDEN, 2)),
    }
    x_BD = rng.normal(size=(5, 3))
    scaled = {"w_DH": 7 * params["w_DH"], "w_HC": params["w_HC"] / 3}
    np.testing.assert_allclose(explr.network(params, x_BD), explr.network(scaled, x_BD))


def test_the_growing_rate_does_what_decay_does(rng, x64):
    """On a loss of the direction alone, 100 steps, and not with another start of the buffer."""
    goal_D, start_D = rng.normal(size=(2, 4))
    gradient = jax.grad(lambda w_D: -(w_D @ goal_D) / jnp.linalg.norm(w_D))
    a = growth_root(0.4, weight_decay=5e-3, momentum=0.9)
    plain = optax.chain(optax.add_decayed_weights(5e-3), optax.sgd(0.4, 0.9))
    growing = optax.sgd(explr.growing(0.4, 5e-3, 0.9), 0.9)

    def path(tx, trace):
        state = explr._state(tx, jnp.asarray(start_D), trace)
        xs = jnp.arange(100)
        record = lambda w_D: w_D  # noqa: E731
        run = dict(state=state, record=record)
        return descent.descend(tx, lambda w, _: gradient(w), jnp.asarray(start_D), xs, **run)[1]

    decayed_TD = path(plain, None)
    grown_TD = path(growing, -(1 - a) / (a * 0.4) * start_D)
    factor_T = a ** -np.arange(1.0, 101)[:, None]
    np.testing.assert_allclose(grown_TD, factor_T * decayed_TD, rtol=1e-9)
    assert np.abs(path(growing, None) / factor_T - decayed_TD).max() > 1e-2


def test_claims_on_a_small_table():
    curves = {"growing rate": 1e-9, "zero buffer": 0.1, "rate inside": 2.0, "no decay": 1.0}
    row = {f"distance {arm}": [0.0, value] for arm, value in curves.items()}
    row |= {"alpha": 0.9, "growth": 2e9, "norm growing rate": [0.9**-400.0], "norm decay": [1.0]}
    row |= {"loss decay": [1.0, 0.5], "loss growing rate": [1.0, 0.5]}
    table = [{**row, "start": start, "seed": 0} for start in ("unit", "he")]
    found = {claim.id: claim for claim in explr.claims(table)}
    assert list(found) == list(explr.EXPECTED)
    assert {id for id, claim in found.items() if not claim.holds} == {"zero_buffer"}
    assert (found["directions"].n, found["directions"].measured) == (2, 1e-9)
