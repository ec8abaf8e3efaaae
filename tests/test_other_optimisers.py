"""EM, evolution, and the study of optimisers that are not gradient descent."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from lsdl.analysis import evolution, mixture
from lsdl.data import sources
from lsdl.studies import other_optimisers
from tests.judging import judged


def test_the_irises_are_cut_into_disjoint_stratified_splits():
    sizes = sources.card("iris").splits
    assert sizes == {"train": 104, "valid": 23, "test": 23}
    table = sources.table("iris").splits
    assert sum(len(part["label"]) for part in table.values()) == 150
    for part in table.values():
        assert np.ptp(np.bincount(part["label"], minlength=3)) <= 1
        assert part["features"].shape[1:] == (4,)


def test_the_expectation_is_that_of_the_gaussians():
    x_NF = np.random.default_rng(0).standard_normal((60, 3)) @ np.diag([1, 2, 3]) + 1
    start = mixture.start(x_NF, 2, np.random.default_rng(1))
    share_NK, likelihood = mixture.expectation(start, x_NF)
    density_NK = np.stack(
        [w * stats.multivariate_normal(m, c).pdf(x_NF) for w, m, c in zip(*start, strict=True)],
        1,
    )
    assert likelihood == pytest.approx(np.log(density_NK.sum(1)).mean(), rel=1e-12)
    np.testing.assert_allclose(share_NK, density_NK / density_NK.sum(1, keepdims=True), rtol=1e-9)


def test_em_climbs_and_one_gaussian_is_the_moments():
    draw = np.random.default_rng(2)
    x_NF = np.concatenate([draw.standard_normal((50, 2)), draw.normal([4, 0], 1, (50, 2))])
    found = mixture.fit(x_NF, mixture.start(x_NF, 2, draw), iterations=30)
    assert np.diff(found.likelihood_T).min() > -1e-12
    assert sorted(found.mixture.mean_KF[:, 0].round()) == [0, 4]
    one = mixture.fit(x_NF, mixture.start(x_NF, 1, draw), iterations=1).mixture
    np.testing.assert_allclose(one.mean_KF[0], x_NF.mean(0))
    np.testing.assert_allclose(one.covariance_KFF[0], np.cov(x_NF.T, bias=True))


def test_a_component_that_collapses_is_told():
    x_NF = np.random.default_rng(0).standard_normal((20, 2))
    start = mixture.start(x_NF, 2, np.random.default_rng(0))
    on_one = np.stack([np.eye(2) * 1e-4, np.eye(2)])
    assert mixture.fit(x_NF, start._replace(covariance_KFF=on_one), iterations=9) is None


def test_clusters_are_matched_whatever_their_names():
    label = np.array([0, 0, 1, 1, 2, 2])
    assert other_optimisers.matched((label + 1) % 3, label) == 1
    assert other_optimisers.matched(np.array([2, 2, 0, 1, 1, 1]), label) == pytest.approx(5 / 6)


def sphere(x_D, shift):
    return ((x_D - shift) ** 2).sum()


def test_a_strategy_finds_the_minimum_and_its_step_size(key):
    x_D, course_G = evolution.evolution_strategy(
        sphere,
        jnp.zeros(5),
        key,
        jnp.full(120, 3.0),
        parents=5,
        offspring=35,
        deviation=0.01,
        record=lambda x_D: sphere(x_D, 3.0),
    )
    assert sphere(x_D, 3.0) < 1e-6
    assert course_G[-1] == pytest.approx(float(sphere(x_D, 3.0)))


def test_genes_come_from_the_parents_and_the_best_stay(key):
    x_PD = jax.random.normal(key, (12, 6))

    @jax.jit
    def run(mutation):
        options = {"elite": 1, "mutation": mutation, "deviation": 0.3}
        record = lambda x_D: sphere(x_D, 0.0)  # noqa: E731
        return evolution.genetic_algorithm(
            sphere, x_PD, key, jnp.zeros(30), record=record, **options
        )

    for mutation in (0.0, 0.5):
        last_PD, best_G = run(mutation)
        assert (np.diff(best_G) <= 0).all()
        assert best_G[0] == pytest.approx(float((x_PD**2).sum(1).min()))
        old = (np.array(last_PD)[:, None] == np.array(x_PD)[None]).any(1)
        assert old.all() == (mutation == 0)


def optimisers(**changes):
    descent, late = [0.5] * 9 + [0.9], [0.5] * 19 + [0.9]
    rows = {
        "iris": {"likelihood": [[-3, -2], [-3, -1]], "share": [0.5, 0.9]},
        "quadratic": {"strategy": [[1.0, 1e-4]] * 2, "genetic": [[1.0, 0.05]] * 2},
        "net": {"descent": [descent] * 2, "strategy": [late] * 2, "genetic": [[0.5] * 20] * 2},
        "regression": {
            "start": 0.5,
            "newton_steps": 8,
            "descent_steps": 800,
            "coordinates_excess": [0.1, 1e-3],
        },
    }
    rows |= {id: rows[id] | fields for id, fields in changes.items()}
    return [row | {"id": id} for id, row in rows.items()]


def test_claims_of_the_optimisers():
    found = judged(other_optimisers, optimisers())
    assert all(claim.holds for claim in found.values())
    assert found["em_clusters"].measured == 0.9  # of the likelier start
    assert found["es_evaluations"].measured == pytest.approx(20 * 70 / 10)
    assert found["ga_evaluations"].measured == other_optimisers.INFINITE
    assert found["gradient"].measured == 100
    worse = optimisers(iris={"likelihood": [[-3, -3.1], [-3, -1]]}, regression={"newton_steps": 16})
    lost = {id for id, claim in judged(other_optimisers, worse).items() if not claim.holds}
    assert lost == {"em", "newton"}
