"""What the condition number costs gradient descent, heavy ball and coordinate descent.

Shape letters: D dims, T steps, K condition numbers.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl.analysis import descent, quadratic
from lsdl.studies.claim import Cell, Claim, Expected, judged

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

KAPPAS = np.geomspace(2, 1e6, 40)
MOMENTA = {"momentum 0": 0.0, "momentum 0.9": 0.9, "momentum 0.99": 0.99}
TARGET = 1e-6


def cells(scale: str, seeds: int) -> list[Cell]:
    """Two planes, a spectrum and the formulas of momentum; exact, so that no seed plays a part."""
    if scale == "full":
        settings = {"kind": "spectrum", "kappa": 100, "dims": 1_000_000}
        return [Cell("spectrum", settings, published="0.980 and 0.818 a step (Polyak 1964)")]
    planes = [Cell(f"plane-{k}", {"kind": "plane", "kappa": k, "dims": 2}) for k in (4, 12)]
    spectrum = Cell("spectrum", {"kind": "spectrum", "kappa": 100, "dims": 1_000})
    return [*planes, spectrum, Cell("momentum", {"kind": "momentum", "kappa": 12, "dims": 2})]


def measure(cell: Cell, folder: Path) -> dict:
    """Steps, contractions and paths; float64 throughout."""
    kappa = cell.settings["kappa"]
    with jax.enable_x64(True):
        if cell.settings["kind"] == "plane":
            return _plane(kappa)
        if cell.settings["kind"] == "spectrum":
            return _spectrum(kappa, cell.settings["dims"])
        return _momentum(kappa)


def _plane(kappa: float) -> dict:
    q_DD, a_DD = quadratic.rotation(45), quadratic.rotated(kappa, 45)
    start_D, plain_DD = np.array([1.0, 1.0]), quadratic.rotated(kappa, 0)
    rate, momentum = quadratic.heavy_ball(2.0, 2.0 * kappa)
    gd = optax.sgd(1 / (kappa + 1))
    path_TD, ball_TD, plain_TD = (
        _path(tx, a, start, 150)
        for tx, a, start in (
            (gd, a_DD, q_DD @ start_D),
            (optax.sgd(rate, momentum), a_DD, q_DD @ start_D),
            (gd, plain_DD, start_D),
        )
    )
    hessian_DD = jax.hessian(lambda x_D: x_D @ a_DD @ x_D)(start_D)
    sweeps = {
        "sweeps_plain": (plain_DD, [1.0, 0.5]),
        "sweeps_rotated": (a_DD, [1.0, 0.5]),
        "sweeps_eigenvector": (a_DD, [1.0, 1.0]),
        "sweeps_axis": (a_DD, [1.0, 0.0]),
    }
    descents = {
        name: quadratic.coordinate_descent(a, np.array(x), sweeps=60)
        for name, (a, x) in sweeps.items()
    }
    norm_S = np.linalg.norm(descents["sweeps_rotated"][::2], axis=1)
    coordinate_TD = quadratic.coordinate_descent(a_DD, q_DD @ start_D, sweeps=60)
    row = {
        "steps_gd": _steps(path_TD),
        "steps_heavy_ball": _steps(ball_TD),
        "rotation_error": float(np.abs(path_TD - plain_TD @ q_DD.T)[:101].max()),
        "hessian_error": float(np.abs(hessian_DD - 2 * a_DD).max()),
        "contraction": float(norm_S[6] / norm_S[5]),
    }
    row |= {name: _steps(path[::2]) for name, path in descents.items()}
    paths = {"gd": path_TD, "heavy_ball": ball_TD, "coordinate": coordinate_TD}
    return row | {f"path_{name}": path[:121].tolist() for name, path in paths.items()}


def _spectrum(kappa: float, dims: int) -> dict:
    h_D = np.geomspace(1, kappa, dims)
    rate, momentum = quadratic.heavy_ball(1, kappa)
    norms = {
        name: np.asarray(_norms(tx, h_D, 1_000))
        for name, tx in (
            ("gd", optax.sgd(2 / (1 + kappa))),
            ("heavy_ball", optax.sgd(rate, momentum)),
        )
    }
    return {f"steps_{n}": descent.first_below(v / v[0], TARGET) for n, v in norms.items()} | {
        f"norms_{name}": norm_T.tolist() for name, norm_T in norms.items()
    }


def _momentum(kappa: float) -> dict:
    a_DD, start_D = quadratic.rotated(kappa, 45), np.array([1.0, 0.5])
    falling = optax.exponential_decay(0.02, 200, 0.01)

    def distance(rate):
        accumulator_TD = _path(optax.sgd(rate, 0.9), a_DD, start_D, 200)
        inside = optax.chain(optax.scale_by_learning_rate(rate), optax.trace(0.9))
        velocity_TD = _path(inside, a_DD, start_D, 200)
        away_T = np.linalg.norm(accumulator_TD - velocity_TD, axis=1)
        return float(away_T.max() / np.linalg.norm(start_D))

    steps = {
        name: [math.log(TARGET) / math.log(quadratic.momentum_rate(k, mu)) for k in KAPPAS]
        for name, mu in MOMENTA.items()
    }
    at = {
        f"{name} at {k}": math.log(TARGET) / math.log(quadratic.momentum_rate(k, mu))
        for name, mu in MOMENTA.items()
        for k in (12, 1_000, 100_000)
    }
    best = [math.log(TARGET) / math.log((k**0.5 - 1) / (k**0.5 + 1)) for k in KAPPAS]
    return (
        steps
        | at
        | {
            "kappas": KAPPAS.tolist(),
            "best momentum": best,
            "distance_constant": distance(0.02),
            "distance_falling": distance(falling),
            "effective_0.9": _effective(0.9),
            "effective_0.99": _effective(0.99),
        }
    )


def _path(tx: optax.GradientTransformation, a_DD, start_D, steps: int) -> np.ndarray:
    """The iterates on x^T A x, the start included."""
    gradient = jax.grad(lambda x_D: x_D @ a_DD @ x_D)
    run = jax.jit(lambda x_D: descent.descend(tx, lambda x, _: gradient(x), x_D, jnp.arange(steps)))
    return np.concatenate([start_D[None], run(jnp.asarray(start_D))[1]])


def _norms(tx: optax.GradientTransformation, h_D, steps: int) -> jax.Array:
    """|x| at each step on half the sum of h x^2, from ones."""
    h_D = jnp.asarray(h_D)

    @jax.jit
    def run(x_D):
        record = dict(record=jnp.linalg.norm)
        return descent.descend(tx, lambda x, _: h_D * x, x_D, jnp.arange(steps), **record)[1]

    x_D = jnp.ones_like(h_D)
    return jnp.concatenate([jnp.linalg.norm(x_D)[None], run(x_D)])


def _steps(path_TD: np.ndarray) -> int:
    norm_T = np.linalg.norm(path_TD, axis=1)
    return descent.first_below(norm_T / norm_T[0], TARGET)


def _effective(momentum: float) -> float:
    """Displacement of the 5,000th step under a gradient of 1, in units of the rate."""
    tx = optax.sgd(0.1, momentum)
    place_T = descent.descend(tx, lambda x, _: -jnp.ones_like(x), jnp.zeros(()), jnp.arange(5_000))[
        1
    ]
    return float(place_T[-1] - place_T[-2]) / 0.1


def claims(table: Sequence[dict]) -> list[Claim]:
    """Two planes against Polyak's and the sweep's closed forms; momentum at its best rates."""
    planes = {row["kappa"]: row for row in table if row["kind"] == "plane"}
    (spectrum,) = (row for row in table if row["kind"] == "spectrum")
    (momentum,) = (row for row in table if row["kind"] == "momentum")
    values = {
        "heavy_ball_spectrum": spectrum["steps_heavy_ball"] / spectrum["steps_gd"],
        "sweeps_plain": max(row["sweeps_plain"] for row in planes.values()),
        "sweep_eigenvector": planes[12]["sweeps_eigenvector"],
        "sweep_axis": planes[12]["sweeps_axis"],
        "rotation": max(row["rotation_error"] for row in planes.values()),
        "hessian": max(row["hessian_error"] for row in planes.values()),
        "conventions": momentum["distance_constant"],
        "conventions_decay": momentum["distance_falling"],
        "effective_0.9": momentum["effective_0.9"],
        "effective_0.99": momentum["effective_0.99"],
        "momentum_0.9": momentum["momentum 0.9 at 1000"] / momentum["momentum 0 at 1000"],
        "momentum_0.99": momentum["momentum 0.99 at 100000"] / momentum["momentum 0.9 at 100000"],
        "momentum_excess": momentum["momentum 0.99 at 12"] / momentum["momentum 0 at 12"],
    }
    for kappa, row in planes.items():
        values[f"gd_{kappa}"] = row["steps_gd"]
        values[f"heavy_ball_{kappa}"] = row["steps_heavy_ball"] / row["steps_gd"]
        values[f"sweep_{kappa}"] = row["contraction"]
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The three paths on the ellipses, how far they are from the minimum, and steps by kappa."""
    from lsdl import plots

    (plane,) = (row for row in table if row["kind"] == "plane" and row["kappa"] == 12)
    (momentum,) = (row for row in table if row["kind"] == "momentum")
    paths = {
        "gradient descent": np.array(plane["path_gd"]),
        "heavy ball": np.array(plane["path_heavy_ball"]),
        "coordinate descent": np.array(plane["path_coordinate"]),
    }
    turn_T = np.linspace(0, 2 * np.pi, 200)
    ring_TD = np.stack([np.cos(turn_T) / 12**0.5, np.sin(turn_T)], 1) @ quadratic.rotation(45).T
    rings = {f"loss {level:g}": (ring_TD * level**0.5).T.tolist() for level in (5, 1.5, 0.4)}
    maps = [
        plots.lines(
            {name: path[:40].T.tolist()} | rings,
            title=f"{name}, kappa 12",
            x="first coordinate",
            y="second coordinate",
        )
        for name, path in paths.items()
    ]
    # A sweep of coordinate descent moves twice, a step of the others once.
    away = {
        name: (np.arange(len(path)) / (2 if "coord" in name else 1), np.linalg.norm(path, axis=1))
        for name, path in paths.items()
    }
    kappas = momentum["kappas"]
    steps = {name: (kappas, momentum[name]) for name in (*MOMENTA, "best momentum")}
    title = "Kappa 12, rotated by 45 degrees"
    return {
        "paths": plots.panels(maps),
        "distance": plots.lines(
            away, title=title, x="steps, or sweeps", y="distance from the minimum", logy=True
        ),
        "kappa": plots.lines(
            steps,
            title="Steps to 1e-6, each at its best learning rate",
            x="condition number",
            y="steps",
            logx=True,
            logy=True,
        ),
    }
