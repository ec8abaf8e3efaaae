"""A mixture of Gaussians, fitted by expectation-maximisation.

Source: Dempster, Laird and Rubin 1977; Bishop 2006, section 9.2.

Shape letters: N examples, F features, K components, T iterations.
"""

from typing import NamedTuple

import numpy as np

# A component's smallest variance along any direction, as a share of the data's.
COLLAPSED = 1e-6


class Mixture(NamedTuple):
    """Weights, means and covariances of the components."""

    weight_K: np.ndarray
    mean_KF: np.ndarray
    covariance_KFF: np.ndarray


class Fit(NamedTuple):
    """The last mixture, and the mean log-likelihood before each iteration and after the last."""

    mixture: Mixture
    likelihood_T: np.ndarray  # nats for each example


def start(x_NF: np.ndarray, components: int, draw: np.random.Generator) -> Mixture:
    """Means at examples drawn at random, the data's own covariance, equal weights."""
    ids = draw.choice(len(x_NF), components, replace=False)
    covariance_FF = np.cov(x_NF.T, bias=True)
    weight_K = np.full(components, 1 / components)
    return Mixture(weight_K, x_NF[ids], np.stack([covariance_FF] * components))


def expectation(mixture: Mixture, x_NF: np.ndarray) -> tuple[np.ndarray, float]:
    """`share_NK`, the probability of each component given the example; the mean log-likelihood."""
    off_NKF = x_NF[:, None] - mixture.mean_KF[None]
    lower_KFF = np.linalg.cholesky(mixture.covariance_KFF)
    scaled_KFN = np.linalg.solve(lower_KFF, off_NKF.transpose(1, 2, 0))
    determinant_K = 2 * np.log(np.diagonal(lower_KFF, axis1=1, axis2=2)).sum(1)
    constant = x_NF.shape[1] * np.log(2 * np.pi)
    log_KN = -((scaled_KFN**2).sum(1) + determinant_K[:, None] + constant) / 2
    joint_NK = (log_KN + np.log(mixture.weight_K)[:, None]).T
    total_N1 = np.logaddexp.reduce(joint_NK, axis=1)[:, None]
    return np.exp(joint_NK - total_N1), float(total_N1.mean())


def maximisation(x_NF: np.ndarray, share_NK: np.ndarray) -> Mixture:
    """The mixture that is most likely if each example belongs to the components by its shares."""
    count_K = share_NK.sum(0)
    mean_KF = share_NK.T @ x_NF / count_K[:, None]
    off_NKF = x_NF[:, None] - mean_KF[None]
    outer_KFF = np.einsum("nk,nkf,nkg->kfg", share_NK, off_NKF, off_NKF)
    return Mixture(count_K / len(x_NF), mean_KF, outer_KFF / count_K[:, None, None])


def fit(x_NF: np.ndarray, mixture: Mixture, *, iterations: int) -> Fit | None:
    """`iterations` of expectation and maximisation. The likelihood never falls.

    None if a component collapses onto examples without volume: the likelihood has no bound there.
    """
    likelihoods = []
    smallest = COLLAPSED * np.linalg.eigvalsh(np.cov(x_NF.T, bias=True))[0]
    for _ in range(iterations):
        share_NK, likelihood = expectation(mixture, x_NF)
        likelihoods.append(likelihood)
        mixture = maximisation(x_NF, share_NK)
        if np.linalg.eigvalsh(mixture.covariance_KFF).min() < smallest:
            return None
    return Fit(mixture, np.array([*likelihoods, expectation(mixture, x_NF)[1]]))
