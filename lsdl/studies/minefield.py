"""Bad minima on spirals: perfect on the training points, worse than chance elsewhere, and tiny."""

from lsdl.studies.claim import Expected

CLAIM = (
    "Minima with perfect training accuracy that generalise no better than chance exist beside the "
    "good ones; their volume is smaller by thousands of decimal orders, so descent misses them."
)
SOURCE = (
    "Lectures: the minefield of bad minima, decision boundaries, volume ratio; Huang et al. 2020, "
    "Understanding generalization through visualizations (arXiv:1906.03291)"
)
_MINEFIELD = "lecture on optimisation and regularisation: the minefield; Huang et al. 2020"
_VOLUME = "lecture on optimisation and regularisation: the volume ratio; Huang et al. 2020"
EXPECTED = {
    "good_train": Expected(
        "train accuracy in percent after 6,000 steps of full-batch Adam, spirals of 130 points",
        _MINEFIELD,
        low=100,
        high=100,
    ),
    "good_valid": Expected(
        "accuracy in percent of the same net on the 1,000 valid points", _MINEFIELD, low=98.5
    ),
    "bad_train": Expected(
        "train accuracy in percent of the net that was also taught 260 other points with wrong "
        "labels, after 46,000 steps",
        _MINEFIELD,
        low=100,
        high=100,
    ),
    "bad_valid": Expected(
        "accuracy in percent of the same net on the 1,000 valid points: below 53",
        _MINEFIELD,
        high=52.99,
    ),
    "orders": Expected(
        "decimal orders between the volumes of the good and the bad minimum: 6,762 times the "
        "difference of the mean log10 radii up to a train loss of 0.1, 200 filter-normalised "
        "directions",
        _VOLUME,
        low=1_000,
    ),
    "orders_0.5": Expected(
        "the same orders with radii up to a train loss of 0.5", _VOLUME, low=1_000
    ),
}
