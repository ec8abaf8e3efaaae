"""PH-30: features that were learnt for other labels, and a probe on few labels of a new one.

Teacher: 64 normal inputs, of which labels see 4 directions alone; 32 heads are known on 8,000
points, a new one on 8 to 128. Digits: a net learns 0 to 6, a probe tells 7, 8 and 9 apart.
Shape letters: S seeds, L numbers of labels, N and M examples, D inputs, K directions that the
teacher sees, H heads, F features, T steps, B batch.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl import plots
from lsdl.analysis import descent
from lsdl.data.readers import EVALUATION, generator
from lsdl.evaluators import linear_probe
from lsdl.models.mlp import Mlp
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Features learnt on many labels of related tasks make a few labels of a new one enough; "
    "nothing is gained where the tasks share no more than the raw inputs show."
)
SOURCE = (
    "Lectures: foundation models, pre-training against overfitting; Kornblith et al. 2019, Do "
    "better ImageNet models transfer better? (arXiv:1805.08974)"
)
_LECTURE = "lectures: pre-train large and generic, transfer to small and specific"
_NEGATIVE = "a negative result of the pilot: -0.7 to 1.0 points"
EXPECTED = {
    "teacher_16": Expected(
        "points that a logistic probe gains from pre-trained features over raw inputs at 16 "
        "labels, new head of a teacher that sees 4 of 64 dimensions",
        _LECTURE,
        low=15,
    ),
    "teacher_32": Expected("points gained at 32 labels", _LECTURE, low=15),
    "few_as_many": Expected(
        "points that 16 labels on pre-trained features are ahead of 128 on raw inputs",
        _LECTURE,
        low=0,
    ),
    "digits_16": Expected(
        "points gained at 16 labels on digits, where 7 classes are known and 3 are new",
        _NEGATIVE,
        low=-3,
        high=2,
    ),
    "digits_32": Expected("points gained at 32 labels on digits", _NEGATIVE, low=-3, high=2),
}

LABELS = (8, 16, 32, 128)
INPUTS, SEEN, HEADS, POINTS = 64, 4, 32, 8_000
HIDDEN, STEPS, RATE, DECAY = 64, 960, 3e-3, 1.0  # of AdamW
BATCHES = {"teacher": 250, "digits": 64}
NEW_HEADS, POOL, TESTED = 8, 512, 2_000
KNOWN = 7  # digits below it
DRAWS = 8  # of few digits


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each; at full scale ResNet-50, whose frozen features other data are read from."""
    if scale == "full":
        fields = {"eval.probes": ("linear",), "eval.transfer_transforms": ("resize:224",)}
        table = "% by a linear probe on all labels (Chen et al. 2020, SimCLR, table 8, supervised)"
        none = "none for this net and as many labels"
        runs = [("cifar10", 0, f"93.6 {table}"), ("oxford_flowers102", 0, f"94.7 {table}")]
        runs += [("oxford_flowers102", shots, none) for shots in (1, 5)]
        runs += [("cifar10", shots, none) for shots in (1, 5, 20)]
        return [
            Cell(
                f"{name}-{shots or 'all'}",
                {"labels_of_each_class": shots or "all"},
                "configs/imagenet_resnet50.py",
                fields | {"eval.transfer_source": f"tfds:{name}", "eval.probe_shots": shots},
                published,
            )
            for name, shots, published in runs
        ]
    return [Cell(name, {"data": name, "seeds": seeds}) for name in BATCHES]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """% right of a probe on `raw` inputs and on learnt `features`, by seed and number of labels."""
    data, seeds = cell.settings["data"], range(cell.settings["seeds"])
    found_S2L = 100 * np.array([{"teacher": _teacher, "digits": _digits}[data](s) for s in seeds])
    return {
        "labels": LABELS,
        "raw": found_S2L[:, 0].tolist(),
        "features": found_S2L[:, 1].tolist(),
    }


def few(label_N: np.ndarray, count: int, draw: np.random.Generator) -> np.ndarray:
    """Ids of `count` examples: of each class as many, or one more."""
    order_N = draw.permutation(len(label_N))
    rank_N = np.zeros(len(label_N), int)  # an example's place among its class's
    for label in np.unique(label_N):
        own = label_N[order_N] == label
        rank_N[own] = np.arange(own.sum())
    return order_N[np.argsort(rank_N, kind="stable")[:count]]


def _teacher(seed: int) -> np.ndarray:
    """`(2, L)`: the mean over new heads of the accuracy on raw inputs and on features."""
    draw = generator(seed, EVALUATION, 0, 0)
    seen_DK = np.linalg.qr(draw.normal(size=(INPUTS, SEEN)))[0]
    head_KH = draw.normal(size=(SEEN, HEADS + NEW_HEADS))
    x_ND = draw.normal(size=(POINTS + POOL + TESTED, INPUTS))
    label_NH = (np.tanh(x_ND @ seen_DK) @ head_KH > 0).astype(int)
    features = _pretrained(seed, x_ND[:POINTS], label_NH[:POINTS, :HEADS], BATCHES["teacher"])
    pool, tested = slice(POINTS, POINTS + POOL), slice(POINTS + POOL, None)
    new = label_NH[:, HEADS:].T
    found = [_probed(features, x_ND[pool], y[pool], x_ND[tested], y[tested], draw) for y in new]
    return np.mean(found, 0)


def _digits(seed: int) -> np.ndarray:
    """`(2, L)`: the same, the mean over draws of the few labels, for the digits from `KNOWN` on."""
    draw = generator(seed, EVALUATION, 0, 1)
    (x_ND, label_N), (valid_MD, valid_M) = (map(np.asarray, split) for split in digits.load())
    old, new, asked = label_N < KNOWN, label_N >= KNOWN, valid_M >= KNOWN
    features = _pretrained(seed, x_ND[old], np.eye(KNOWN)[label_N[old]], BATCHES["digits"])
    tested = valid_MD[asked], valid_M[asked]
    found = [_probed(features, x_ND[new], label_N[new], *tested, draw) for _ in range(DRAWS)]
    return np.mean(found, 0)


def _probed(features, x_ND, label_N, tested_MD, label_M, draw: np.random.Generator) -> np.ndarray:
    """`(2, L)`: accuracy of a probe on few examples of `x_ND`, and on their `features`."""
    inputs = [(x_ND, tested_MD), (features(x_ND), features(tested_MD))]
    found_2L = np.zeros((2, len(LABELS)))
    for j, count in enumerate(LABELS):
        id_B = few(label_N, count, draw)
        for i, (own_ND, other_MD) in enumerate(inputs):
            predicted_M = linear_probe(own_ND[id_B], label_N[id_B], other_MD)
            found_2L[i, j] = (predicted_M == label_M).mean()
    return found_2L


def _pretrained(seed: int, x_ND: np.ndarray, label_NH: np.ndarray, batch: int):
    """`x (N, D) -> features (N, F)`: the hidden layer of a net that learnt all heads at once."""
    id_TB = digits.batches(seed, len(x_ND), size=batch, steps=STEPS)
    model, body = Mlp((HIDDEN,), label_NH.shape[1]), Mlp((HIDDEN,), 0)

    @jax.jit
    def train(key, x_ND, label_NH, id_TB):
        def gradient(params, id_B):
            def loss(params):
                z_BH = model.apply({"params": params}, x_ND[id_B], train=True)
                return optax.sigmoid_binary_cross_entropy(z_BH, label_NH[id_B]).mean()

            return jax.grad(loss)(params)

        params = model.init(key, x_ND[:1], train=False)["params"]
        tx = optax.adamw(RATE, weight_decay=DECAY)
        return descent.descend(tx, gradient, params, id_TB, record=descent.nothing)[0][0]

    params = train(jax.random.key(seed), jnp.float32(x_ND), jnp.float32(label_NH), id_TB)
    body_params = {"params": {name: p for name, p in params.items() if name != "head"}}
    return lambda x_ND: np.asarray(body.apply(body_params, jnp.float32(x_ND), train=False))


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    gain, at = {}, {}
    for row in table:
        raw_SL, features_SL = np.array(row["raw"]), np.array(row["features"])
        for j, count in enumerate(row["labels"]):
            gain[f"{row['data']}_{count}"] = features_SL[:, j] - raw_SL[:, j]
            at[row["data"], count] = raw_SL[:, j], features_SL[:, j]
    values = {id: gain[id] for id in EXPECTED if id in gain}
    values["few_as_many"] = at["teacher", 16][1] - at["teacher", 128][0]
    return judged(EXPECTED, values)


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Accuracy against the number of labels, where tasks share something and where not."""
    titles = {
        "teacher": "A new head of a teacher with 32 known",
        "digits": "Digits 7, 8, 9 after 0 to 6",
    }
    panels = []
    for row in table:
        series = {
            label: (np.array(row["labels"]), *_summary(np.array(row[name])))
            for name, label in (("features", "learnt features"), ("raw", "raw inputs"))
        }
        axes = dict(x="labels", y="accuracy of a linear probe, %", logx=True)
        panels.append(plots.lines(series, title=titles[row["data"]], **axes))
    alt = "On the teacher learnt features are far ahead of raw inputs; on digits they are not."
    return {"labels": plots.panels(panels, title="Few labels on learnt features", alt=alt)}


def _summary(value_SL: np.ndarray) -> tuple:
    return value_SL.mean(0), value_SL.min(0), value_SL.max(0)
