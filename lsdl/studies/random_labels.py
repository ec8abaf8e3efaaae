"""Random labels and random images are learnt by heart, somewhat slower."""

from lsdl.studies.claim import Expected

CLAIM = (
    "A net with more parameters than examples learns random labels to the last one, at a small "
    "multiple of the epochs, and then knows nothing of other images."
)
SOURCE = (
    "Lectures: memorising random labels, parameters against examples; Zhang et al. 2017, "
    "Understanding deep learning requires rethinking generalization (arXiv:1611.03530)"
)
_FIT = "lecture on optimisation and regularisation: random labels; Zhang et al. 2017, section 2.1"
_NOISE = "Zhang et al. 2017, figure 1c: partially corrupted labels"
EXPECTED = {
    "random_train": Expected(
        "highest train accuracy in percent within 100 epochs on random labels, MLP of three layers "
        "of 512 on 1,257 digits, SGD with momentum",
        _FIT,
        low=100,
        high=100,
    ),
    "random_valid": Expected(
        "valid accuracy in percent of the nets that learnt random labels", _FIT, low=4, high=16
    ),
    "slower": Expected(
        "epochs to 100% of the train labels, random labels over true labels", _FIT, low=1.5
    ),
    "small_factor": Expected("the same ratio from above: a small constant factor", _FIT, high=6),
    "half_train": Expected(
        "highest train accuracy in percent within 100 epochs, half of the labels random",
        _NOISE,
        low=100,
        high=100,
    ),
    "half_valid": Expected(
        "valid accuracy in percent of the nets that learnt half random labels",
        _NOISE,
        low=60,
        high=85,
    ),
    "falling": Expected(
        "smallest fall of the valid accuracy in points from 0 to 20, 50 and 100% random labels",
        _NOISE,
        low=1,
    ),
    "gaussian_train": Expected(
        "highest train accuracy in percent within 100 epochs on images of normal noise, the true "
        "labels",
        "Zhang et al. 2017, section 2.1: Gaussian images",
        low=100,
        high=100,
    ),
    "gaussian_faster": Expected(
        "epochs to 100% on images of normal noise over on digits with random labels",
        "Zhang et al. 2017, section 2.1: noise images converge faster than random labels",
        high=1 - 1e-6,
    ),
}
