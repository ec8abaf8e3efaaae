"""PH-23, grokking: the training pairs are fit early, the others long after."""

from lsdl.studies.claim import Expected

CLAIM = "A net fits a table of modular sums at once and finds the rule long after; decay drives it."
SOURCE = (
    "Lecture on loss surfaces: grokking; Power et al. 2022, Grokking: generalization beyond "
    "overfitting on small algorithmic datasets (arXiv:2201.02177)"
)
_POWER = "Power et al. 2022, figure 1: validation jumps long after training is fit"
_DECAY = "Power et al. 2022, section 3.3: weight decay makes it generalise"
_RELU = "ReLU net of 256 on a + b mod 53, 40% of the pairs"
_QUADRATIC = "quadratic net of 128 on a + b mod 31, 50% of the pairs"
EXPECTED = {
    "delay_relu": Expected(
        f"step of 95% valid accuracy over step of 99% training accuracy, {_RELU}, weight decay 1",
        _POWER,
        low=20,
    ),
    "delay_quadratic": Expected(f"the same, {_QUADRATIC}, weight decay 1", _POWER, low=5),
    "at_fit_relu": Expected(
        f"valid accuracy in percent where 99% of the training pairs are fit, {_RELU}",
        _POWER,
        high=5,
    ),
    "at_fit_quadratic": Expected(f"the same, {_QUADRATIC}", _POWER, high=5),
    "no_decay_relu": Expected(
        f"valid accuracy in percent after 3,000 steps without weight decay, {_RELU}",
        _DECAY,
        high=10,
    ),
    "no_decay_quadratic": Expected(f"the same, {_QUADRATIC}", _DECAY, high=10),
    "decay": Expected(
        "largest ratio of the delay (steps from 99% training to 95% valid accuracy) to that at "
        f"half the weight decay, weight decays 0.25, 0.5, 1 and 2, {_QUADRATIC}",
        _DECAY,
        high=1 - 1e-6,
    ),
}
SLOW = {
    "transformer_delay": Expected(
        "step of 95% valid accuracy over step of 99% training accuracy, transformer of 2 layers, "
        "width 128, 4 heads on a + b mod 53, 40% of the pairs, weight decay 1",
        _POWER,
        low=5,
    ),
    "transformer_at_fit": Expected(
        "valid accuracy in percent where 99% of the training pairs are fit, the same transformer",
        _POWER,
        high=50,
    ),
}
