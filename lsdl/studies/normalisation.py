"""PH-26: normalisation layers at batches of 32, 4 and 2, and BatchNorm at a batch of one.

A 64-64-64-64-10 ReLU net on digits, a norm before each activation, SGD with momentum at a rate in
proportion to the batch, 15 epochs. BatchNorm is evaluated with its moving averages.
Shape letters: S seeds, E epochs, T steps of an epoch, B batch, N examples, D pixels, C classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.errors import UserError
from lsdl.models.mlp import Mlp
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "BatchNorm fails at tiny batches, where two examples give no statistics; GroupNorm and "
    "LayerNorm never look at other examples and do not."
)
WU = "Wu and He 2018, Group normalization"
_LECTURE = "lectures: batch, layer and group normalisation; "
SOURCE = f"Lectures: conditioning, B = 1 breaks BatchNorm; {WU} (arXiv:1803.08494)"
EXPECTED = {
    "batch_2": Expected(
        "points of valid accuracy that BatchNorm loses from a batch of 32 to 2, 3 x 64 net on "
        "digits, rate in proportion to the batch, 15 epochs, moving averages",
        f"{_LECTURE}{WU}",
        low=20,
    ),
    "batch_4": Expected("points that BatchNorm loses from 32 to 4", f"{_LECTURE}{WU}", high=3),
    "group_2": Expected(
        "points that GroupNorm (4 groups) loses from 32 to 2", f"{_LECTURE}{WU}", high=2
    ),
    "layer_2": Expected("points that LayerNorm loses from 32 to 2", _LECTURE.strip("; "), high=2),
    "none_2": Expected(
        "points that the net without a norm loses from 32 to 2", _LECTURE.strip("; "), high=2
    ),
    "group_over_batch": Expected(
        "points that GroupNorm is ahead of BatchNorm at a batch of 2",
        f"{WU}: 10.6 on ImageNet at 2 images for each GPU",
        low=10.6,
    ),
    "batch_1": Expected(
        "BatchNorm on a batch of one example is refused (1: yes)",
        "lecture on batch size: one example breaks BatchNorm",
        low=1,
        high=1,
    ),
}

NORMS = {"batch": "BatchNorm", "group": "GroupNorm", "layer": "LayerNorm", "none": "none"}
BATCHES = (32, 4, 2)
HIDDEN, EPOCHS, RATE, MOMENTUM = (64, 64, 64), 15, 0.05, 0.9  # the rate of a batch of 32
LARGEST = max(BATCHES)


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each norm; at full scale ResNet-50 with either at 32 and 2 images for each of 8."""
    if scale == "full":
        published = {("batch", 256): 23.6, ("batch", 16): 34.7, ("group", 256): 24.1}
        published |= {("group", 16): 24.1}
        return [
            Cell(
                f"{norm}_{batch // 8}",
                {"norm": norm, "images_per_device": batch // 8},
                "configs/imagenet_resnet50.py",
                {"model.norm": norm, "batch_size": batch},
                f"{error} % error ({WU}, table 2): BatchNorm's statistics are of one device's "
                "images there and of the global batch here",
            )
            for (norm, batch), error in published.items()
        ]
    return [
        Cell(norm, {"norm": norm, "epochs": EPOCHS, "hidden": HIDDEN, "seeds": seeds})
        for norm in NORMS
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Valid accuracy in % by batch, then epoch, then seed."""
    norm, epochs, hidden, seeds = (cell.settings[n] for n in ("norm", "epochs", "hidden", "seeds"))
    model = Mlp(tuple(hidden), 10, norm=norm)
    train, valid = digits.load()
    accuracy = [_trained(model, train, valid, batch, epochs, seeds) for batch in BATCHES]
    refused = norm == "batch" and _refused(model, train)
    return {"batches": BATCHES, "accuracy": accuracy, "refused": int(refused)}


def _refused(model: Mlp, train: digits.Split) -> bool:
    """Whether the net will not be trained on one example."""
    try:
        _trained(model, train, train, 1, 1, 1)
    except UserError:
        return True
    return False


def _trained(
    model: Mlp, train: digits.Split, valid: digits.Split, batch: int, epochs: int, seeds: int
) -> list[list[float]]:
    """Valid accuracy in % after each epoch, of each seed."""
    tx = optax.sgd(RATE * batch / LARGEST, MOMENTUM)
    per_epoch = len(train.label_N) // batch

    def loss(params, averages, part):
        variables = {"params": params} | averages
        logits_BC, averages = model.apply(variables, part.x_ND, train=True, mutable=list(averages))
        return optax.softmax_cross_entropy_with_integer_labels(
            logits_BC, part.label_N
        ).mean(), averages

    def step(state, id_B):
        params, averages, opt_state = state
        gradient, averages = jax.grad(loss, has_aux=True)(
            params, averages, digits.rows(train, id_B)
        )
        updates, opt_state = tx.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), averages, opt_state), None

    def epoch(state, id_TB):
        state, _ = lax.scan(step, state, id_TB)
        logits_NC = model.apply({"params": state[0]} | state[1], valid.x_ND, train=False)
        return state, 100 * (logits_NC.argmax(-1) == valid.label_N).mean()

    def run(key, id_ETB):
        variables = model.init(key, train.x_ND[:2], train=False)
        params = variables.pop("params")
        return lax.scan(epoch, (params, variables, tx.init(params)), id_ETB)[1]

    size = dict(size=batch, steps=epochs * per_epoch)
    ids = [digits.batches(seed, len(train.label_N), **size) for seed in range(seeds)]
    id_SETB = np.stack(ids).reshape(seeds, epochs, per_epoch, batch)
    return np.asarray(jax.jit(jax.vmap(run))(digits.keys(seeds), id_SETB)).T.tolist()


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    end = {row["norm"]: np.array(row["accuracy"])[:, -1] for row in table}  # by batch and seed
    lost = {norm: end_BS[:1] - end_BS for norm, end_BS in end.items()}
    four, two = (BATCHES.index(batch) for batch in (4, 2))
    return judged(
        EXPECTED,
        {
            "batch_2": lost["batch"][two],
            "batch_4": lost["batch"][four],
            "group_2": lost["group"][two],
            "layer_2": lost["layer"][two],
            "none_2": lost["none"][two],
            "group_over_batch": end["group"][two] - end["batch"][two],
            "batch_1": sum(row["refused"] for row in table),
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Accuracy against the batch, and the course of the smallest."""
    by_batch, by_epoch = {}, {}
    for row in table:
        accuracy_BES = np.array(row["accuracy"])
        by_batch[NORMS[row["norm"]]] = (np.array(row["batches"]), *_summary(accuracy_BES[:, -1]))
        epochs = np.arange(1, accuracy_BES.shape[1] + 1)
        by_epoch[NORMS[row["norm"]]] = (epochs, *_summary(accuracy_BES[-1]))
    axes = dict(y="valid accuracy, %")
    pair = [
        plots.lines(by_batch, title="After training", x="batch size", logx=True, **axes),
        plots.lines(by_epoch, title="A batch of 2", x="epoch", **axes),
    ]
    alt = "BatchNorm falls at a batch of 2, the others stay where they are."
    return {"accuracy": plots.panels(pair, title="Norms and tiny batches, digits", alt=alt)}


def _summary(value_XS: np.ndarray) -> tuple:
    return value_XS.mean(1), value_XS.min(1), value_XS.max(1)
