"""What the condition number costs gradient descent, heavy ball and coordinate descent.

Shape letters: D dims, T steps, K condition numbers.
"""

from lsdl.studies.claim import Expected

CLAIM = (
    "Gradient descent slows down in proportion to the condition number and momentum to its root; "
    "coordinate descent depends on the axes as well, which gradient descent does not see."
)
SOURCE = (
    "Lectures on optimisation and regularisation: condition number, coordinate descent, momentum; "
    "Polyak 1964, Some methods of speeding up the convergence of iteration methods"
)
_POLYAK = "Polyak 1964: optimal rates (k-1)/(k+1) and (sqrt k-1)/(sqrt k+1)"
_DESCENT = "lecture on optimisation and regularisation: coordinate descent"
_MOMENTUM = "lectures on optimisation: momentum, velocity and accumulator form"
EXPECTED = {
    "gd_4": Expected(
        "steps of gradient descent at the best rate until |x| is 1e-6 of its start, kappa 4",
        _POLYAK,
        low=27,
        high=29,
    ),
    "gd_12": Expected(
        "steps of gradient descent at the best rate until |x| is 1e-6 of its start, kappa 12",
        _POLYAK,
        low=82,
        high=84,
    ),
    "heavy_ball_4": Expected(
        "steps of heavy ball over steps of gradient descent, both at their best, kappa 4",
        _POLYAK,
        high=0.6,
    ),
    "heavy_ball_12": Expected(
        "steps of heavy ball over steps of gradient descent, both at their best, kappa 12",
        _POLYAK,
        high=0.4,
    ),
    "heavy_ball_spectrum": Expected(
        "the same ratio with eigenvalues spread evenly in log from 1 to 100, kappa 100",
        _POLYAK,
        high=0.25,
    ),
    "sweeps_plain": Expected(
        "sweeps of coordinate descent until |x| is 1e-6 of its start, axes of the ellipses along "
        "the coordinates, the larger of kappa 4 and 12",
        _DESCENT,
        low=1,
        high=1,
    ),
    "sweep_4": Expected(
        "|x| after a sweep of coordinate descent over before, rotated by 45 degrees, kappa 4: "
        "((k-1)/(k+1))^2 = 0.36",
        _DESCENT,
        low=9 / 25 - 1e-6,
        high=9 / 25 + 1e-6,
    ),
    "sweep_12": Expected(
        "|x| after a sweep of coordinate descent over before, rotated by 45 degrees, kappa 12: "
        "((k-1)/(k+1))^2 = 0.71598",
        _DESCENT,
        low=121 / 169 - 1e-6,
        high=121 / 169 + 1e-6,
    ),
    "sweep_eigenvector": Expected(
        "sweeps of coordinate descent from an eigenvector of the rotated quadratic, kappa 12: more "
        "than one, for it is a start on the first coordinate's axis that needs a single sweep",
        _DESCENT,
        low=2,
    ),
    "sweep_axis": Expected(
        "sweeps of coordinate descent from a start on the first coordinate's axis, rotated by 45 "
        "degrees, kappa 12",
        _DESCENT,
        low=1,
        high=1,
    ),
    "rotation": Expected(
        "largest distance between the iterates of gradient descent on the rotated quadratic and "
        "the rotated iterates, 100 steps, kappa 4 and 12",
        "lecture on optimisation and regularisation: rotated quadratic",
        high=1e-12,
    ),
    "hessian": Expected(
        "largest distance between the Hessian of x^T A x and 2 A: the lecture shows A itself, "
        "which has the same condition number",
        "lecture on optimisation and regularisation: diagonal and rotated quadratic",
        high=1e-12,
    ),
    "conventions": Expected(
        "distance between the iterates of the velocity and of the accumulator form of momentum at "
        "a constant rate, over |x_0|",
        _MOMENTUM,
        high=1e-12,
    ),
    "conventions_decay": Expected(
        "the same distance when the rate falls to a hundredth: the two forms differ under a "
        "schedule",
        _MOMENTUM,
        low=1e-3,
    ),
    "effective_0.9": Expected(
        "displacement per step over rate x gradient, constant gradient, momentum 0.9: 1 / (1 - mu),"
        " the sum of the weights, which an average would have at 1",
        _MOMENTUM,
        low=9.99,
        high=10.01,
    ),
    "effective_0.99": Expected(
        "displacement per step over rate x gradient, constant gradient, momentum 0.99",
        _MOMENTUM,
        low=99.9,
        high=100.1,
    ),
    "momentum_0.9": Expected(
        "steps with momentum 0.9 over without, each at its best rate, kappa 1,000",
        "lecture on optimisation, part 2: 0.9 or 0.99 when badly conditioned",
        high=0.1,
    ),
    "momentum_0.99": Expected(
        "steps with momentum 0.99 over with 0.9, each at its best rate, kappa 100,000",
        "lecture on optimisation, part 2: 0.9 or 0.99 when badly conditioned",
        high=0.25,
    ),
    "momentum_excess": Expected(
        "steps with momentum 0.99 over without any, each at its best rate, kappa 12: momentum "
        "above the best one costs steps",
        _POLYAK,
        low=5,
    ),
}
