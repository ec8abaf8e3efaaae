"""The norms of AlexNet-BN's weights and gradients at its first iteration, against a printed table.

The printed labels are the wrong way round: columns `.b` hold weights, columns `.w` biases.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "At the first iteration the ratio of a weight's norm to its gradient's differs by more than "
    "a hundred from layer to layer, so that one rate cannot suit all."
)
SOURCE = (
    "Lecture: large-batch training; You et al. 2017, "
    "Large batch training of convolutional networks (arXiv:1708.03888), table 2"
)
_TABLE = "You et al. 2017, table 2, as the lecture prints it"
EXPECTED = {
    "weights": Expected(
        "relative distance of the initial weight norms from columns .b, of the worst layer's mean "
        "over seeds",
        _TABLE,
        low=-0.005,
        high=0.005,
    ),
    "biases": Expected(
        "relative distance of the initial bias norms from columns .w, of the worst layer",
        _TABLE,
        low=-0.005,
        high=0.005,
    ),
    "labels": Expected(
        "least relative distance of a layer's initial norms from the columns of their own name",
        f"{_TABLE}: the labels of weights and biases are swapped",
        low=0.5,
    ),
    "ratios": Expected(
        "largest relative distance of a printed ratio from the quotient of the printed norms, "
        "without conv5.w",
        _TABLE,
        high=0.05,
    ),
    "conv5": Expected(
        "the quotient of conv5.w's printed norms over its printed ratio: a digit was lost",
        _TABLE,
        low=10.0,
        high=13.0,
    ),
    "spread": Expected("the largest printed ratio over the least", _TABLE, low=100.0),
}
