"""Points where gradient descent stops, and what takes it away: noise, and a rate above a limit.

The saddle is that of x^2 - y^2 + y^4 / 4 at 0. The basins are those of the smaller of two
quadratics in one dimension, a sharp one (curvature 50) and a wide one (curvature 1).
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Gradient descent stays at a saddle that a little noise leaves; noise, or a learning rate "
    "above the local limit, leaves a sharp minimum and not a wide one."
)
SOURCE = (
    "Lectures: saddle points, stochasticity escapes local minima, local divergence can help; "
    "Jin et al. 2017, How to escape saddle points efficiently (arXiv:1703.00887)"
)
_SADDLE = "lectures on optimisation and on stochastic gradients: noise escapes saddles"
_NOISE = "lecture on phenomena: stochasticity escapes local minima"
_RATE = "lecture on phenomena: local divergence can help; the limit is 2 / curvature = 0.04"
EXPECTED = {
    "without_noise": Expected(
        "share of 7 runs a seed that leave the saddle within 2,000 steps of 0.05 from (1, 0), "
        "without noise",
        _SADDLE,
        low=0,
        high=0,
    ),
    "with_noise": Expected(
        "share that leaves it, with gradient noise of deviation 1e-8",
        _SADDLE,
        low=1,
        high=1,
    ),
    "logarithm": Expected(
        "slope of the median step of the escape against ln(1 / deviation), times ln(1 + 2 rate): "
        "the distance grows by 1 + 2 rate a step",
        "Jin et al. 2017: the steps grow as a logarithm",
        low=0.9,
        high=1.1,
    ),
    "strong_noise": Expected(
        "share of 200 runs a seed from the sharp basin that end in the wide one after 2,000 steps "
        "of 0.02, gradient noise of deviation 8",
        _NOISE,
        low=0.8,
    ),
    "weak_noise": Expected(
        "share that ends in the wide basin, gradient noise of deviation 2", _NOISE, low=0, high=0
    ),
    "below_the_limit": Expected(
        "share that ends in the wide basin at the rate 0.039, without noise", _RATE, low=0, high=0
    ),
    "above_the_limit": Expected(
        "share that ends in the wide basin at the rate 0.041, without noise", _RATE, low=1, high=1
    ),
}
