"""How wide the first weights are drawn decides how deep a plain net can be trained.

ReLU nets of width 64 on digits, 22 and 30 layers of weights, all of them normal with variance 2 / n
(He) or 1 / n, biases of zero; SGD with momentum 0.9 on batches of 64.

Shape letters: G variances, S seeds, L hidden layers, D width, F units, C classes, N examples,
T steps or epochs, B batch.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import plots
from lsdl.analysis import descent
from lsdl.models.mlp import Mlp
from lsdl.optim.groups import path
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "With weights of variance 1 / n each ReLU layer halves the squared signal and gradient: 22 "
    "layers start late and 30 not at all, where He's 2 / n trains both; units that start alike "
    "stay alike."
)
SOURCE = (
    "Lecture on loss surfaces: initialisation, symmetry breaking, vanishing gradients; He et al. "
    "2015, Delving deep into rectifiers (arXiv:1502.01852), section 2.2"
)
_HE = "He et al. 2015, figures 2 and 3"
_GRADIENT = "He et al. 2015, section 2.2: L layers lose 1 / sqrt(2)^L"
_SYMMETRY = "lecture on loss surfaces: symmetry breaking"
EXPECTED = {
    "stalls_30": Expected(
        "training cross-entropy in nats after 30 epochs, 30 layers, variance 1 / n, rate 0.001",
        _HE,
        low=2.2,
    ),
    "trains_30": Expected(
        "training cross-entropy in nats after 30 epochs, 30 layers, He, rate 0.001", _HE, high=0.5
    ),
    "late_22": Expected(
        "epochs to a training cross-entropy of 1, 22 layers, rate 0.003, variance 1 / n over He "
        "(never in 60 epochs as 60)",
        _HE,
        low=3,
    ),
    "learns_22": Expected(
        "training cross-entropy in nats after 60 epochs, 22 layers, variance 1 / n", _HE, high=2.0
    ),
    "vanishing_22": Expected(
        "gradient norm of the first layer at the start, He over 1 / n, over 2^11, 22 layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "vanishing_30": Expected(
        "gradient norm of the first layer at the start, He over 1 / n, over 2^15, 30 layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "exploding_30": Expected(
        "gradient norm of the first layer at the start, variance 4 / n over He, over 2^15, 30 "
        "layers",
        _GRADIENT,
        low=0.25,
        high=4,
    ),
    "symmetry": Expected(
        "largest difference of two hidden units' weights after 10 epochs over the largest weight, "
        "64-32-10 net whose units start alike, float64",
        _SYMMETRY,
        high=1e-9,
    ),
    "broken": Expected(
        "validation accuracy in points after 10 epochs, He less units that start alike",
        _SYMMETRY,
        low=30,
    ),
}

WIDTH, CLASSES, BATCH, MOMENTUM = 64, 10, 64, 0.9  # a digit has 64 pixels too
HE, INVERSE, DOUBLE = 2.0, 1.0, 4.0  # the variances, times n
RATES, EPOCHS = {22: 0.003, 30: 0.001}, {22: 60, 30: 30}
SYMMETRIC = {"width": 32, "rate": 0.02, "epochs": 10}

PUBLISHED = {
    ("14", "he"): "33.82/13.34 % top-1/top-5 error",
    ("14", "inverse"): "33.90/13.44 % top-1/top-5 error",
    ("22", "he"): "learns, and before the other",
    ("22", "inverse"): "learns",
    ("30", "he"): "38.56/16.59 % top-1/top-5 error",
    ("30", "inverse"): "stalls",
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """Two depths, and units that start alike; at full scale the published errors."""
    if scale == "full":
        return [
            Cell(
                f"{layers}-{name}",
                {},
                f"configs/imagenet_msra.py:{layers}" + ",inverse" * (name == "inverse"),
                {},
                f"{result} (He et al. 2015)",
            )
            for (layers, name), result in PUBLISHED.items()
        ]
    depths = [Cell(f"depth-{depth}", {"depth": depth, "seeds": seeds}) for depth in RATES]
    return [*depths, Cell("symmetry", {"depth": 2, "seeds": seeds})]


class Plain(NamedTuple):
    """A ReLU net whose hidden layers are all alike."""

    w_LDD: jax.Array
    b_LD: jax.Array
    head_DC: jax.Array
    head_C: jax.Array


def drawn(key: jax.Array, gain: jax.Array, *, depth: int) -> Plain:
    """`depth` layers of normal weights with variance `gain` / n, biases of zero."""
    hidden, head = jax.random.split(key)
    deviation = jnp.sqrt(gain / WIDTH)
    return Plain(
        deviation * jax.random.normal(hidden, (depth - 1, WIDTH, WIDTH)),
        jnp.zeros((depth - 1, WIDTH)),
        deviation * jax.random.normal(head, (WIDTH, CLASSES)),
        jnp.zeros(CLASSES),
    )


def loss(net: Plain, batch: digits.Split) -> jax.Array:
    """The mean cross-entropy in nats."""

    def layer(x_ND, parameters):
        w_DD, b_D = parameters
        return jax.nn.relu(x_ND @ w_DD + b_D[None]), None

    x_ND, _ = lax.scan(layer, batch.x_ND, (net.w_LDD, net.b_LD))
    return _cross_entropy(x_ND @ net.head_DC + net.head_C[None], batch.label_N)


def _cross_entropy(z_NC: jax.Array, label_N: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(z_NC, label_N).mean()


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Losses by variance, seed and epoch, and norms of the layers' first gradients."""
    depth, seeds = cell.settings["depth"], cell.settings["seeds"]
    if cell.id == "symmetry":
        return _symmetry(seeds)
    train, _ = digits.load()
    epochs = EPOCHS[depth]
    count = len(train.label_N)
    shape = {"size": BATCH, "steps": epochs * (count // BATCH)}
    id_STB = jnp.stack([digits.batches(seed, count, **shape) for seed in range(seeds)])

    def norms(key, gain):
        gradient = jax.grad(loss)(drawn(key, gain, depth=depth), train)
        return jnp.sqrt((gradient.w_LDD**2).sum((1, 2)))

    def course(key, id_TB, gain):
        net = drawn(key, gain, depth=depth)
        tx = optax.sgd(RATES[depth], MOMENTUM)
        gradient = lambda net, id_B: jax.grad(loss)(net, digits.rows(train, id_B))  # noqa: E731

        def epoch(carry, id_TB):
            net, state = carry
            carry, _ = descent.descend(
                tx, gradient, net, id_TB, state=state, record=descent.nothing
            )
            return carry, loss(carry[0], train)

        _, later = lax.scan(epoch, (net, tx.init(net)), id_TB.reshape(epochs, -1, BATCH))
        return jnp.concatenate([loss(net, train)[None], later])

    def both(over_gains, over_seeds, function):
        return jax.jit(jax.vmap(jax.vmap(function, over_seeds), over_gains))

    keys_S = digits.keys(seeds)
    norm_GSL = both((None, 0), (0, None), norms)(keys_S, jnp.array([INVERSE, HE, DOUBLE]))
    curves = both((None, None, 0), (0, 0, None), course)
    loss_GST = curves(keys_S, id_STB, jnp.array([INVERSE, HE]))
    return {
        "inverse": np.asarray(loss_GST[0]).tolist(),
        "he": np.asarray(loss_GST[1]).tolist(),
        "norms": np.asarray(norm_GSL).tolist(),
    }


def _symmetry(seeds: int) -> dict[str, Any]:
    """Distances of units and accuracies by seed, of units that start alike and of He's."""
    train, valid = digits.load()
    count = len(train.label_N)
    model = Mlp((SYMMETRIC["width"],), CLASSES, dtype=jnp.float64)
    shape = {"size": BATCH, "steps": SYMMETRIC["epochs"] * (count // BATCH)}

    def logits(params, x_ND):
        return model.apply({"params": params}, x_ND, train=False)

    def value(params, batch):
        return _cross_entropy(logits(params, batch.x_ND), batch.label_N)

    def run(params, id_TB):
        tx = optax.sgd(SYMMETRIC["rate"], MOMENTUM)
        gradient = lambda params, id_B: jax.grad(value)(params, digits.rows(train, id_B))  # noqa: E731
        (params, _), distance_T = descent.descend(tx, gradient, params, id_TB, record=apart)
        accuracy = (logits(params, valid.x_ND).argmax(-1) == valid.label_N).mean()
        return distance_T, accuracy

    with jax.enable_x64(True):
        start_S = jax.vmap(lambda key: model.init(key, valid.x_ND[:1], train=False)["params"])(
            digits.keys(seeds)
        )
        start_S = jax.tree.map(lambda x: x.astype(jnp.float64), start_S)
        id_STB = jnp.stack([digits.batches(seed, count, **shape) for seed in range(seeds)])
        both = jax.jit(jax.vmap(lambda params, ids: (run(alike(params), ids), run(params, ids))))
        (alike_ST, alike_S), (_, he_S) = both(start_S, id_STB)
        row = {"distance": alike_ST, "accuracy_alike": alike_S, "accuracy_he": he_S}
        return {name: np.asarray(value).tolist() for name, value in row.items()}


def alike(params: Any) -> Any:
    """`params` with the first hidden unit's weights, in and out, for all units."""
    first = {
        "hidden_0/dense/kernel": lambda w_DF: jnp.broadcast_to(w_DF[:, :1], w_DF.shape),
        "head/kernel": lambda w_FC: jnp.broadcast_to(w_FC[:1], w_FC.shape),
    }
    return jax.tree_util.tree_map_with_path(
        lambda keys, x: first.get(path(keys), lambda x: x)(x), params
    )


def apart(params: Any) -> jax.Array:
    """The largest difference of two hidden units' weights over the largest weight."""
    leaves = {path(keys): x for keys, x in jax.tree_util.tree_leaves_with_path(params)}
    w_DF = leaves["hidden_0/dense/kernel"]
    return (w_DF.max(1) - w_DF.min(1)).max() / abs(w_DF).max()


def claims(table: Sequence[dict]) -> list[Claim]:
    """One value for each seed."""
    rows = {row["id"]: row for row in table}
    shallow, deep, symmetry = rows["depth-22"], rows["depth-30"], rows["symmetry"]
    first = {depth: np.array(rows[f"depth-{depth}"]["norms"])[..., 0] for depth in RATES}
    late = [
        epochs_to(a) / epochs_to(b) for a, b in zip(shallow["inverse"], shallow["he"], strict=True)
    ]
    gap = np.array(symmetry["accuracy_he"]) - symmetry["accuracy_alike"]
    values = {
        "stalls_30": np.array(deep["inverse"])[:, 30],
        "trains_30": np.array(deep["he"])[:, 30],
        "late_22": late,
        "learns_22": np.array(shallow["inverse"])[:, 60],
        "vanishing_22": first[22][1] / first[22][0] / 2**11,
        "vanishing_30": first[30][1] / first[30][0] / 2**15,
        "exploding_30": first[30][2] / first[30][1] / 2**15,
        "symmetry": np.array(symmetry["distance"])[:, -1],
        "broken": 100 * gap,
    }
    return judged(EXPECTED, values)


def epochs_to(loss_T: Sequence[float]) -> int:
    """Epochs to a loss of 1, from 1; their number if it is not reached."""
    return max(1, min(descent.first_below(loss_T, 1.0), len(loss_T) - 1))


def figure(table: Sequence[dict]) -> dict:
    """The courses, the gradients of the layers, and the distance of units that start alike."""
    rows = {row["id"]: row for row in table}
    names = {"inverse": "variance 1 / n", "he": "variance 2 / n (He)"}
    courses, layers = [], []
    for depth in RATES:
        row = rows[f"depth-{depth}"]
        series = {}
        for name, label in names.items():
            mean_T, *limits = plots.summary(row[name])
            series[label] = (range(len(mean_T)), mean_T, *limits)
        courses.append(
            plots.lines(
                series,
                title=f"{depth} layers",
                x="epoch",
                y="training cross-entropy, nats",
                levels={"ln 10, by chance": math.log(10)},
            )
        )
        norm_GL = np.exp(np.log(row["norms"]).mean(1))
        gains = ("1 / n", "2 / n (He)", "4 / n")
        layers.append(
            plots.lines(
                {
                    f"variance {gain}": (range(1, depth), norm_L)
                    for gain, norm_L in zip(gains, norm_GL, strict=True)
                },
                title=f"{depth} layers, at the start",
                x="layer, from the input",
                y="norm of its gradient",
                logy=True,
            )
        )
    symmetry = rows["symmetry"]
    bars = {
        "He": plots.summary(100 * np.array(symmetry["accuracy_he"])),
        "units alike": plots.summary(100 * np.array(symmetry["accuracy_alike"])),
    }
    alt = "He's nets learn at both depths; with 1 / n 22 layers start late and 30 stay at ln 10."
    return {
        "courses": plots.panels(courses, title="Depth that an initialisation reaches", alt=alt),
        "gradients": plots.panels(layers, title="Every layer's gradient vanishes or explodes"),
        "symmetry": plots.bars(
            bars, title="Units that start alike stay alike", x="validation accuracy, %"
        ),
    }
