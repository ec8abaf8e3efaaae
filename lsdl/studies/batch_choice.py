"""Which batch size for which machine, early in training and late.

Plain SGD on a 64-64-10 ReLU net and the 1,257 training digits, drawn with replacement. Phase 1 goes
from the initial weights to a training loss of 0.5, phase 2 from 0.1, which one run reached, to
0.02. Every batch size tries the same rates, and the steps S that its best one takes are fitted by

    S = S_min (1 + B_crit / B),    so that E = S B has (S / S_min - 1) (E / E_min - 1) = 1

A machine takes 1 + B / B_machine for a step: up to B_machine examples more hardly count. The time
S (1 + B / B_machine) is least at B = sqrt(B_crit B_machine).

Shape letters: F phases, S seeds, R rates, P moments, T steps, B batch.
"""

import functools
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
from lsdl.analysis import noise
from lsdl.planner import devices, scaling
from lsdl.studies import digits
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "A small machine wants a small batch early in training and a medium one late, a big machine a "
    "medium batch early and a large one late."
)
_MCCANDLISH = "McCandlish et al. 2018, An empirical model of large-batch training"
_LECTURE = "lecture on optimisation, part 3: choosing batch size in SGD"
SOURCE = f"Lecture: choosing batch size in SGD, a table; {_MCCANDLISH} (arXiv:1812.06162)"
_KAPLAN = "Kaplan et al. 2020: 2e8 tokens / L^(1 / 0.21); Austin et al. 2025, chapter 12"
EXPECTED = {
    "law": Expected(
        "largest distance of log steps from the fitted S_min (1 + B_crit / B), over both phases "
        "and 5 batch sizes from 4 to 1,024",
        f"{_MCCANDLISH}, section 2.3",
        high=0.35,
    ),
    "critical": Expected(
        "B_crit of phase 2 over that of phase 1", f"{_MCCANDLISH}: it grows as the loss falls", 2.0
    ),
    "noise": Expected(
        "B_crit over B_simple where the phase begins, of the phase that is farther from 1",
        f"{_MCCANDLISH}: within an order of magnitude",
        0.1,
        10.0,
    ),
    "machine": Expected(
        "best batch of the big machine (B_machine 256) over that of the small one (4), the phase "
        "with the smaller ratio",
        _LECTURE,
        low=2.0,
    ),
    "phase": Expected(
        "best batch in phase 2 over that in phase 1, the machine with the smaller ratio",
        _LECTURE,
        low=1.4,
    ),
    "formula": Expected(
        "log2 of the best batch over sqrt(B_crit B_machine), of the four the one whose mean is "
        "farthest from 0",
        f"from the trade-off of {_MCCANDLISH}",
        -1.0,
        1.0,
    ),
    "kept": Expected(
        "time of phase 2 on the big machine with the batch that was best in phase 1, over that "
        "with its own best",
        _LECTURE,
        low=1.1,
    ),
    "one_node": Expected(
        "tokens that keep 8 H100 busy under FSDP, over the critical batch of language models at a "
        "loss of 4 nats",
        _KAPLAN,
        high=0.2,
    ),
    "cluster": Expected(
        "tokens that keep 16,384 H100 busy under FSDP, over the critical batch at a loss of 2 nats",
        _KAPLAN,
        low=2.0,
    ),
}

HIDDEN = 64
PHASES = ((None, 0.5), (0.1, 0.02))  # from the loss (None: of the initial weights), to the loss
RATES = tuple(2.0**i for i in range(-5, 3))
STEPS = {4: 2_048, 16: 1_024, 64: 512, 256: 256, 1024: 256}  # by batch size: the most
MACHINES = {"small": 4, "big": 256}  # B_machine
SETTLED = dict(size=32, rate=0.1, steps=1_000)  # the run that reaches where phase 2 begins
LARGEST = 1e3  # nats: the loss of a diverged run
CHUNK = 419  # a third of the digits
NODES = {"8": 8, "64": 64, "512": 512, "4k": 4096, "16k": 16_384}
LOSSES = (4.0, 3.0, 2.0)
# What the papers say of the critical batch.
PUBLISHED = {
    "imagenet_resnet50:256": "B_crit: tens of thousands of images (McCandlish et al. 2018)",
    "lm_gpt2:124m": "B_crit: 2e8 tokens / loss^4.76 (Kaplan et al. 2020)",
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """One for each batch size, both phases in one program, and one for the noise."""
    if scale == "full":
        batches = {"imagenet_resnet50:256": (256, 1024, 8192), "lm_gpt2:124m": (64, 512, 4096)}
        return [
            Cell(
                f"{name.partition(':')[0]}-{size}",
                {"batch_size": size},
                f"configs/{name.replace(':', '.py:')}",
                {"batch_size": size},
                published,
            )
            for name, published in PUBLISHED.items()
            for size in batches[name]
        ]
    runs = [
        Cell(f"batch-{size}", {"batch_size": size, "steps": steps, "seeds": seeds})
        for size, steps in STEPS.items()
    ]
    return [*runs, Cell("noise", {"seeds": seeds})]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """`steps` by phase, seed and rate (infinity as None); `noise_scale` by phase and seed."""
    given = cell.settings
    start_FS = _starts(given["seeds"])
    if "steps" not in given:
        return {"noise_scale": np.asarray(_noise(start_FS)).tolist()}
    size, steps = given["batch_size"], given["steps"]
    every = max(1, 64 // size)  # steps from one look at the loss to the next
    train, _ = digits.load()
    draw = np.random.default_rng(size)
    id_STB = draw.integers(len(train.label_N), size=(given["seeds"], steps, size))
    loss_FSRP = np.asarray(_curves(start_FS, jnp.asarray(id_STB), jnp.array(RATES), every=every))
    found = [
        [[every * _crossing(loss_P, target) for loss_P in loss_RP] for loss_RP in loss_SRP]
        for loss_SRP, (_, target) in zip(loss_FSRP, PHASES, strict=True)
    ]
    return {"steps_to": [[[_finite(x) for x in r] for r in s] for s in found]}


def _finite(x: float) -> float | None:
    return x if np.isfinite(x) else None


@functools.cache
def _starts(seeds: int) -> Any:
    """The parameters that each phase begins with, `(F, S, ...)`."""
    train, _ = digits.load()
    net = digits.Classifier(HIDDEN)
    first_S = net.init(digits.keys(seeds))
    count, size = len(train.label_N), SETTLED["size"]
    id_STB = np.stack(
        [digits.batches(s, count, size=size, steps=SETTLED["steps"]) for s in range(seeds)]
    )
    optimizer = optax.sgd(SETTLED["rate"])

    def settle(params, id_TB):
        def step(params, id_B):
            done = net.loss(params, train) <= PHASES[1][0]
            after, _ = digits.step(
                net, optimizer, (params, optimizer.init(params)), digits.rows(train, id_B)
            )
            return jax.tree.map(lambda a, b: jnp.where(done, a, b), params, after), None

        return lax.scan(step, params, id_TB)[0]

    second_S = jax.jit(jax.vmap(settle))(first_S, jnp.asarray(id_STB))
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), first_S, second_S)


@functools.partial(jax.jit, static_argnames="every")
def _curves(start_FS, id_STB, rate_R, *, every: int) -> jax.Array:
    """The training loss at the start and after every `every` steps, `(F, S, R, P)`."""
    train, _ = digits.load()
    net = digits.Classifier(HIDDEN)

    def curve(params, id_TB, rate):
        def step(params, id_B):
            gradient = jax.grad(net.loss)(params, digits.rows(train, id_B))
            return jax.tree.map(lambda w, g: w - rate * g, params, gradient), None

        def look(params, id_TB):
            params, _ = lax.scan(step, params, id_TB)
            return params, net.loss(params, train)

        id_PTB = id_TB.reshape(-1, every, id_TB.shape[-1])
        _, loss_P = lax.scan(look, params, id_PTB)
        return jnp.concatenate([net.loss(params, train)[None], loss_P])

    of_rates = jax.vmap(curve, (None, None, 0))
    of_seeds = jax.vmap(of_rates, (0, 0, None))
    loss = jax.vmap(of_seeds, (0, None, None))(start_FS, id_STB, rate_R)
    return jnp.minimum(jnp.nan_to_num(loss, nan=LARGEST), LARGEST)


@jax.jit
def _noise(start_FS) -> jax.Array:
    train, _ = digits.load()
    net = digits.Classifier(HIDDEN)

    def scale(params):
        found = noise.example_statistics(
            net.example_loss, params, train, population=True, chunk=CHUNK
        )
        return found.noise_scale

    return jax.vmap(jax.vmap(scale))(start_FS)


def _crossing(loss_P: np.ndarray, target: float) -> float:
    """The first look at which the loss is `target`, between looks; infinity if there is none."""
    below = np.flatnonzero(loss_P <= target)
    if not below.size:
        return np.inf
    if not below[0]:
        return 0.0
    before, after = np.log(loss_P[below[0] - 1 : below[0] + 1])
    return float(below[0] - (np.log(target) - after) / (before - after))


def fit(sizes: Sequence[float], steps: Sequence[float]) -> tuple[float, float]:
    """(S_min, B_crit) whose S_min (1 + B_crit / B) is nearest to `steps`, in logarithms."""
    sizes, log_steps = np.asarray(sizes, float), np.log(steps)
    critical = np.geomspace(1e-2, 1e6, 8_001)[:, None]
    shape = np.log1p(critical / sizes)
    least = (log_steps - shape).mean(1)
    away = np.square(log_steps - shape - least[:, None]).sum(1)
    best = away.argmin()
    return float(np.exp(least[best])), float(critical[best, 0])


def best_batch(sizes: Sequence[float], steps: Sequence[float], machine: float) -> float:
    """The batch of the least time: the vertex of the parabola, in logarithms, at the best size."""
    x, y = np.log(sizes), np.log(times(sizes, steps, machine))
    i = y.argmin()
    if i in (0, len(y) - 1):
        return float(sizes[i])
    bend, slope, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    return float(np.exp(x[i] - slope / (2 * bend)))


def times(sizes: Sequence[float], steps: Sequence[float], machine: float) -> np.ndarray:
    """The time to the target for each size, in what a step of a tiny batch takes."""
    return np.asarray(steps) * (1 + np.asarray(sizes) / machine)


def _steps(table: Sequence[Mapping[str, Any]]) -> tuple[list[int], np.ndarray]:
    """Batch sizes, and the steps `(S, F, B)` of each seed at its best rate."""
    rows = sorted((r for r in table if "steps_to" in r), key=lambda r: r["batch_size"])
    found = [np.array(row["steps_to"], float) for row in rows]  # None -> NaN
    return [r["batch_size"] for r in rows], np.stack(
        [np.nan_to_num(f, nan=np.inf).min(2).T for f in found], 2
    )


def busy_tokens(gpus: int) -> float:
    """The least batch with which `gpus` H100 compute as long as FSDP's traffic takes."""
    work = scaling.Work(parameters=1, model_flops=6.0, gradient_bytes=2)
    own = scaling.target(devices.find("gpu", "h100"), gpus)
    return gpus * scaling.point(work, own, 1.0, split="all")["least_units_per_device"]


def critical_tokens(loss: float) -> float:
    """The critical batch of language models. Source: Kaplan et al. 2020, section 5.1."""
    return 2e8 / loss ** (1 / 0.21)


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Seed by seed, but for the H100s; of the four best batches the one whose mean is worst."""
    sizes, steps_SFB = _steps(table)
    (row,) = (row for row in table if "noise_scale" in row)
    noise_SF = np.transpose(row["noise_scale"])
    found = [_of_seed(sizes, *pair) for pair in zip(steps_SFB, noise_SF, strict=True)]
    values = {name: np.array([own[name] for own in found]) for name in found[0]}
    apart_S4 = values["formula"]
    return judged(
        EXPECTED,
        values
        | {
            "formula": apart_S4[:, np.abs(apart_S4.mean(0)).argmax()],
            "one_node": busy_tokens(8) / critical_tokens(4.0),
            "cluster": busy_tokens(16_384) / critical_tokens(2.0),
        },
    )


def _of_seed(sizes: Sequence[int], steps_FB: np.ndarray, noise_F: np.ndarray) -> dict[str, Any]:
    fits = [fit(sizes, steps_B) for steps_B in steps_FB]
    away = [
        np.log(steps_B / (least * (1 + critical / np.array(sizes))))
        for steps_B, (least, critical) in zip(steps_FB, fits, strict=True)
    ]
    critical_F = np.array([critical for _, critical in fits])
    best = {
        (machine, phase): best_batch(sizes, steps_B, own)
        for machine, own in MACHINES.items()
        for phase, steps_B in enumerate(steps_FB)
    }
    apart = [
        np.log2(batch / np.sqrt(critical_F[phase] * MACHINES[machine]))
        for (machine, phase), batch in best.items()
    ]
    late_B = times(sizes, steps_FB[1], MACHINES["big"])
    kept = np.exp(np.interp(np.log(best["big", 0]), np.log(sizes), np.log(late_B)))
    return {
        "law": np.abs(away).max(),
        "critical": critical_F[1] / critical_F[0],
        "noise": max(critical_F / noise_F, key=lambda ratio: abs(np.log(ratio))),
        "machine": min(best["big", phase] / best["small", phase] for phase in (0, 1)),
        "phase": min(best[machine, 1] / best[machine, 0] for machine in MACHINES),
        "formula": apart,
        "kept": kept / late_B.min(),
    }


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Examples against steps, time by batch, and what H100s need against what pays."""
    sizes, steps_SFB = _steps(table)
    steps_FB = steps_SFB.mean(0)
    names = [f"phase {i}" for i in (1, 2)]
    batch = np.geomspace(min(sizes), max(sizes), 65)
    curves, points, time = {}, {}, {}
    for name, steps_B in zip(names, steps_FB, strict=True):
        least, critical = fit(sizes, steps_B)
        curve = least * (1 + critical / batch)
        curves[f"{name}, B_crit {critical:.0f}"] = (curve, curve * batch)
        points[f"{name}, measured"] = (steps_B, steps_B * np.array(sizes))
    for (machine, own), i in itertools.product(MACHINES.items(), (0, 1)):
        time[f"{machine} machine, {names[i]}"] = (sizes, times(sizes, steps_FB[i], own))
    gpus = list(NODES.values())
    loglog = dict(logx=True, logy=True)
    return {
        "tradeoff": plots.lines(
            curves,
            published=points,
            title="Steps against examples, to a loss",
            x="steps",
            y="examples",
            **loglog,
        ),
        "time": plots.lines(
            time, title="Time to a loss, by batch", x="batch", y="steps of a tiny batch", **loglog
        ),
        "tokens": plots.lines(
            {"keeps H100s busy": (gpus, [busy_tokens(n) for n in gpus])},
            levels={f"critical at loss {loss:g}": critical_tokens(loss) for loss in LOSSES},
            title="Tokens in a batch",
            x="H100 GPUs",
            y="tokens",
            **loglog,
        ),
    }
