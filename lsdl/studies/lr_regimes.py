"""Learning rates in units of 1 / lambda_max: too small, good, and too large.

Shape letters: N examples, D pixels, C classes, T steps, R rates.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl.analysis import descent
from lsdl.models.mlp import Mlp
from lsdl.state import stream
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Below 2 / lambda_max a larger learning rate is faster, above it a quadratic diverges; a "
    "network may first lower its own lambda_max."
)
SOURCE = (
    "Lectures: learning rate too small, good, too large; Lewkowycz et al. 2020, The large learning "
    "rate phase of deep learning: the catapult mechanism (arXiv:2003.02218)"
)
_FIGURE = "lecture on basics: learning rate too small, good, too large"
_CATAPULT = "Lewkowycz et al. 2020: 2 < rate x lambda_max < 4"
EXPECTED = {
    "small": Expected(
        "loss after 200 steps at 0.1 / lambda_max over at 0.5, tanh network on digits, squared "
        "error, full batch",
        _FIGURE,
        low=1 + 1e-6,
    ),
    "good": Expected("loss after 200 steps at 0.5 / lambda_max over at 1.0", _FIGURE, low=1 + 1e-6),
    "quadratic_1.99": Expected(
        "excess loss after 1,000 steps over before, least squares on digits at 1.99 / lambda_max",
        "lecture on optimisation, part 2: the rate's limit is 2 / lambda_max",
        high=0.01,
    ),
    "quadratic_2.01": Expected(
        "excess loss after 1,000 steps over before, least squares on digits at 2.01 / lambda_max",
        "lecture on optimisation, part 2: the rate's limit is 2 / lambda_max",
        low=100,
    ),
    "too_large": Expected(
        "loss after 200 steps over before at 8 / lambda_max, the network (infinite as 1e30)",
        _FIGURE,
        low=1,
    ),
    "catapult": Expected(
        "loss after 200 steps over before at 2.5 / lambda_max, the network: above the quadratic's "
        "limit, yet no divergence",
        _CATAPULT,
        high=1,
    ),
    "curvature": Expected(
        "lambda_max after 200 steps over before, at 2.5 / lambda_max, the network",
        _CATAPULT,
        high=1,
    ),
}

FACTORS = (0.1, 0.5, 1.0, 1.9, 2.5, 8.0)  # of 1 / lambda_max
STEPS = 200
SWEEP = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
INFINITE = 1e30


def cells(scale: str, seeds: int) -> list[Cell]:
    """A network for each seed, and the quadratic; at full scale a sweep of nine rates."""
    if scale == "full":
        published = {0.1: "test error 8.75% (He et al. 2016, table 6)"}
        return [
            Cell(
                f"rate-{rate:g}",
                {"rate": rate},
                "configs/cifar10_resnet.py:20",
                {"optim.schedule.peak": rate},
                published.get(rate, ""),
            )
            for rate in SWEEP
        ]
    networks = [
        Cell(f"network-s{seed}", {"kind": "network", "seed": seed}) for seed in range(seeds)
    ]
    return [Cell("quadratic", {"kind": "quadratic", "seed": 0}), *networks]


def measure(cell: Cell, folder: Path) -> dict:
    """Losses at every step and rate."""
    if cell.settings["kind"] == "quadratic":
        return _quadratic()
    return _network(cell.settings["seed"])


def _quadratic() -> dict:
    """Least squares on digits by gradient descent, in float64: loss above the smallest."""
    x_ND, label_N = descent.digits("train")
    x_ND = descent.with_bias(x_ND[:, x_ND.std(0) > 0])
    y_NC = descent.one_hot(label_N)
    best_DC = np.linalg.lstsq(x_ND, y_NC)[0]
    moment_DD = x_ND.T @ x_ND / len(x_ND)
    largest = float(np.linalg.eigvalsh(moment_DD)[-1])
    factors = (0.1, 1.0, 1.99, 2.01)

    def excess(off_DC):
        return jnp.sum(off_DC * (moment_DD @ off_DC))

    def run(factor, off_DC):
        # Half the squared error, whose Hessian is the second moments.
        tx = optax.sgd(factor / largest)
        gradient = lambda off_DC, _: moment_DD @ off_DC  # noqa: E731
        return descent.descend(tx, gradient, off_DC, jnp.arange(1_000), record=excess)[1]

    with jax.enable_x64(True):
        start = jnp.asarray(-best_DC)
        excess_RT = jax.jit(jax.vmap(run, (0, None)))(jnp.array(factors), start)
        share_RT = np.asarray(excess_RT / excess(start))
    return {"factors": list(factors), "losses": [[1.0, *row] for row in share_RT.tolist()]}


def _network(seed: int) -> dict:
    x_ND, label_N = descent.digits("train")
    x_ND, y_NC = jnp.asarray(x_ND, jnp.float32), jnp.asarray(descent.one_hot(label_N), jnp.float32)
    start, loss_RT, curvature, end = _courses(jax.random.key(seed), x_ND, y_NC)
    finite_RT = np.minimum(np.nan_to_num(loss_RT, nan=INFINITE, posinf=INFINITE), INFINITE)
    return {
        "factors": list(FACTORS),
        "losses": [[float(start), *row] for row in finite_RT.astype(float).tolist()],
        "curvature": float(curvature),
        "curvature_end": float(end),
    }


@jax.jit
def _courses(key: jax.Array, x_ND: jax.Array, y_NC: jax.Array) -> tuple[jax.Array, ...]:
    """Loss at the start, `loss_RT`, lambda_max at the start and after the catapult."""
    model = Mlp((32,), 10, "tanh")

    def loss(params):
        return ((model.apply({"params": params}, x_ND, train=False) - y_NC) ** 2).mean()

    params = model.init(stream(key, "init"), x_ND[:1], train=False)["params"]
    curvature = descent.largest_eigenvalue(loss, params, stream(key, "start"))

    def one(factor):
        tx = optax.sgd(factor / curvature)
        gradient = lambda params, _: jax.grad(loss)(params)  # noqa: E731
        return descent.descend(tx, gradient, params, jnp.arange(STEPS), record=loss)

    (ends, _), loss_RT = lax.map(one, jnp.array(FACTORS))
    catapult = jax.tree.map(lambda leaf: leaf[FACTORS.index(2.5)], ends)
    end = descent.largest_eigenvalue(loss, catapult, stream(key, "end"))
    return loss(params), loss_RT, curvature, end


def claims(table: Sequence[dict]) -> list[Claim]:
    """Ratios of losses between rates, and to the start's."""
    (quadratic,) = (row for row in table if row["kind"] == "quadratic")
    networks = [row for row in table if row["kind"] == "network"]

    def last(row, factor):
        return row["losses"][row["factors"].index(factor)][-1]

    def over_start(factor):
        return [last(row, factor) / row["losses"][0][0] for row in networks]

    values = {
        "small": [last(row, 0.1) / last(row, 0.5) for row in networks],
        "good": [last(row, 0.5) / last(row, 1.0) for row in networks],
        "quadratic_1.99": last(quadratic, 1.99),
        "quadratic_2.01": last(quadratic, 2.01),
        "too_large": over_start(8.0),
        "catapult": over_start(2.5),
        "curvature": [row["curvature_end"] / row["curvature"] for row in networks],
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The losses of each rate, on the quadratic and in the network."""
    from lsdl import plots

    networks = [row for row in table if row["kind"] == "network"]
    titles = {
        "quadratic": "Least squares on digits",
        "network": "A tanh network on digits, squared error",
    }
    figures = {}
    for kind, title in titles.items():
        row = networks[0] if kind == "network" else next(r for r in table if r["kind"] == kind)
        series = {
            f"{factor:g} / lambda_max": (list(range(len(losses))), _until(losses, 1e3))
            for factor, losses in zip(row["factors"], row["losses"], strict=True)
        }
        y = "loss" if kind == "network" else "excess loss, share of the start"
        figures[kind] = plots.lines(series, title=title, x="step", y=y, logy=True)
    return figures


def _until(losses: Sequence[float], bound: float) -> list[float]:
    """`losses` without what follows the first above `bound`."""
    above_T = np.cumsum(np.array(losses) > bound) > 1
    return np.where(above_T, np.nan, np.minimum(losses, bound)).tolist()
