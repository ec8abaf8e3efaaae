"""Memory against recomputation in backpropagation: counted in a pass, and in compiled programs.

The programs are those of the chain of `lsdl.planner.chain`; their unit is one activation of it.

Shape letters: N nodes, B batch, D width.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsdl import plots
from lsdl.analysis import backprop, clock
from lsdl.planner import chain
from lsdl.studies.claim import Cell, Claim, Expected, judged

CLAIM = (
    "Vanilla backpropagation evaluates n nodes and stores n, a memory-poor one n^2 / 2 and 1, and "
    "one with checkpoints 2n and 2 sqrt(n)."
)
SOURCE = (
    "Lecture: stories from modern machine learning, automatic differentiation; "
    "Chen et al. 2016, Training deep nets with sublinear memory cost (arXiv:1604.06174)"
)
_CHEN = "Chen et al. 2016: sqrt(n) segments"
_SLIDE = "lecture: vanilla, memory-poor and checkpointed backpropagation"
_GRIEWANK = "Griewank and Walther 2000, algorithm 799"
_AWAY = "largest distance of evaluations and of stored activations from "
_AT = ", n = 16, 36, 64, 100, 144"
_TEMPORARY = "compiled temporary bytes, in activations, "
_LENGTHS = " activations, largest relative distance, L = 16, 64, 256"
_PROGRAM = "counted from a program: residuals of the chain, batch much larger than width"
EXPECTED = {
    "vanilla": Expected(f"{_AWAY}n and n{_AT}", _SLIDE, low=0, high=0),
    "memory_poor": Expected(f"{_AWAY}n (n + 1) / 2 and 1{_AT}", _SLIDE, low=0, high=0),
    "checkpointed": Expected(f"{_AWAY}2n - sqrt(n) and 2 sqrt(n) - 1{_AT}", _CHEN, low=0, high=0),
    "kept_last": Expected(
        "evaluations of 64 nodes, if the forward pass keeps the last segment", _CHEN, 113, 113
    ),
    "thousand_evaluations": Expected("evaluations of 1,000 nodes, checkpointed", _CHEN, 1968, 1968),
    "thousand_stored": Expected("stored of 1,000 nodes, checkpointed", _CHEN, low=62, high=62),
    "shrinking_stored": Expected(
        "stored of 1,000 nodes, if each segment is shorter by one than the one before: sqrt(2n)",
        "counted: checkpoints behind the segment in hand are gone",
        low=45,
        high=45,
    ),
    "shrinking_evaluations": Expected(
        "evaluations of 1,000 nodes with these segments", "no node more often than twice", high=1968
    ),
    "binomial_stored": Expected(
        "stored of 1,000 nodes, binomial: log2(n) at the most", _GRIEWANK, high=9.97
    ),
    "binomial_evaluations": Expected(
        "evaluations of 1,000 nodes, binomial: n log2(n) at the most", _GRIEWANK, high=9966
    ),
    "gradients": Expected(
        "largest relative distance of a pass's gradients from jax.grad's, float64, n = 16 to 144",
        _SLIDE,
        high=1e-6,
    ),
    "bytes_none": Expected(
        f"{_TEMPORARY}from the r L + 3{_LENGTHS}; r is read from the jaxpr: 2, what a layer takes "
        "in and its slope (jax 0.10 keeps two arrays of the slope, r = 3)",
        _PROGRAM,
        high=0.05,
    ),
    "bytes_full": Expected(f"{_TEMPORARY}from L + 3{_LENGTHS}", _PROGRAM, high=0.05),
    "bytes_sqrt": Expected(f"{_TEMPORARY}from 2 sqrt(L) + 4{_LENGTHS}", _CHEN, high=0.05),
    "bytes_every": Expected(
        f"{_TEMPORARY}from the (1 + r) sqrt(L) + 4 of sqrt(L) segments that keep all when they are "
        f"made again, largest relative distance, L = 16, 64, 256",
        _PROGRAM,
        high=0.1,
    ),
    "bytes_poor": Expected(
        "compiled temporary bytes, in activations, of the memory-poor form, L = 8",
        _SLIDE,
        high=8,
    ),
    "bytes_binomial": Expected(
        "compiled temporary bytes of the binomial form over those of sqrt, the most of L = 64, 256",
        _GRIEWANK,
        high=0.999,
    ),
    "spacing": Expected(
        "compiled temporary bytes of segments of k layers, from L / k + r k + 4 activations, "
        "largest relative distance, L = 64, every k that divides it",
        "counted: L / k checkpoints, and r arrays for each layer of one segment",
        high=0.1,
    ),
    "evaluations_full": Expected(
        "evaluations of a layer, counted in the program: each layer checkpointed, L = 16, 64, 256",
        _CHEN,
        2,
        2,
    ),
    "evaluations_every": Expected(
        "evaluations of a layer, counted in the program: sqrt(L) segments, L = 16, 64, 256",
        _CHEN,
        2,
        2,
    ),
    "evaluations_sqrt": Expected(
        "evaluations of a layer, counted in the program: sqrt(L) segments of which each layer is "
        "checkpointed too, L = 16, 64, 256",
        "a scan keeps input and slope or the input alone: the third evaluation is for the slope",
        low=3,
        high=3,
    ),
    "evaluations_poor": Expected(
        "evaluations of a layer, counted in the program: memory-poor, L = 8, (L + 1) / 2",
        _SLIDE,
        low=4.5,
        high=4.5,
    ),
    "policies": Expected(
        "largest relative distance of gradients with a policy from those with none, L = 8",
        _SLIDE,
        high=1e-6,
    ),
    "time": Expected(
        "time of a gradient with sqrt(L) segments over that without, L = 64; of each seed the "
        "median of interleaved pairs",
        "pilot: extra time at most 60% on CPU; Chen et al. 2016: 30%",
        high=1.6,
    ),
}

SIZES = (16, 36, 64, 100, 144)
LENGTHS = (16, 64, 256)
POOR = 8  # layers: a longer chain takes long to compile
TIMED = dict(batch=512, width=128)
ROUNDS = 7
SPACED = 64  # layers, of which every segment length is compiled
PASSES = {
    "vanilla": backprop.vanilla,
    "memory_poor": backprop.memory_poor,
    "checkpointed": backprop.checkpointed,
    "kept_last": functools.partial(backprop.checkpointed, keep_last=True),
    "shrinking": lambda chain, f_0: backprop.checkpointed(
        chain, f_0, ends=backprop.shrinking(chain.length)
    ),
    "binomial": backprop.binomial,
}


def cells(scale: str, seeds: int) -> list[Cell]:
    """Counted passes, compiled programs, timed pairs; at full scale what the papers report."""
    if scale == "full":
        return _full()
    return [
        *(Cell(f"count-{n}", {"nodes": n}) for n in (*SIZES, 1000)),
        *(Cell(f"compiled-{n}", {"length": n}) for n in LENGTHS),
        Cell("poor", {"poor_length": POOR}),
        Cell("spacing", {"spaced": SPACED}),
        *(Cell(f"time-s{seed}", {"timed": 64, "seed": seed}) for seed in range(seeds)),
    ]


def _full() -> list[Cell]:
    deep = {"model.depths": (66, 84, 133, 50), "batch_size": 32, "total_steps": 100}
    resnet = "configs/imagenet_resnet50.py:128"
    chen = {"none": "48 GB", "full": "7 GB, 30% slower"}
    gpt = {"none": "the time of one", "full": "39% slower at 22 B (Korthikanti et al. 2022)"}
    return [
        *(
            Cell(f"resnet1001-{policy}", {}, resnet, deep | {"remat": policy}, f"{told} (Chen)")
            for policy, told in chen.items()
        ),
        *(
            Cell(f"gpt2-{policy}", {}, "configs/lm_gpt2.py:1.5b", {"remat": policy}, told)
            for policy, told in gpt.items()
        ),
    ]


def measure(cell: Cell, folder: Path) -> dict[str, Any]:
    """Counts of each pass, or bytes and products of each policy's program, or seconds."""
    settings = dict(cell.settings)
    if "nodes" in settings:
        return _counted(settings["nodes"])
    if "length" in settings:
        return _compiled(settings["length"])
    if "poor_length" in settings:
        return {"poor": chain.program(settings["poor_length"], "poor")}
    if "spaced" in settings:
        length = settings["spaced"]
        every = [k for k in range(1, length + 1) if length % k == 0]
        return {
            "every": every,
            "activations": [chain.program(length, f"every:{k}").activations for k in every],
        }
    return _timed(settings["timed"], settings["seed"])


def _counted(n: int) -> dict[str, Any]:
    """[evaluations, stored] of each pass over n nodes; up to 144 nodes with tanh's gradients."""
    if n > max(SIZES):
        runs = {name: run(backprop.numbers(n), 0) for name, run in PASSES.items()}
        return {name: [run.evaluations, run.peak] for name, run in runs.items()}
    with jax.enable_x64(True):
        weight_NDD, x_BD = map(np.asarray, chain.arrays(n, batch=16, width=8, seed=n))
        expected_NDD = np.asarray(jax.jit(chain.gradient())(weight_NDD, x_BD))
    runs = {name: run(backprop.tanh(weight_NDD), x_BD) for name, run in PASSES.items()}
    found = {name: [run.evaluations, run.peak] for name, run in runs.items()}
    apart = [_distance(np.stack(run.b[1][::-1]), expected_NDD) for run in runs.values()]
    return found | {"distance": max(apart)}


def _distance(found: Any, expected: Any) -> float:
    """The largest, over the largest entry."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _compiled(length: int) -> dict[str, Any]:
    """{policy: [activations, evaluations of a layer]}, and what a layer keeps without a policy."""
    policies = ["none", "full", "sqrt", f"every:{math.isqrt(length)}", "binomial"]
    row = {policy.partition(":")[0]: chain.program(length, policy) for policy in policies}
    if length == min(LENGTHS):
        row["distance"] = _policies_apart(POOR, [*policies, "poor"])
    return row | {"kept": chain.kept(length)}


def _policies_apart(length: int, policies: Sequence[str]) -> float:
    """The largest distance of a policy's gradients from those without one."""
    arrays = chain.arrays(length, batch=64)
    found = {p: np.asarray(jax.jit(chain.gradient(p))(*arrays)) for p in policies}
    return max(_distance(gradient, found["none"]) for gradient in found.values())


def _timed(length: int, seed: int) -> dict[str, Any]:
    """{policy: the median over rounds of its time over that of none}, and all seconds."""
    arrays = chain.arrays(length, **TIMED, seed=seed)
    policies = ["none", f"every:{math.isqrt(length)}", "sqrt", "full"]
    programs = {p.partition(":")[0]: jax.jit(chain.gradient(p)) for p in policies}
    calls = {name: functools.partial(program, *arrays) for name, program in programs.items()}
    seconds = clock.in_turn(calls, rounds=ROUNDS)
    ratios = {name: np.divide(times, seconds["none"]) for name, times in seconds.items()}
    return {name: float(np.median(values)) for name, values in ratios.items()} | {"all_s": seconds}


def claims(table: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """Counts, bytes and products against their laws."""
    values = _counts({row["nodes"]: row for row in table if "nodes" in row})
    compiled = [row for row in table if "length" in row]
    values |= _compiled_values(compiled)
    values["bytes_poor"], values["evaluations_poor"] = _only(table, "poor")["poor"]
    values["policies"] = _only(compiled, "distance")["distance"]
    spaced, kept = _only(table, "spaced"), compiled[0]["kept"]
    law = np.array([chain.segments(k, spaced["spaced"], kept) for k in spaced["every"]])
    values["spacing"] = np.abs(spaced["activations"] / law - 1).max()
    values["time"] = [row["every"] for row in table if "timed" in row]
    return judged(EXPECTED, values)


def _only(table: Sequence[Mapping[str, Any]], column: str) -> Mapping[str, Any]:
    (row,) = (row for row in table if column in row)
    return row


def _counts(rows: Mapping[int, Mapping[str, Any]]) -> dict[str, float]:
    """Of the passes over n nodes: {n: row}."""
    laws = {
        "vanilla": lambda n, root: (n, n),
        "memory_poor": lambda n, root: (n * (n + 1) // 2, 1),
        "checkpointed": lambda n, root: (2 * n - root, 2 * root - 1),
    }
    values = {
        name: max(np.abs(np.subtract(rows[n][name], law(n, math.isqrt(n)))).max() for n in SIZES)
        for name, law in laws.items()
    }
    values |= {"kept_last": rows[64]["kept_last"][0]}
    names = {"thousand": "checkpointed", "shrinking": "shrinking", "binomial": "binomial"}
    for claim, name in names.items():
        values[f"{claim}_evaluations"], values[f"{claim}_stored"] = rows[1000][name]
    return values | {"gradients": max(rows[n]["distance"] for n in SIZES)}


def _compiled_values(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the programs of the chains of all lengths."""
    laws = {
        "none": lambda n, root, kept: kept * n + 3,
        "full": lambda n, root, kept: n + 3,
        "sqrt": lambda n, root, kept: 2 * root + 4,
        "every": lambda n, root, kept: chain.segments(root, n, kept),
    }

    def distance(name, row):
        n = row["length"]
        return abs(row[name][0] / laws[name](n, math.isqrt(n), row["kept"]) - 1)

    values = {f"bytes_{name}": max(distance(name, row) for row in rows) for name in laws}
    ratios = [row["binomial"][0] / row["sqrt"][0] for row in rows if row["length"] >= 64]
    values["bytes_binomial"] = max(ratios)
    for name in ("full", "every", "sqrt"):
        values[f"evaluations_{name}"] = [row[name][1] for row in rows]
    return values


def figure(table: Sequence[Mapping[str, Any]]) -> dict[str, plots.Figure]:
    """Memory against recomputation, compiled bytes against length and spacing, and the passes."""
    return {
        "trade": _trade(64),
        "passes": _pictures(16),
        "compiled": _bytes_figure([row for row in table if "length" in row]),
        "spacing": _spacing_figure(table),
    }


def _trade(n: int) -> plots.Figure:
    """Several numbers of even segments, and the binomial passes with few slots."""
    nodes = backprop.numbers(n)

    def series(runs):
        return [run.evaluations / n for run in runs], [run.peak for run in runs]

    number = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, n)
    even = [backprop.checkpointed(nodes, 0, ends=backprop.even(n, k)) for k in number]
    slots = [backprop.binomial(nodes, 0, slots=k) for k in range(2, 12)]
    return plots.scatter(
        {
            "even segments": series(even),
            "shrinking segments": series([PASSES["shrinking"](nodes, 0)]),
            "sqrt(n) segments": series([backprop.checkpointed(nodes, 0)]),
            "vanilla": series([backprop.vanilla(nodes, 0)]),
            "memory-poor": series([backprop.memory_poor(nodes, 0)]),
            "binomial": series(slots),
        },
        title=f"Reverse passes over {n} nodes",
        x="evaluations of a node",
        y="activations stored",
        logx=True,
        logy=True,
    )


def _pictures(n: int) -> plots.Figure:
    shown = ("vanilla", "memory_poor", "checkpointed", "binomial")
    runs = {name: PASSES[name](backprop.numbers(n), 0) for name in shown}
    drawn = [backprop.picture(run, name.replace("_", "-")) for name, run in runs.items()]
    return plots.panels(drawn, title=f"Reverse passes over {n} nodes, event by event")


def _bytes_figure(rows: Sequence[Mapping[str, Any]]) -> plots.Figure:
    def series(name):
        return list(zip(*((r["length"], r[name][0]) for r in rows), strict=True))

    names = {"none": "none", "full": "full", "every": "every: sqrt(L)", "sqrt": "sqrt"}
    names |= {"binomial": "binomial"}
    return plots.lines(
        {label: series(name) for name, label in names.items()},
        title="Compiled temporary memory of the chain",
        x="layers",
        y="activations",
        logx=True,
        logy=True,
    )


def _spacing_figure(table: Sequence[Mapping[str, Any]]) -> plots.Figure:
    spaced = _only(table, "spaced")
    kept = next(row["kept"] for row in table if "kept" in row)
    length, every = spaced["spaced"], spaced["every"]
    return plots.lines(
        {
            "compiled": (every, spaced["activations"]),
            f"L/k + {kept}k + 4": (every, [chain.segments(k, length, kept) for k in every]),
        },
        title=f"{length} layers in segments of k",
        x="layers of a segment",
        y="activations",
        logx=True,
        logy=True,
    )
