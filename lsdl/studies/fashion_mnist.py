"""The last lecture's example: one hidden layer of 100 ELUs by four optimisers at one rate.

The config is that of Fashion-MNIST. Here, on digits: the same file with other data, the batch of
1,024, the rate of 4e-4 and the number of updates, 530, that 10 epochs of Fashion-MNIST have.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "At one small rate the optimisers are far apart: momentum is ten times as fast as SGD, Adam "
    "faster than both, and weight decay hardly matters in so short a run."
)
SOURCE = (
    "Lecture on training neural networks: the Fashion-MNIST example and its notebook; Xiao et al. "
    "2017, Fashion-MNIST (arXiv:1708.07747)"
)
_NOTEBOOK = "lecture on training: Fashion-MNIST, four optimisers"
EXPECTED = {
    "parameters": Expected(
        "parameters of the net on 28 x 28 pixels", "the lecture's notebook", 79_510, 79_510
    ),
    "adam": Expected(
        "valid accuracy in % of Adam on digits, 530 updates on batches of 1,024 at 4e-4",
        _NOTEBOOK,
        low=90,
    ),
    "adam_over_sgd": Expected(
        "training loss of Adam over that of SGD, after 530 updates on digits", _NOTEBOOK, high=0.5
    ),
    "adam_over_momentum": Expected(
        "training loss of Adam over that of SGD with momentum 0.9", _NOTEBOOK, high=1 - 1e-6
    ),
    "momentum_over_sgd": Expected(
        "training loss of SGD with momentum 0.9 over that of SGD", _NOTEBOOK, high=0.8
    ),
    "ten_times": Expected(
        "training loss of SGD with momentum 0.9 over that of SGD at 10 times the rate",
        "lecture on optimisers: momentum 0.9 is a rate 10 times as large",
        0.8,
        1.25,
    ),
    "adamw_as_adam": Expected(
        "points of valid accuracy between AdamW (decay 0.01) and Adam", _NOTEBOOK, -1, 1
    ),
}
