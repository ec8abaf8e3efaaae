"""Weight decay under normalisation as a learning rate that grows exponentially.

Shape letters: N examples, B batch, D pixels, H hidden, C classes, T steps.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "For a network that does not heed the scale of its weights, weight decay at a fixed learning "
    "rate and no decay at an exponentially growing one give the same functions, step by step."
)
SOURCE = (
    "Lecture on phenomena: exponentially growing learning rate; Li and Arora 2020, An exponential "
    "learning rate schedule for deep learning (arXiv:1910.07454)"
)
_THEOREM = "Li and Arora 2020: rate eta alpha^(-2t-1), alpha of x^2 - (1 + mu - lambda eta) x + mu"
_BUFFER = "Li and Arora 2020: momentum with the rate outside the buffer"
_CONTROL = "distance of directions from the run with decay, at its largest in 400 steps: "
EXPECTED = {
    "directions": Expected(
        "largest distance between the weights' directions in the two runs over 400 steps on the "
        "same batches, float64: rate 0.4, decay 5e-3, momentum 0.9, digits",
        _THEOREM,
        high=1e-6,
    ),
    "growth": Expected("last rate over first, 400 steps", _THEOREM, low=1e9),
    "norms": Expected(
        "ratio of the weights' norms after 400 steps over alpha^-400", _THEOREM, 0.99, 1.01
    ),
    "losses": Expected(
        "largest distance between the two runs' losses over 400 steps", _THEOREM, high=1e-6
    ),
    "zero_buffer": Expected(_CONTROL + "the buffer starts at zero", _BUFFER, low=0.5),
    "inside": Expected(_CONTROL + "the rate inside the buffer", _BUFFER, low=0.5),
    "no_decay": Expected(
        _CONTROL + "no decay at the fixed rate", "Li and Arora 2020: decay is what grows", low=0.5
    ),
    "alpha": Expected(
        "alpha for rate 0.1, decay 5e-4, momentum 0.9: 0.9994977",
        _THEOREM,
        low=0.9994977 - 1e-7,
        high=0.9994977 + 1e-7,
    ),
    "epoch": Expected(
        "growth of that rate over an epoch of 391 steps: the paper's 1.481",
        "Li and Arora 2020: PreResNet-32 on CIFAR-10",
        low=1.4807,
        high=1.4817,
    ),
}
