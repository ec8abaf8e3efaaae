"""PH-15, double descent: the error peaks where the training data are just fit, and falls again."""

from lsdl.studies.claim import Expected

CLAIM = (
    "The risk peaks where a model can just fit its training data, and falls below the classical "
    "minimum as it grows on; so it may over the epochs."
)
SOURCE = (
    "Lectures: double descent, conventional and deep intuition; Belkin et al. 2019, Reconciling "
    "modern machine-learning practice and the bias-variance trade-off (arXiv:1812.11118)"
)
_BELKIN = "Belkin et al. 2019, figure 2: random Fourier features of least norm"
_NET = "Belkin et al. 2019, figure 3: fully connected nets, threshold at n K parameters"
_EPOCHS = "Nakkiran et al. 2020, section 5: double descent over epochs"
_CELL = {
    "clean": "random cosine features on 300 digits",
    "noise": "the same with 20% of the training labels redrawn",
}


def _features(kind: str) -> dict[str, Expected]:
    of = _CELL[kind]
    return {
        f"peak_{kind}": Expected(
            f"number of features N with the largest median squared error on valid, {of}",
            _BELKIN,
            low=300,
            high=300,
        ),
        f"height_{kind}": Expected(
            f"median squared error on valid at N = 300 over at N = 100, {of}", _BELKIN, low=20
        ),
        f"second_{kind}": Expected(
            f"median squared error on valid at N = 8,000 over the lowest at N < 300, {of}",
            _BELKIN,
            high=1 - 1e-6,
        ),
        f"norm_{kind}": Expected(
            f"number of features N with the largest median norm of the coefficients, {of}",
            _BELKIN,
            low=300,
            high=300,
        ),
    }


EXPECTED = {
    **_features("clean"),
    **_features("noise"),
    "net_peak": Expected(
        "largest squared error on valid from 750 to 12,000 parameters (a quarter of n K to four "
        "times) over the lowest below 750, ReLU nets of one layer, 300 digits, 20% label noise",
        _NET,
        low=1.1,
    ),
    "net_second": Expected(
        "squared error on valid of the widest net over that peak", _NET, high=0.9
    ),
    "epoch_rise": Expected(
        "risk at the peak over at the first minimum before it, over steps of gradient descent on "
        "least squares with features of two scales",
        "Heckel and Yilmaz 2021, section 3: superposed bias-variance trade-offs",
        low=1.1,
    ),
    "epoch_second": Expected(
        "risk at the end over at the peak, the same",
        "Heckel and Yilmaz 2021, section 3: superposed bias-variance trade-offs",
        high=0.9,
    ),
    "net_epochs": Expected(
        "points of valid error from the peak over the steps to the end, the widest ReLU net on 300 "
        "digits, 20% label noise: whether digits show it too",
        _EPOCHS,
        low=1.0,
    ),
}
