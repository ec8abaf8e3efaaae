"""Weight decay under normalisation as a learning rate that grows exponentially.

Shape letters: N examples, B batch, D pixels, H hidden, C classes, T steps.
"""

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsdl.analysis import descent
from lsdl.optim.schedules import growth_root
from lsdl.state import stream
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "For a network that does not heed the scale of its weights, weight decay at a fixed learning "
    "rate and no decay at an exponentially growing one give the same functions, step by step."
)
SOURCE = (
    "Lecture on phenomena: exponentially growing learning rate; Li and Arora 2020, An exponential "
    "learning rate schedule for deep learning (arXiv:1910.07454)"
)
_THEOREM = "Li and Arora 2020: rate eta alpha^(-2t-1), alpha of x^2 - (1 + mu - lambda eta) x + mu"
_BUFFER = "Li and Arora 2020: momentum with the rate outside the buffer"
_CONTROL = "distance of directions from the run with decay, at its largest in 400 steps: "
EXPECTED = {
    "directions": Expected(
        "largest distance between the weights' directions in the two runs over 400 steps on the "
        "same batches, float64: rate 0.4, decay 5e-3, momentum 0.9, digits",
        _THEOREM,
        high=1e-6,
    ),
    "growth": Expected("last rate over first, 400 steps", _THEOREM, low=1e9),
    "norms": Expected(
        "ratio of the weights' norms after 400 steps over alpha^-400", _THEOREM, 0.99, 1.01
    ),
    "losses": Expected(
        "largest distance between the two runs' losses over 400 steps", _THEOREM, high=1e-6
    ),
    "zero_buffer": Expected(_CONTROL + "the buffer starts at zero", _BUFFER, low=0.5),
    "zero_buffer_breaks": Expected(
        _CONTROL + "the buffer starts at zero; from weights of norm 1 and of He's scale (written "
        "down after the first measurement: the distance depends on the start, that there is one "
        "does not)",
        _BUFFER,
        low=0.1,
    ),
    "inside": Expected(_CONTROL + "the rate inside the buffer", _BUFFER, low=0.5),
    "no_decay": Expected(
        _CONTROL + "no decay at the fixed rate", "Li and Arora 2020: decay is what grows", low=0.5
    ),
    "alpha": Expected(
        "alpha for rate 0.1, decay 5e-4, momentum 0.9: 0.9994977",
        _THEOREM,
        low=0.9994977 - 1e-7,
        high=0.9994977 + 1e-7,
    ),
    "epoch": Expected(
        "growth of that rate over an epoch of 391 steps: the paper's 1.481",
        "Li and Arora 2020: PreResNet-32 on CIFAR-10",
        low=1.4807,
        high=1.4817,
    ),
}

STEPS, BATCH, HIDDEN = 400, 128, 64
RATE, DECAY, MOMENTUM = 0.4, 5e-3, 0.9
GAIN = 4.0  # of the logits


def cells(scale: str, seeds: int) -> list[Cell]:
    """Five runs on the same batches, for each seed; the paper's pair at full scale."""
    if scale == "full":
        # Not frozen here, unlike in the paper: gains and biases, which do heed their scale.
        file = "configs/cifar10_resnet.py:32"
        same = {"optim.decay_mask": ((r".*/(bias|scale)", False), (r".*", True))}
        same["model.block"] = "preact"
        decay = {"optim.weight_decay": 5e-4, "optim.schedule.name": "constant"}
        growth = {"optim.weight_decay": 0.0, "optim.schedule.name": "exp_growth"}
        growth["optim.schedule.growth_decay"] = 5e-4
        arms = {"decay": decay, "growing": growth}
        published = "the same curves; rate 0.1 x 1.481^epoch (Li and Arora 2020, figure 1)"
        return [
            Cell(arm, {"arm": arm}, file, fields | same, published) for arm, fields in arms.items()
        ]
    starts = ("unit", "he")
    return [
        Cell(f"{s}-s{seed}", {"start": s, "seed": seed}) for s in starts for seed in range(seeds)
    ]


def growing(rate: float, decay: float, momentum: float) -> optax.Schedule:
    """The rate eta alpha^(-2t-1) that stands for `decay`."""
    alpha = growth_root(rate, weight_decay=decay, momentum=momentum)
    return descent.schedule("exp_growth", rate, steps=STEPS, growth=alpha)


def measure(cell: Cell, folder: Path) -> dict:
    """Distances of directions from the run with decay, norms and losses; in float64."""
    a = growth_root(RATE, weight_decay=DECAY, momentum=MOMENTUM)
    with jax.enable_x64(True):
        runs = {name: jax.tree.map(np.asarray, run) for name, run in _runs(**cell.settings).items()}
    reference = runs["decay"]
    row = {"alpha": a, "growth": a ** (-2 * (STEPS - 1))}
    for name, run in runs.items():
        away = [
            np.linalg.norm(run["direction"][k] - reference["direction"][k], axis=(1, 2))
            for k in ("w_DH", "w_HC")
        ]
        row[f"distance {name}"] = np.max(away, axis=0).tolist()
        row[f"norm {name}"] = run["norm"].tolist()
        row[f"loss {name}"] = run["loss"].tolist()
    return row


def _runs(start: str, seed: int) -> dict:
    key = jax.random.key(seed)
    x_ND, label_N = descent.digits("train")
    y_NC = descent.one_hot(label_N)
    id_TB = jax.random.randint(stream(key, "batches"), (STEPS, BATCH), 0, len(x_ND))
    weights = {
        "w_DH": jax.random.normal(stream(key, "first"), (x_ND.shape[1], HIDDEN)),
        "w_HC": jax.random.normal(stream(key, "second"), (HIDDEN, y_NC.shape[1])),
    }
    scale = {"unit": jnp.linalg.norm, "he": lambda w: (len(w) / 2) ** 0.5}[start]
    weights = jax.tree.map(lambda w: w / scale(w), weights)

    return _courses(jnp.asarray(x_ND), jnp.asarray(y_NC), id_TB, weights)


@jax.jit
def _courses(x_ND: jax.Array, y_NC: jax.Array, id_TB: jax.Array, start: dict) -> dict:
    """Directions, norms and losses on the first batch, of each arm after each step."""

    def loss(params, id_B):
        z_BC = network(params, x_ND[id_B])
        return (jax.nn.logsumexp(z_BC, 1) - (z_BC * y_NC[id_B]).sum(1)).mean()

    def record(params):
        norms = jax.tree.map(jnp.linalg.norm, params)
        return {
            "direction": jax.tree.map(jnp.divide, params, norms),
            "norm": norms["w_DH"],
            "loss": loss(params, id_TB[0]),
        }

    a = growth_root(RATE, weight_decay=DECAY, momentum=MOMENTUM)
    fixed = optax.sgd(RATE, MOMENTUM)
    schedule = growing(RATE, DECAY, MOMENTUM)
    inside = optax.chain(optax.scale_by_learning_rate(schedule), optax.trace(MOMENTUM))
    # A buffer as if the step before the first had followed the growing rate as well.
    before = jax.tree.map(lambda w: -(1 - a) / (a * RATE) * w, start)
    arms = {
        "decay": (optax.chain(optax.add_decayed_weights(DECAY), fixed), None),
        "growing rate": (optax.sgd(schedule, MOMENTUM), before),
        "zero buffer": (optax.sgd(schedule, MOMENTUM), None),
        "rate inside": (inside, jax.tree.map(lambda w: (1 - a) * w, start)),
        "no decay": (fixed, None),
    }

    return {
        name: descent.descend(
            tx, jax.grad(loss), start, id_TB, state=_state(tx, start, trace), record=record
        )[1]
        for name, (tx, trace) in arms.items()
    }


def network(params: dict, x_BD: jax.Array) -> jax.Array:
    """Logits `z_BC` that do not heed the scale of either weight: each is divided by its norm."""
    first_DH = params["w_DH"] / jnp.linalg.norm(params["w_DH"]) * HIDDEN**0.5
    second_HC = params["w_HC"] / jnp.linalg.norm(params["w_HC"]) * GAIN
    return jnp.tanh(x_BD @ first_DH) @ second_HC


def _state(tx: optax.GradientTransformation, params: dict, trace: dict | None):
    """The optimiser's first state, momentum's buffer set to `trace` if there is one."""
    state = tx.init(params)
    if trace is None:
        return state
    is_trace = lambda leaf: isinstance(leaf, optax.TraceState)  # noqa: E731
    return jax.tree.map(
        lambda s: optax.TraceState(trace) if is_trace(s) else s, state, is_leaf=is_trace
    )


def claims(table: Sequence[dict]) -> list[Claim]:
    """Distances between the runs, at their largest, and the growth of rate and norm."""
    paper = growth_root(0.1, weight_decay=5e-4, momentum=0.9)

    unit = [row for row in table if row["start"] == "unit"]

    def largest(name, rows=unit):
        return [max(row[f"distance {name}"]) for row in rows]

    def norms(row):
        ratio = row["norm growing rate"][-1] / row["norm decay"][-1]
        return ratio / row["alpha"] ** -STEPS

    def losses(row):
        return np.abs(np.subtract(row["loss decay"], row["loss growing rate"])).max()

    values = {
        "directions": largest("growing rate", table),
        "growth": [row["growth"] for row in table],
        "norms": [norms(row) for row in table],
        "losses": [losses(row) for row in table],
        "zero_buffer": largest("zero buffer"),
        "zero_buffer_breaks": largest("zero buffer", table),
        "inside": largest("rate inside"),
        "no_decay": largest("no decay"),
        "alpha": paper,
        "epoch": paper ** (-2 * 391),
    }
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """Distance from the run with decay, norms and losses, step by step."""
    from lsdl import plots

    row, steps = table[0], list(range(1, STEPS + 1))
    arms = ("growing rate", "zero buffer", "rate inside", "no decay")
    every = ("decay", *arms)
    return {
        "directions": plots.lines(
            {arm: (steps, row[f"distance {arm}"]) for arm in arms},
            title="How far the weights' directions are from those with decay",
            x="step",
            y="distance of unit vectors",
            logy=True,
        ),
        "norms": plots.lines(
            {arm: (steps, row[f"norm {arm}"]) for arm in every},
            title="Norm of the first weight",
            x="step",
            y="norm",
            logy=True,
        ),
        "losses": plots.lines(
            {arm: (steps, row[f"loss {arm}"]) for arm in every},
            title="128 training digits",
            x="step",
            y="loss",
            logy=True,
        ),
    }
