"""Sharpness-aware minimisation on digits, with clean and with noisy labels.

A 64-256-256-10 ReLU net on 1,257 digits, batches of 32, SGD with momentum 0.9, a cosine from 0.05,
150 epochs. SAM is the optimiser's own wrapper around it, as `optim.sam_rho` asks for. Noise is a
share of the labels drawn uniformly from all ten, as `data.label_noise` does. Claims on noise are
about the end, where the wrong labels are learnt by heart: the figure shows that SAM with rho 0.5 is
far ahead in the first epochs.

`train` serves the study of MixUp as well: `prepare` and `loss` are the task's own.

Shape letters: N examples, D pixels, V versions of the images, S seeds, T steps, B batch,
R looks.
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
from lsdl.analysis import descent
from lsdl.optim.wrappers import sam
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged
from lsdl.studies.random_labels import noisy
from lsdl.tasks import Classification

CLAIM = (
    "Sharpness-aware minimisation finds minima of lower curvature and lower error; on digits with "
    "noisy labels that are learnt by heart it does not help."
)
SOURCE = (
    "Lectures: wide and narrow minima, SAM; Foret et al. 2021, Sharpness-aware minimization "
    "(arXiv:2010.01412)"
)
_SAM = "lecture on optimisation: wide minima; Foret et al. 2021, table 1"
_NOISE = "Foret et al. 2021, table 4, where SAM won by 10 to 52 points: an honest negative here"
EXPECTED = {
    "valid": Expected(
        "points of valid accuracy that SAM (rho 0.5) is ahead of SGD, digits, MLP of two layers of "
        "256, 150 epochs",
        _SAM,
        low=0.5,
    ),
    "valid_0.1": Expected("points that SAM with rho 0.1 is ahead of SGD", _SAM, low=0),
    "curvature": Expected(
        "lambda_max of the train loss after SAM (rho 0.5) over after SGD",
        "Foret et al. 2021, figure 3",
        high=1 - 1e-6,
    ),
    "interpolation": Expected(
        "train accuracy in percent on the noisy labels, the lower of SGD and SAM (rho 0.5), 40% of "
        "the labels random",
        _NOISE,
        low=99,
    ),
    "noise": Expected(
        "points of valid accuracy that SAM (rho 0.5) is ahead of SGD with 40% random labels (a "
        "negative result)",
        _NOISE,
        high=0,
    ),
    "noise_0.1": Expected("the same with rho 0.1 (a negative result)", _NOISE, high=0),
}
NET = digits.Classifier(256, 256)
RATE, MOMENTUM, BATCH, EPOCHS, LOOKS = 0.05, 0.9, 32, 150, 15
NOISE = 0.4
RHOS = (0.0, 0.1, 0.5)  # 0: plain SGD
# Foret et al. 2021, tables 1 and 4: test error, and test accuracy with 40% label noise.
PUBLISHED = {
    ("clean", 0.0): "3.5 +- 0.1 % error",
    ("clean", 0.05): "2.7 +- 0.1 % error",
    ("noise", 0.0): "68.8 % accuracy",
    ("noise", 0.1): "93.4 % accuracy",
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """A radius on clean or noisy labels each, all seeds together."""
    if scale == "full":
        return [
            Cell(
                f"cifar10-{labels}-rho{rho:g}",
                {"model": "WRN-28-10" if labels == "clean" else "ResNet-32"},
                f"configs/cifar10_{'wrn.py:28-10' if labels == 'clean' else 'resnet.py:32'}",
                {"optim.sam_rho": rho, "data.label_noise": NOISE * (labels == "noise")},
                published,
            )
            for (labels, rho), published in PUBLISHED.items()
        ]
    return [
        Cell(f"{labels}-rho{rho:g}", {"labels": labels, "rho": rho, "seeds": seeds})
        for labels in ("clean", "noise")
        for rho in RHOS
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Accuracies in percent at each look, `(S, R)`; lambda_max at the end, on clean labels."""
    clean, rho, seeds = (cell.settings[name] for name in ("labels", "rho", "seeds"))
    images, _ = digits.load()
    label_SN = labels(NOISE * (clean == "noise"), seeds)
    end_S, row = run(images.x_ND[None], label_SN, rho=rho)
    if clean == "clean":
        row["curvature"] = np.array(_curvature(end_S, images), float).tolist()
    return row


def labels(share: float, seeds: int) -> np.ndarray:
    """`(S, N)`: the training labels with a share of them random, drawn for each seed."""
    label_N = np.array(digits.load()[0].label_N)
    return np.stack([noisy(label_N, share, seed) for seed in range(seeds)])


def run(
    image_VND: jax.Array,
    label_SN: np.ndarray,
    *,
    valid: digits.Split | None = None,
    rho: float = 0.0,
    alpha: float = 0.0,
) -> tuple[Any, dict[str, Any]]:
    """All seeds' nets, and their accuracies in percent: on the labels learnt, on valid, on the
    wrong ones among the labels learnt (empty without noise).

    `image_VND` are versions of the training images, one of which is drawn for each example of a
    batch; `alpha` is MixUp's.
    """
    seeds, count = label_SN.shape
    steps = EPOCHS * (count // BATCH)
    ids = [digits.batches(seed, count, size=BATCH, steps=steps) for seed in range(seeds)]
    draw = np.random.default_rng(0)
    version_STB = draw.integers(len(image_VND), size=(seeds, steps, BATCH))
    keys_S = digits.keys(seeds)
    end_S, looks = train(
        NET.init(keys_S),
        jnp.asarray(image_VND),
        jnp.asarray(label_SN),
        np.stack(ids).astype(np.int32),
        version_STB.astype(np.int32),
        keys_S,
        valid or digits.load()[1],
        rho=rho,
        alpha=alpha,
    )
    names = ("train", "valid", "wrong")
    row = dict(zip(names, (100 * np.array(look, float) for look in looks), strict=True))
    if np.isnan(row["wrong"]).any():
        del row["wrong"]
    return end_S, {name: value_SR.tolist() for name, value_SR in row.items()}


def optimizer(rho: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """SGD with momentum on a cosine; with a radius, SAM around it."""
    schedule = descent.schedule("cosine", RATE, steps=steps)
    inner = optax.with_extra_args_support(optax.sgd(schedule, MOMENTUM))
    return sam(inner, rho, []) if rho else inner


def task(alpha: float = 0.0) -> Classification:
    """Of flattened images, standardised already."""
    features = {"features": jax.ShapeDtypeStruct((64,), jnp.float32)}
    features["label"] = jax.ShapeDtypeStruct((), jnp.int32)
    return Classification(features, 10, mean=(), std=(), mixup=alpha)


@functools.partial(jax.jit, static_argnames=("rho", "alpha"))
def train(
    params_S: Any,
    image_VND: jax.Array,
    label_SN: jax.Array,
    id_STB: jax.Array,
    version_STB: jax.Array,
    keys_S: jax.Array,
    valid: digits.Split,
    *,
    rho: float,
    alpha: float,
) -> tuple[Any, tuple[jax.Array, ...]]:
    """(the nets' parameters, shares of the train, valid and wrong labels at each look `(S, R)`)."""
    truth_N = digits.load()[0].label_N
    tx = optimizer(rho, id_STB.shape[1])
    mix = task(alpha)

    def loss(params, batch):
        logits_BC = NET.logits(params, *mix.inputs(batch))
        total, weight, _ = mix.loss(logits_BC, batch)
        return total / weight

    def one(params, label_N, id_TB, version_TB, key):
        def step(state, xs):
            params, opt_state = state
            t, id_B, version_B = xs
            batch = {"features": image_VND[version_B, id_B], "label": label_N[id_B]}
            batch["weight"] = jnp.ones(BATCH)
            batch = mix.prepare(batch, jax.random.fold_in(key, t))
            gradient = lambda params, _=0: jax.grad(loss)(params, batch)  # noqa: E731
            updates, opt_state = tx.update(gradient(params), opt_state, params, grad_fn=gradient)
            return (optax.apply_updates(params, updates), opt_state), None

        def look(params):
            said_N = NET.logits(params, image_VND[0]).argmax(-1)
            wrong_N = label_N != truth_N
            right_N = said_N == label_N
            return (
                right_N.mean(),
                NET.accuracy(params, valid),
                (right_N & wrong_N).sum() / wrong_N.sum(),
            )

        def some(state, xs):
            state, _ = lax.scan(step, state, xs)
            return state, look(state[0])

        xs = jnp.arange(len(id_TB)), id_TB, version_TB
        chunks = jax.tree.map(lambda x: x.reshape(LOOKS, -1, *x.shape[1:]), xs)
        (params, _), looks = lax.scan(some, (params, tx.init(params)), chunks)
        return params, looks

    return jax.vmap(one)(params_S, label_SN, id_STB, version_STB, keys_S)


@jax.jit
def _curvature(params_S: Any, train: digits.Split) -> jax.Array:
    loss = functools.partial(NET.loss, batch=train)
    key = jax.random.key(0)
    return jax.vmap(lambda p: descent.largest_eigenvalue(loss, p, key, steps=20))(params_S)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    row = {(r["labels"], r["rho"]): r for r in table}

    def ahead(labels, rho):
        return last(row[labels, rho], "valid") - last(row[labels, 0.0], "valid")

    train = [last(row["noise", rho], "train") for rho in (0.0, 0.5)]
    curvature = [np.array(row["clean", rho]["curvature"]) for rho in (0.5, 0.0)]
    return judged(
        EXPECTED,
        {
            "valid": ahead("clean", 0.5),
            "valid_0.1": ahead("clean", 0.1),
            "curvature": curvature[0] / curvature[1],
            "interpolation": np.min(train, axis=0),
            "noise": ahead("noise", 0.5),
            "noise_0.1": ahead("noise", 0.1),
        },
    )


def last(row: Mapping[str, Any], name: str) -> np.ndarray:
    """The last look of each seed."""
    return np.array(row[name])[:, -1]


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Valid accuracy over epochs, clean and noisy; the curvature at the end."""
    name = lambda row: f"SAM, rho {row['rho']:g}" if row["rho"] else "SGD"  # noqa: E731
    clean, noise = (
        {name(row): row for row in table if row["labels"] == labels}
        for labels in ("clean", "noise")
    )
    bars = {}
    for label, row in clean.items():
        bars[label] = plots.summary(row["curvature"])
    return {
        "accuracy": accuracies(
            {"Clean labels": (clean, "valid"), "40% random labels": (noise, "valid")},
            title="SAM and SGD",
            alt="SAM is ahead on clean labels; with noise only until it has learnt them by heart.",
        ),
        "curvature": plots.bars(
            bars,
            title="The largest curvature at the end, clean labels",
            x="lambda_max",
            alt="SAM ends at a lower lambda_max than SGD; at rho 0.5 the seeds differ widely.",
        ),
    }


def accuracies(panels: Mapping[str, tuple], *, title: str, alt: str) -> plots.Figure:
    """A panel for each {title: (rows by label, "valid" or another of their accuracies)}."""
    axis = {"valid": "valid accuracy, %", "wrong": "wrong labels learnt, %"}
    epoch_R = EPOCHS * (1 + np.arange(LOOKS)) / LOOKS
    drawn = []
    for words, (rows, name) in panels.items():
        series = {}
        for label, row in rows.items():
            series[label] = (epoch_R, *plots.summary(row[name]))
        drawn.append(plots.lines(series, title=words, x="epoch", y=axis[name]))
    return plots.panels(drawn, title=title, alt=alt)
