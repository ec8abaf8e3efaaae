"""Random labels and random images are learnt by heart, somewhat slower.

1,257 digits, an MLP of three layers of 512 (563,722 parameters), SGD with momentum 0.9 at 0.05 on
batches of 128, no regularisation; until every net of a kind has all labels right, at most 100
epochs. A share of the labels is drawn uniformly from all ten, as `data.label_noise` does. Images of
noise have independent normal pixels, standardised like the digits, and the digits' labels.

Shape letters: N examples, D pixels, S seeds, T steps, B batch, E epochs.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.data.readers import NOISE, Arrays, NoisyLabels, generator
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A net with more parameters than examples learns random labels to the last one, at a small "
    "multiple of the epochs, and then knows nothing of other images."
)
SOURCE = (
    "Lectures: memorising random labels, parameters against examples; Zhang et al. 2017, "
    "Understanding deep learning requires rethinking generalization (arXiv:1611.03530)"
)
_FIT = "lecture on optimisation and regularisation: random labels; Zhang et al. 2017, section 2.1"
_NOISE = "Zhang et al. 2017, figure 1c: partially corrupted labels"
EXPECTED = {
    "random_train": Expected(
        "highest train accuracy in percent within 100 epochs on random labels, MLP of three layers "
        "of 512 on 1,257 digits, SGD with momentum",
        _FIT,
        low=100,
        high=100,
    ),
    "random_valid": Expected(
        "valid accuracy in percent of the nets that learnt random labels", _FIT, low=4, high=16
    ),
    "slower": Expected(
        "epochs to 100% of the train labels, random labels over true labels", _FIT, low=1.5
    ),
    "small_factor": Expected("the same ratio from above: a small constant factor", _FIT, high=6),
    "half_train": Expected(
        "highest train accuracy in percent within 100 epochs, half of the labels random",
        _NOISE,
        low=100,
        high=100,
    ),
    "half_valid": Expected(
        "valid accuracy in percent of the nets that learnt half random labels",
        _NOISE,
        low=60,
        high=85,
    ),
    "falling": Expected(
        "smallest fall of the valid accuracy in points from 0 to 20, 50 and 100% random labels",
        _NOISE,
        low=1,
    ),
    "gaussian_train": Expected(
        "highest train accuracy in percent within 100 epochs on images of normal noise, the true "
        "labels",
        "Zhang et al. 2017, section 2.1: Gaussian images",
        low=100,
        high=100,
    ),
    "gaussian_faster": Expected(
        "epochs to 100% on images of normal noise over on digits with random labels",
        "Zhang et al. 2017, section 2.1: noise images converge faster than random labels",
        high=1 - 1e-6,
    ),
}
KINDS = {  # the share of random labels, and whether the images are noise
    "true": (0.0, False),
    "20%": (0.2, False),
    "50%": (0.5, False),
    "100%": (1.0, False),
    "gaussian": (0.0, True),
}
NET = digits.Classifier(512, 512, 512)
OPTIMIZER = optax.sgd(0.05, 0.9)
EPOCHS, BATCH = 100, 128
# Zhang et al. 2017, table 1, no regularisation: random labels, train and test accuracy.
PUBLISHED = {"true": "100% train, 85.75% test (Inception)", "100%": "100% train, 9.78% test"}


def cells(scale: str, seeds: int) -> list[Cell]:
    """A kind of labels each, all seeds together; at full scale a ResNet on CIFAR-10."""
    if scale == "full":
        fields = {"optim.weight_decay": 0.0, "data.transforms": "()"}
        return [
            Cell(
                f"cifar10-{kind.replace('%', '')}",
                {"their_model": "small Inception, 1,649,402 parameters"},
                "configs/cifar10_resnet.py:56",
                fields | {"data.label_noise": KINDS[kind][0]},
                published,
            )
            for kind, published in PUBLISHED.items()
        ]
    return [Cell(k.replace("%", ""), {"kind": k, "seeds": seeds}) for k in KINDS]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Accuracies in percent after each epoch, `(S, E + 1)`, the one before the first included."""
    share, noise = KINDS[cell.settings["kind"]]
    seeds = range(cell.settings["seeds"])
    _, valid = digits.load()
    train_S = jax.tree.map(lambda *x: jnp.stack(x), *[data(share, noise, seed) for seed in seeds])
    count = train_S.label_N.shape[1]
    per_epoch = count // BATCH
    shape = {"size": BATCH, "steps": EPOCHS * per_epoch}
    id_STB = np.stack([digits.batches(seed, count, **shape) for seed in seeds]).astype(np.int32)
    params = NET.init(digits.keys(len(seeds)))
    state = params, jax.vmap(OPTIMIZER.init)(params)
    found = [_accuracies(params, train_S, valid)]
    for epoch in range(EPOCHS):
        ids = id_STB[:, epoch * per_epoch : (epoch + 1) * per_epoch]
        state = _epoch(state, train_S, ids)
        found.append(_accuracies(state[0], train_S, valid))
        if (np.max([right_S for right_S, _ in found], axis=0) == 1).all():
            break
    right_SE, valid_SE = (100 * np.stack(part, 1) for part in zip(*found, strict=True))
    return {"train": right_SE.tolist(), "valid": valid_SE.tolist()}


def data(share: float, noise: bool, seed: int) -> digits.Split:
    """The training split with a share of random labels, or with images of noise."""
    train, _ = digits.load()
    x_ND, label_N = train
    if noise:
        x_ND = jnp.asarray(generator(seed, NOISE, 1, 0).normal(size=x_ND.shape), jnp.float32)
    return digits.Split(x_ND, jnp.asarray(noisy(np.array(label_N), share, seed)))


def noisy(label_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A share of the labels drawn from all ten, as the data pipeline does it."""
    reader = NoisyLabels(Arrays({"label": label_N}), share=share, num_classes=10, seed=seed)
    return np.array([reader[i]["label"] for i in range(len(reader))], np.int32)


@functools.partial(jax.jit, donate_argnums=0)
@jax.vmap
def _epoch(state: tuple, train: digits.Split, id_TB: jax.Array) -> tuple:
    def step(state, id_B):
        return digits.step(NET, OPTIMIZER, state, digits.rows(train, id_B)), None

    return lax.scan(step, state, id_TB)[0]


@jax.jit
def _right(params_S: Any, train_S: digits.Split, valid: digits.Split):
    train_accuracy = jax.vmap(NET.accuracy)(params_S, train_S)
    return train_accuracy, jax.vmap(NET.accuracy, (0, None))(params_S, valid)


def _accuracies(params_S, train_S, valid) -> tuple[np.ndarray, np.ndarray]:
    return tuple(np.array(part, float) for part in _right(params_S, train_S, valid))


def _learnt(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each seed: the highest train accuracy, its first epoch, and valid's there."""
    train_SE, valid_SE = np.array(row["train"]), np.array(row["valid"])
    epoch_S = train_SE.argmax(1)
    return train_SE.max(1), epoch_S, valid_SE[np.arange(len(epoch_S)), epoch_S]


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    found = {row["kind"]: _learnt(row) for row in table}
    train, epochs, valid = ({kind: part[i] for kind, part in found.items()} for i in range(3))
    falls = [valid[a] - valid[b] for a, b in (("true", "20%"), ("20%", "50%"), ("50%", "100%"))]
    slower = epochs["100%"] / epochs["true"]
    return judged(
        EXPECTED,
        {
            "random_train": train["100%"],
            "random_valid": valid["100%"],
            "slower": slower,
            "small_factor": slower,
            "half_train": train["50%"],
            "half_valid": valid["50%"],
            "falling": np.min(falls, axis=0),
            "gaussian_train": train["gaussian"],
            "gaussian_faster": epochs["gaussian"] / epochs["100%"],
        },
    )


LABELS = {
    "true": "true labels",
    "20%": "20% random",
    "50%": "50% random",
    "100%": "random labels",
    "gaussian": "images of noise",
}


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Train accuracy over epochs; the valid accuracy that is left."""
    curves = {
        LABELS[row["kind"]]: (range(len(row["train"][0])), *plots.summary(row["train"]))
        for row in table
    }
    left = plots.lines(
        curves,
        title="All labels are learnt in the end",
        x="epoch",
        y="train accuracy, %",
    )
    share = {"true": 0, "20%": 20, "50%": 50, "100%": 100}
    rows = {row["kind"]: _learnt(row)[2] for row in table if row["kind"] in share}
    at = np.array([share[kind] for kind in rows])
    valid = plots.summary(np.stack(list(rows.values()), 1))
    right = plots.lines(
        {"digits": (at, *valid)},
        title="What is left for other images",
        x="random labels, %",
        y="valid accuracy, %",
        levels={"chance": 10.0},
    )
    return {
        "random_labels": plots.panels(
            [left, right],
            title="Learning by heart",
            alt="Every kind reaches 100% of its labels; valid accuracy falls to chance.",
        )
    }
