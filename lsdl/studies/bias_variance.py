"""The expected error of a fit in three terms: squared bias, variance and noise.

Least squares in Chebyshev polynomials to 50 points of sin(4.5 x) on [-1, 1] with noise of deviation
0.25, over 400 data sets.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "The expected squared error is exactly squared bias plus variance plus noise; a richer model "
    "has less bias and more variance, and a penalty on the coefficients turns that round."
)
SOURCE = (
    "Lecture on generalisation: bias, variance and noise; Geman et al. 1992, Neural networks and "
    "the bias/variance dilemma"
)
_TERMS = "lecture on generalisation: the three terms (its last line; a bracket is misplaced before)"
_RIDGE = "lecture on generalisation: L2 lowers the variance of the coefficients"
EXPECTED = {
    "identity": Expected(
        "largest distance, over degrees 1 to 15, of squared bias + variance + noise from the error "
        "on fresh noisy targets, relative to it",
        _TERMS,
        high=0.02,
    ),
    "bias": Expected("squared bias of degree 9 over degree 1", _TERMS, high=1 - 1e-6),
    "variance": Expected("variance of degree 9 over degree 1", _TERMS, low=1 + 1e-6),
    "ridge_variance": Expected(
        "variance of degree 9 with the largest L2 penalty (10) over the smallest (1e-4)",
        _RIDGE,
        high=1 - 1e-6,
    ),
    "ridge_bias": Expected(
        "squared bias of degree 9 with the largest L2 penalty over the smallest",
        _RIDGE,
        low=1 + 1e-6,
    ),
    "ridge_identity": Expected(
        "largest relative distance of the three terms from the error, over the penalties",
        _TERMS,
        high=0.02,
    ),
}
