"""Growing the batch in place of decaying the rate (Smith et al. 2018), by whole runs of lsdl.train.

A deep BatchNorm MLP on digits, SGD with momentum 0.9, 24 epochs, base batch 32. At a half and at
three quarters of the examples either the rate falls by a factor of 4, or the batch grows by it
through accumulation, so that BatchNorm sees microbatches of 32 in every arm.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np

from lsdl import plots
from lsdl.metrics import read_rows
from lsdl.studies.claim import Cell, Expected, judged

CLAIM = "Growing the batch does what decaying the rate does, with fewer updates."
SMITH = "Smith et al. 2018, sections 3 and 5"
SOURCE = f"Lecture on efficiency and distribution: K may grow during training; {SMITH}"

CONFIG = "configs/digits_bn_mlp.py"
EPOCHS, FACTOR, PARTS = 24.0, 4, 25
POINTS = (50.0, 75.0)  # percent of the examples
ARMS = {
    "decay": {
        "optim.schedule.name": "step",
        "optim.schedule.boundaries_percent": POINTS,
        "optim.schedule.step_factor": 1 / FACTOR,
    },
    "ramp": {"batch_ramp": tuple((p, FACTOR**i) for i, p in enumerate(POINTS, start=1))},
    "neither": {},
}

EXPECTED = {
    "accuracy": Expected(
        "points of valid accuracy between decaying the rate and growing the batch",
        SMITH,
        low=-1.0,
        high=1.0,
    ),
    "updates": Expected(
        "updates with the growing batch / updates with the decaying rate", SMITH, high=0.6
    ),
    "loss": Expected(
        "last training loss with the growing batch / with neither: the batch does decay the noise",
        SMITH,
        high=0.9,
    ),
    "like_decay": Expected(
        "log10 of the last training loss with the growing batch / with the decaying rate",
        SMITH,
        low=-0.5,
        high=0.5,
    ),
}


def cells(scale: str, seeds: int) -> list[Cell]:
    if scale == "full":
        fields = {"batch_size": 128, "optim.schedule.name": "constant"}
        step = fields | {
            "optim.schedule.name": "step",
            "optim.schedule.boundaries_percent": (30.0, 60.0, 80.0),
            "optim.schedule.step_factor": 0.2,
        }
        ramp = fields | {"batch_ramp": ((30.0, 5), (60.0, 25), (80.0, 125))}
        path = "configs/cifar10_wrn.py:16-4"
        of = "94.3 % test accuracy with either (Smith et al. 2018)"
        return [Cell("decay", {}, path, step, of), Cell("ramp", {}, path, ramp, of)]
    fields = {
        "optim.schedule.name": "constant",
        "total_epochs": EPOCHS,
        "log.every_steps": 1,
        "eval.every_epochs": 2.0,
        "log.tensorboard": False,
    }
    return [
        Cell(f"{arm}_s{seed}", {"arm": arm, "seed": seed}, CONFIG, fields | own | {"seed": seed})
        for arm, own in ARMS.items()
        for seed in range(seeds)
    ]


def measure(cell: Cell, folder: Path) -> dict:
    """The rows of a real run; a run that was stopped goes on."""
    given = [f"--config.{field}={value}" for field, value in cell.overrides.items()]
    run = folder / "run"
    command = [sys.executable, "-m", "lsdl.train", "--config", cell.config, "--workdir", str(run)]
    done = subprocess.run([*command, *given], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} left with {done.returncode}: {done.stderr}")
    rows = read_rows(run / "metrics.jsonl")
    train = [row for row in rows if row["split"] == "train"]
    seen = np.array([row["examples_seen"] for row in train])
    loss = np.array([row["loss"] for row in train])
    # Means over 4 percent of the examples at a time: six updates at the largest batch.
    part = np.digitize(seen, np.linspace(0, seen[-1], PARTS + 1), right=True) - 1
    over_parts = lambda x: [float(x[part == i].mean()) for i in range(PARTS)]  # noqa: E731
    last = [row for row in rows if row["split"] == "valid"][-1]
    end = loss[seen > 0.9 * seen[-1]].mean()
    return {
        "accuracy": 100 * last["accuracy"],
        "updates": train[-1]["step"],
        "examples": int(seen[-1]),
        "train_loss": float(end),
        "losses": over_parts(loss),
        "steps": over_parts(np.array([row["step"] for row in train])),
    }


def _of(table: list[dict], arm: str, name: str) -> np.ndarray:
    rows = [row for row in table if row["arm"] == arm]
    return np.array([row[name] for row in sorted(rows, key=lambda row: row["seed"])], float)


def claims(table: list[dict]):
    loss = {arm: _of(table, arm, "train_loss") for arm in ARMS}
    return judged(
        EXPECTED,
        {
            "accuracy": _of(table, "ramp", "accuracy") - _of(table, "decay", "accuracy"),
            "updates": _of(table, "ramp", "updates") / _of(table, "decay", "updates"),
            "loss": loss["ramp"] / loss["neither"],
            "like_decay": np.log10(loss["ramp"] / loss["decay"]),
        },
    )


def figure(table: list[dict]) -> dict:
    names = {"decay": "rate / 4", "ramp": "batch x 4", "neither": "neither"}
    by_examples, by_updates = {}, {}
    epochs = (np.arange(PARTS) + 0.5) / PARTS * EPOCHS
    for arm, name in names.items():
        rows = [row for row in table if row["arm"] == arm]
        losses = np.array([row["losses"] for row in rows])
        summary = [f(losses, axis=0) for f in (np.mean, np.min, np.max)]
        by_examples[name] = (epochs, *summary)
        by_updates[name] = (np.array(rows[0]["steps"]), *summary)
    axes = dict(y="training loss", logy=True)
    both = plots.panels(
        [
            plots.lines(by_examples, title="The same curve in epochs", x="epochs", **axes),
            plots.lines(by_updates, title="in fewer updates", x="updates", **axes),
        ]
    )
    return {"loss": both}
