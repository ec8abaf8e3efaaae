"""Optimisers that are not gradient descent, each on a problem that suits it.

EM on the irises, evolution strategies and a genetic algorithm on a rotated quadratic and a small
net, Newton's method and coordinate descent on logistic regression.

Shape letters: N examples, F features, K components, C classes, D parameters, P population,
G generations, T steps, S seeds, B batch.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from lsdl import plots
from lsdl.analysis import descent, evolution, logistic, mixture
from lsdl.data.readers import EVALUATION, generator
from lsdl.optim import solvers
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Expectation-maximisation, evolution, coordinate descent and Newton's method work where they "
    "apply; where there is a gradient, what does without it needs far more evaluations."
)
SOURCE = (
    "Lectures: optimisers without gradients, coordinate descent, Newton's method; Dempster et al. "
    "1977 (EM); Schwefel 1981 (evolution strategies)"
)
_EM = "Dempster et al. 1977, theorem 1"
_EVOLUTION = "first lecture: evolution strategies, genetic algorithms"
_NEWTON = "lecture on optimisation and regularisation: Newton's method"
_NET = "64-8-10 net on digits; an evaluation is the loss, or its gradient, on 64 images"
EXPECTED = {
    "em": Expected(
        "smallest rise of the mean log-likelihood in an iteration of EM, in nats, 3 Gaussians on "
        "the iris measurements, 100 iterations",
        _EM,
        low=-1e-9,
    ),
    "em_clusters": Expected(
        "share of irises in the component that holds most of their species, best of the seeds' "
        "starts by likelihood",
        "first lecture: EM (Gaussian mixtures)",
        low=0.8,
    ),
    "es_quadratic": Expected(
        "loss after 300 generations of a (10, 70) evolution strategy over at the start, rotated "
        "quadratic in 10 dimensions, condition number 10",
        _EVOLUTION,
        high=1e-3,
    ),
    "ga_quadratic": Expected(
        "loss after 300 generations of a genetic algorithm of 70 over at the start, the same "
        "quadratic",
        _EVOLUTION,
        high=0.1,
    ),
    "es_net": Expected(
        f"best validation accuracy of the evolution strategy in percent, {_NET}",
        _EVOLUTION,
        low=80,
    ),
    "es_evaluations": Expected(
        "evaluations of the evolution strategy to 80% over those of SGD (infinite as 1e9)",
        _EVOLUTION,
        low=10,
    ),
    "ga_evaluations": Expected(
        "evaluations of the genetic algorithm to 80% over those of SGD (infinite as 1e9)",
        _EVOLUTION,
        low=10,
    ),
    "newton": Expected(
        "iterations of Newton's method to a gradient norm below 1e-8, logistic regression on "
        "breast_cancer, decay 1e-2",
        _NEWTON,
        high=15,
    ),
    "coordinates": Expected(
        "loss above the minimum after 100 sweeps of coordinate descent over at zero, the same "
        "regression",
        "lecture on optimisation and regularisation: coordinate descent",
        high=0.01,
    ),
    "gradient": Expected(
        "steps of gradient descent to a gradient norm below 1e-8, at most 10,000, over Newton's, "
        "the same regression",
        _NEWTON,
        low=10,
    ),
}

COMPONENTS, ITERATIONS = 3, 100
DIMS, CONDITION, GENERATIONS = 10, 10.0, 300
PARENTS, POPULATION = 10, 70
HIDDEN, BATCH, NET_GENERATIONS, SGD_STEPS, SGD_RATE, TARGET = 8, 64, 1_000, 500, 0.1, 0.8
GENETIC = {"elite": 2, "mutation": 0.2, "deviation": 0.1}
DECAY, SWEEPS, NEWTON_STEPS, GRADIENT_STEPS, SMALL = 1e-2, 100, 30, 10_000, 1e-8
INFINITE = 1e9


def cells(scale: str, seeds: int) -> list[Cell]:
    """A cell for each problem. At full scale nobody runs them."""
    if scale == "full":
        return [Cell("none", published="none: the lectures name these optimisers alone")]
    drawn = [Cell(id, {"seeds": seeds}) for id in ("iris", "quadratic", "net")]
    return [*drawn, Cell("regression", {"seeds": 1})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Courses by seed; the regression has no chance in it."""
    kinds = {"iris": _iris, "quadratic": _quadratic, "net": _net, "regression": _regression}
    return kinds[cell.id](cell.settings["seeds"])


def _iris(seeds: int) -> dict[str, Any]:
    """EM from `seeds` starts: the likelihoods, and the purest clusters' share."""
    x_NF, label_N = descent.examples("iris", "train")
    likelihood, share, assigned = [], [], []
    for seed in range(seeds):
        draw, found = generator(seed, EVALUATION, 0, 0), None
        while found is None:  # a start that collapses is drawn again
            start = mixture.start(x_NF, COMPONENTS, draw)
            found = mixture.fit(x_NF, start, iterations=ITERATIONS)
        component_N = mixture.expectation(found.mixture, x_NF)[0].argmax(1)
        likelihood.append(found.likelihood_T.tolist())
        share.append(matched(component_N, label_N))
        assigned.append(component_N.tolist())
    row = {"likelihood": likelihood, "share": share, "component": assigned}
    return row | {"label": label_N.tolist(), "petal": x_NF[:, 2:].tolist()}


def matched(component_N: np.ndarray, label_N: np.ndarray) -> float:
    """The share of examples in the component of their class, at the best pairing of both."""
    count_KC = np.array(
        [[(label_N[component_N == k] == c).sum() for c in range(3)] for k in range(3)]
    )
    pairings = itertools.permutations(range(3))
    return float(max(count_KC[range(3), list(p)].sum() for p in pairings) / len(label_N))


def _quadratic(seeds: int) -> dict[str, Any]:
    """Loss over the start's by generation, of the strategy, the algorithm and gradient descent."""
    value_D = jnp.geomspace(1.0, CONDITION, DIMS)

    def courses(key):
        keys = jax.random.split(key, 4)
        q_DD, _ = jnp.linalg.qr(jax.random.normal(keys[0], (DIMS, DIMS)))
        loss = lambda x_D, _: (value_D * (q_DD @ x_D) ** 2).sum()  # noqa: E731
        x_D = jax.random.normal(keys[1], (DIMS,))
        found = _evolved(loss, x_D, keys[2:], jnp.arange(GENERATIONS), lambda x_D: loss(x_D, None))
        tx = optax.sgd(1 / (1 + CONDITION))  # the best rate: the eigenvalues are 2 to 20
        gradient = lambda x_D, _: jax.grad(loss)(x_D, None)  # noqa: E731
        _, descent_G = descent.descend(
            tx, gradient, x_D, jnp.arange(GENERATIONS), record=lambda x_D: loss(x_D, None)
        )
        return jax.tree.map(lambda x: x / loss(x_D, None), {**found, "descent": descent_G})

    found = jax.jit(lambda keys_S: lax.map(courses, keys_S))(digits.keys(seeds))
    return {name: np.asarray(course_SG).tolist() for name, course_SG in found.items()}


def _evolved(loss, x_D, keys, batches, record) -> dict[str, jax.Array]:
    """The course of each kind of evolution from `x_D`."""
    for_strategy, for_genes = keys
    _, strategy_G = evolution.evolution_strategy(
        loss,
        x_D,
        for_strategy,
        batches,
        parents=PARENTS,
        offspring=POPULATION,
        deviation=0.1,
        record=record,
    )
    for_first, for_genes = jax.random.split(for_genes)
    shift_PD = 0.1 * jax.random.normal(for_first, (POPULATION, x_D.size))
    _, genetic_G = evolution.genetic_algorithm(
        loss, x_D[None] + shift_PD, for_genes, batches, **GENETIC, record=record
    )
    return {"strategy": strategy_G, "genetic": genetic_G}


def _net(seeds: int) -> dict[str, Any]:
    """Validation accuracy after each generation, and after each step of SGD."""
    train, valid = digits.load()
    net = digits.Classifier(HIDDEN)
    count = len(train.label_N)
    shape = {"size": BATCH, "steps": NET_GENERATIONS}
    id_STB = jnp.stack([digits.batches(seed, count, **shape) for seed in range(seeds)])

    def courses(args):
        params, key, id_TB = args
        x_D, unravel = ravel_pytree(params)
        loss = lambda x_D, id_B: net.loss(unravel(x_D), digits.rows(train, id_B))  # noqa: E731
        record = lambda x_D: net.accuracy(unravel(x_D), valid)  # noqa: E731
        found = _evolved(loss, x_D, jax.random.split(key), id_TB, record)
        tx, steps = optax.sgd(SGD_RATE), id_TB[:SGD_STEPS]
        _, found["descent"] = descent.descend(tx, jax.grad(loss), x_D, steps, record=record)
        return found

    keys_S = digits.keys(seeds)
    found = jax.jit(lambda args: lax.map(courses, args))((net.init(keys_S), keys_S, id_STB))
    return {name: np.asarray(course_ST).tolist() for name, course_ST in found.items()}


def _regression(seeds: int) -> dict[str, Any]:
    """Gradient norms and losses above the smallest, step by step (sweep by sweep)."""
    del seeds
    x_NF, label_N = descent.examples("breast_cancer", "train")
    x_NF = descent.with_bias((x_NF - x_NF.mean(0)) / x_NF.std(0))
    with jax.enable_x64(True):
        x_NF, y_NC = jnp.asarray(x_NF), jnp.asarray(descent.one_hot(label_N))
        loss = functools.partial(logistic.loss, x_BD=x_NF, y_BC=y_NC, decay=DECAY)
        zero_FC = jnp.zeros((x_NF.shape[1], y_NC.shape[1]), jnp.float64)
        rate = 1 / logistic.largest_curvature(x_NF, decay=DECAY)
        solvers_ = {
            "newton": (_minimising(solvers.newton(0.0, 4_096), loss), NEWTON_STEPS),
            "coordinates": (
                _minimising(solvers.coordinate_descent(0.0), loss),
                SWEEPS * zero_FC.size,
            ),
            "descent": (optax.sgd(rate), GRADIENT_STEPS),
        }

        @jax.jit
        def run():
            def record(w_FC):
                return loss(w_FC), jnp.linalg.norm(jax.grad(loss)(w_FC))

            gradient = lambda w_FC, _: jax.grad(loss)(w_FC)  # noqa: E731
            return loss(zero_FC), {
                name: descent.descend(tx, gradient, zero_FC, jnp.arange(steps), record=record)[1]
                for name, (tx, steps) in solvers_.items()
            }

        start, found = jax.tree.map(np.asarray, run())
    smallest = float(found["newton"][0].min())
    kept = {"newton": slice(None), "coordinates": slice(zero_FC.size - 1, None, zero_FC.size)}
    row: dict[str, Any] = {"start": float(start) - smallest}
    for name, (loss_T, norm_T) in found.items():
        part = kept.get(name, slice(None, None, 10))
        row[f"{name}_excess"] = (loss_T[part] - smallest).tolist()
        row[f"{name}_steps"] = descent.first_below(norm_T, SMALL) + 1
    return row


def _minimising(solver, loss: Callable) -> optax.GradientTransformation:
    """`solver` with the gradient function that it asks the training step for."""
    solver = optax.chain(solver, optax.scale(-1.0))

    def update(updates, state, params=None):
        return solver.update(updates, state, params, grad_fn=jax.grad(loss))

    return optax.GradientTransformation(solver.init, update)


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed where there is chance."""
    rows = {row["id"]: row for row in table}
    iris, quadratic, net, regression = (
        rows[id] for id in ("iris", "quadratic", "net", "regression")
    )
    likelihood_ST = np.array(iris["likelihood"])

    def evaluations(name):
        each = 1 if name == "descent" else POPULATION
        return np.array([each * reached(course_T) for course_T in net[name]])

    values = {
        "em": np.diff(likelihood_ST, axis=1).min(),
        "em_clusters": iris["share"][int(likelihood_ST[:, -1].argmax())],
        "es_quadratic": np.array(quadratic["strategy"])[:, -1],
        "ga_quadratic": np.array(quadratic["genetic"])[:, -1],
        "es_net": 100 * np.array(net["strategy"]).max(1),
        "es_evaluations": np.minimum(evaluations("strategy") / evaluations("descent"), INFINITE),
        "ga_evaluations": np.minimum(evaluations("genetic") / evaluations("descent"), INFINITE),
        "newton": regression["newton_steps"],
        "coordinates": regression["coordinates_excess"][-1] / regression["start"],
        "gradient": regression["descent_steps"] / regression["newton_steps"],
    }
    return judged(EXPECTED, values)


def reached(accuracy_T: Sequence[float]) -> float:
    """The first step with `TARGET`, from 1; infinite if there is none."""
    step = descent.first_below(-np.array(accuracy_T), -TARGET)
    return step + 1 if step < len(accuracy_T) else math.inf


def figure(table: Sequence[dict]) -> dict:
    """Each problem's course, against what it cost."""
    rows = {row["id"]: row for row in table}
    return {
        "em": _em(rows["iris"]),
        "evolution": _evolution(rows["quadratic"], rows["net"]),
        "regression": _courses(rows["regression"]),
    }


def _em(row: dict) -> plots.Figure:
    series = {f"start {i + 1}": (range(len(ys)), ys) for i, ys in enumerate(row["likelihood"])}
    axes = {"x": "iteration of EM", "y": "mean log-likelihood, nats"}
    course = plots.lines(series, title="Likelihood", **axes)
    best = int(np.argmax([course_T[-1] for course_T in row["likelihood"]]))
    petal_N2, component_N = np.array(row["petal"]), np.array(row["component"][best])
    clusters = {
        f"component {k + 1}": tuple(petal_N2[component_N == k].T) for k in range(COMPONENTS)
    }
    axes = {"x": "petal length, cm", "y": "petal width, cm"}
    found = plots.scatter(clusters, title="The likeliest mixture", **axes)
    alt = "The likelihood rises in each iteration; the components are nearly the species."
    return plots.panels([course, found], title="Three Gaussians on the irises", alt=alt)


def _evolution(quadratic: dict, net: dict) -> plots.Figure:
    names = {
        "strategy": "evolution strategy",
        "genetic": "genetic algorithm",
        "descent": "gradient descent",
    }

    def costs(row, times):
        for name, label in names.items():
            course_T = times * np.mean(row[name], 0)
            each = 1 if name == "descent" else POPULATION
            yield label, ((1 + np.arange(len(course_T))) * each, course_T)

    axes = {"x": "evaluations of the loss or its gradient", "logx": True}
    first = plots.lines(
        {label: (xs, np.maximum(ys, 1e-12)) for label, (xs, ys) in costs(quadratic, 1)},
        title="Rotated quadratic, 10 dimensions",
        y="loss, share of the start, 1e-12 at least",
        logy=True,
        **axes,
    )
    second = plots.lines(
        dict(costs(net, 100)),
        title="64-8-10 net on digits",
        y="validation accuracy, %",
        levels={"80%": 80},
        **axes,
    )
    alt = "Evolution gets there with tens to hundreds of times the evaluations of gradient descent."
    return plots.panels([first, second], title="Evolution beside the gradient", alt=alt)


def _courses(row: dict) -> plots.Figure:
    labels = {
        "newton": "Newton's method",
        "coordinates": "coordinate descent, sweeps",
        "descent": "gradient descent",
    }
    every = {"newton": 1, "coordinates": 1, "descent": 10}  # steps between two values
    courses = {}
    for name, label in labels.items():
        excess_T = np.array(row[f"{name}_excess"])
        excess_T = np.where(excess_T > 1e-14, excess_T, np.nan)  # rounding is left out
        courses[label] = (1 + every[name] * np.arange(len(excess_T)), excess_T)
    return plots.lines(
        courses,
        title="Logistic regression on breast_cancer",
        x="step",
        y="loss above the minimum, nats",
        logx=True,
        logy=True,
    )
