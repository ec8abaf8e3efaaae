"""Validation accuracy of an asynchronous parameter server, by how stale its gradients are."""

from lsdl.studies.claim import Expected

CLAIM = (
    "Gradients a few updates old do no harm, much older ones ruin plain SGD and momentum, and "
    "Adagrad stands more of them."
)
SOURCE = (
    "Lecture: distributed training, parameter server; "
    "Dean et al. 2012, Large scale distributed deep networks"
)
_DEAN = "Dean et al. 2012, section 4.1"
EXPECTED = {
    "mild": Expected(
        "largest loss of validation accuracy, in points, at a staleness of 1 or 4 against 0, over "
        "SGD 0.05, SGD 0.2, momentum and Adagrad",
        _DEAN,
        high=1.5,
    ),
    "sgd_16": Expected(
        "validation accuracy in percent of SGD 0.2 at a staleness of 16", _DEAN, high=20.0
    ),
    "momentum_16": Expected(
        "validation accuracy in percent of momentum 0.02 at a staleness of 16", _DEAN, high=20.0
    ),
    "adagrad_16": Expected(
        "loss of validation accuracy, in points, of Adagrad 0.02 at a staleness of 16 against 0",
        f"{_DEAN}: Adagrad greatly increases robustness",
        high=1.0,
    ),
    "adagrad_64": Expected(
        "validation accuracy, in points, of Adagrad 0.02 above SGD 0.05 at a staleness of 64",
        f"{_DEAN}: Adagrad greatly increases robustness",
        low=20.0,
    ),
}
