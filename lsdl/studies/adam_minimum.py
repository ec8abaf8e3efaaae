"""Adam close to a minimum, and on which side of the root its eps stands.

Shape letters: R replicas, D dims, N examples, C classes, B batch, T steps.
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from lsdl.analysis import descent, logistic
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Adam scales small gradients up, so that at a constant rate it keeps a distance from the "
    "minimum that a decay, or a switch to SGD with momentum, removes; eps matters where it stands."
)
SOURCE = (
    "Lectures on optimisation: Adam near the minimum, eps inside and outside the root; Kingma and "
    "Ba 2015, Adam, algorithm 1"
)
_NEAR = "lecture on optimisation and regularisation: Adam near the minimum"
_KINGMA = "Kingma and Ba 2015, algorithm 1: eps outside the root"
_INSIDE = "lecture on optimisation and regularisation: eps inside the root"
_QUADRATIC = "2-D quadratic of kappa 10 with gradient noise"
_DIGITS = "logistic regression on digits"
EXPECTED = {
    "quadratic_decay": Expected(
        f"final excess of Adam at a constant rate over Adam with a cosine decay, {_QUADRATIC}",
        _NEAR,
        low=5,
    ),
    "quadratic_switch": Expected(
        f"final excess of Adam at a constant rate over Adam, then SGD with momentum for the last "
        f"20%, {_QUADRATIC}",
        _NEAR,
        low=5,
    ),
    "digits_decay": Expected(
        f"final excess of Adam at a constant rate over Adam with a cosine decay, {_DIGITS}",
        _NEAR,
        low=5,
    ),
    "digits_switch": Expected(
        f"final excess of Adam at a constant rate over Adam, then SGD with momentum for the last "
        f"20%, {_DIGITS}",
        _NEAR,
        low=5,
    ),
    "first_step": Expected(
        "first step over the rate, gradient 1: the bias corrections cancel",
        _KINGMA,
        low=1 - 1e-6,
        high=1 + 1e-6,
    ),
    "outside_1e-4": Expected(
        "first step over the rate, gradient 1e-4, eps 1e-8 outside the root",
        _KINGMA,
        low=1 / (1 + 1e-4) - 1e-6,
        high=1 / (1 + 1e-4) + 1e-6,
    ),
    "inside_1e-4": Expected(
        "first step over the rate, gradient 1e-4, eps 1e-8 inside the root",
        _INSIDE,
        low=0.5**0.5 - 1e-6,
        high=0.5**0.5 + 1e-6,
    ),
    "outside_1e-8": Expected(
        "first step over the rate, gradient 1e-8, eps 1e-8 outside the root",
        _KINGMA,
        low=0.5 - 1e-6,
        high=0.5 + 1e-6,
    ),
    "inside_1e-8": Expected(
        "first step over the rate, gradient 1e-8, eps 1e-8 inside the root",
        _INSIDE,
        low=1e-4 - 1e-6,
        high=1e-4 + 1e-6,
    ),
    "ratio_1e-8": Expected(
        "step with eps outside over inside, gradient 1e-8: 5,000", _INSIDE, low=4999, high=5001
    ),
    "ratio_limit": Expected(
        "step with eps outside over inside, gradient 1e-14: 10,000 as the gradient vanishes",
        _INSIDE,
        low=9999,
        high=10001,
    ),
}

ARMS = ("Adam", "Adam, cosine", "Adam, then SGD", "SGD")
SHARE = 0.8  # of the steps, before the switch
H_D, NOISE, REPLICAS = (10.0, 1.0), 0.01, 64
BATCH, DECAY = 32, 0.01
# Adam remembers the first gradients for thousands of steps, 1 / (1 - b2) = 1,000 at a time: only
# when these are forgotten does it scale small ones up.
STEPS = {"quadratic": 20_000, "digits": 4_000}
EVERY = {"quadratic": 200, "digits": 40}


def cells(scale: str, seeds: int) -> list[Cell]:
    """Two problems for each seed, and the first steps; three places of eps at full scale."""
    if scale == "full":
        outside, inside = "optim.eps", "optim.eps_root"
        places = {
            "outside-1e-8": {outside: 1e-8},
            "inside-1e-8": {outside: 0.0, inside: 1e-8},
            "outside-1e-4": {outside: 1e-4},
        }
        file = "configs/lm_gpt2.py:124m"
        return [Cell(id, {"eps": id}, file, fields) for id, fields in places.items()]
    problems = ("quadratic", "digits")
    runs = [
        Cell(f"{k}-s{seed}", {"kind": k, "seed": seed}) for k in problems for seed in range(seeds)
    ]
    return [Cell("eps", {"kind": "eps", "seed": 0}), *runs]


def measure(cell: Cell, folder: Path) -> dict:
    """Excess losses of the four arms over time, or first steps; in float64."""
    kind, key = cell.settings["kind"], jax.random.key(cell.settings["seed"])
    with jax.enable_x64(True):
        if kind == "eps":
            return _eps()
        excess = _quadratic(key) if kind == "quadratic" else _digits(key)
    steps = np.arange(1, STEPS[kind] // EVERY[kind] + 1) * EVERY[kind]
    return {"steps": steps.tolist()} | {
        arm: np.asarray(excess_T).tolist() for arm, excess_T in excess.items()
    }


def _eps() -> dict:
    """First steps over the rate: gradients from 1e-14 to 1, eps 1e-8 on either side of the root."""
    gradients = [10.0**power for power in range(-14, 1)]
    row = {"gradients": gradients}
    for name, place in {"outside": {"eps": 1e-8}, "inside": {"eps": 0.0, "eps_root": 1e-8}}.items():
        tx = optax.scale_by_adam(0.9, 0.999, **place)
        gradient_E = jnp.array(gradients)
        row[name] = np.asarray(tx.update(gradient_E, tx.init(gradient_E))[0]).tolist()
    return row


def _arms(rate: float, sgd_rate: float, steps: int) -> dict:
    """{arm: [(optimiser, steps)]}."""
    cosine = optax.cosine_decay_schedule(rate, steps)
    adam, sgd = optax.adam(rate), optax.sgd(sgd_rate, 0.9)
    first = round(SHARE * steps)
    return dict(
        zip(
            ARMS,
            (
                [(adam, steps)],
                [(optax.adam(cosine), steps)],
                [(adam, first), (sgd, steps - first)],
                [(sgd, steps)],
            ),
            strict=True,
        )
    )


def _run(parts, gradient, params, xs_T, every: int, value) -> jax.Array:
    """`value` of the parameters after each `every` steps, part after part."""
    records = []
    for tx, steps in parts:
        xs_T, part_T = xs_T[steps:], xs_T[:steps]

        def some(carry, keys, tx=tx):
            params, state = carry
            carry, _ = descent.descend(
                tx, gradient, params, keys, state=state, record=descent.nothing
            )
            return carry, value(carry[0])

        carry, record_T = lax.scan(
            some, (params, tx.init(params)), part_T.reshape(-1, every, *part_T.shape[1:])
        )
        params = carry[0]
        records.append(record_T)
    return jnp.concatenate(records)


def _quadratic(key: jax.Array) -> dict:
    """Half the sum of h x^2, from ones; the excess is the mean of the replicas."""
    h_D = jnp.array(H_D)[None]
    steps, every = STEPS["quadratic"], EVERY["quadratic"]

    def gradient(x_RD, noise_RD):
        return h_D * x_RD + noise_RD

    def excess(x_RD):
        return (h_D * x_RD**2).sum(1).mean() / 2

    @jax.jit
    def run(x_RD):
        noise_TRD = NOISE * jax.random.normal(key, (steps, *x_RD.shape))
        return {
            arm: _run(parts, gradient, x_RD, noise_TRD, every, excess)
            for arm, parts in _arms(0.01, 0.01, steps).items()
        }

    return run(jnp.ones((REPLICAS, 2)))


def _digits(key: jax.Array) -> dict:
    x_ND, label_N = descent.digits("train")
    x_ND, y_NC = jnp.asarray(descent.with_bias(x_ND)), jnp.asarray(descent.one_hot(label_N))
    best = logistic.minimum(x_ND, y_NC, decay=DECAY, steps=4_000)
    return {arm: loss_T - best for arm, loss_T in _courses(key, x_ND, y_NC).items()}


@jax.jit
def _courses(key: jax.Array, x_ND: jax.Array, y_NC: jax.Array) -> dict:
    """The training loss of each arm, on the same batches, drawn with replacement."""
    steps, every = STEPS["digits"], EVERY["digits"]
    full = functools.partial(logistic.loss, x_BD=x_ND, y_BC=y_NC, decay=DECAY)

    def gradient(w_DC, id_B):
        return jax.grad(logistic.loss)(w_DC, x_ND[id_B], y_NC[id_B], decay=DECAY)

    id_TB = jax.random.randint(key, (steps, BATCH), 0, len(x_ND))
    start_DC = jnp.zeros((x_ND.shape[1], y_NC.shape[1]))
    return {
        arm: _run(parts, gradient, start_DC, id_TB, every, full)
        for arm, parts in _arms(0.01, 0.005, steps).items()
    }


def claims(table: Sequence[dict]) -> list[Claim]:
    """Ratios of final excess losses, and first steps against their closed forms."""
    (eps,) = (row for row in table if row["kind"] == "eps")
    step = {
        f"{place}_{gradient:.0e}".replace("e-0", "e-"): value
        for place in ("outside", "inside")
        for gradient, value in zip(eps["gradients"], eps[place], strict=True)
    }
    values = {
        "first_step": step["outside_1e+00"],
        "ratio_1e-8": step["outside_1e-8"] / step["inside_1e-8"],
        "ratio_limit": step["outside_1e-14"] / step["inside_1e-14"],
    }
    values |= {
        f"{p}_{g}": step[f"{p}_{g}"] for p in ("outside", "inside") for g in ("1e-4", "1e-8")
    }
    for kind in ("quadratic", "digits"):
        rows = [row for row in table if row["kind"] == kind]
        values[f"{kind}_decay"] = [row["Adam"][-1] / row["Adam, cosine"][-1] for row in rows]
        values[f"{kind}_switch"] = [row["Adam"][-1] / row["Adam, then SGD"][-1] for row in rows]
    return judged(EXPECTED, values)


def figure(table: Sequence[dict]) -> dict:
    """The four arms on both problems, and the first step by the size of the gradient."""
    from lsdl import plots

    (eps,) = (row for row in table if row["kind"] == "eps")
    titles = {
        "quadratic": "Noisy quadratic, kappa 10: mean of 64 replicas",
        "digits": "Logistic regression on digits",
    }
    figures = {}
    for kind, title in titles.items():
        row = next(row for row in table if row["kind"] == kind)
        series = {arm: (row["steps"], row[arm]) for arm in ARMS}
        figures[kind] = plots.lines(series, title=title, x="step", y="excess loss", logy=True)
    places = {
        f"eps {place} the root": (eps["gradients"], eps[place]) for place in ("outside", "inside")
    }
    figures["eps"] = plots.lines(
        places,
        title="Adam's first step, eps 1e-8",
        x="gradient",
        y="step / learning rate",
        logx=True,
        logy=True,
    )
    return figures
