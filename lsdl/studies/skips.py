"""PH-16, skip connections: the loss surface of deep nets with and without them.

Dense nets of width 32 on the digits: one layer in, blocks of two layers, the logits. A block is
relu(x + f(x)) or relu(f(x)), f(x) = W2 relu(W1 x + b1) + b2: the same parameters. He's
initialisation; with skips, W2 is divided by the square root of the blocks' number, in place of the
norms that the papers' nets have. Adam with clipping.

Shape letters: S seeds, N blocks, B batch, D features, C classes, T steps, P points, Q slices.
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
from lsdl.analysis import landscape
from lsdl.state import stream
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A deep net without skip connections ends in a rough, sharp and worse minimum; with them its "
    "surface stays smooth and wide."
)
SOURCE = (
    "Lecture on loss surfaces: ResNet-56 with and without skip connections; Li et al. 2018, "
    "Visualizing the loss landscape of neural nets (arXiv:1712.09913)"
)
_LI = "Li et al. 2018: the effect of network depth and of shortcuts"
EXPECTED = {
    "width_54": Expected(
        "length of the part of a slice around the minimum where the training loss is less than 1 "
        "nat higher, with skips over without, depth 54, mean of 12 filter-normalised slices",
        _LI,
        low=5,
    ),
    "concave_54_skip": Expected(
        "share of a slice's points where it bends down, with skips, depth 54", _LI, high=0.05
    ),
    "concave_54_plain": Expected("the same without skips, depth 54", _LI, low=0.1),
    "gap_54": Expected(
        "points of valid accuracy that skips are ahead, depth 54, digits", _LI, low=5
    ),
    "gap_30": Expected("the same, depth 30", _LI, low=5),
    "gap_10": Expected("the same, depth 10: few layers train without skips", _LI, low=-4, high=4),
    "width_30": Expected(
        "length of the slices' low part with skips over without, depth 30", _LI, low=3
    ),
}
DEPTHS, WIDTH = (10, 30, 54), 32
EPOCHS, BATCH, RATE, CLIP = 60, 64, 1e-3, 1.0
SLICES, POINTS, RADIUS = 12, 41, 1.0
PLANE, PLANE_POINTS = 54, 21  # the depth whose planes are drawn, of the first seed
PUBLISHED = {
    ("20", "skips"): "7.37 % test error",
    ("20", "plain"): "8.18 % test error",
    ("56", "skips"): "5.89 % test error",
    ("56", "plain"): "13.31 % test error",
    ("110", "skips"): "5.79 % test error",
    ("110", "plain"): "16.44 % test error",
}
DIMS = {
    "in/kernel": (1,),
    "head/kernel": (1,),
    **{f"blocks/{name}/kernel": (0, 2) for name in ("first", "second")},
    **{f"{name}/bias": None for name in ("in", "head", "blocks/first", "blocks/second")},
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """Each depth with and without skips; at full scale the papers' ResNets."""
    if scale == "full":
        return [
            Cell(
                f"resnet{depth}_{kind}",
                {},
                f"cifar10_resnet:{depth}" + ",plain" * (kind == "plain"),
                {},
                f"{error} (Li et al. 2018)",
            )
            for (depth, kind), error in PUBLISHED.items()
        ]
    return [
        Cell(f"{depth}-{kind}", {"depth": depth, "kind": kind, "seeds": seeds})
        for depth in DEPTHS
        for kind in ("skips", "plain")
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Percent of valid, the loss at each point of the slices `(S, Q, P)`, and a plane."""
    depth, skip = cell.settings["depth"], cell.settings["kind"] == "skips"
    seeds = cell.settings["seeds"]
    train, _ = digits.load()
    shape = {"size": BATCH, "steps": EPOCHS * (len(train.label_N) // BATCH)}
    ids = np.stack([digits.batches(s, len(train.label_N), **shape) for s in range(seeds)])
    params_S, right_S = _trained(depth, skip, digits.keys(seeds), ids)
    each = [jax.tree.map(lambda leaf, s=s: leaf[s], params_S) for s in range(seeds)]
    keys = digits.keys(seeds)
    loss_SQP = [_slices(skip, *at).tolist() for at in zip(each, keys, strict=True)]
    row = {"accuracy": np.asarray(right_S).tolist(), "loss": loss_SQP}
    if depth == PLANE:
        row["plane"] = _plane(skip, each[0], keys[0])
    return row


def initial(depth: int, skip: bool, key: jax.Array) -> Any:
    """He's normal kernels and biases of zero; blocks are stacked."""
    blocks = (depth - 2) // 2
    keys = jax.random.split(key, 4)

    def layer(key, *shape, scale=1.0):
        std = scale * np.sqrt(2 / shape[-2])
        bias = jnp.zeros((*shape[:-2], shape[-1]))
        return {"kernel": std * jax.random.normal(key, shape), "bias": bias}

    small = 1 / np.sqrt(blocks) if skip else 1.0
    return {
        "in": layer(keys[0], 64, WIDTH),
        "blocks": {
            "first": layer(keys[1], blocks, WIDTH, WIDTH),
            "second": layer(keys[2], blocks, WIDTH, WIDTH, scale=small),
        },
        "head": layer(keys[3], WIDTH, 10),
    }


def logits(skip: bool, params: Any, x_BD: jax.Array) -> jax.Array:
    """`(B, C)`."""

    def dense(layer, x_BD):
        return x_BD @ layer["kernel"] + layer["bias"][None]

    def block(x_BD, layers):
        y_BD = dense(layers["second"], jax.nn.relu(dense(layers["first"], x_BD)))
        return jax.nn.relu(x_BD + y_BD if skip else y_BD), None

    x_BD, _ = lax.scan(block, jax.nn.relu(dense(params["in"], x_BD)), params["blocks"])
    return dense(params["head"], x_BD)


def _loss(skip: bool, params: Any, batch: digits.Split) -> jax.Array:
    log_p_BC = jax.nn.log_softmax(logits(skip, params, batch.x_ND))
    return -jnp.take_along_axis(log_p_BC, batch.label_N[:, None], 1).mean()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _trained(depth: int, skip: bool, keys_S: jax.Array, id_STB: jax.Array):
    """The parameters after the last step, and the percent of valid that is right."""
    train, valid = digits.load()
    optimizer = optax.chain(optax.clip_by_global_norm(CLIP), optax.adam(RATE))

    def one(key, id_TB):
        params = initial(depth, skip, key)

        def step(state, id_B):
            params, moments = state
            gradient = jax.grad(_loss, argnums=1)(skip, params, digits.rows(train, id_B))
            updates, moments = optimizer.update(gradient, moments)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = lax.scan(step, (params, optimizer.init(params)), id_TB)
        return params, 100 * (logits(skip, params, valid.x_ND).argmax(-1) == valid.label_N).mean()

    return jax.vmap(one)(keys_S, id_STB)


def directions(params: Any, keys_Q: jax.Array) -> Any:
    """Random, each filter as long as the parameters' own, `(Q, ...)`; biases stay."""
    normalised = functools.partial(landscape.filter_normalised, dims=DIMS)
    return landscape.slices(params, keys_Q, normalised)


def _slices(skip: bool, params: Any, key: jax.Array) -> np.ndarray:
    """The training loss along `SLICES` directions, `(Q, P)`."""
    own_Q = directions(params, jax.random.split(stream(key, "slices"), SLICES))
    points_P = landscape.line(-RADIUS, RADIUS, POINTS)[:, 0]
    return np.asarray(_along(skip, params, own_Q, jnp.float32(points_P)))


@functools.partial(jax.jit, static_argnums=0)
def _along(skip: bool, params: Any, own_Q: Any, points_P: jax.Array) -> jax.Array:
    train, _ = digits.load()

    def along(own):
        def at(x):
            return _loss(skip, jax.tree.map(lambda w, d: w + x * d, params, own), train)

        return lax.map(at, points_P)

    return lax.map(along, own_Q)


def _plane(skip: bool, params: Any, key: jax.Array) -> list[list[float]]:
    """The training loss on the plane of two directions, `rows[y][x]`."""
    train, _ = digits.load()
    axis = landscape.line(-RADIUS, RADIUS, PLANE_POINTS)
    own_Q = directions(params, jax.random.split(stream(key, "plane")))
    pair = [jax.tree.map(lambda leaf, q=q: leaf[q], own_Q) for q in range(2)]

    def sums(variables, batch):
        return {"loss": _loss(skip, variables["params"], batch), "weight": jnp.array(1.0)}

    points_PQ = landscape.grid(axis, axis)
    found = landscape.surface(sums, {"params": params}, pair, points_PQ, [train])
    return found["loss"].reshape(PLANE_POINTS, PLANE_POINTS).tolist()


def low_part(x_P: np.ndarray, loss_P: np.ndarray) -> float:
    """The length around 0 where the loss is less than 1 above that at 0, between the points too."""
    centre = int(np.abs(x_P).argmin())
    above_P = np.asarray(loss_P) - loss_P[centre] - 1

    def reach(above, x):
        over = np.flatnonzero(~(above < 0))
        if not len(over):
            return abs(x[-1] - x[0])
        i = over[0]
        share = above[i - 1] / (above[i - 1] - above[i]) if np.isfinite(above[i]) else 0.0
        return abs(x[i - 1] + share * (x[i] - x[i - 1]) - x[0])

    ends = (above_P[centre:], x_P[centre:]), (above_P[centre::-1], x_P[centre::-1])
    return float(sum(reach(*end) for end in ends))


def _of_slices(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean length of the low part and mean share that bends down, `(S,)` each."""
    x_P = landscape.line(-RADIUS, RADIUS, POINTS)[:, 0]
    parts = [
        [(low_part(x_P, np.array(loss_P)), landscape.bent_down(loss_P)) for loss_P in q]
        for q in row["loss"]
    ]
    low_S, bent_S = np.mean(parts, 1).T
    return low_S, bent_S


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    rows = {(row["depth"], row["kind"]): row for row in table}
    low = {key: _of_slices(row)[0] for key, row in rows.items()}

    def gap(depth):
        return np.subtract(*(rows[depth, kind]["accuracy"] for kind in ("skips", "plain")))

    return judged(
        EXPECTED,
        {
            "width_54": low[54, "skips"] / low[54, "plain"],
            "concave_54_skip": _of_slices(rows[54, "skips"])[1],
            "concave_54_plain": _of_slices(rows[54, "plain"])[1],
            "gap_54": gap(54),
            "gap_30": gap(30),
            "gap_10": gap(10),
            "width_30": low[30, "skips"] / low[30, "plain"],
        },
    )


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Slices and planes of the deepest nets; width and accuracy over the depth."""
    rows = {(row["depth"], row["kind"]): row for row in table}
    names = {"skips": "with skips", "plain": "without"}
    x_P = landscape.line(-RADIUS, RADIUS, POINTS)[:, 0]
    slices = []
    for kind, name in names.items():
        curves = {
            f"slice {q + 1}": (x_P, loss_P)
            for q, loss_P in enumerate(rows[PLANE, kind]["loss"][0][:4])
        }
        axes = dict(x="filter-normalised distance", y="training loss, nats", logy=True)
        slices.append(plots.lines(curves, title=f"Depth {PLANE}, {name}", **axes))
    ticks = [f"{x:.1f}" for x in landscape.line(-RADIUS, RADIUS, PLANE_POINTS)[:, 0]]
    planes = [
        plots.heatmap(
            rows[PLANE, kind]["plane"],
            title=f"Depth {PLANE}, {name}",
            x="first direction",
            y="second direction",
            columns=ticks,
            rows=ticks,
            z="training loss, nats",
            logz=True,
            numbers=False,
            limits=(0.01, 100),
        )
        for kind, name in names.items()
    ]
    return {
        "planes": plots.panels(
            planes,
            title="Loss planes around the minimum",
            alt="With skips a wide smooth bowl; without, a small uneven patch between cliffs.",
        ),
        "slices": plots.panels(
            slices,
            title="Slices of one seed",
            alt="Without skips the loss bends up and down and reaches millions of nats.",
        ),
        "depth": _over_depth(rows, names),
    }


def _over_depth(rows: Mapping, names: Mapping[str, str]) -> plots.Figure:
    def series(value_of):
        found = {}
        for kind, name in names.items():
            value_DS = np.array([value_of(rows[depth, kind]) for depth in DEPTHS])
            found[name] = (DEPTHS, *plots.summary(value_DS.T))
        return found

    y = "length with loss < minimum + 1"
    return plots.panels(
        [
            plots.lines(
                series(lambda row: row["accuracy"]),
                title="Accuracy",
                x="layers",
                y="valid accuracy, %",
            ),
            plots.lines(
                series(lambda row: _of_slices(row)[0]),
                title="Width of the minimum",
                x="layers",
                y=y,
            ),
            plots.lines(
                series(lambda row: _of_slices(row)[1]),
                title="Roughness",
                x="layers",
                y="share of points bending down",
            ),
        ],
        title="Depth with and without skip connections",
        alt="With depth, nets without skips lose accuracy and their minima are narrow and rough.",
    )
