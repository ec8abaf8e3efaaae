"""How wide the first weights are drawn decides how deep a plain net can be trained.

ReLU nets of width 64 on digits, 22 and 30 layers of weights, all of them normal with variance 2 / n
(He) or 1 / n, biases of zero; SGD with momentum 0.9 on batches of 64.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "With weights of variance 1 / n each ReLU layer halves the squared signal and gradient: 22 "
    "layers start late and 30 not at all, where He's 2 / n trains both; units that start alike "
    "stay alike."
)
SOURCE = (
    "Lecture on phenomena: initialisation, symmetry breaking, vanishing gradients; He et al. 2015, "
    "Delving deep into rectifiers (arXiv:1502.01852), section 2.2"
)
_HE = "He et al. 2015, figures 2 and 3"
_GRADIENT = "He et al. 2015, section 2.2: L layers lose 1 / sqrt(2)^L"
_SYMMETRY = "lecture on phenomena: symmetry breaking"
EXPECTED = {
    "stalls_30": Expected(
        "training cross-entropy in nats after 30 epochs, 30 layers, variance 1 / n, rate 0.001",
        _HE,
        low=2.2,
    ),
    "trains_30": Expected(
        "training cross-entropy in nats after 30 epochs, 30 layers, He, rate 0.001", _HE, high=0.5
    ),
    "late_22": Expected(
        "epochs to a training cross-entropy of 1, 22 layers, rate 0.003, variance 1 / n over He "
        "(never in 60 epochs as 60)",
        _HE,
        low=3,
    ),
    "learns_22": Expected(
        "training cross-entropy in nats after 60 epochs, 22 layers, variance 1 / n", _HE, high=2.0
    ),
    "vanishing_22": Expected(
        "gradient norm of the first layer at the start, He over 1 / n, over 2^11, 22 layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "vanishing_30": Expected(
        "gradient norm of the first layer at the start, He over 1 / n, over 2^15, 30 layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "exploding_30": Expected(
        "gradient norm of the first layer at the start, variance 4 / n over He, over 2^15, 30 "
        "layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "symmetry": Expected(
        "largest difference of two hidden units' weights after 10 epochs over the largest weight, "
        "64-32-10 net whose units start alike, float64",
        _SYMMETRY,
        high=1e-9,
    ),
    "broken": Expected(
        "validation accuracy in points after 10 epochs, He less units that start alike",
        _SYMMETRY,
        low=30,
    ),
}
