"""The last lecture's example: one hidden layer of 100 ELUs by four optimisers at one rate.

The config is that of Fashion-MNIST. Here, on digits: the same file with other data, the batch of
1,024, the rate of 4e-4 and the number of updates, 530, that 10 epochs of Fashion-MNIST have.
Shape letters: S seeds, T steps, P points of a curve.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsdl import plots, sweep
from lsdl.experiment import opened
from lsdl.studies.claim import Cell, Claim, Expected, judged

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

CONFIG = "configs/fashion_mnist_mlp.py"
DIGITS = {
    "data.source": "digits",
    "data.train_split": "train",
    "data.valid_split": "valid",
    "data.test_split": "test",
    "total_steps": 530,
}
SGD = {"optim.name": "sgd"}
# Fields in place of the config's variants: runs of one file and seed share their batches.
RUNS = {
    "sgd": SGD,
    "sgd_10": SGD | {"optim.schedule.peak": 4e-3},
    "momentum": SGD | {"optim.momentum": 0.9},
    "adam": {"optim.name": "adam"},
    "adamw": {"optim.name": "adamw", "optim.weight_decay": 0.01},
}
LABELS = {"sgd": "SGD", "sgd_10": "SGD, 10 x the rate", "momentum": "momentum 0.9"}
LABELS |= {"adam": "Adam", "adamw": "AdamW"}
EVERY = 10  # steps of a point of the curve


def cells(scale: str, seeds: int) -> list[Cell]:
    """A run for each optimiser and seed; at full scale Fashion-MNIST itself."""
    if scale == "full":
        shown = "none: the lecture's notebook shows curves"
        return [
            Cell(name, {"optimizer": name}, f"{CONFIG}:{name}", {}, shown)
            for name in ("sgd", "momentum", "adam", "adamw")
        ]
    runs = [
        Cell(
            f"{name}-s{seed}",
            {"run": name, "seed": seed},
            CONFIG,
            DIGITS | fields | {"seed": seed},
        )
        for name, fields in RUNS.items()
        for seed in range(seeds)
    ]
    return [Cell("net", {"run": "net"}, CONFIG), *runs]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """The net's size; of a run valid accuracy in % and training losses."""
    if cell.settings["run"] == "net":
        return {"parameters": opened(cell.config, cell.overrides).num_parameters}
    run = sweep.train(cell.config, cell.overrides)
    loss_T = np.array(run.metrics_T["loss"], float)
    return {
        "accuracy": 100 * float(run.valid["accuracy"]),
        "valid_loss": float(run.valid["loss"]),
        "end_loss": float(loss_T[-EVERY:].mean()),
        "losses": loss_T.reshape(-1, EVERY).mean(1).tolist(),
    }


def _of(table: Sequence[Mapping[str, Any]], run: str, name: str) -> np.ndarray:
    """By seed."""
    rows = sorted((row for row in table if row["run"] == run), key=lambda row: row["seed"])
    return np.array([row[name] for row in rows])


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    loss = {run: _of(table, run, "end_loss") for run in RUNS}
    accuracy = {run: _of(table, run, "accuracy") for run in RUNS}
    (parameters,) = (row["parameters"] for row in table if row["run"] == "net")
    return judged(
        EXPECTED,
        {
            "parameters": parameters,
            "adam": accuracy["adam"],
            "adam_over_sgd": loss["adam"] / loss["sgd"],
            "adam_over_momentum": loss["adam"] / loss["momentum"],
            "momentum_over_sgd": loss["momentum"] / loss["sgd"],
            "ten_times": loss["momentum"] / loss["sgd_10"],
            "adamw_as_adam": accuracy["adamw"] - accuracy["adam"],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The optimisers' training losses, and where they end."""
    curves, ends = {}, {}
    for run, label in LABELS.items():
        loss_SP, accuracy_S = _of(table, run, "losses"), _of(table, run, "accuracy")
        steps = EVERY * (np.arange(loss_SP.shape[1]) + 0.5)
        curves[label] = (steps, loss_SP.mean(0), loss_SP.min(0), loss_SP.max(0))
        ends[label] = (accuracy_S.mean(), accuracy_S.min(), accuracy_S.max())
    left = plots.lines(
        curves,
        title="Training",
        x="update on 1,024 digits",
        y="training loss, nats",
        logy=True,
    )
    right = plots.bars(ends, title="After 530 updates", x="valid accuracy, %")
    alt = "Adam's and AdamW's losses fall the fastest, SGD's the slowest."
    title = "One rate of 4e-4, one hidden layer of 100 ELUs"
    return {"optimisers": plots.panels([left, right], title=title, alt=alt)}
