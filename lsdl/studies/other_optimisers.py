"""Optimisers that are not gradient descent, each on a problem that suits it.

EM on the irises, evolution strategies and a genetic algorithm on a rotated quadratic and a small
net, Newton's method and coordinate descent on logistic regression.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Expectation-maximisation, evolution, coordinate descent and Newton's method work where they "
    "apply; where there is a gradient, what does without it needs far more evaluations."
)
SOURCE = (
    "Lectures: optimisers without gradients, coordinate descent, Newton's method; Dempster et al. "
    "1977 (EM); Schwefel 1981 (evolution strategies)"
)
_EM = "Dempster et al. 1977, theorem 1"
_EVOLUTION = "first lecture: evolution strategies, genetic algorithms"
_NEWTON = "lecture on optimisation: Newton's method"
_NET = "64-8-10 net on digits; an evaluation is the loss, or its gradient, on 64 images"
EXPECTED = {
    "em": Expected(
        "smallest rise of the mean log-likelihood in an iteration of EM, in nats, 3 Gaussians on "
        "the iris measurements, 100 iterations",
        _EM,
        low=-1e-9,
    ),
    "em_clusters": Expected(
        "share of irises in the component that holds most of their species, best of the seeds' "
        "starts by likelihood",
        "first lecture: EM (Gaussian mixtures)",
        low=0.8,
    ),
    "es_quadratic": Expected(
        "loss after 300 generations of a (10, 70) evolution strategy over at the start, rotated "
        "quadratic in 10 dimensions, condition number 10",
        _EVOLUTION,
        high=1e-3,
    ),
    "ga_quadratic": Expected(
        "loss after 300 generations of a genetic algorithm of 70 over at the start, the same "
        "quadratic",
        _EVOLUTION,
        high=0.1,
    ),
    "es_net": Expected(
        f"best validation accuracy of the evolution strategy in percent, {_NET}",
        _EVOLUTION,
        low=80,
    ),
    "es_evaluations": Expected(
        "evaluations of the evolution strategy to 80% over those of SGD (infinite as 1e9)",
        _EVOLUTION,
        low=10,
    ),
    "ga_evaluations": Expected(
        "evaluations of the genetic algorithm to 80% over those of SGD (infinite as 1e9)",
        _EVOLUTION,
        low=10,
    ),
    "newton": Expected(
        "iterations of Newton's method to a gradient norm below 1e-8, logistic regression on "
        "breast_cancer, decay 1e-2",
        _NEWTON,
        high=15,
    ),
    "coordinates": Expected(
        "loss above the minimum after 100 sweeps of coordinate descent over at zero, the same "
        "regression",
        "lecture on optimisation: coordinate descent",
        high=0.01,
    ),
    "gradient": Expected(
        "steps of gradient descent to a gradient norm below 1e-8, at most 10,000, over Newton's, "
        "the same regression",
        _NEWTON,
        low=10,
    ),
}
