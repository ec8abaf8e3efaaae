"""Flat and sharp minima: where the rate and the batch let the curvature end."""

from lsdl.studies.claim import Expected

CLAIM = (
    "A small batch ends in a flatter minimum that generalises better; full-batch descent ends "
    "where lambda_max is 2 / rate. Keskar's recipe shows no such gap on the digits."
)
SOURCE = (
    "Lectures: flat and sharp minima; Keskar et al. 2017, On large-batch training "
    "(arXiv:1609.04836); Cohen et al. 2021, Gradient descent typically occurs at the edge of "
    "stability (arXiv:2103.00065)"
)
_EDGE = "Cohen et al. 2021, section 3: gradient descent ends at lambda_max = 2 / rate"
_FLAT = "lecture on optimisation and regularisation: flat and sharp minima; Keskar et al. 2017"
_NEGATIVE = "Keskar et al. 2017, tables 2 and 3, which had a gap: an honest negative on digits"
EXPECTED = {
    "edge_0.2": Expected(
        "lambda_max rate / 2 after full-batch descent at 0.2, tanh net on 512 digits, half the "
        "squared error",
        _EDGE,
        low=0.95,
        high=1.05,
    ),
    "edge_0.4": Expected("lambda_max rate / 2, the same at 0.4", _EDGE, low=0.95, high=1.05),
    "flatter_0.2": Expected(
        "lambda_max after batches of 16 over after full-batch descent, rate 0.2", _FLAT, high=0.85
    ),
    "flatter_0.4": Expected(
        "lambda_max after batches of 16 over after full-batch descent, rate 0.4", _FLAT, high=0.85
    ),
    "valid_0.2": Expected(
        "points of valid accuracy that batches of 16 are ahead of full-batch descent, rate 0.2",
        _FLAT,
        low=0.3,
    ),
    "valid_0.4": Expected(
        "points of valid accuracy that batches of 16 are ahead of full-batch descent, rate 0.4",
        _FLAT,
        low=0.3,
    ),
    "phi": Expected(
        "Keskar's phi(1e-3) after full-batch descent over after batches of 16, rate 0.2",
        "Keskar et al. 2017, metric 2.1",
        low=1 + 1e-6,
    ),
    "keskar_phi": Expected(
        "phi(1e-3) after full-batch Adam over after Adam on batches of 16, ReLU net, cross-"
        "entropy, all digits, both stopped at a train loss of 0.01 (a negative result: 24 to 167 "
        "in the paper)",
        _NEGATIVE,
        low=0.5,
        high=2,
    ),
    "keskar_valid": Expected(
        "points of valid accuracy that batches of 16 are ahead in that comparison (a negative "
        "result: 0.2 to 5.3 points of test accuracy in the paper)",
        _NEGATIVE,
        low=-0.5,
        high=0.5,
    ),
}
