"""One layer by neurons, by vectors, by vmap and by a matrix product; and in blocks.

Shape letters: B batch, D inputs, H neurons, L layers.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsdl import plots
from lsdl.analysis import clock
from lsdl.state import stream
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A layer as one matrix product is the same numbers as neuron by neuron and far faster, forward "
    "and backward, and its blocks are best where they fit the caches."
)
SOURCE = (
    "Lecture on optimisation in deep learning: matrix-vector form, decomposition into blocks; "
    "lecture on systems: vectorised implementations"
)
_FORM = "lecture: a_j = g(sum_i a_i w_ij + b_j) = layer form g(W a + b)"
_SYSTEMS = "lecture: cuBLAS and cuDNN, forward and backward both fast"
_BLOCKS = "lecture: computations decomposed into blocks that match cache and GPU block sizes"
_LAYER = "layer of 256 -> 256 on 256 examples, float32"
EXPECTED = {
    "equal": Expected(
        "largest difference of any form's activations and gradients from the matrix product's, "
        f"over its largest entry: {_LAYER}",
        _FORM,
        high=1e-5,
    ),
    "forward": Expected(
        "time of a Python loop over neurons and examples, an inner product each, over that of the "
        f"matrix product, jax.jit: {_LAYER}",
        _FORM,
        low=20,
    ),
    "backward": Expected("the same for the gradients of weights and inputs", _SYSTEMS, low=20),
    "vectors": Expected(
        "time of the faster of two compiled loops, over neurons or over examples, a matrix-vector "
        "product each, over that of the matrix product",
        _FORM,
        low=2,
    ),
    "vmap_products": Expected(
        "products in the program that vmap makes of one neuron and one example", _FORM, 1, 1
    ),
    "vmap": Expected(
        "time of that program over that of the matrix product, both by jax.jit", _FORM, 0.67, 1.5
    ),
    "backward_rate": Expected(
        "FLOP/s of the gradients over those of the activations", _SYSTEMS, low=0.5
    ),
    "batch": Expected(
        "examples/s at a batch over those at half of it, the least for batches 2 to 256",
        "lecture: mini-batches use vectorisation; non-decreasing within 10%",
        low=0.9,
    ),
    "batch_gradient": Expected("the same for the gradients", _SYSTEMS, low=0.9),
    "batch_gain": Expected(
        "examples/s at batch 256 over those at batch 1: weights are read once", _FORM, 4
    ),
    "blocks": Expected(
        "time of a matrix product of 256 x 256 x 256 in blocks of 8, a compiled loop, over that in "
        "blocks of 256: most of a small block's time is not its FLOPs'",
        _BLOCKS,
        low=10,
    ),
    "rows_whole": Expected(
        "time of 4 layers of 64 neurons on 131,072 examples, the whole batch layer by layer, over "
        "that of the best block of rows, each through all layers",
        _BLOCKS,
        low=1.2,
    ),
    "rows_small": Expected("time of blocks of 16 rows over that of the best", _BLOCKS, low=1.2),
}

WIDTH = BATCH = 256
BATCHES = tuple(2**i for i in range(9))  # 1 to 256
BLOCKS = tuple(2**i for i in range(3, 9))  # 8 to 256
ROWS, NARROW, DEEP = 2**17, 64, 4
ROW_BLOCKS = (16, 64, 256, 1024, 4096, 16_384, ROWS)
FORMS = {
    "neurons": "inner products, Python's loop",
    "by_neuron": "a neuron at once, compiled loop",
    "by_example": "an example at once, compiled loop",
    "vmap": "inner product under vmap",
    "product": "matrix product",
    "neurons_back": "gradients: inner products",
    "product_back": "gradients: matrix products",
}
ROUNDS, SLOW_ROUNDS = 41, 5
LEAST_S = 0.005  # of one timing: a call of some microseconds is repeated until then


def cells(scale: str, seeds: int) -> list[Cell]:
    """Each seed draws other numbers and times again; at full scale the model FLOP/s of a GPT."""
    if scale == "full":
        file = "configs/lm_gpt2.py:124m"
        return [
            Cell(f"batch{size}", {}, file, {"batch_size": size, "total_steps": 100})
            for size in (8, 32, 128, 512)
        ]
    parts = ("loops", "batches", "blocks", "rows")
    return [
        Cell(f"{part}-s{seed}", {"part": part, "seed": seed})
        for part in parts
        for seed in range(seeds)
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Seconds, and distances from the matrix product's numbers."""
    parts = {"loops": _loops, "batches": _batches, "blocks": _blocks, "rows": _rows}
    return parts[cell.settings["part"]](jax.random.key(cell.settings["seed"]))


def _normal(key: jax.Array, label: str, *shape: int) -> jax.Array:
    return jax.random.normal(stream(key, label), shape)


def _fastest(calls: Mapping[Any, Callable[[], Any]], rounds: int = ROUNDS) -> dict[Any, float]:
    """{name: seconds} of the fastest of interleaved rounds: a busy machine only adds to a time."""
    seconds = clock.in_turn(calls, rounds=rounds, least_s=LEAST_S)
    return {name: min(times) for name, times in seconds.items()}


# One layer, relu(a W + b): neuron by neuron as the lecture writes it, and in ever larger steps.


def neurons(a_BD: np.ndarray, w_DH: np.ndarray, bias_H: np.ndarray) -> np.ndarray:
    """`z_BH`: of each example each neuron, an inner product."""
    z_BH, w_HD = np.empty((len(a_BD), len(bias_H)), np.float32), np.ascontiguousarray(w_DH.T)
    for b, a_D in enumerate(a_BD):
        for h, w_D in enumerate(w_HD):
            z_BH[b, h] = max(a_D @ w_D + bias_H[h], 0)
    return z_BH


def neurons_back(a_BD, w_DH, delta_BH) -> tuple[np.ndarray, np.ndarray]:
    """Gradients `(w_DH, a_BD)` for the slopes `delta_BH`: of each entry an inner product."""
    a_DB, delta_HB = np.ascontiguousarray(a_BD.T), np.ascontiguousarray(delta_BH.T)
    to_w_DH, to_a_BD = np.empty_like(w_DH), np.empty_like(a_BD)
    for d, (a_B, w_H) in enumerate(zip(a_DB, w_DH, strict=True)):
        for h, delta_B in enumerate(delta_HB):
            to_w_DH[d, h] = a_B @ delta_B
        for b, delta_H in enumerate(delta_BH):
            to_a_BD[b, d] = delta_H @ w_H
    return to_w_DH, to_a_BD


def neuron(a_D: jax.Array, w_D: jax.Array, bias: jax.Array) -> jax.Array:
    """One activation, of one example and one neuron; or of many, if one of both is a matrix."""
    return jax.nn.relu(jnp.dot(a_D, w_D) + bias)


vmapped = jax.jit(jax.vmap(jax.vmap(neuron, (None, 1, 0)), (0, None, None)))


@jax.jit
def by_neuron(a_BD: jax.Array, w_DH: jax.Array, bias_H: jax.Array) -> jax.Array:
    """`z_BH`: each neuron on all examples, a matrix-vector product, in a loop."""
    one = lambda part: neuron(a_BD, *part)  # noqa: E731
    return jax.lax.map(one, (w_DH.T, bias_H)).T


@jax.jit
def by_example(a_BD: jax.Array, w_DH: jax.Array, bias_H: jax.Array) -> jax.Array:
    """`z_BH`: all neurons on each example, a matrix-vector product, in a loop."""
    return jax.lax.map(lambda a_D: neuron(a_D, w_DH, bias_H), a_BD)


@jax.jit
def product(a_BD: jax.Array, w_DH: jax.Array, bias_H: jax.Array) -> jax.Array:
    """`z_BH`: one matrix product."""
    return jax.nn.relu(a_BD @ w_DH + bias_H[None])


@jax.jit
def product_back(a_BD, w_DH, delta_BH) -> tuple[jax.Array, jax.Array]:
    """Gradients `(w_DH, a_BD)`: two matrix products."""
    return a_BD.T @ delta_BH, delta_BH @ w_DH.T


@functools.partial(jax.jit, static_argnames="block")
def blocked(a_BD: jax.Array, w_DH: jax.Array, *, block: int) -> jax.Array:
    """`a_BD @ w_DH`, block by block in loops; all three dims are multiples of `block`."""
    (batch, depth), width = a_BD.shape, w_DH.shape[1]
    # Here b, d and h count blocks, and S is the side of one.
    a_bdSS = a_BD.reshape(batch // block, block, depth // block, block).swapaxes(1, 2)
    w_hdSS = w_DH.reshape(depth // block, block, width // block, block).transpose(2, 0, 1, 3)

    def entry(a_dSS, w_dSS):
        add = lambda sum_SS, pair: (sum_SS + pair[0] @ pair[1], None)  # noqa: E731
        return jax.lax.scan(add, jnp.zeros((block, block)), (a_dSS, w_dSS))[0]

    z_bhSS = jax.lax.map(
        lambda a_dSS: jax.lax.map(lambda w_dSS: entry(a_dSS, w_dSS), w_hdSS), a_bdSS
    )
    return z_bhSS.swapaxes(1, 2).reshape(batch, width)


@functools.partial(jax.jit, static_argnames="rows")
def in_rows(a_BD: jax.Array, w_LDD: jax.Array, *, rows: int) -> jax.Array:
    """`z_BD`: all layers, without biases, on `rows` examples, then on the next ones."""

    def layers(x_RD):
        for w_DD in w_LDD:
            x_RD = jax.nn.relu(x_RD @ w_DD)
        return x_RD

    return jax.lax.map(layers, a_BD.reshape(-1, rows, a_BD.shape[1])).reshape(a_BD.shape)


def _apart(found: Any, expected: Any) -> float:
    """The largest difference over the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(np.subtract(f, e)).max() / np.abs(e).max()) for f, e in pairs)


def _loops(key: jax.Array) -> dict[str, Any]:
    a_BD, w_DH = _normal(key, "examples", BATCH, WIDTH), _normal(key, "weights", WIDTH, WIDTH)
    bias_H, slope_BH = _normal(key, "bias", WIDTH), _normal(key, "slopes", BATCH, WIDTH)
    there = (a_BD, w_DH, bias_H), (a_BD, w_DH, slope_BH)
    here = [tuple(map(np.asarray, arrays)) for arrays in there]
    forms = {"by_neuron": by_neuron, "by_example": by_example, "vmap": vmapped, "product": product}
    fast = {name: functools.partial(form, *there[0]) for name, form in forms.items()}
    fast |= {"product_back": functools.partial(product_back, *there[1])}
    slow = {"neurons": functools.partial(neurons, *here[0])}
    slow |= {"neurons_back": functools.partial(neurons_back, *here[1])}

    apart = [_apart(call(), fast["product"]()) for name, call in fast.items() if name in forms]
    apart.append(_apart(slow["neurons"](), fast["product"]()))
    apart.append(_apart(slow["neurons_back"](), fast["product_back"]()))
    program = vmapped.trace(*there[0]).jaxpr
    return {
        "seconds_of": _fastest(fast) | _fastest(slow, SLOW_ROUNDS),
        "apart": max(apart),
        "products": sum(eqn.primitive.name == "dot_general" for eqn in program.jaxpr.eqns),
    }


def _batches(key: jax.Array) -> dict[str, Any]:
    """Examples/s by batch, of activations and of gradients."""
    w_DH, bias_H = _normal(key, "weights", WIDTH, WIDTH), _normal(key, "bias", WIDTH)
    forward, back = {}, {}
    for batch in BATCHES:
        a_BD, slope_BH = (_normal(key, label, batch, WIDTH) for label in ("examples", "slopes"))
        forward[batch] = functools.partial(product, a_BD, w_DH, bias_H)
        back[batch] = functools.partial(product_back, a_BD, w_DH, slope_BH)
    return {
        name: [batch / seconds for batch, seconds in _fastest(calls).items()]
        for name, calls in (("forward", forward), ("back", back))
    }


def _blocks(key: jax.Array) -> dict[str, Any]:
    """Seconds of a product by block."""
    a_BD, w_DH = (_normal(key, label, WIDTH, WIDTH) for label in ("examples", "weights"))
    calls = {block: functools.partial(blocked, a_BD, w_DH, block=block) for block in BLOCKS}
    apart = max(_apart(call(), a_BD @ w_DH) for call in calls.values())
    return {"seconds_by_block": list(_fastest(calls).values()), "apart": apart}


def _rows(key: jax.Array) -> dict[str, Any]:
    """Seconds of the layers by rows of a block."""
    a_BD = _normal(key, "examples", ROWS, NARROW)
    w_LDD = _normal(key, "weights", DEEP, NARROW, NARROW) * (2 / NARROW) ** 0.5
    calls = {rows: functools.partial(in_rows, a_BD, w_LDD, rows=rows) for rows in ROW_BLOCKS}
    apart = max(_apart(call(), calls[ROWS]()) for call in calls.values())
    return {"seconds_by_rows": list(_fastest(calls, SLOW_ROUNDS).values()), "apart": apart}


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Ratios of times, one for each seed."""
    parts = {
        part: [row for row in table if row["part"] == part]
        for part in ("loops", "batches", "blocks", "rows")
    }

    def ratios(above, below):
        return [row["seconds_of"][above] / row["seconds_of"][below] for row in parts["loops"]]

    def least(name):
        return [np.divide(row[name][1:], row[name][:-1]).min() for row in parts["batches"]]

    by_rows = [row["seconds_by_rows"] for row in parts["rows"]]
    vectors = np.minimum(*(ratios(form, "product") for form in ("by_neuron", "by_example")))
    values = {
        "equal": max(row["apart"] for row in table if "apart" in row),
        "forward": ratios("neurons", "product"),
        "backward": ratios("neurons_back", "product_back"),
        "vectors": vectors,
        "vmap_products": [row["products"] for row in parts["loops"]],
        "vmap": ratios("vmap", "product"),
        # The gradients are two products.
        "backward_rate": [2 * ratio for ratio in ratios("product", "product_back")],
        "batch": least("forward"),
        "batch_gradient": least("back"),
        "batch_gain": [row["forward"][-1] / row["forward"][0] for row in parts["batches"]],
        "blocks": [r["seconds_by_block"][0] / r["seconds_by_block"][-1] for r in parts["blocks"]],
        "rows_whole": [seconds[-1] / min(seconds) for seconds in by_rows],
        "rows_small": [seconds[0] / min(seconds) for seconds in by_rows],
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Times of all forms, examples/s against batch, and times against the size of a block."""

    def middle(part, column):
        return np.median([row[column] for row in table if row["part"] == part], 0)

    seconds = [row["seconds_of"] for row in table if row["part"] == "loops"]
    times = {FORMS[form]: np.median([row[form] for row in seconds]) for form in FORMS}
    return {
        "forms": plots.bars(times, title="One layer, 256 x 256 x 256", x="seconds", logx=True),
        "batches": plots.lines(
            {
                "activations": (BATCHES, middle("batches", "forward")),
                "gradients": (BATCHES, middle("batches", "back")),
            },
            title="A layer of 256 -> 256",
            x="examples in a batch",
            y="examples / s",
            logx=True,
            logy=True,
        ),
        "blocks": plots.lines(
            {"256 x 256 x 256": (BLOCKS, middle("blocks", "seconds_by_block"))},
            title="A matrix product in blocks",
            x="side of a block",
            y="seconds",
            logx=True,
            logy=True,
        ),
        "rows": plots.lines(
            {f"{DEEP} layers of {NARROW}": (ROW_BLOCKS, middle("rows", "seconds_by_rows"))},
            title=f"{ROWS:,} examples in blocks of rows",
            x="rows in a block",
            y="seconds",
            logx=True,
            logy=True,
        ),
    }
