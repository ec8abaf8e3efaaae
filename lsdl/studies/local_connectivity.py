"""Nets of the size that the task asks for: block-diagonal layers, the smallest width, and the error
of an estimate from folds.

Shape letters: B batch, T steps, S seeds, G groups, I inputs and O outputs of a group, D all inputs,
F features or units, C classes, N examples, W widths, P pairs or partitions, K folds.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl import plots
from lsdl.analysis import blocks, descent
from lsdl.data.folds import folds
from lsdl.data.readers import EVALUATION, generator
from lsdl.optim.groups import path
from lsdl.planner.count import count
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Where inputs interact within groups alone, block-diagonal layers do the work of dense ones "
    "for a fraction of the products, and where groups interact they cannot; a task has a width "
    "that is enough."
)
SOURCE = "Lectures: local connectivity, right-sized networks, cross-validation"
_LOCAL = "lecture on optimisation, part 2: local connectivity, W = blockdiag(W_A, W_B)"
_SIZE = "lecture on optimisation, part 2: right-sized networks"
_FOLDS = "first lecture: cross-validation; Kohavi 1995"
EXPECTED = {
    "dense_products": Expected(
        "multiply-adds of a dense layer of 8 inputs and 4 units, counted in its program",
        _LOCAL,
        low=32,
        high=32,
    ),
    "block_products": Expected(
        "multiply-adds of two blocks of 4 inputs and 2 units, counted in the program",
        _LOCAL,
        low=16,
        high=16,
    ),
    "equality": Expected(
        "largest distance between the outputs of the blocks, concatenated (the lecture adds them), "
        "and of the dense layer with zeros outside the blocks, float64",
        _LOCAL,
        high=1e-12,
    ),
    "local_task": Expected(
        "validation error of the dense net less the block-diagonal one, share of the targets' "
        "variance, where the target is a sum over two groups of inputs",
        _LOCAL,
        low=-0.02,
    ),
    "long_range_task": Expected(
        "validation error of the block-diagonal net, share of the targets' variance, where the "
        "target is the product of one input of each group",
        _LOCAL,
        low=0.5,
    ),
    "long_range_dense": Expected(
        "validation error of the dense net on that target", _LOCAL, high=0.2
    ),
    "enough": Expected(
        "smallest width of 1, 2, 4, ... 128 whose net reaches 95% on the validation digits "
        "(none as 1,024)",
        _SIZE,
        high=32,
    ),
    "more": Expected(
        "validation accuracy in points of width 128 less that of the smallest that is enough",
        _SIZE,
        high=3,
    ),
    "folds": Expected(
        "examples that are not held out exactly once, over 10 folds of the training digits",
        _FOLDS,
        low=0,
        high=0,
    ),
    "spread": Expected(
        "standard deviation over 5 partitions of the mean of 10 folds' accuracy, over that of a "
        "single fold's",
        _FOLDS,
        high=0.7,
    ),
    "cost": Expected(
        "examples seen in training for a 10-fold estimate over those for one held-out fold",
        "first lecture: cross-validation is expensive",
        low=10,
        high=10,
    ),
}

GROUPS, INPUTS, OUTPUTS = 2, 4, 2  # the lecture's layer: 8 inputs, 4 units
HIDDEN, STEPS, BATCH, RATE, VALID = 32, 2_000, 64, 3e-3, 2_000  # units of a group
TASKS = {"local": ((0, 1), (4, 5)), "long_range": ((0, 4),)}  # which inputs are multiplied
WIDTHS = (1, 2, 4, 8, 16, 32, 64, 128)
ENOUGH, NONE = 0.95, 1_024
DIGITS = {"size": 64, "epochs": 20, "rate": 0.05, "momentum": 0.9}
FOLDS, PARTITIONS, PENALTY = 10, 5, 10.0


def cells(scale: str, seeds: int) -> list[Cell]:
    """The layers, the two tasks, the widths and the folds; at full scale nets of several sizes."""
    if scale == "full":
        errors = {"20": 8.75, "32": 7.51, "44": 7.17, "56": 6.97, "110": 6.43}
        return [
            Cell(
                f"resnet-{depth}",
                {"layers": int(depth)},
                f"cifar10_resnet:{depth}",
                published=f"test error {error}% (He et al. 2016, table 6)",
            )
            for depth, error in errors.items()
        ]
    return [Cell(id, {"seeds": seeds}) for id in ("layers", "tasks", "widths", "folds")]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Counts, and errors or accuracies by seed."""
    kinds = {"layers": _layers, "tasks": _tasks, "widths": _widths, "folds": _folds}
    return kinds[cell.id](cell.settings["seeds"])


def _layers(seeds: int) -> dict[str, Any]:
    """Products of both forms of a layer, and how far their outputs are apart by seed."""
    with jax.enable_x64(True):
        apart = []
        for seed in range(seeds):
            draw = generator(seed, EVALUATION, 0, 0)
            x_BD = jnp.asarray(draw.standard_normal((BATCH, GROUPS * INPUTS)))
            w_GIO = jnp.asarray(draw.standard_normal((GROUPS, INPUTS, OUTPUTS)))
            w_DF = blocks.block_diagonal(w_GIO)
            apart.append(float(abs(blocks.block_dense(x_BD, w_GIO) - x_BD @ w_DF).max()))
        one = x_BD[:1]
        return {
            "apart": apart,
            "dense": products(jnp.matmul, one, w_DF),
            "blocks": products(blocks.block_dense, one, w_GIO),
        }


def products(layer: Callable, *arguments: jax.Array) -> int:
    """Multiply-adds of `layer(*arguments)`, counted in its program."""
    return count(jax.make_jaxpr(layer)(*arguments).jaxpr).total() // 2


def _tasks(seeds: int) -> dict[str, Any]:
    """Validation errors by task and seed, share of the targets' variance, and products."""
    size = GROUPS * INPUTS
    draws = [generator(seed, EVALUATION, 1, 0) for seed in range(seeds)]
    x_STBD = np.stack([draw.standard_normal((STEPS, BATCH, size)) for draw in draws])
    valid_SND = np.stack([draw.standard_normal((VALID, size)) for draw in draws])
    x_STBD, valid_SND = (jnp.asarray(x, jnp.float32) for x in (x_STBD, valid_SND))
    nets = {"dense": (1, size, GROUPS * HIDDEN), "blocks": (GROUPS, INPUTS, HIDDEN)}
    row: dict[str, Any] = {}
    for name, (groups, inputs, hidden) in nets.items():
        shapes = (groups, inputs, hidden), (groups, hidden, hidden), (1, groups * hidden, 1)

        def error(key, x_TBD, valid_ND, index_P2, shapes=shapes):
            weights = [
                jax.random.normal(jax.random.fold_in(key, i), shape) * math.sqrt(2 / shape[1])
                for i, shape in enumerate(shapes)
            ]

            def loss(params, x_BD):
                return ((_output(params, x_BD) - _target(x_BD, index_P2)) ** 2).mean()

            params = [(w_GIO, jnp.zeros(w_GIO.shape[0] * w_GIO.shape[2])) for w_GIO in weights]
            tx = optax.adam(RATE)
            (params, _), _ = descent.descend(
                tx, jax.grad(loss), params, x_TBD, record=descent.nothing
            )
            return loss(params, valid_ND) / jnp.var(_target(valid_ND, index_P2))

        one = jax.jit(jax.vmap(error, (0, 0, 0, None)))
        for task, pairs in TASKS.items():
            # One shape for both tasks is one program: a pair twice counts half each time.
            index_P2 = jnp.array(pairs * (2 // len(pairs)))
            found_S = one(digits.keys(seeds), x_STBD, valid_SND, index_P2)
            row[f"{task}_{name}"] = np.asarray(found_S).tolist()
        row[f"products_{name}"] = sum(math.prod(shape) for shape in shapes)
    return row


def _output(params, x_BD: jax.Array) -> jax.Array:
    """Of ReLU layers, the last one linear: `(B,)`."""
    for i, (w_GIO, b_F) in enumerate(params):
        x_BD = blocks.block_dense(x_BD, w_GIO) + b_F[None]
        x_BD = x_BD if i + 1 == len(params) else jax.nn.relu(x_BD)
    return x_BD[:, 0]


def _target(x_BD: jax.Array, index_P2: jax.Array) -> jax.Array:
    """The mean over pairs of inputs of their product."""
    return (x_BD[:, index_P2[:, 0]] * x_BD[:, index_P2[:, 1]]).mean(1)


def _widths(seeds: int) -> dict[str, Any]:
    """Validation accuracy by seed and width."""
    train, valid = digits.load()
    net = digits.Classifier(WIDTHS[-1])
    examples = len(train.label_N)
    shape = {"size": DIGITS["size"], "steps": DIGITS["epochs"] * (examples // DIGITS["size"])}
    id_STB = jnp.stack([digits.batches(seed, examples, **shape) for seed in range(seeds)])
    tx = optax.sgd(DIGITS["rate"], DIGITS["momentum"])

    def accuracy(params, id_TB, width):
        params = narrowed(params, width)
        gradient = lambda params, id_B: jax.grad(net.loss)(params, digits.rows(train, id_B))  # noqa: E731
        (params, _), _ = descent.descend(tx, gradient, params, id_TB, record=descent.nothing)
        return net.accuracy(params, valid)

    over_widths = jax.vmap(accuracy, (None, None, 0))
    run = jax.jit(jax.vmap(over_widths, (0, 0, None)))
    found_SW = run(net.init(digits.keys(seeds)), id_STB, jnp.array(WIDTHS))
    return {"accuracy": np.asarray(found_SW).tolist()}


def narrowed(params: Any, width: jax.Array) -> Any:
    """A net of one hidden layer whose units from `width` on are zero, and stay so in training.

    A unit without weights in and out has no gradient: one program trains all widths.
    """

    def kept(keys, x):
        name = path(keys)
        if name == "hidden_0/dense/kernel":
            return x * (jnp.arange(x.shape[1]) < width)[None]
        if name == "head/kernel":  # its weights are drawn for the inputs that are left
            return x * (jnp.arange(len(x)) < width)[:, None] * jnp.sqrt(len(x) / width)
        return x

    return jax.tree_util.tree_map_with_path(kept, params)


def _folds(seeds: int) -> dict[str, Any]:
    """Accuracies of a ridge classifier by seed, partition and fold; how often each is held out."""
    x_NF, label_N = descent.digits("train")
    x_NF, y_NC = descent.with_bias(x_NF), descent.one_hot(label_N)
    valid_NF, valid_N = descent.digits("valid")

    def fitted(ids):
        x, y = x_NF[ids], y_NC[ids]
        return np.linalg.solve(x.T @ x + PENALTY * np.eye(x.shape[1]), x.T @ y)

    def accuracy(w_FC, x_NF, label_N):
        return float(((x_NF @ w_FC).argmax(1) == label_N).mean())

    accuracies, missed, seen = [], [], 0
    for seed in range(seeds):
        partitions = [folds(label_N, FOLDS, seed=seed * PARTITIONS + i) for i in range(PARTITIONS)]
        accuracies.append(
            [
                [accuracy(fitted(kept), x_NF[held], label_N[held]) for kept, held in partition]
                for partition in partitions
            ]
        )
        held_N = [np.bincount(np.concatenate([h for _, h in p])) for p in partitions]
        missed.append(int(sum((times_N != 1).sum() for times_N in held_N)))
        seen = [len(kept) for kept, _ in partitions[0]]
    whole = accuracy(fitted(np.arange(len(x_NF))), descent.with_bias(valid_NF), valid_N)
    return {"accuracy": accuracies, "missed": missed, "seen": seen, "valid": whole}


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed where there is chance."""
    layers, tasks, widths, fold = (
        next(row for row in table if row["id"] == id)
        for id in ("layers", "tasks", "widths", "folds")
    )
    accuracy_SW = np.array(widths["accuracy"])
    place_S = [descent.first_below(-accuracy_W, -ENOUGH) for accuracy_W in accuracy_SW]
    more = [
        100 * (accuracy_W[-1] - accuracy_W[i]) if i < len(WIDTHS) else math.nan
        for accuracy_W, i in zip(accuracy_SW, place_S, strict=True)
    ]
    accuracy_SPK = np.array(fold["accuracy"])
    values = {
        "dense_products": layers["dense"],
        "block_products": layers["blocks"],
        "equality": layers["apart"],
        "local_task": np.array(tasks["local_dense"]) - tasks["local_blocks"],
        "long_range_task": tasks["long_range_blocks"],
        "long_range_dense": tasks["long_range_dense"],
        "enough": [WIDTHS[i] if i < len(WIDTHS) else NONE for i in place_S],
        "more": more,
        "folds": fold["missed"],
        "spread": accuracy_SPK.mean(2).std(1, ddof=1) / accuracy_SPK.std((1, 2), ddof=1),
        "cost": sum(fold["seen"]) / np.mean(fold["seen"]),
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """Errors of both nets on both tasks; accuracy against width; folds of each partition."""
    tasks, widths, fold = (
        next(row for row in table if row["id"] == id) for id in ("tasks", "widths", "folds")
    )
    bars = {
        f"{label} ({tasks[f'products_{name}']} products)": {
            task.replace("_", " "): plots.summary(100 * np.array(tasks[f"{task}_{name}"]))
            for task in TASKS
        }
        for name, label in (("dense", "dense"), ("blocks", "block-diagonal"))
    }
    accuracy_SW = 100 * np.array(widths["accuracy"])
    right = plots.lines(
        {"mean, least, most": (WIDTHS, *plots.summary(accuracy_SW))},
        title="A right-sized net for digits",
        x="hidden units",
        y="validation accuracy, %",
        logx=True,
        levels={"95%": 95},
    )
    accuracy_PK = 100 * np.array(fold["accuracy"]).reshape(-1, FOLDS)
    xs = np.arange(1, len(accuracy_PK) + 1)
    partitions = plots.scatter(
        {
            "single folds": (np.repeat(xs, FOLDS), accuracy_PK.ravel()),
            "mean of 10 folds": (xs, accuracy_PK.mean(1)),
        },
        title="Cross-validation of a ridge classifier",
        x="partition of the training digits",
        y="accuracy on the held-out fold, %",
        levels={"validation split": 100 * fold["valid"]},
    )
    return {
        "tasks": plots.bars(
            bars, title="Products within groups, and across", x="error, % of variance"
        ),
        "widths": right,
        "folds": partitions,
    }
