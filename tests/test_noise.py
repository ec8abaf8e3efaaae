"""The noise of gradients, where the covariance is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis.noise import cosine, example_statistics, noise_scale, square, two_batch
from lsdl.errors import UserError

# Shape letters: R repetitions, N examples, D dims, T steps.
MEAN_D = np.array([1.0, -2.0, 0.5, 0.0])
SCALE_D = np.array([3.0, 1.0, 2.0, 0.5])  # Sigma is diagonal
SQUARE, TRACE = (MEAN_D**2).sum(), (SCALE_D**2).sum()


def linear(params, example_D):
    """Its gradient is the example itself, cut into two leaves."""
    return params["a"] @ example_D[:3] + params["b"] * example_D[3]


PARAMS = {"a": jnp.zeros(3), "b": jnp.zeros(())}


def draws(*shape, seed=0):
    return MEAN_D + SCALE_D * np.random.default_rng(seed).normal(size=(*shape, 4))


def statistics(x_ND, *, population=True, chunk=5):
    return example_statistics(
        linear, PARAMS, jnp.array(x_ND, jnp.float32), population=population, chunk=chunk
    )


@pytest.mark.parametrize("chunk", [1, 5, 12, 40])
def test_of_a_population_they_are_its_moments(chunk):
    x_ND = draws(12)
    found = statistics(x_ND, chunk=chunk)
    mean_D = x_ND.mean(0)
    np.testing.assert_allclose(found.gradient["a"], mean_D[:3], rtol=1e-5)
    assert found.square == pytest.approx((mean_D**2).sum(), rel=1e-5)
    assert found.trace == pytest.approx(x_ND.var(0).sum(), rel=1e-5)
    assert found.noise_scale == pytest.approx(x_ND.var(0).sum() / (mean_D**2).sum(), rel=1e-5)
    unit_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
    pairs = unit_ND @ unit_ND.T
    assert found.cosine == pytest.approx(pairs[~np.eye(12, dtype=bool)].mean(), abs=1e-6)


def test_of_a_sample_they_are_unbiased():
    x_RND = jnp.array(draws(4000, 6), jnp.float32)
    found = jax.jit(jax.vmap(lambda x_ND: statistics(x_ND, population=False)))(x_RND)
    for values, truth in ((found.square, SQUARE), (found.trace, TRACE)):
        error = np.std(values) / np.sqrt(len(values))
        assert abs(np.mean(values) - truth) < 4 * error < 0.1 * truth


def test_two_batch_sizes_are_unbiased_and_their_ratio_has_its_error():
    small, big, steps, repetitions = 4, 16, 100, 200
    # The mean of a batch of Gaussian gradients is Gaussian.
    noise = np.random.default_rng(1).normal(size=(2, repetitions, steps, 4)) * SCALE_D
    square_of = [
        ((MEAN_D + n / b**0.5) ** 2).sum(-1) for n, b in zip(noise, (small, big), strict=True)
    ]
    trace_RT, square_RT = two_batch(*square_of, small, big)
    for values, truth in ((trace_RT, TRACE), (square_RT, SQUARE)):
        error = values.std() / np.sqrt(values.size)
        assert abs(values.mean() - truth) < 4 * error < 0.1 * truth
    ratio_R, error_R = np.transpose(
        [noise_scale(*pair, small, big) for pair in zip(*square_of, strict=True)]
    )
    assert ratio_R.mean() == pytest.approx(TRACE / SQUARE, rel=0.03)
    assert error_R.mean() == pytest.approx(ratio_R.std(ddof=1), rel=0.15)


def test_exact_expectations_give_the_exact_noise_scale():
    expected = [np.full(3, SQUARE + TRACE / b) for b in (2, 8)]
    assert noise_scale(*expected, 2, 8) == pytest.approx((TRACE / SQUARE, 0))


def test_angles():
    a, b = {"x": jnp.array([3.0, 0.0]), "y": jnp.array(4.0)}, {"x": jnp.zeros(2), "y": jnp.array(2)}
    assert square(a) == 25
    assert cosine(a, b) == pytest.approx(0.8)
    assert cosine(a, {"x": jnp.zeros(2), "y": jnp.array(0.0)}) == 0


def test_an_example_that_is_learnt_exactly_has_no_direction():
    found = statistics(np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 0]]))
    assert np.isfinite(found.cosine)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: two_batch(1.0, 1.0, 8, 8), "8 and 8: the first must be smaller"),
        (lambda: noise_scale([1.0], [1.0], 1, 2), "1 steps have no standard error"),
        (lambda: statistics(draws(1)), "1 examples in chunks of 5"),
    ],
)
def test_counts_that_do_not_fit_are_refused(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
