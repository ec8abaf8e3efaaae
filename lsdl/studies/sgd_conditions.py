"""What decaying rates do to noise, and when one pass of SGD beats one step of gradient descent.

Shape letters: R replicas, T steps, N examples, D inputs (the last is the constant 1), C classes.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "With noise a constant rate ends on a plateau, 1/t converges like 1/t and e^-t stops too soon; "
    "SGD is ahead early, where each step costs less, and gradient descent late."
)
SOURCE = (
    "Lecture on optimisation, part 2: the conditions on the learning rate, phases of GD and SGD; "
    "Robbins and Monro 1951; Bottou and Bousquet 2008, The tradeoffs of large scale learning"
)
_NOISY = "x <- x - rate (x + N(0, 1)), x_0 = 10, 4,000 replicas, 10,000 steps"
_CONDITIONS = "lecture on optimisation, part 2: the two conditions on the learning rate"
_PHASES = "lecture on optimisation, part 2: phases of GD and SGD"
EXPECTED = {
    "constant": Expected(
        f"E x^2 of the last 1,000 steps over rate / (2 - rate) at rate 0.1; {_NOISY}",
        _CONDITIONS,
        low=0.95,
        high=1.05,
    ),
    "inverse": Expected("E x^2 times t at rate 1/t, after 10,000 steps", _CONDITIONS, 0.9, 1.1),
    "exponential": Expected("smallest E x^2 of all steps at rate e^-t", _CONDITIONS, low=10),
    "inverse_sqrt": Expected(
        "E x^2 times the root of t at rate 1/sqrt(t), after 10,000 steps: 1/2",
        _CONDITIONS,
        0.45,
        0.55,
    ),
    "sqrt_slower": Expected(
        "E x^2 at rate 1/sqrt(t) over at 1/t, after 10,000 steps", _CONDITIONS, low=10
    ),
    "square_sums": Expected(
        "of the four rates, how many meet the lecture's two conditions while the sum of their "
        "squares diverges: 1/sqrt(t), which Robbins and Monro exclude",
        "Robbins and Monro 1951: the sum of squares is finite",
        low=1,
        high=1,
    ),
    "early": Expected(
        "largest ratio of SGD's training loss (batch 16, fresh subsets) to gradient descent's at "
        "equal gradient evaluations, after 1 and 2 epochs, logistic regression on digits",
        _PHASES,
        high=1,
    ),
    "late": Expected(
        "excess loss of gradient descent over that of SGD at rate 1/t after 1,000 epochs",
        _PHASES,
        high=0.1,
    ),
    "plateau": Expected(
        "excess loss of SGD at a constant rate after 1,000 epochs over after 100 (means of 50 "
        "epochs)",
        _PHASES,
        low=0.5,
        high=2,
    ),
    "order": Expected(
        "slope of log excess against log epochs from 100 to 1,000, SGD at rate 1/t",
        "Bottou and Bousquet 2008: excess of order 1/t",
        low=-1.5,
        high=-0.7,
    ),
}
