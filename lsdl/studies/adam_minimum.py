"""Adam close to a minimum, and on which side of the root its eps stands.

Shape letters: R replicas, D dims, N examples, C classes, B batch, T steps.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Adam scales small gradients up, so that at a constant rate it keeps a distance from the "
    "minimum that a decay, or a switch to SGD with momentum, removes; eps matters where it stands."
)
SOURCE = (
    "Lectures on optimisation: Adam near the minimum, eps inside and outside the root; Kingma and "
    "Ba 2015, Adam, algorithm 1"
)
_NEAR = "lecture on optimisation and regularisation: Adam near the minimum"
_KINGMA = "Kingma and Ba 2015, algorithm 1: eps outside the root"
_INSIDE = "lecture on optimisation and regularisation: eps inside the root"
_QUADRATIC = "2-D quadratic of kappa 10 with gradient noise"
_DIGITS = "logistic regression on digits"
EXPECTED = {
    "quadratic_decay": Expected(
        f"final excess of Adam at a constant rate over Adam with a cosine decay, {_QUADRATIC}",
        _NEAR,
        low=5,
    ),
    "quadratic_switch": Expected(
        f"final excess of Adam at a constant rate over Adam, then SGD with momentum for the last "
        f"20%, {_QUADRATIC}",
        _NEAR,
        low=5,
    ),
    "digits_decay": Expected(
        f"final excess of Adam at a constant rate over Adam with a cosine decay, {_DIGITS}",
        _NEAR,
        low=5,
    ),
    "digits_switch": Expected(
        f"final excess of Adam at a constant rate over Adam, then SGD with momentum for the last "
        f"20%, {_DIGITS}",
        _NEAR,
        low=5,
    ),
    "first_step": Expected(
        "first step over the rate, gradient 1: the bias corrections cancel",
        _KINGMA,
        low=1 - 1e-6,
        high=1 + 1e-6,
    ),
    "outside_1e-4": Expected(
        "first step over the rate, gradient 1e-4, eps 1e-8 outside the root",
        _KINGMA,
        low=1 / (1 + 1e-4) - 1e-6,
        high=1 / (1 + 1e-4) + 1e-6,
    ),
    "inside_1e-4": Expected(
        "first step over the rate, gradient 1e-4, eps 1e-8 inside the root",
        _INSIDE,
        low=0.5**0.5 - 1e-6,
        high=0.5**0.5 + 1e-6,
    ),
    "outside_1e-8": Expected(
        "first step over the rate, gradient 1e-8, eps 1e-8 outside the root",
        _KINGMA,
        low=0.5 - 1e-6,
        high=0.5 + 1e-6,
    ),
    "inside_1e-8": Expected(
        "first step over the rate, gradient 1e-8, eps 1e-8 inside the root",
        _INSIDE,
        low=1e-4 - 1e-6,
        high=1e-4 + 1e-6,
    ),
    "ratio_1e-8": Expected(
        "step with eps outside over inside, gradient 1e-8: 5,000", _INSIDE, low=4999, high=5001
    ),
    "ratio_limit": Expected(
        "step with eps outside over inside, gradient 1e-14: 10,000 as the gradient vanishes",
        _INSIDE,
        low=9999,
        high=10001,
    ),
}
