"""PH-29: ten weak features and a shortcut that agrees with the label until it does not.

Labels are +-1. Each core feature is 0.4 times the label plus unit noise: all ten together reach 90%
at best. The shortcut is +-1, the label's sign in a share of the training examples, and in the
future drawn without the label, or turned round.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "A feature that nearly always agrees with the label in training takes over: the training error "
    "is low, and once the correlation is gone the future error is high."
)
SOURCE = (
    "Lecture on optimisation and regularisation: spurious features, 99.79 % and 98.51 %; Geirhos "
    "et al. 2020, Shortcut learning in deep neural networks (arXiv:2004.07780)"
)
_LECTURE = "lecture: spurious features, a correlation of 99.79 %"
EXPECTED = {
    "train": Expected(
        "training accuracy in % of a net with a shortcut that agrees with 99.8 % of the labels",
        _LECTURE,
        low=99,
    ),
    "future": Expected(
        "points of future accuracy, where the shortcut is independent of the label, that the net "
        "loses against one trained without it",
        _LECTURE,
        low=20,
    ),
    "flipped": Expected(
        "future accuracy in % where the shortcut says the opposite: below a coin's",
        _LECTURE,
        high=50,
    ),
    "unchanged": Expected(
        "points by which the net is ahead of one trained without the shortcut on data that keep it",
        _LECTURE,
        low=5,
    ),
    "probe": Expected(
        "the shortcut's weight over the largest of a core feature, each feature with deviation 1, "
        "in a logistic probe on the training data",
        _LECTURE,
        low=2,
    ),
    "response": Expected(
        "the same in the linear function closest to the net's own logit",
        _LECTURE,
        low=2,
    ),
    "weaker": Expected(
        "points of future accuracy lost at an agreement of 98.51 %: the lecture's other number",
        "lecture: spurious features, a correlation of 98.51 %",
        low=10,
    ),
}
