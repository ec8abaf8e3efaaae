"""Bad minima on spirals: perfect on the training points, worse than chance elsewhere, and tiny.

Both nets of a seed start at the same initialisation. The good one learns the 130 training points;
the bad one also learns 260 poison points with the wrong labels, first at half of the loss, then at
2% of it. What is reported are the 1,000 valid points, which neither has seen. Biases start uniform
within 1 / sqrt(inputs); the lectures leave that open. Two other starts were measured with three
seeds: with biases of zero, where all kinks of the first layer go through the origin, the good net
has 97.2%; with kernels of that size as well, a sixth of the variance, the bad one has 54.8%.

The orders between the volumes average log radii, as the lectures' number does: the ball with the
typical radius. A radius below the search's limit counts as the limit, which makes them too few.
Bad minima are near in that they have the same start; they end several times as far from it.

Shape letters: N points, F = 2 coordinates, S seeds, K directions, G places of a grid.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl import plots
from lsdl.analysis import descent, landscape, volume
from lsdl.analysis.curvature import dot, size
from lsdl.models.mlp import Mlp
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Minima with perfect training accuracy that generalise no better than chance exist beside the "
    "good ones; their volume is smaller by thousands of decimal orders, so descent misses them."
)
SOURCE = (
    "Lectures: the minefield of bad minima, decision boundaries, volume ratio; Huang et al. 2020, "
    "Understanding generalization through visualizations (arXiv:1906.03291)"
)
_MINEFIELD = "lecture on optimisation and regularisation: the minefield; Huang et al. 2020"
_VOLUME = "lecture on optimisation and regularisation: the volume ratio; Huang et al. 2020"
EXPECTED = {
    "good_train": Expected(
        "train accuracy in percent after 6,000 steps of full-batch Adam, spirals of 130 points",
        _MINEFIELD,
        low=100,
        high=100,
    ),
    "good_valid": Expected(
        "accuracy in percent of the same net on the 1,000 valid points", _MINEFIELD, low=98.5
    ),
    "bad_train": Expected(
        "train accuracy in percent of the net that was also taught 260 other points with wrong "
        "labels, after 46,000 steps",
        _MINEFIELD,
        low=100,
        high=100,
    ),
    "bad_valid": Expected(
        "accuracy in percent of the same net on the 1,000 valid points: below 53",
        _MINEFIELD,
        high=52.99,
    ),
    "good_valid_tanh": Expected(
        "accuracy in percent on the 1,000 valid points of nets with tanh in place of ReLUs, taught "
        "the training points alone (added after a first run, in which ReLU nets had 97.2)",
        _MINEFIELD,
        low=98.5,
    ),
    "orders": Expected(
        "decimal orders between the volumes of the good and the bad minimum: 6,762 times the "
        "difference of the mean log10 radii up to a train loss of 0.1, 200 filter-normalised "
        "directions",
        _VOLUME,
        low=1_000,
    ),
    "orders_0.5": Expected(
        "the same orders with radii up to a train loss of 0.5", _VOLUME, low=1_000
    ),
}
DIRECTIONS = 200
NET = Mlp(hidden=(40,) * 5, num_classes=2)
TANH = Mlp(hidden=(40,) * 5, num_classes=2, activation="tanh")
GOOD = (6_000, 3e-3, 0.0)  # steps and rate of full-batch Adam, and the poison's share of the loss
BAD = (40_000, 2e-3, 0.5), (6_000, 3e-4, 0.02)
CUTS = (0.1, 0.5)  # of the train loss, in nats
GRID = 61


class Points(NamedTuple):
    x_NF: jax.Array
    label_N: jax.Array


def cells(scale: str, seeds: int) -> list[Cell]:
    """One, of a good and a bad net for each seed; at full scale the nets on SVHN."""
    if scale == "full":
        fields = {"data.source": "tfds:svhn_cropped", "batch_size": 256}
        poisoned = {"model": "ResNet-18", "batch": 256, "poison_share": 0.35}
        found = "100% train, 29% test accuracy; volumes 10,000 orders apart (Huang et al. 2020)"
        return [
            Cell("svhn_good", {}, "configs/cifar10_resnet.py:20", fields, "none for this net"),
            Cell("svhn_bad", poisoned, published=found),
        ]
    return [Cell("spirals", {"seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Lists by seed: accuracies, distances, radii; the boundaries and the losses of seed 0."""
    train, valid, poison = (_points(split) for split in ("train", "valid", "poison"))
    poison = poison._replace(label_N=1 - poison.label_N)
    start = _init(digits.keys(cell.settings["seeds"]))
    run = functools.partial(_trained, train, poison)
    good = run(start, phases=(GOOD,))
    bad = run(start, phases=BAD)
    smooth = run(start, phases=(GOOD,), net=TANH)
    on_train = lambda params: _loss(params, train)  # noqa: E731
    row: dict[str, Any] = {"parameters": size(start) // cell.settings["seeds"]}
    for name, params in {"good": good, "bad": bad}.items():
        for split, points in {"train": train, "valid": valid, "poison": poison}.items():
            row[f"{name}_{split}"] = _accuracies(params, points).tolist()
        row[f"{name}_loss"] = np.array(_losses(params, train), float).tolist()
        row |= _radii(name, params, on_train)
        row[f"{name}_map"] = _map(jax.tree.map(lambda x: x[0], params))
    row["tanh_valid"] = _accuracies(smooth, valid, TANH).tolist()
    row["apart"] = _distances(good, bad)
    row["good_moved"], row["bad_moved"] = _distances(start, good), _distances(start, bad)
    row["between"] = _between(good, bad, train)
    return row


def _points(split: str) -> Points:
    x_NF, label_N = descent.examples("spirals", split)
    return Points(jnp.asarray(x_NF, jnp.float32), jnp.asarray(label_N, jnp.int32))


@jax.jit
@jax.vmap
def _init(key: jax.Array) -> Any:
    params = NET.init(key, jnp.zeros((1, 2)), train=False)["params"]
    leaves, form = jax.tree_util.tree_flatten_with_path(params)
    arrays = {jax.tree_util.keystr(path): array for path, array in leaves}
    for name, own in zip(arrays, jax.random.split(key, len(arrays)), strict=True):
        if "bias" in name:
            most = len(arrays[name.replace("bias", "kernel")]) ** -0.5
            arrays[name] = jax.random.uniform(own, arrays[name].shape, minval=-most, maxval=most)
    return jax.tree.unflatten(form, list(arrays.values()))


def _logits(params: Any, x_NF: jax.Array, net: Mlp = NET) -> jax.Array:
    return net.apply({"params": params}, x_NF, train=False)


def _loss(params: Any, points: Points) -> jax.Array:
    logits_NC = _logits(params, points.x_NF)
    return optax.softmax_cross_entropy_with_integer_labels(logits_NC, points.label_N).mean()


def _accuracy(params: Any, points: Points, net: Mlp = NET) -> jax.Array:
    return (_logits(params, points.x_NF, net).argmax(-1) == points.label_N).mean()


_losses = jax.jit(jax.vmap(_loss, (0, None)))


def _accuracies(params: Any, points: Points, net: Mlp = NET) -> np.ndarray:
    of = jax.vmap(lambda params: _accuracy(params, points, net))
    return np.array(100 * jax.jit(of)(params), float)


@functools.partial(jax.jit, static_argnames=("phases", "net"))
def _trained(train: Points, poison: Points, start: Any, *, phases: tuple, net: Mlp = NET) -> Any:
    """All seeds' nets after the phases, each with an Adam of its own."""
    together = Points(*(jnp.concatenate(leaves) for leaves in zip(train, poison, strict=True)))

    def run(params):
        for steps, rate, share in phases:
            points = together if share else train
            weight_N = np.full(len(points.label_N), (1 - share) / len(train.label_N), np.float32)
            weight_N[len(train.label_N) :] = share / len(poison.label_N)

            def loss(params, points=points, weight_N=weight_N):
                loss_N = optax.softmax_cross_entropy_with_integer_labels(
                    _logits(params, points.x_NF, net), points.label_N
                )
                return loss_N @ weight_N

            gradient = lambda params, _, loss=loss: jax.grad(loss)(params)  # noqa: E731
            (params, _), _ = descent.descend(
                optax.adam(rate), gradient, params, jnp.arange(steps), record=descent.nothing
            )
        return params

    return jax.vmap(run)(start)


def _radii(name: str, params_S: Any, loss: Callable) -> dict[str, Any]:
    """Radii along filter-normalised directions, `(S, K)`, and how many met the search's limits."""
    found: dict[str, Any] = {f"{name}_{k}": [] for k in (*map(_radius, CUTS), "floored", "open")}
    for seed in range(len(jax.tree.leaves(params_S)[0])):
        params = jax.tree.map(lambda x, seed=seed: x[seed], params_S)
        draw = np.random.default_rng(seed).normal
        normal = lambda w, draw=draw: draw(size=(DIRECTIONS, *w.shape)).astype(np.float32)  # noqa: E731
        losses = volume.stacked_losses(loss, params, _scaled(jax.tree.map(normal, params), params))
        searches = [
            volume.radii(losses, DIRECTIONS, cut=cut, low=1e-4, high=10.0, factor=2.0)
            for cut in CUTS
        ]
        for cut, search in zip(CUTS, searches, strict=True):
            found[f"{name}_{_radius(cut)}"].append(search.radius_K.tolist())
        for limit in ("floored", "open"):
            met = [int(getattr(search, f"{limit}_K").sum()) for search in searches]
            found[f"{name}_{limit}"].append(met)
    return found


def _radius(cut: float) -> str:
    return f"radius_{cut:g}"


@jax.jit
def _scaled(normal_K: Any, params: Any) -> Any:
    """Each direction with filters, and biases, as long as the parameters' own."""
    paths = [
        jax.tree_util.keystr(keys, simple=True, separator="/")
        for keys, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    dims = {path: (1,) if "kernel" in path else None for path in paths}
    return jax.vmap(
        lambda normal: landscape.filter_normalised(normal, params, dims, vectors="scale")
    )(normal_K)


def _distances(start: Any, end: Any) -> list[float]:
    apart = jax.vmap(lambda a, b: dot(d := landscape.difference(a, b), d))(start, end)
    return np.sqrt(np.array(apart, float)).tolist()


def _between(good: Any, bad: Any, train: Points) -> dict[str, list]:
    """Train loss along the straight line from the good minimum to the bad one, `(S, G)`."""
    at_G = landscape.line(-0.2, 1.2, 57)[:, 0]

    def of(good, bad):
        move = lambda at: jax.tree.map(lambda g, b: g + at * (b - g), good, bad)  # noqa: E731
        return jax.lax.map(lambda at: _loss(move(at), train), jnp.asarray(at_G, jnp.float32))

    loss_SG = jax.jit(jax.vmap(of))(good, bad)
    return {"at": at_G.tolist(), "loss": np.array(loss_SG, float).tolist()}


def _map(params: Any) -> list[list[float]]:
    """The probability of the second arm over the square around the disc, in rows of y."""
    at_G1 = landscape.line(-1, 1, GRID)
    x_NF = jnp.asarray(landscape.grid(at_G1, at_G1), jnp.float32)
    share_N = jax.nn.softmax(_logits(params, x_NF))[:, 1]
    return np.round(np.array(share_N, float), 3).reshape(GRID, GRID).tolist()


def _orders(row: Mapping[str, Any], cut: float) -> list[tuple[float, float]]:
    """(orders, standard error over directions) of each seed."""
    pairs = zip(*(row[f"{name}_{_radius(cut)}"] for name in ("good", "bad")), strict=True)
    return [volume.orders_between(np.array(g), np.array(b), row["parameters"]) for g, b in pairs]


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed."""
    (row,) = table
    names = ("good_train", "good_valid", "bad_train", "bad_valid")
    values = {name: row[name] for name in names} | {"good_valid_tanh": row["tanh_valid"]}
    for id, cut in {"orders": 0.1, "orders_0.5": 0.5}.items():
        values[id] = [orders for orders, _ in _orders(row, cut)]
    return judged(EXPECTED, values)


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Boundaries of seed 0, radii of all seeds, the way between the minima."""
    (row,) = table
    return {"boundaries": _boundaries(row), "radii": _sizes(row)}


def _boundaries(row: Mapping[str, Any]) -> plots.Figure:
    """A half of the colour for what the net says, the whole for a training point's own label."""
    train = _points("train")
    at_G = np.linspace(-1, 1, GRID)
    place_NF = np.round((np.array(train.x_NF) + 1) / 2 * (GRID - 1)).astype(int)
    said = {"good": "the good minimum", "bad": "a bad minimum"}
    panels = []
    for name, words in said.items():
        colour_GG = 0.6 * (2 * np.array(row[f"{name}_map"]) - 1)
        colour_GG[place_NF[:, 1], place_NF[:, 0]] = 2 * np.array(train.label_N) - 1
        panels.append(
            plots.heatmap(
                colour_GG,
                title=f"{words.capitalize()}: {row[f'{name}_valid'][0]:.1f}% of other points",
                x="x",
                y="y",
                z="arm; strong: a training point",
                columns=[f"{at:.2f}" for at in at_G],
                rows=[f"{at:.2f}" for at in at_G],
                diverging=True,
                numbers=False,
            )
        )
    return plots.panels(
        panels,
        title="Two nets that are perfect on the training points",
        alt="The good net's boundary follows the spiral; the bad one's winds around each point.",
    )


def _sizes(row: Mapping[str, Any]) -> plots.Figure:
    share_K = (np.arange(DIRECTIONS) + 0.5) / DIRECTIONS
    series = {}
    for cut in CUTS:
        for name in ("good", "bad"):
            sorted_SK = np.sort(row[f"{name}_{_radius(cut)}"], axis=1)
            series[f"{name}, to a loss of {cut:g}"] = (share_K, *plots.summary(sorted_SK))
    orders = np.mean([orders for orders, _ in _orders(row, CUTS[0])])
    radii = plots.lines(
        series,
        title=f"Radii: the volumes are {orders:,.0f} orders apart",
        x="share of the directions",
        y="radius, shares of the filters' lengths",
        logy=True,
    )
    way = plots.lines(
        {"seeds' mean": (row["between"]["at"], *plots.summary(row["between"]["loss"]))},
        title="From the good minimum (0) to the bad one (1)",
        x="share of the way",
        y="train loss, nats",
        logy=True,
    )
    return plots.panels(
        [radii, way],
        title="The bad minimum is narrow",
        alt="Radii of the bad minimum are tens of times smaller than the good one's.",
    )
