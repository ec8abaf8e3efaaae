"""MixUp and shifted images on digits, with clean and with noisy labels.

The net and the training are those of the study `sam`; MixUp is the task's own, as `loss.mixup` asks
for, and the shifts are the transform `shift:1`. Both are drawn anew for each batch. Shifted images
and what they are compared with are standardised by all shifted images. The claims on noise are
about the end, where all arms have learnt the wrong labels; the figure shows how much later MixUp.

Shape letters: N examples, D pixels, V versions of the images, C classes, K draws.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsdl import plots
from lsdl.analysis import descent
from lsdl.data import transforms
from lsdl.studies import digits, sam
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Mixed and shifted training images raise the accuracy on others; MixUp learns fewer wrong "
    "labels by heart, but once it has learnt them it does not help."
)
SOURCE = (
    "Lectures: MixUp and data augmentation against overfitting; Zhang et al. 2018, mixup: beyond "
    "empirical risk minimization (arXiv:1710.09412)"
)
_MIXUP = "lecture on optimisation and regularisation: MixUp; Zhang et al. 2018, section 3"
_EQUATION = "Zhang et al. 2018, equation 2"
_NOISE = "Zhang et al. 2018, table 2, where MixUp won: an honest negative here"
EXPECTED = {
    "valid_1": Expected(
        "points of valid accuracy that MixUp (alpha 1) is ahead of plain SGD, digits, MLP of two "
        "layers of 256, 150 epochs",
        _MIXUP,
        low=0.5,
    ),
    "valid_8": Expected("points that MixUp with alpha 8 is ahead of plain SGD", _MIXUP, low=0),
    "valid_shift": Expected(
        "points of valid accuracy that shifts by up to one pixel are ahead of plain SGD",
        "lectures: data augmentation",
        low=0,
    ),
    "soft_labels": Expected(
        "largest distance from 1 of the sum of a mixed label's shares", _EQUATION, high=1e-6
    ),
    "share": Expected("largest distance of the mixing share from [0, 1]", _EQUATION, low=0, high=0),
    "memorised": Expected(
        "points of the wrong labels that plain SGD learns beyond MixUp (alpha 1), 40% of the "
        "labels random, 150 epochs",
        "Zhang et al. 2018, section 3.4: MixUp memorises less",
        low=0,
    ),
    "noise_1": Expected(
        "points of valid accuracy that MixUp (alpha 1) is ahead of plain SGD with 40% random "
        "labels (a negative result)",
        _NOISE,
        high=0,
    ),
    "noise_8": Expected("the same with alpha 8 (a negative result)", _NOISE, high=0),
}
ARMS = {
    "clean": ("plain", "mixup1", "mixup8", "shift", "unshifted"),
    "noise": ("plain", "mixup1", "mixup8"),
}
ALPHA = {"plain": 0.0, "shift": 0.0, "unshifted": 0.0, "mixup1": 1.0, "mixup8": 8.0}
DRAWS = 1_000
# Zhang et al. 2018, section 3.2 and Foret et al. 2021, table 4 (ResNet-32, 40% label noise).
PUBLISHED = {
    "clean-plain": "5.6% test error",
    "clean-mixup": "4.2% test error",
    "noise-plain": "68.8% test accuracy",
    "noise-mixup": "90.0% test accuracy",
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """The laws of the mixing, and an arm on clean or noisy labels each, all seeds together."""
    if scale == "full":
        return [
            Cell(
                f"cifar10-{id}",
                {"model": "PreAct ResNet-18" if "clean" in id else "ResNet-32"},
                f"configs/cifar10_resnet.py:{'preact18' if 'clean' in id else 32}",
                {
                    "loss.mixup": 1.0 * ("mixup" in id),
                    "data.label_noise": sam.NOISE * ("noise" in id),
                },
                published,
            )
            for id, published in PUBLISHED.items()
        ]
    arms = [(labels, arm) for labels, names in ARMS.items() for arm in names]
    return [Cell("equation", {"arm": "equation", "draws": DRAWS})] + [
        Cell(f"{labels}-{arm}", {"labels": labels, "arm": arm, "seeds": seeds})
        for labels, arm in arms
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Accuracies in percent at each look, `(S, R)`; or what was seen of the mixing."""
    arm = cell.settings["arm"]
    if arm == "equation":
        return _equation(cell.settings["draws"])
    images, _ = digits.load()
    image_VND, valid = images.x_ND[None], None
    if arm in ("shift", "unshifted"):
        image_VND, valid = shifted()
        image_VND = image_VND if arm == "shift" else image_VND[:1]
    label_SN = sam.labels(sam.NOISE * (cell.settings["labels"] == "noise"), cell.settings["seeds"])
    return sam.run(image_VND, label_SN, valid=valid, alpha=ALPHA[arm])[1]


class Drawn:
    """Takes the place of a transform's random numbers: gives what it was given, in turn."""

    def __init__(self, *numbers: int):
        self._numbers = iter(numbers)

    def integers(self, high: int) -> int:
        return next(self._numbers)


def shifted() -> tuple[np.ndarray, digits.Split]:
    """(the training images in all nine versions, the unmoved first; valid), standardised alike.

    With the mean and deviation of each pixel over all versions: some pixels at the rim are zero in
    almost every unmoved image, and a stroke moved there would be a thousand deviations away.
    """
    raw_ND, _ = descent.examples("digits", "train")
    whole_VND = moved(raw_ND)
    mean_D, std_D = whole_VND.mean((0, 1)), whole_VND.std((0, 1)) + 16e-3
    valid_ND, label_N = descent.examples("digits", "valid")
    valid_ND = (valid_ND - mean_D[None]) / std_D[None]
    valid = digits.Split(jnp.asarray(valid_ND, jnp.float32), jnp.asarray(label_N, jnp.int32))
    return ((whole_VND - mean_D[None, None]) / std_D[None, None]).astype(np.float32), valid


def moved(raw_ND: np.ndarray) -> np.ndarray:
    """`raw_VND`: moved by -1, 0 or 1 pixel each way, the unmoved first."""
    image_HWN = raw_ND.reshape(-1, 8, 8).transpose(1, 2, 0).astype(np.uint8)
    moves = sorted(itertools.product(range(3), repeat=2), key=lambda move: move != (1, 1))
    shift = transforms.shift(1)  # a batch in place of the channels: all move alike
    found = [shift({"image": image_HWN}, Drawn(*move))["image"] for move in moves]
    return np.stack([x.transpose(2, 0, 1).reshape(len(raw_ND), -1) for x in found])


def _equation(draws: int) -> dict[str, Any]:
    """The sum of the mixed labels and the share of a batch's first row, over draws of each alpha.

    Only the first row's image is not zero: mixed, it is the share itself.
    """
    row_B = np.arange(sam.BATCH)
    batch = {"features": jnp.asarray(row_B == 0, jnp.float32)[:, None], "label": row_B % 10}
    found: dict[str, Any] = {"share": {}, "sum": 0.0}
    for alpha in sorted(set(ALPHA.values()) - {0.0}):
        keys_K = jax.random.split(jax.random.key(0), draws)
        mixed = jax.jit(jax.vmap(lambda k, a=alpha: sam.task(a).prepare(batch, k)))(keys_K)
        sums = np.array(mixed["label"], float).sum(-1)
        found["share"][f"{alpha:g}"] = np.array(mixed["features"], float)[:, 0, 0].tolist()
        found["sum"] = max(found["sum"], float(abs(sums - 1).max()))
    return found


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    (law,) = (r for r in table if r["arm"] == "equation")
    row = {(r["labels"], r["arm"]): r for r in table if r["arm"] != "equation"}

    def ahead(labels, arm, name="valid", of="plain"):
        return sam.last(row[labels, arm], name) - sam.last(row[labels, of], name)

    share_K = np.concatenate(list(law["share"].values()))
    return judged(
        EXPECTED,
        {
            "valid_1": ahead("clean", "mixup1"),
            "valid_8": ahead("clean", "mixup8"),
            "valid_shift": ahead("clean", "shift", of="unshifted"),
            "soft_labels": law["sum"],
            "share": max(0.0, -share_K.min(), share_K.max() - 1),
            "memorised": -ahead("noise", "mixup1", "wrong"),
            "noise_1": ahead("noise", "mixup1"),
            "noise_8": ahead("noise", "mixup8"),
        },
    )


LABELS = {
    "plain": "plain SGD",
    "mixup1": "MixUp, alpha 1",
    "mixup8": "MixUp, alpha 8",
    "shift": "shifts by a pixel",
    "unshifted": "plain, pixels scaled as shifted",
}


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Valid accuracy over epochs, clean and noisy, and the wrong labels that are learnt."""
    arms = [row for row in table if row["arm"] != "equation"]
    clean, noise = (
        {LABELS[row["arm"]]: row for row in arms if row["labels"] == labels}
        for labels in ("clean", "noise")
    )
    panels = {
        "Clean labels": (clean, "valid"),
        "40% random labels": (noise, "valid"),
        "What is learnt by heart": (noise, "wrong"),
    }
    return {
        "mixup": sam.accuracies(
            panels,
            title="MixUp and shifted images",
            alt="Both help on clean labels; with noise MixUp is ahead until it has learnt it all.",
        )
    }
