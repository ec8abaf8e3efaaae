"""Least squares on raw, centred, standardised and whitened features.

Shape letters: N examples, F features (the last is the constant 1), C outputs, T steps, E entries.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Centring and scaling the inputs lowers the condition number of least squares by orders of "
    "magnitude, and with it the steps of gradient descent; removing correlations leaves 1."
)
SOURCE = (
    "Lectures on optimisation: whitening, conditioning of the data; LeCun et al. 1998, Efficient "
    "BackProp, section 4.3"
)
_CENTRE = "LeCun et al. 1998, section 4.3"
_WHITEN = "lectures on optimisation: whitening"
_STEPS = (
    "gradient descent's steps to 1e-3 of the excess loss at zero, rate 1 / lambda_max, {}: raw "
    "over standardised"
)
EXPECTED = {
    "kappa_wine": Expected(
        "condition number of the second moments with a bias column, wine: raw over standardised",
        _CENTRE,
        low=1e6,
    ),
    "centred": Expected(
        "condition number raw over centred, the smallest of wine, breast_cancer and digits",
        _CENTRE,
        low=1,
    ),
    "kappa_whitened": Expected(
        "condition number whitened, the largest of wine, breast_cancer and digits",
        _WHITEN,
        high=1 + 1e-6,
    ),
    "standardised": Expected(
        "condition number standardised, the smallest of the three: dividing by the deviations, "
        "which the first lecture calls whitening, leaves the correlations in",
        _WHITEN,
        low=10,
    ),
    "steps_wine": Expected(_STEPS.format("wine"), _CENTRE, low=1000),
    "steps_breast_cancer": Expected(_STEPS.format("breast_cancer"), _CENTRE, low=1000),
    "steps_digits": Expected(
        _STEPS.format("digits") + "; pixels share one unit, so that scaling changes little",
        _CENTRE,
        low=1000,
    ),
    "steps_whitened": Expected(
        "gradient descent's steps to 1e-3 of the excess, whitened, the largest of the three",
        _WHITEN,
        high=2,
    ),
    "hessian": Expected(
        "largest distance, in units of the largest entry, between the Hessian of the mean squared "
        "error and (2/n) X^T X: the lecture leaves out the 2, and 1/n in two terms",
        "lecture on optimisation and regularisation: least squares",
        high=1e-9,
    ),
    "valid": Expected(
        "condition number of the valid split under the train split's whitening, the smallest of "
        "the three: statistics of the sample, not of the distribution",
        "lecture on optimisation and regularisation: statistics from the whole training set",
        low=1.1,
    ),
}
