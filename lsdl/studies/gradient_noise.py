"""How far a minibatch's gradient is from the full one, and what batch size that asks for.

The 1,257 training digits are all there is: minibatches are drawn from them, and the full gradient
is known. A 64-128-128-10 ReLU net, SGD with momentum on batches of 32. The agreement of examples is
the mean cosine of two gradients, each counted alike; B_simple weighs them by their lengths, and
grows as well where few examples keep a large gradient.

Shape letters: S seeds, P moments of training, B batch sizes, M draws,
T steps.
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import noise
from lsdl.data.readers import EVALUATION, generator
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A minibatch's gradient is the full gradient plus noise whose variance falls like 1/B; as the "
    "loss falls the examples' gradients stop agreeing, and ever larger batches pay."
)
SOURCE = (
    "Lectures: stochastic gradients, batch size, data redundancy; "
    "McCandlish et al. 2018, An empirical model of large-batch training (arXiv:1812.06162)"
)
_NOISE = "McCandlish et al. 2018, section 2.2"
EXPECTED = {
    "variance": Expected(
        "slope of log variance of a minibatch gradient against log B, drawn with replacement, at "
        "initialisation",
        "lecture on stochastic gradients: the variance of a mean",
        low=-1.05,
        high=-0.95,
    ),
    "without_replacement": Expected(
        "variance of half the examples' mean gradient, drawn without replacement over with, at "
        "initialisation: (N - B) / (N - 1)",
        "lectures on batch size: reshuffled epochs against independent subsets",
        low=0.45,
        high=0.55,
    ),
    "right_angle": Expected(
        "share of minibatches of 32 within 90 degrees of the full gradient, at initialisation",
        "lecture on batch size: the 90-degree rule",
        low=0.99,
    ),
    "angle": Expected(
        "largest distance, over B, of the mean cosine from 1 / sqrt(1 + B_simple / B), at "
        "initialisation",
        f"{_NOISE}: E|g_B|^2 = |G|^2 + tr Sigma / B",
        high=0.05,
    ),
    "two_batches": Expected(
        "B_simple from the norms at two batch sizes over B_simple from per-example gradients, at "
        "initialisation",
        "McCandlish et al. 2018, appendix A.1",
        low=0.8,
        high=1.25,
    ),
    "growth": Expected(
        "B_simple after 12 epochs over B_simple at initialisation",
        f"{_NOISE}: the noise scale grows as the loss falls",
        low=10.0,
    ),
    "redundancy": Expected(
        "mean cosine between two examples' gradients, after 12 epochs over at initialisation",
        "lecture on optimisation, part 2: data redundancy, correlated and decorrelated gradients",
        high=0.5,
    ),
}
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SMALL, BIG = 8, 128  # of the estimate from two batch sizes
DRAWS = 256
HIDDEN, EPOCHS, BATCH, RATE, MOMENTUM = (128, 128), 12, 32, 0.05, 0.9
CHUNK = 419  # a third of the digits


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale the runs whose B_simple two batch sizes would give."""
    if scale == "full":
        found = "tens of thousands of images by the end (McCandlish et al. 2018)"
        return [
            Cell(
                "cifar10",
                config="cifar10_resnet:20",
                published="about a thousand images (the same)",
            ),
            Cell("imagenet", config="imagenet_resnet50:256", published=found),
            Cell("c4", config="lm_gpt2:124m", published="none for these data"),
        ]
    return [Cell("digits", {"epochs": EPOCHS, "draws": DRAWS, "seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Lists by seed, then by epoch (0: initialisation) or by batch size."""
    train, _ = digits.load()
    net = digits.Classifier(*HIDDEN)
    epochs, draws, seeds = (cell.settings[name] for name in ("epochs", "draws", "seeds"))
    run = functools.partial(_trained, net, train, epochs=epochs)
    shape = {"size": BATCH, "steps": epochs * (len(train.label_N) // BATCH)}
    ids = np.stack([digits.batches(s, len(train.label_N), **shape) for s in range(seeds)])
    params_PS = jax.jit(jax.vmap(run, out_axes=1))(net.init(digits.keys(seeds)), ids)

    def statistics(params):
        found = noise.example_statistics(
            net.example_loss, params, train, population=True, chunk=CHUNK
        )
        return net.loss(params, train), found

    loss_PS, found_PS = jax.jit(lambda p: lax.map(lambda p: lax.map(statistics, p), p))(params_PS)
    row = {"loss": loss_PS, "noise_scale": found_PS.noise_scale, "cosine": found_PS.cosine}
    row = {name: np.array(value_PS).T.tolist() for name, value_PS in row.items()}
    measured = jax.jit(functools.partial(lax.map, functools.partial(_measured, net, train)))
    drawn = [_drawn(seed, len(train.label_N), draws) for seed in range(seeds)]
    id_by_size = jax.tree.map(lambda *x: np.stack(x), *drawn)
    for moment, i in (("init", 0), ("end", -1)):
        at_S = [jax.tree.map(operator.itemgetter(i), x) for x in (params_PS, found_PS.gradient)]
        row |= _summary(moment, measured((id_by_size, *at_S)))
    return row


def _trained(net, train: digits.Split, params, id_TB, *, epochs: int):
    """The parameters at initialisation and after each epoch."""
    optimizer = optax.sgd(RATE, MOMENTUM)

    def step(state, id_B):
        return digits.step(net, optimizer, state, digits.rows(train, id_B)), None

    def epoch(state, id_TB):
        state, _ = lax.scan(step, state, id_TB)
        return state, state[0]

    start = params, optimizer.init(params)
    _, later = lax.scan(epoch, start, id_TB.reshape(epochs, -1, BATCH))
    return jax.tree.map(lambda first, x: jnp.concatenate([first[None], x]), params, later)


def _drawn(seed: int, count: int, draws: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Ids of minibatches `(M, B)`: with replacement of each size, and of half the examples, with
    replacement and without, a quarter as many.
    """
    draw = generator(seed, EVALUATION, 0, 0)
    by_size = [draw.integers(count, size=(draws, size)) for size in BATCH_SIZES]
    half = count // 2
    subsets = np.stack([draw.permutation(count)[:half] for _ in range(draws // 4)])
    return by_size, [draw.integers(count, size=(draws // 4, half)), subsets]


def _measured(net, train: digits.Split, args):
    """|error|^2, cosine with the full gradient and |gradient|^2 of the minibatches, `(B, M)` each.

    And |error|^2 of the halves, `(2, M)`.
    """
    (by_size, halves), params, full = args

    def of(id_B):
        gradient = jax.grad(net.loss)(params, digits.rows(train, id_B))
        error = noise.square(jax.tree.map(jnp.subtract, gradient, full))
        return error, noise.cosine(gradient, full), noise.square(gradient)

    columns = zip(*(lax.map(of, id_MB) for id_MB in by_size), strict=True)
    half_2M = lax.map(lambda id_MB: lax.map(lambda id_B: of(id_B)[0], id_MB), jnp.stack(halves))
    return *(jnp.stack(column) for column in columns), half_2M


def _summary(moment: str, drawn) -> dict[str, Any]:
    error_SBM, cosine_SBM, square_SBM, half_S2M = (np.asarray(x, float) for x in drawn)
    pairs = zip(*(square_SBM[:, BATCH_SIZES.index(size)] for size in (SMALL, BIG)), strict=True)
    two_batch, two_batch_error = np.transpose([noise.noise_scale(*p, SMALL, BIG) for p in pairs])
    half_S2 = half_S2M.mean(-1)
    values = {
        "variance": error_SBM.mean(-1),
        "cosine": cosine_SBM.mean(-1),
        "within_90": (cosine_SBM > 0).mean(-1),
        "low": np.quantile(cosine_SBM, 0.05, axis=-1),
        "two_batch": two_batch,
        "two_batch_error": two_batch_error,
        "half_ratio": half_S2[:, 1] / half_S2[:, 0],
    }
    return {f"{name}_{moment}": value.tolist() for name, value in values.items()}


def predicted(noise_scale, batch_size):
    """The cosine that |g_B|^2 = |G|^2 + tr Sigma / B means, where g_B . G = |G|^2."""
    return 1 / np.sqrt(1 + np.asarray(noise_scale) / np.asarray(batch_size))


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    (row,) = table
    scale_SP, cosine_SP = np.array(row["noise_scale"]), np.array(row["cosine"])
    cosine_SB, init_S1 = np.array(row["cosine_init"]), scale_SP[:, :1]
    log_B = np.log(BATCH_SIZES)
    slope_S = np.polyfit(log_B, np.log(row["variance_init"]).T, 1)[0]
    distance_SB = np.abs(cosine_SB - predicted(init_S1, np.array(BATCH_SIZES)[None]))
    return judged(
        EXPECTED,
        {
            "variance": slope_S,
            "without_replacement": row["half_ratio_init"],
            "right_angle": np.array(row["within_90_init"])[:, BATCH_SIZES.index(32)],
            "angle": distance_SB.max(1),
            "two_batches": row["two_batch_init"] / scale_SP[:, 0],
            "growth": scale_SP[:, -1] / scale_SP[:, 0],
            "redundancy": cosine_SP[:, -1] / cosine_SP[:, 0],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """The 1/B law, the angle and the noise scale; the agreement of examples over training."""
    (row,) = table
    moments = {"at initialisation": "init", f"after {row['epochs']} epochs": "end"}
    sizes = np.array(BATCH_SIZES)
    variance = {}
    angle = {}
    for (label, moment), i in zip(moments.items(), (0, -1), strict=True):
        mean_B = np.mean(row[f"variance_{moment}"], 0)
        variance[label] = (sizes, mean_B / mean_B[0])
        degrees = [_degrees(row[f"{name}_{moment}"]) for name in ("cosine", "low")]
        angle[label] = (sizes, degrees[0], degrees[0], degrees[1])
        scale = np.mean([scale_P[i] for scale_P in row["noise_scale"]])
        angle[f"{label}, predicted"] = (sizes, _degrees([predicted(scale, sizes)]))
    left = plots.lines(
        variance | {"1/B": (sizes, 1 / sizes)},
        title="Noise falls like 1/B",
        x="batch size B",
        y="variance over that of B = 1",
        logx=True,
        logy=True,
    )
    middle = plots.lines(
        angle,
        title="Angle to the full gradient, up to its 95% quantile",
        x="batch size B",
        y="degrees",
        logx=True,
        levels={"90 degrees": 90.0},
    )
    return {
        "noise": plots.panels(
            [left, middle],
            title="What a minibatch knows of the gradient",
            alt="The variance falls in proportion to 1/B, and the angle with it.",
        ),
        "growth": _growth(row),
    }


def _growth(row) -> plots.Figure:
    epochs = np.arange(row["epochs"] + 1)
    scale_SP, cosine_SP, loss_SP = (np.array(row[n]) for n in ("noise_scale", "cosine", "loss"))
    left = plots.lines(
        {
            "per example": (epochs, *plots.summary(scale_SP)),
            "two batches": (
                epochs[[0, -1]],
                [np.mean(row[f"two_batch_{m}"]) for m in ("init", "end")],
            ),
        },
        title="The noise scale grows",
        x="epoch",
        y="B_simple, examples",
        logy=True,
    )
    middle = plots.lines(
        {"seeds' mean": (epochs, *plots.summary(loss_SP))},
        title="as the loss falls",
        x="epoch",
        y="training loss, nats",
        logy=True,
    )
    right = plots.lines(
        {"seeds' mean": (epochs, *plots.summary(cosine_SP))},
        title="and examples stop agreeing",
        x="epoch",
        y="mean cosine of two gradients",
    )
    return plots.panels(
        [left, middle, right],
        title="The batch size worth having",
        alt="B_simple grows by orders of magnitude while loss and cosine between examples fall.",
    )


def _degrees(cosine_SB) -> np.ndarray:
    return np.degrees(np.arccos(np.clip(np.mean(cosine_SB, 0), -1, 1)))
