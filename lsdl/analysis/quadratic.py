"""The quadratics x^T A x that have closed forms: rotations, coordinate descent, rates of momentum.

Shape letters: D dims, S sweeps, R rates.
"""

import math

import numpy as np


def rotation(degrees: float) -> np.ndarray:
    """`q_DD`, by `degrees` in the plane."""
    angle = math.radians(degrees)
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def rotated(kappa: float, degrees: float) -> np.ndarray:
    """`a_DD` = Q diag(kappa, 1) Q^T in the plane; the Hessian of x^T A x is 2 A."""
    q_DD = rotation(degrees)
    return q_DD @ np.diag([kappa, 1.0]) @ q_DD.T


def coordinate_descent(a_DD: np.ndarray, x_D: np.ndarray, *, sweeps: int) -> np.ndarray:
    """The iterates of exact minimisation along one coordinate after the other, `(1 + S D, D)`."""
    x_D, path = x_D.copy(), [x_D.copy()]
    for _ in range(sweeps):
        for i in range(len(x_D)):
            x_D[i] -= a_DD[i] @ x_D / a_DD[i, i]
            path.append(x_D.copy())
    return np.stack(path)


def gradient_rate(kappa: float) -> float:
    """|x| after a step of gradient descent over before, at the best rate."""
    return (kappa - 1) / (kappa + 1)


def heavy_ball(low: float, high: float) -> tuple[float, float]:
    """The best rate and momentum for Hessian eigenvalues from `low` to `high`.

    Source: Polyak 1964.
    """
    root = math.sqrt(high / low)
    return 4 / (math.sqrt(low) + math.sqrt(high)) ** 2, ((root - 1) / (root + 1)) ** 2


def momentum_rate(kappa: float, momentum: float) -> float:
    """|x| after a step over before, in the long run, at the best rate for this `momentum`."""
    # A step maps (x_t, x_t-1) by a matrix with this characteristic polynomial at each eigenvalue h:
    # z^2 - (1 + momentum - rate h) z + momentum. The worst h is the smallest or the largest.
    rate_R = np.geomspace(1e-3, 1, 20_001)[:-1] * 2 * (1 + momentum) / kappa

    def radius(eigenvalue: float) -> np.ndarray:
        b_R = 1 + momentum - rate_R * eigenvalue
        root_R = np.sqrt(b_R.astype(complex) ** 2 - 4 * momentum)
        return np.maximum(abs(b_R + root_R), abs(b_R - root_R)) / 2

    return float(np.maximum(radius(1.0), radius(kappa)).min())
