"""Sharpness-aware minimisation on digits, with clean and with noisy labels."""

from lsdl.studies.claim import Expected

CLAIM = (
    "Sharpness-aware minimisation finds minima of lower curvature and lower error; on digits with "
    "noisy labels that are learnt by heart it does not help."
)
SOURCE = (
    "Lectures: wide and narrow minima, SAM; Foret et al. 2021, Sharpness-aware minimization "
    "(arXiv:2010.01412)"
)
_SAM = "lecture on optimisation: wide minima; Foret et al. 2021, table 1"
_NOISE = "Foret et al. 2021, table 4, where SAM won by 10 to 52 points: an honest negative here"
EXPECTED = {
    "valid": Expected(
        "points of valid accuracy that SAM (rho 0.5) is ahead of SGD, digits, MLP of two layers of "
        "256, 150 epochs",
        _SAM,
        low=0.5,
    ),
    "valid_0.1": Expected("points that SAM with rho 0.1 is ahead of SGD", _SAM, low=0),
    "curvature": Expected(
        "lambda_max of the train loss after SAM (rho 0.5) over after SGD",
        "Foret et al. 2021, figure 3",
        high=1 - 1e-6,
    ),
    "interpolation": Expected(
        "train accuracy in percent on the noisy labels, the lower of SGD and SAM (rho 0.5), 40% of "
        "the labels random",
        _NOISE,
        low=99,
    ),
    "noise": Expected(
        "points of valid accuracy that SAM (rho 0.5) is ahead of SGD with 40% random labels (a "
        "negative result)",
        _NOISE,
        high=0,
    ),
    "noise_0.1": Expected("the same with rho 0.1 (a negative result)", _NOISE, high=0),
}
