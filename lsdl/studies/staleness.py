"""Validation accuracy of an asynchronous parameter server, by how stale its gradients are.

One replica of the server, every gradient taken at the parameters of `staleness` updates ago. What
the answer hangs on and papers leave open is fixed here: the digits standardised pixel by pixel, a
64-128-10 ReLU net with He's initialisation, batches of 32, 400 updates; Adagrad as Dean et al.
have it, its accumulator started at 0 and without an epsilon, so that its first step is the rate
itself in every weight. `Adagrad 0.02 from 0.1` starts it at optax's 0.1, and a second net has two
hidden layers: both are drawn, and no claim is made of them. The second net was added when it had
been seen that the first one stands a staleness of 16 better than expected.

Shape letters: L lags, S seeds, T updates, B batch.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl import plots
from lsdl.analysis.parameter_server import simulate
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Gradients a few updates old do no harm, much older ones ruin plain SGD and momentum, and "
    "Adagrad stands more of them."
)
SOURCE = (
    "Lecture: distributed training, parameter server; "
    "Dean et al. 2012, Large scale distributed deep networks"
)
_DEAN = "Dean et al. 2012, section 4.1"
EXPECTED = {
    "mild": Expected(
        "largest loss of validation accuracy, in points, at a staleness of 1 or 4 against 0, over "
        "SGD 0.05, SGD 0.2, momentum and Adagrad",
        _DEAN,
        high=1.5,
    ),
    "sgd_16": Expected(
        "validation accuracy in percent of SGD 0.2 at a staleness of 16", _DEAN, high=20.0
    ),
    "momentum_16": Expected(
        "validation accuracy in percent of momentum 0.02 at a staleness of 16", _DEAN, high=20.0
    ),
    "adagrad_16": Expected(
        "loss of validation accuracy, in points, of Adagrad 0.02 at a staleness of 16 against 0",
        f"{_DEAN}: Adagrad greatly increases robustness",
        high=1.0,
    ),
    "adagrad_64": Expected(
        "validation accuracy, in points, of Adagrad 0.02 above SGD 0.05 at a staleness of 64",
        f"{_DEAN}: Adagrad greatly increases robustness",
        low=20.0,
    ),
}
STALENESS = (0, 1, 4, 16, 64)
OPTIMIZERS = {
    "SGD 0.05": functools.partial(optax.sgd, 0.05),
    "SGD 0.2": functools.partial(optax.sgd, 0.2),
    "momentum 0.02": functools.partial(optax.sgd, 0.02, 0.9),
    "Adagrad 0.02": functools.partial(optax.adagrad, 0.02, initial_accumulator_value=0.0, eps=0.0),
    "Adagrad 0.02 from 0.1": functools.partial(optax.adagrad, 0.02, initial_accumulator_value=0.1),
}
CLAIMED = tuple(OPTIMIZERS)[:4]
NETS = {(128,): tuple(OPTIMIZERS), (128, 128): ("SGD 0.2", "momentum 0.02", "Adagrad 0.02")}
BATCH, UPDATES = 32, 400
BLOCK = 10  # updates that a point of a loss curve is the mean of
LARGEST = 1e3  # nats: the loss of a diverged run


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each optimiser; at full scale the synchronous run to compare with."""
    if scale == "full":
        published = (
            "none on these data; Dean et al. 2012, figure 4: on ImageNet-21k Downpour with 200 "
            "replicas and Adagrad is the fastest to 16% below 2,000 cores"
        )
        return [Cell("synchronous", config="imagenet_resnet50:8k", published=published)]
    return [
        Cell(
            f"{name.lower().replace(' ', '-')}-{len(hidden)}-hidden",
            {
                "optimizer": name,
                "hidden": list(hidden),
                "staleness": list(STALENESS),
                "batch_size": BATCH,
                "updates": UPDATES,
                "seeds": seeds,
            },
        )
        for hidden, names in NETS.items()
        for name in names
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """`accuracy`: percent of valid, by staleness and seed; `loss`: seeds' mean, by staleness."""
    given = cell.settings
    train, valid = digits.load()
    net = digits.Classifier(*given["hidden"])
    shape = {"size": given["batch_size"], "steps": given["updates"]}
    id_STB = np.stack(
        [digits.batches(seed, len(train.label_N), **shape) for seed in range(given["seeds"])]
    )

    def run(lag, params, id_TB):
        found = simulate(
            params,
            id_TB[:, None],
            loss=lambda params, ids: net.loss(params, digits.rows(train, ids)),
            optimizer=OPTIMIZERS[given["optimizer"]](),
            joined=1,
            staleness=max(given["staleness"]),
            lag=lag,
        )
        return net.accuracy(found.params, valid), found.loss_RN[:, 0]

    over_both = jax.jit(jax.vmap(jax.vmap(run, (None, 0, 0)), (0, None, None)))
    params_S = net.init(digits.keys(given["seeds"]))
    accuracy, loss_LST = over_both(jnp.array(given["staleness"]), params_S, id_STB)
    loss_LT = np.nan_to_num(np.mean(loss_LST, 1), nan=LARGEST)
    blocks = np.minimum(loss_LT, LARGEST).reshape(len(loss_LT), -1, BLOCK).mean(-1)
    return {"accuracy": (100 * np.array(accuracy)).tolist(), "loss": blocks.tolist()}


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Differences are taken seed by seed."""
    accuracy = _accuracy(table)
    drops = {
        (name, staleness): accuracy[name, 0] - accuracy[name, staleness]
        for name in CLAIMED
        for staleness in (1, 4, 16)
    }
    mild = [drop for (_, staleness), drop in drops.items() if staleness <= 4]
    return judged(
        EXPECTED,
        {
            "mild": max(mild, key=np.mean),
            "sgd_16": accuracy["SGD 0.2", 16],
            "momentum_16": accuracy["momentum 0.02", 16],
            "adagrad_16": drops["Adagrad 0.02", 16],
            "adagrad_64": accuracy["Adagrad 0.02", 64] - accuracy["SGD 0.05", 64],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Accuracy by staleness, and the loss over 400 updates at a staleness of 16."""
    by_staleness = [
        plots.lines(
            _series(_accuracy(table, hidden)),
            title=title,
            x="staleness + 1, in updates",
            y="validation accuracy, %",
            logx=True,
            levels={"chance": 10.0},
            alt="Accuracy is the same for a staleness up to 4 and falls beyond.",
        )
        for hidden, title in ((1, "Stale gradients: fine, until they are not"), (2, "a deeper net"))
    ]
    at_16 = {
        row["optimizer"]: row["loss"][STALENESS.index(16)]
        for row in table
        if len(row["hidden"]) == 1
    }
    over_time = plots.lines(
        {name: (BLOCK * np.arange(1, len(loss) + 1), loss) for name, loss in at_16.items()},
        title="16 updates old",
        x="update",
        y="training loss, nats",
        logy=True,
        alt="Training loss over the updates at a staleness of 16.",
    )
    return {"staleness": plots.panels([*by_staleness, over_time], title="A parameter server")}


def _series(accuracy: Mapping[tuple[str, int], np.ndarray]) -> dict[str, tuple]:
    """By optimiser: the mean and the seeds' range at each staleness + 1."""
    series = {}
    for name in dict.fromkeys(name for name, _ in accuracy):
        values = [accuracy[name, staleness] for staleness in STALENESS]
        ends = np.transpose([(v.min(), v.max()) for v in values])
        series[name] = ([s + 1 for s in STALENESS], [v.mean() for v in values], *ends)
    return series


def _accuracy(table, hidden: int = 1) -> dict[tuple[str, int], np.ndarray]:
    """(optimiser, staleness) -> accuracy by seed, of the net with so many hidden layers."""
    return {
        (row["optimizer"], staleness): np.array(accuracy)
        for row in table
        if len(row["hidden"]) == hidden
        for staleness, accuracy in zip(row["staleness"], row["accuracy"], strict=True)
    }
