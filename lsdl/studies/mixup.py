"""MixUp and shifted images on digits, with clean and with noisy labels."""

from lsdl.studies.claim import Expected

CLAIM = (
    "Mixed and shifted training images raise the accuracy on others; MixUp learns fewer wrong "
    "labels by heart, but once it has learnt them it does not help."
)
SOURCE = (
    "Lectures: MixUp and data augmentation against overfitting; Zhang et al. 2018, mixup: beyond "
    "empirical risk minimization (arXiv:1710.09412)"
)
_MIXUP = "lecture on optimisation and regularisation: MixUp; Zhang et al. 2018, section 3"
_EQUATION = "Zhang et al. 2018, equation 2"
_NOISE = "Zhang et al. 2018, table 2, where MixUp won: an honest negative here"
EXPECTED = {
    "valid_1": Expected(
        "points of valid accuracy that MixUp (alpha 1) is ahead of plain SGD, digits, MLP of two "
        "layers of 256, 150 epochs",
        _MIXUP,
        low=0.5,
    ),
    "valid_8": Expected("points that MixUp with alpha 8 is ahead of plain SGD", _MIXUP, low=0),
    "valid_shift": Expected(
        "points of valid accuracy that shifts by up to one pixel are ahead of plain SGD",
        "lectures: data augmentation",
        low=0,
    ),
    "soft_labels": Expected(
        "largest distance from 1 of the sum of a mixed label's shares", _EQUATION, high=1e-6
    ),
    "share": Expected("largest distance of the mixing share from [0, 1]", _EQUATION, low=0, high=0),
    "memorised": Expected(
        "points of the wrong labels that plain SGD learns beyond MixUp (alpha 1), 40% of the "
        "labels random, 150 epochs",
        "Zhang et al. 2018, section 3.4: MixUp memorises less",
        low=0,
    ),
    "noise_1": Expected(
        "points of valid accuracy that MixUp (alpha 1) is ahead of plain SGD with 40% random "
        "labels (a negative result)",
        _NOISE,
        high=0,
    ),
    "noise_8": Expected("the same with alpha 8 (a negative result)", _NOISE, high=0),
}
