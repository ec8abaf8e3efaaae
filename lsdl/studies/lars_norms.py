"""The norms of AlexNet-BN's weights and gradients at its first iteration, against a printed table.

The printed labels are the wrong way round: columns `.b` hold weights, columns `.w` biases. Initial
norms follow from the initialisation alone and are compared. Gradients do not: ours, of generated
images and of labels drawn at random, stand beside the printed ones and no claim is made of them.
Behind batch normalisation a convolution's bias has no gradient at all, which the printed table
does not show; so ours are of AlexNet with it and without.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lsdl import plots
from lsdl.models.alexnet import AlexNet
from lsdl.optim.groups import path
from lsdl.state import stream
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "At the first iteration the ratio of a weight's norm to its gradient's differs by more than "
    "a hundred from layer to layer, so that one rate cannot suit all."
)
SOURCE = (
    "Lecture: large-batch training; You et al. 2017, "
    "Large batch training of convolutional networks (arXiv:1708.03888), table 2"
)
_TABLE = "You et al. 2017, table 2, as the lecture prints it"
EXPECTED = {
    "weights": Expected(
        "relative distance of the initial weight norms from columns .b, of the worst layer's mean "
        "over seeds",
        _TABLE,
        low=-0.005,
        high=0.005,
    ),
    "biases": Expected(
        "relative distance of the initial bias norms from columns .w, of the worst layer",
        _TABLE,
        low=-0.005,
        high=0.005,
    ),
    "labels": Expected(
        "least relative distance of a layer's initial norms from the columns of their own name",
        f"{_TABLE}: the labels of weights and biases are swapped",
        low=0.5,
    ),
    "ratios": Expected(
        "largest relative distance of a printed ratio from the quotient of the printed norms, "
        "without conv5.w",
        _TABLE,
        high=0.05,
    ),
    "conv5": Expected(
        "the quotient of conv5.w's printed norms over its printed ratio: a digit was lost",
        _TABLE,
        low=10.0,
        high=13.0,
    ),
    "spread": Expected("the largest printed ratio over the least", _TABLE, low=100.0),
}


class Column(NamedTuple):
    """Of one layer's weights or biases, as printed."""

    norm: float
    gradient: float
    ratio: float


# layer -> (printed as .b: the weights, printed as .w: the biases)
TABLE = {
    "conv1": (Column(1.86, 0.22, 8.48), Column(0.098, 0.017, 5.76)),
    "conv2": (Column(5.546, 0.165, 33.6), Column(0.16, 0.002, 83.5)),
    "conv3": (Column(9.40, 0.135, 69.9), Column(0.196, 0.0015, 127)),
    "conv4": (Column(8.15, 0.109, 74.6), Column(0.196, 0.0013, 148)),
    "conv5": (Column(6.65, 0.09, 73.6), Column(0.16, 0.0002, 69)),
    "fc6": (Column(30.7, 0.26, 117), Column(6.4, 0.005, 1345)),
    "fc7": (Column(20.5, 0.30, 68), Column(6.4, 0.013, 489)),
    "fc8": (Column(20.2, 0.22, 93), Column(0.316, 0.016, 19)),
}
WRONG = ("conv5", 1)  # the column whose ratio does not follow
MODULES = {
    **{f"conv{i + 1}": f"layer_{i}/conv" for i in range(5)},
    **{"fc6": "dense_0", "fc7": "dense_1", "fc8": "head"},
}
PARTS = ("kernel", "bias")
SIDE, CLASSES = 227, 1000
FORMS = {"plain": False, "batch_norm": True}
# You et al. 2017, tables 1 and 3: AlexNet-BN's top-1 accuracy by batch size.
PUBLISHED = {"512": "60.2%", "4k": "60.4%", "8k": "60.1%", "16k": "59.3%", "32k": "57.8%"}


def cells(scale: str, seeds: int) -> list[Cell]:
    """The initial norms and a batch's gradients; at full scale AlexNet-BN trained with LARS."""
    if scale == "full":
        return [
            Cell(f"lars-{size}", config=f"imagenet_alexnet:bn,lars,{size}", published=accuracy)
            for size, accuracy in PUBLISHED.items()
        ] + [Cell("sgd-512", config="imagenet_alexnet:bn,512", published="60.2%")]
    # The norm of conv1's 34,848 weights varies by 0.4% from draw to draw: many draws.
    gradients = [Cell(f"gradients-{form}", {"form": form, "images": 4}) for form in FORMS]
    return [Cell("norms", {"draws": 4 * seeds}), *gradients]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """`weights` and `biases`: a list by layer, of norms by draw or of the gradient's norm."""
    if "draws" in cell.settings:
        norms = jax.jit(lambda keys: lax.map(initial_norms, keys))
        found = norms(jax.vmap(jax.random.key)(jnp.arange(cell.settings["draws"])))
    else:
        form = FORMS[cell.settings["form"]]
        batch = cell.settings["images"]
        found = jax.jit(lambda key: gradient_norms(key, batch_norm=form, batch=batch))(
            jax.random.key(0)
        )
    weights, biases = ([found[layer][i].tolist() for layer in TABLE] for i in (0, 1))
    return {"weights": weights, "biases": biases}


def initial_norms(key: jax.Array) -> dict[str, tuple[jax.Array, ...]]:
    """{layer: (norm of the weights, of the biases)} of AlexNet as `key` initialises it."""
    image = jnp.zeros((1, SIDE, SIDE, 3))
    return _norms(AlexNet(CLASSES).init(key, image, train=False)["params"])


def gradient_norms(key: jax.Array, *, batch_norm: bool, batch: int) -> dict[str, tuple]:
    """{layer: (of the weights, of the biases)}: the first iteration's gradient.

    Images are Gaussian at 8 x 8 points and smooth in between, of mean 0 and deviation 1 over all;
    the loss is the mean cross-entropy of random labels.
    """
    model = AlexNet(CLASSES, batch_norm=batch_norm)
    coarse = jax.random.normal(stream(key, "images"), (batch, 8, 8, 3))
    image = jax.image.resize(coarse, (batch, SIDE, SIDE, 3), "linear")
    image = (image - image.mean()) / image.std()
    label_B = jax.random.randint(stream(key, "labels"), (batch,), 0, CLASSES)
    variables = model.init(stream(key, "init"), image[:1], train=False)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params):
        rngs = {"dropout": stream(key, "dropout")}
        logits_BC, _ = model.apply(
            {"params": params} | rest, image, train=True, rngs=rngs, mutable=list(rest)
        )
        log_p_BC = jax.nn.log_softmax(logits_BC)
        return -jnp.take_along_axis(log_p_BC, label_B[:, None], 1).mean()

    return _norms(jax.grad(loss)(params))


def _norms(params) -> dict[str, tuple]:
    leaves = {path(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return {
        layer: tuple(jnp.linalg.norm(leaves[f"{module}/{part}"].ravel()) for part in PARTS)
        for layer, module in MODULES.items()
    }


def printed(name: str) -> np.ndarray:
    """One line of the table, `(layers, 2)`: weights, biases."""
    return np.array([[getattr(column, name) for column in columns] for columns in TABLE.values()])


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Relative distances; of the norms the worst layer's, over the draws."""
    (row,) = (row for row in table if "draws" in row)
    norm, ratio = printed("norm"), printed("ratio")
    weights, biases = (
        np.array(row[part]) / norm[:, i, None] - 1 for i, part in enumerate(("weights", "biases"))
    )
    own = np.stack([np.mean(row["weights"], 1), np.mean(row["biases"], 1)], 1)
    crossed = np.abs(own / norm[:, ::-1] - 1)
    quotient = norm / printed("gradient")
    wrong = list(TABLE).index(WRONG[0]), WRONG[1]
    apart = np.abs(quotient / ratio - 1)
    apart[wrong] = 0
    return judged(
        EXPECTED,
        {
            "weights": weights[np.abs(weights.mean(1)).argmax()],
            "biases": biases[np.abs(biases.mean(1)).argmax()],
            "labels": crossed.min(),
            "ratios": apart.max(),
            "conv5": quotient[wrong] / ratio[wrong],
            "spread": ratio.max() / ratio.min(),
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The printed norms beside ours, and the ratios to gradients: printed, and of ours."""
    (init,) = (row for row in table if "draws" in row)
    gradients = {row["form"]: row for row in table if "form" in row}
    norm, ratio = printed("norm"), printed("ratio")
    drawn = []
    for i, part in enumerate(("weights", "biases")):
        ours = np.mean(init[part], 1)
        norms = {
            "printed": dict(zip(TABLE, norm[:, i], strict=True)),
            "initialised here": dict(zip(TABLE, ours, strict=True)),
        }
        ratios = {"printed": dict(zip(TABLE, ratio[:, i], strict=True))}
        for form, row in gradients.items():
            if (part, form) != ("biases", "batch_norm"):
                name = f"ours, {form.replace('_', ' ')}"
                ratios[name] = dict(zip(TABLE, ours / np.array(row[part]), strict=True))
        drawn.append(plots.bars(norms, title=f"Norms of the {part}", x="norm", logx=True))
        drawn.append(
            plots.bars(
                ratios, title=f"{part.capitalize()}: norm over gradient's", x="ratio", logx=True
            )
        )
    return {
        "norms": plots.panels(drawn[::2], title="AlexNet before its first step"),
        "ratios": plots.panels(drawn[1::2], title="No rate suits every layer"),
    }
