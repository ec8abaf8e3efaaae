"""PH-23, grokking: the training pairs are fit early, the others long after.

Two-layer nets without biases on the pairs (a, b), each one-hot: the first layer is a sum of two
rows. Full batches, cross-entropy, AdamW (0.9, 0.98) with decoupled decay. The pairs that are not
trained on are the valid ones. The slow cell is the lectures' transformer, from its config.

Shape letters: S seeds, W weight decays, N training pairs, V valid pairs, F hidden, P = 2p inputs,
C = p classes, T checks.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl import experiment, loop, plots
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = "A net fits a table of modular sums at once and finds the rule long after; decay drives it."
SOURCE = (
    "Lecture on loss surfaces: grokking; Power et al. 2022, Grokking: generalization beyond "
    "overfitting on small algorithmic datasets (arXiv:2201.02177)"
)
_POWER = "Power et al. 2022: validation jumps long after training is fit"
_DECAY = "Power et al. 2022: weight decay makes it generalise"
_RELU = "ReLU net of 256 on a + b mod 53, 40% of the pairs"
_QUADRATIC = "quadratic net of 128 on a + b mod 31, 50% of the pairs"
EXPECTED = {
    "delay_relu": Expected(
        f"step of 95% valid accuracy over step of 99% training accuracy, {_RELU}, weight decay 1",
        _POWER,
        low=20,
    ),
    "delay_quadratic": Expected(f"the same, {_QUADRATIC}, weight decay 1", _POWER, low=5),
    "at_fit_relu": Expected(
        f"valid accuracy in percent where 99% of the training pairs are fit, {_RELU}",
        _POWER,
        high=5,
    ),
    "at_fit_quadratic": Expected(f"the same, {_QUADRATIC}", _POWER, high=5),
    "no_decay_relu": Expected(
        f"valid accuracy in percent after 3,000 steps without weight decay, {_RELU}",
        _DECAY,
        high=10,
    ),
    "no_decay_quadratic": Expected(f"the same, {_QUADRATIC}", _DECAY, high=10),
    "decay": Expected(
        "largest ratio of the delay (steps from 99% training to 95% valid accuracy) to that at "
        f"half the weight decay, weight decays 0.25, 0.5, 1 and 2, {_QUADRATIC}",
        _DECAY,
        high=1 - 1e-6,
    ),
}
SLOW = {
    "transformer_delay": Expected(
        "step of 95% valid accuracy over step of 99% training accuracy, transformer of 2 layers, "
        "width 128, 4 heads on a + b mod 53, 40% of the pairs, weight decay 1",
        _POWER,
        low=5,
    ),
    "transformer_at_fit": Expected(
        "valid accuracy in percent where 99% of the training pairs are fit, the same transformer",
        _POWER,
        high=50,
    ),
}
FIT, GROKKED = 99.0, 95.0  # percent of the training and of the valid pairs
TRANSFORMER = "configs/modular_transformer.py"
PUBLISHED = (
    "training near perfect before 1e3 steps, valid near 1e6 (Power et al. 2022, a / b mod 97, half "
    "of the pairs)"
)


class Net(NamedTuple):
    """A small net, its data and its rate."""

    modulus: int
    percent: int  # of the pairs, for training
    width: int
    rate: float
    steps: int
    every: int  # steps between checks
    squared: bool  # activation x^2 in place of the ReLU


NETS = {
    "relu": Net(53, 40, 256, 5e-3, 5_000, 20, False),
    "quadratic": Net(31, 50, 128, 1e-2, 5_000, 10, True),
}
DECAYS = {"relu": (0.0, 1.0), "quadratic": (0.0, 0.25, 0.5, 1.0, 2.0)}
WITHOUT = 3_000  # steps of the nets that are not decayed


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each net and weight decay; slow, the transformer on the same task; full, Power's."""
    if scale == "full":
        fields = {"seed": 0, "total_steps": 1_000_000}
        return [Cell("division", {}, f"{TRANSFORMER}:paper", fields, PUBLISHED)]
    if scale == "slow":
        settings = {"net": "transformer", "decay": 1.0, "every": 50}
        fields = {"seed": 0, "total_steps": 6_000, "optim.weight_decay": 1.0}
        return [Cell("transformer", settings, TRANSFORMER, fields)]
    return [
        Cell(f"{net}-{decay:g}", {"net": net, "decay": decay, "seeds": seeds})
        for net, decays in DECAYS.items()
        for decay in decays
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Percent of the training and valid pairs, `(S, T)`, at the steps of `(T,)`."""
    if cell.settings["net"] == "transformer":
        return _transformer(cell)
    net, decay = NETS[cell.settings["net"]], cell.settings["decay"]
    seeds = range(cell.settings["seeds"])
    keys_S = jax.vmap(jax.random.key)(jnp.arange(len(seeds)))
    pairs_S = jax.tree.map(lambda *x: np.stack(x), *(pairs(net, seed) for seed in seeds))
    state = jax.vmap(functools.partial(initial, net))(keys_S)
    advance = jax.jit(jax.vmap(functools.partial(_advance, net, decay=decay)))
    checks = [_checked(state, pairs_S, net)]
    steps = net.steps if decay else WITHOUT
    for _ in range(steps // net.every):
        state, found = advance(state, pairs_S)
        checks.append(np.asarray(found))
        if (checks[-1][:, 1] >= GROKKED).all() and len(checks) >= 10:
            break
    train_ST, valid_ST = np.stack(checks, -1)[:, 0], np.stack(checks, -1)[:, 1]
    at_T = np.arange(len(checks)) * net.every
    return {"step": at_T.tolist(), "train": train_ST.tolist(), "valid": valid_ST.tolist()}


def pairs(net: Net, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`(N, 3)` and `(V, 3)`: a, b and their sum modulo p, in an order of the seed's own."""
    p = net.modulus
    a, b = np.divmod(np.random.default_rng(seed).permutation(p * p), p)
    table = np.stack([a, b, (a + b) % p], 1).astype(np.int32)
    count = len(table) * net.percent // 100
    return table[:count], table[count:]


def initial(net: Net, key: jax.Array) -> tuple[Any, Any]:
    """Parameters and AdamW's moments. The first layer's variance is 1 / 2p, the second's 1 / F."""
    first, second = jax.random.split(key)
    in_PF = jax.random.normal(first, (2 * net.modulus, net.width)) / np.sqrt(2 * net.modulus)
    out_FC = jax.random.normal(second, (net.width, net.modulus)) / np.sqrt(net.width)
    params = {"in": in_PF, "out": out_FC}
    return params, _optimizer(net, 0.0).init(params)


def logits(net: Net, params: Any, pair_N3: jax.Array) -> jax.Array:
    """`(N, C)`."""
    one_hot_NP = jax.nn.one_hot(pair_N3[:, 0], 2 * net.modulus)
    one_hot_NP += jax.nn.one_hot(pair_N3[:, 1] + net.modulus, 2 * net.modulus)
    h_NF = one_hot_NP @ params["in"]
    h_NF = jnp.square(h_NF) if net.squared else jax.nn.relu(h_NF)
    return h_NF @ params["out"]


def _optimizer(net: Net, decay: float) -> optax.GradientTransformation:
    return optax.adamw(net.rate, b1=0.9, b2=0.98, weight_decay=decay)


def _advance(net: Net, state: tuple, data: tuple, *, decay: float) -> tuple[tuple, jax.Array]:
    """`net.every` steps; then the percents."""
    train_N3, _ = data
    optimizer = _optimizer(net, decay)

    def loss(params):
        log_p_NC = jax.nn.log_softmax(logits(net, params, train_N3))
        return -jnp.take_along_axis(log_p_NC, train_N3[:, 2:], 1).mean()

    def step(state, _):
        params, moments = state
        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return (optax.apply_updates(params, updates), moments), None

    state, _ = lax.scan(step, state, length=net.every)
    return state, _percents(net, state[0], data)


def _percents(net: Net, params: Any, data: tuple) -> jax.Array:
    right = [(logits(net, params, x).argmax(-1) == x[:, 2]).mean() for x in data]
    return 100 * jnp.stack(right)


def _checked(state: tuple, data: tuple, net: Net) -> np.ndarray:
    return np.asarray(jax.vmap(functools.partial(_percents, net))(state[0], data))


def _transformer(cell: Cell) -> dict[str, Any]:
    """The config's run until valid is solved, checked on the whole of both splits."""
    found = experiment.opened(cell.config, cell.overrides)
    loader, state = found.train_loader(), found.init()
    rows = [_both(found, state)]
    every = cell.settings["every"]
    for start in range(0, found.total_steps, every):
        for batch in loader.batches(start, start + every):
            state, _ = found.train_step(state, batch)
        rows.append(_both(found, state))
        if rows[-1][1] >= GROKKED:
            break
    train_T, valid_T = np.transpose(rows).tolist()
    at_T = [every * i for i in range(len(rows))]
    return {"step": at_T, "train": [train_T], "valid": [valid_T]}


def _both(found: experiment.Experiment, state: Any) -> list[float]:
    return [100 * loop.evaluate(found, state, split)["accuracy"] for split in ("train", "valid")]


def reached(step_T: Sequence[int], percent_T: Sequence[float], bound: float) -> float:
    """The first step with at least `bound` percent; NaN if there is none."""
    above = np.flatnonzero(np.asarray(percent_T) >= bound)
    return float(step_T[above[0]]) if len(above) else np.nan


def _ends(row: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Step of the fit and of the jump, and valid percent at the fit, `(S,)` each."""
    fit_S = np.array([reached(row["step"], train_T, FIT) for train_T in row["train"]])
    jump_S = np.array([reached(row["step"], valid_T, GROKKED) for valid_T in row["valid"]])
    at_S = [np.interp(s, row["step"], v_T) for s, v_T in zip(fit_S, row["valid"], strict=True)]
    return fit_S, jump_S, np.array(at_S)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """One value for each seed; what never jumps has no ratio, and a delay of all its steps."""
    rows = {(row["net"], row["decay"]): row for row in table}
    values = {}
    for net in NETS:
        fit_S, jump_S, at_S = _ends(rows[net, 1.0])
        values |= {f"delay_{net}": jump_S / fit_S, f"at_fit_{net}": at_S}
        values[f"no_decay_{net}"] = [valid_T[-1] for valid_T in rows[net, 0.0]["valid"]]
    delay_WS = np.stack([_delay(rows["quadratic", d]) for d in DECAYS["quadratic"][1:]])
    values["decay"] = (delay_WS[1:] / delay_WS[:-1]).max(0)
    expected = EXPECTED
    if ("transformer", 1.0) in rows:
        fit_S, jump_S, at_S = _ends(rows["transformer", 1.0])
        values |= {"transformer_delay": jump_S / fit_S, "transformer_at_fit": at_S}
        expected = EXPECTED | SLOW
    return judged(expected, values)


def _delay(row: Mapping[str, Any]) -> np.ndarray:
    fit_S, jump_S, _ = _ends(row)
    return np.where(np.isnan(jump_S), row["step"][-1], jump_S) - fit_S


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Accuracy over the steps for each net, and the delay against the weight decay."""
    rows = {(row["net"], row["decay"]): row for row in table}
    titles = {"relu": "ReLU net, a + b mod 53", "quadratic": "Quadratic net, a + b mod 31"}
    curves = [_curves(rows[net, 1.0], rows[net, 0.0], title) for net, title in titles.items()]
    alt = "Training accuracy is at 100% early; valid accuracy jumps much later, and with decay."
    figures = {"grokking": plots.panels(curves, title="Fit first, understood later", alt=alt)}
    decays = DECAYS["quadratic"][1:]
    delay_WS = np.stack([_delay(rows["quadratic", decay]) for decay in decays])
    figures["decay"] = plots.lines(
        {"seeds' mean": (decays, *plots.summary(delay_WS.T))},
        title="The delay falls with the weight decay, quadratic net",
        x="weight decay",
        y="steps from fit to jump",
        alt="Twice the weight decay, about half the delay.",
        logx=True,
        logy=True,
    )
    if ("transformer", 1.0) in rows:
        title = "Transformer of 2 layers, a + b mod 53"
        figures["transformer"] = _curves(rows["transformer", 1.0], None, title)
    return figures


def _curves(row: Mapping[str, Any], bare: Mapping[str, Any] | None, title: str) -> plots.Figure:
    series = {"training": _band(row, "train"), "valid": _band(row, "valid")}
    if bare:
        series["valid, no decay"] = _band(bare, "valid")
    alt = "Training accuracy is at 100% early; valid accuracy jumps later."
    return plots.lines(series, title=title, x="step", y="accuracy, %", logx=True, alt=alt)


def _band(row: Mapping[str, Any], name: str) -> tuple:
    return row["step"], *plots.summary(row[name])
