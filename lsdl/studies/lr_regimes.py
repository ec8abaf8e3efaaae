"""Learning rates in units of 1 / lambda_max: too small, good, and too large.

Shape letters: N examples, D pixels, C classes, T steps, R rates.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Below 2 / lambda_max a larger learning rate is faster, above it a quadratic diverges; a "
    "network may first lower its own lambda_max."
)
SOURCE = (
    "Lectures: learning rate too small, good, too large; Lewkowycz et al. 2020, The large learning "
    "rate phase of deep learning: the catapult mechanism (arXiv:2003.02218)"
)
_FIGURE = "lecture on basics: learning rate too small, good, too large"
_CATAPULT = "Lewkowycz et al. 2020: 2 < rate x lambda_max < 4"
EXPECTED = {
    "small": Expected(
        "loss after 200 steps at 0.1 / lambda_max over at 0.5, tanh network on digits, squared "
        "error, full batch",
        _FIGURE,
        low=1 + 1e-6,
    ),
    "good": Expected("loss after 200 steps at 0.5 / lambda_max over at 1.0", _FIGURE, low=1 + 1e-6),
    "quadratic_1.99": Expected(
        "excess loss after 1,000 steps over before, least squares on digits at 1.99 / lambda_max",
        "lecture on optimisation, part 2: the rate's limit is 2 / lambda_max",
        high=0.01,
    ),
    "quadratic_2.01": Expected(
        "excess loss after 1,000 steps over before, least squares on digits at 2.01 / lambda_max",
        "lecture on optimisation, part 2: the rate's limit is 2 / lambda_max",
        low=100,
    ),
    "too_large": Expected(
        "loss after 200 steps over before at 8 / lambda_max, the network (infinite as 1e30)",
        _FIGURE,
        low=1,
    ),
    "catapult": Expected(
        "loss after 200 steps over before at 2.5 / lambda_max, the network: above the quadratic's "
        "limit, yet no divergence",
        _CATAPULT,
        high=1,
    ),
    "curvature": Expected(
        "lambda_max after 200 steps over before, at 2.5 / lambda_max, the network",
        _CATAPULT,
        high=1,
    ),
}
