"""PH-31: images and captions that name attributes, and combinations that no caption named before.

Pictures of 12 x 12: 4 colours x 4 shapes x 2 sizes, anywhere and noisy; of the 32 combinations 24
are seen, in 25 epochs, and 8 held out. Two MLP towers, CLIP's loss.
Shape letters: S seeds, N and M images, D pixels, W words, E shared embedding, K combinations or
numbers of shots, T steps, B batch.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.data.readers import EVALUATION, generator
from lsdl.evaluators import linear_probe
from lsdl.losses import contrastive
from lsdl.models.mlp import Mlp
from lsdl.state import stream
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Images and texts that are trained to find each other classify what was never seen by its name "
    "alone, and their features need few labels."
)
RADFORD = "Radford et al. 2021, Learning transferable visual models from natural language"
SOURCE = f"Lectures: CLIP, zero-shot and few-shot transfer; {RADFORD} (arXiv:2103.00020)"
_LECTURE = "lectures: zero-shot transfer without explicit labels"
EXPECTED = {
    "unseen_8": Expected(
        "% of images of 8 held-out combinations that find their own of the 8 captions (chance "
        "12.5), 24 combinations seen in training",
        _LECTURE,
        low=50,
    ),
    "unseen_32": Expected("the same among all 32 captions (chance 3.1)", _LECTURE, low=15),
    "seen_32": Expected(
        "% of new images of the 24 seen combinations, among all 32 captions", _LECTURE, low=60
    ),
    "one_shot": Expected(
        "points that the names of the 8 held-out combinations are ahead of one labelled image of "
        "each, logistic probe on the image features",
        f"{RADFORD}, figure 6: zero-shot is ahead of one-shot",
        low=0,
    ),
    "few_shot": Expected(
        "points that a probe gains from the image features over raw pixels, 4 images of each of "
        "the 8 held-out combinations",
        "lectures: few-shot transfer",
        low=5,
    ),
    "untrained": Expected(
        "% of the held-out images that find their caption before training (chance 12.5)",
        _LECTURE,
        high=25,
    ),
    "more_unseen_8": Expected(
        "% of held-out images that find their own of the 8 captions after training on 400 images "
        "of a combination in place of 60 (added after a first run with 60)",
        _LECTURE,
        low=50,
    ),
    "more_unseen_32": Expected(
        "the same among all 32 captions (added after a first run)", _LECTURE, low=15
    ),
    "more_seen_32": Expected(
        "% of new images of the 24 seen combinations, among all 32 captions, after training on 400 "
        "images of each (added after a first run)",
        _LECTURE,
        low=60,
    ),
}

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}
SHAPES = ("square", "disc", "cross", "triangle")
SIZES = {"small": 5, "large": 7}  # pixels across
SIDE = 12
COMBINATIONS = tuple(itertools.product(COLOURS, SHAPES, SIZES))
HELD_OUT, NEW = 8, 40
FEW, MORE = 60, 400  # images of a combination to learn from
HIDDEN, EMBED, BATCH, EPOCHS, RATE = (256,), 16, 64, 25, 1e-3
SHOTS = (1, 2, 4, 8, 16)
NOISE = 0.25


def cells(scale: str, seeds: int) -> list[Cell]:
    """One; at full scale CLIP on COCO's captions, and on digits with captions."""
    if scale == "full":
        web = "62.96 % zero-shot on ImageNet after 400 M web pairs (Cherti et al. 2023)"
        tokens = {"data.tokenizer": "clip.json"}
        return [
            Cell("coco_b32", {}, "configs/clip.py:b32", tokens, web),
            Cell("digits", {}, "configs/digits_clip.py", {}, "none for these data"),
        ]
    return [
        Cell(f"images-{count}", {"images": count, "seeds": seeds, "epochs": EPOCHS})
        for count in (FEW, MORE)
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Accuracies in %, one for each seed; of probes by seed and number of shots."""
    images, epochs = cell.settings["images"], cell.settings["epochs"]
    found = [_measured(seed, images, epochs) for seed in range(cell.settings["seeds"])]
    return {name: [one[name] for one in found] for name in found[0]}


def mask(shape: str, size: int) -> np.ndarray:
    """`(size, size)`: 1 inside."""
    middle = (size - 1) / 2
    y, x = np.mgrid[:size, :size] - middle
    inside = {
        "square": np.ones((size, size), bool),
        "disc": x**2 + y**2 <= (middle + 0.3) ** 2,
        "cross": (np.abs(x) < 1) | (np.abs(y) < 1),
        "triangle": np.abs(x) <= (y + middle) / 2,
    }
    return inside[shape].astype(float)


def pictures(combination_N: Sequence[int], draw: np.random.Generator) -> np.ndarray:
    """`(N, H * W * 3)`: each combination somewhere, in some brightness, under noise."""
    image_NHWC = np.zeros((len(combination_N), SIDE, SIDE, 3))
    for i, k in enumerate(combination_N):
        colour, shape, size = COMBINATIONS[k]
        width = SIZES[size]
        top, left = draw.integers(SIDE - width + 1, size=2)
        ink = draw.uniform(0.6, 1.0) * np.array(COLOURS[colour], float)
        window = image_NHWC[i, top : top + width, left : left + width]
        window += mask(shape, width)[..., None] * ink
    image_NHWC += draw.normal(scale=NOISE, size=image_NHWC.shape)
    return image_NHWC.reshape(len(image_NHWC), -1).astype(np.float32)


def captions() -> np.ndarray:
    """`(K, W)`: which of the words each combination's caption has, as in a large red disc."""
    words = [*COLOURS, *SHAPES, *SIZES]
    return np.array([[word in own for word in words] for own in COMBINATIONS], np.float32)


def _measured(seed: int, images: int, epochs: int) -> dict[str, Any]:
    draw = generator(seed, EVALUATION, 0, 0)
    unseen_K = np.sort(draw.permutation(len(COMBINATIONS))[:HELD_OUT])
    seen_K = np.setdiff1d(np.arange(len(COMBINATIONS)), unseen_K)
    train_N = np.repeat(seen_K, images)
    x_ND, caption_KW = pictures(train_N, draw), captions()
    steps = epochs * (len(train_N) // BATCH)
    id_TB = digits.batches(seed, len(train_N), size=BATCH, steps=steps)
    first, last, loss_T = _train(jax.random.key(seed), x_ND, caption_KW[train_N], id_TB)
    new_M = {"seen": np.repeat(seen_K, NEW), "unseen": np.repeat(unseen_K, NEW)}
    x_MD = {name: pictures(id_M, draw) for name, id_M in new_M.items()}
    every = np.arange(len(COMBINATIONS))

    def found(params, name, among_K):
        best_M = similarity(params, x_MD[name], caption_KW[among_K]).argmax(1)
        return 100 * float((among_K[best_M] == new_M[name]).mean())

    shot_N = np.repeat(unseen_K, max(SHOTS))
    features = lambda x_ND: np.asarray(_embed(last["image"], x_ND, IMAGE))  # noqa: E731
    x_SD = pictures(shot_N, draw)
    inputs = {
        "probe": (features(x_SD), features(x_MD["unseen"])),
        "probe_pixels": (x_SD, x_MD["unseen"]),
    }

    def right(own_ND, label_N, new_MD):
        return 100 * float((linear_probe(own_ND, label_N, new_MD) == new_M["unseen"]).mean())

    rank_N = np.tile(np.arange(max(SHOTS)), HELD_OUT)  # an image's place in its class
    probes = {
        name: [right(own_ND[rank_N < k], shot_N[rank_N < k], new_MD) for k in SHOTS]
        for name, (own_ND, new_MD) in inputs.items()
    }
    return probes | {
        "unseen_8": found(last, "unseen", unseen_K),
        "unseen_32": found(last, "unseen", every),
        "seen_32": found(last, "seen", every),
        "untrained": found(first, "unseen", unseen_K),
        "loss": np.asarray(loss_T).reshape(epochs, -1).mean(1).tolist(),
    }


IMAGE, TEXT = (Mlp(HIDDEN, EMBED) for _ in range(2))


def _embed(params, x_ND, tower: Mlp) -> jax.Array:
    """`(N, E)`, of unit length."""
    x_NE = tower.apply({"params": params}, x_ND, train=False)
    return x_NE / jnp.linalg.norm(x_NE, axis=-1, keepdims=True)


def similarity(params, x_ND, caption_KW) -> np.ndarray:
    """The cosine of each image with each caption, `(N, K)`."""
    x_NE, text_KE = _embed(params["image"], x_ND, IMAGE), _embed(params["text"], caption_KW, TEXT)
    return np.asarray(x_NE @ text_KE.T)


@jax.jit
def _train(key: jax.Array, x_ND: jax.Array, caption_NW: jax.Array, id_TB: jax.Array):
    """The parameters before and after, and each step's loss."""
    own = {"row_B": jnp.arange(id_TB.shape[1]), "weight_B": jnp.ones(id_TB.shape[1])}

    def loss(params, id_B):
        pair = [
            _embed(params["image"], x_ND[id_B], IMAGE),
            _embed(params["text"], caption_NW[id_B], TEXT),
        ]
        scale = jnp.exp(params["log_scale"])
        return contrastive(*pair, scale, jnp.zeros(()), **own, form="softmax")["loss"] / len(id_B)

    params = {
        "image": IMAGE.init(stream(key, "image"), x_ND[:1], train=False)["params"],
        "text": TEXT.init(stream(key, "text"), caption_NW[:1], train=False)["params"],
        "log_scale": jnp.log(1 / 0.07),
    }
    tx = optax.adam(RATE)

    def step(state, id_B):
        params, opt_state = state
        value, gradient = jax.value_and_grad(loss)(params, id_B)
        updates, opt_state = tx.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), value

    (last, _), loss_T = lax.scan(step, (params, tx.init(params)), id_TB)
    return params, last, loss_T


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    row, more = (next(r for r in table if r["images"] == count) for count in (FEW, MORE))
    probe_SK, pixels_SK = np.array(row["probe"]), np.array(row["probe_pixels"])
    one, four = (SHOTS.index(shots) for shots in (1, 4))
    names = ("unseen_8", "unseen_32", "seen_32")
    values = {name: row[name] for name in (*names, "untrained")}
    values |= {f"more_{name}": more[name] for name in names}
    values["one_shot"] = np.array(row["unseen_8"]) - probe_SK[:, one]
    values["few_shot"] = probe_SK[:, four] - pixels_SK[:, four]
    return judged(EXPECTED, values)


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Probes on few images beside the names alone, after few and more images of the others."""
    panels = []
    for row in table:
        series = {
            label: (np.array(SHOTS), *_summary(np.array(row[name])))
            for name, label in (("probe", "CLIP's features"), ("probe_pixels", "pixels"))
        }
        panels.append(
            plots.lines(
                series,
                levels={"zero-shot": float(np.mean(row["unseen_8"])), "chance": 12.5},
                title=f"After {row['images']} images of each other combination",
                x="labelled images of each new combination",
                y="accuracy of a probe, %",
                logx=True,
            )
        )
    alt = "Names alone do as well as one or more labelled images of each combination."
    title = "8 combinations that no caption named"
    return {"shots": plots.panels(panels, title=title, alt=alt)}


def _summary(value_SK: np.ndarray) -> tuple:
    return value_SK.mean(0), value_SK.min(0), value_SK.max(0)
