"""The best layout for a target: meshes, rules, remat policies and microbatches, ranked.

Every layout that the model and the batch allow is estimated by closed forms; those that cannot fit
are rejected, the fastest of the rest are compiled for the target, and their order is then that of
what the compiler says: memory that fits, FLOPs counted in the step, bytes on the wire.

Closed forms are there for `none` and `full`. What another policy takes lies between theirs: it is
as far from `full` as the bytes that the traced loss keeps under it, and as far from `none` as the
FLOPs that the traced step computes again.
"""

import dataclasses
import functools
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
from tqdm import tqdm

from lsdl import page, remat_choice
from lsdl.errors import UserError
from lsdl.experiment import Experiment
from lsdl.planner import analytic, compiled, count, fit, hardware, memory, tree
from lsdl.sharding.mesh import batch_shards
from lsdl.source import Source

FIELDS = ("mesh", "rules", "remat", "accum")
TIMES = ("fastest_s", "slowest_s", "binds")

POLICIES = ("none", "dots", "dots_no_batch", "full")  # and names, all that the model gives
MOST_TENSOR = 16  # beyond it products of one device are slivers of a layer
COMPILED = 6  # layouts that are compiled at once,
ROUNDS = 3  # and again, while none of them fits
TOLERANCE = 1.15  # by how much the closed forms of memory may be off: they only sort out


def layouts(devices: int) -> Iterator[dict[str, str]]:
    """{field: value} of every mesh and rule table for `devices`, axes of size 1 left out."""
    for tensor, fsdp in itertools.product(_divisors(devices), repeat=2):
        if devices % (tensor * fsdp) or tensor > MOST_TENSOR:
            continue
        data = devices // (tensor * fsdp)
        sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
        axes = {axis: size for axis, size in sizes.items() if size > 1} or {"data": 1}
        mesh = ",".join(f"{axis}={size}" for axis, size in axes.items())
        yield {"mesh": mesh, "rules": "fsdp_tp"}
        if tensor > 1:
            yield {"mesh": mesh, "rules": "tp_sp"}
        if data > 1 and fsdp == 1 and tensor == 1:
            yield {"mesh": mesh, "rules": "zero1"}


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def run(
    source: Source,
    target: hardware.Target,
    *,
    limit_bytes: int | None = None,
    file: Path | None = None,
    most: int = COMPILED,
) -> list[dict[str, Any]]:
    """The layouts, best first, as JSON values; each with the `reason` why it is no better.

    `limit_bytes`: of a device, by default what the target has; `file`: the user's own hardware. The
    `most` fastest by estimate are compiled, and as many again while none of them fits; 0: none is.
    """
    limit = limit_bytes or target.memory_bytes
    if limit is None:
        raise UserError(f"--search for {target.text} needs --memory-gib: its memory is not known.")
    found = list(_estimated(source, target, limit))
    left = sorted((row for row in found if not row["reason"]), key=middle_s)
    for _ in range(ROUNDS):
        chosen = _different(left, most)
        left = [row for row in left if row not in chosen]
        variants = [source.varied(**_fields(row)) for row in chosen]
        asked = [(variant.file, variant.overrides) for variant in variants]
        told = functools.partial(_tell, chosen)
        answers = compiled.ask_all(asked, target.text, file=file, told=told) if asked else ()
        for row, variant, answer in zip(chosen, variants, answers, strict=True):
            row |= judged(answer, variant.build(target.count), target, limit_bytes=limit)
        if any(row["fits"] for row in chosen):
            break
    ranked = sorted(found, key=_order)
    for row in ranked[1:]:
        row["reason"] = row["reason"] or _worse(row, ranked[0])
    return ranked


def _tell(rows: Sequence[Mapping[str, Any]], i: int, answer: Mapping[str, Any]) -> None:
    layout = " ".join(f"{name}={value}" for name, value in _fields(rows[i]).items())
    print(f"  {layout}: {fit.in_short(answer)}", file=sys.stderr)


class _Between(NamedTuple):
    """Where a policy lies between `none` and `full`."""

    kept: float  # 1: it keeps what `none` does, 0: what `full` does
    again: float  # 0: it computes again what `none` does, 1: what `full` does


def _between(experiment: Experiment, build: Callable[[str], Experiment]) -> dict[str, _Between]:
    """{policy: where it lies}, by the traced programs of `build(policy)`; they know no mesh."""
    names = experiment.activation_names
    others = [*POLICIES, *([f"names:{','.join(names)}"] if names else [])]
    rows = {policy: remat_choice.traced(policy, build(policy)) for policy in others}
    kept = {policy: row["saved_bytes"] for policy, row in rows.items()}
    again = {policy: row["recomputed_flops"] for policy, row in rows.items()}
    most, least = kept["none"] - kept["full"], again["full"] - again["none"]
    if not (most and least):  # a model without layers that could be computed again
        return {"none": _Between(1.0, 0.0)}
    return {
        policy: _Between(
            (kept[policy] - kept["full"]) / most, (again[policy] - again["none"]) / least
        )
        for policy in others
    }


def _estimated(
    source: Source, target: hardware.Target, limit_bytes: int
) -> Iterator[dict[str, Any]]:
    """One row for each layout and policy, with as few microbatches as fit by closed forms."""
    everything, between = list(layouts(target.count)), {}
    for layout in tqdm(everything, desc="layouts", file=sys.stderr, disable=None, leave=False):
        blank = {"accum": 1, "fits": None, "bytes": None, "reason": "", **dict.fromkeys(TIMES)}
        build = functools.partial(_build, source, target, layout)
        try:
            experiment = build("none")
        except UserError as error:
            yield {**layout, "remat": "any", **blank, "reason": str(error)}
            continue
        between = between or _between(experiment, build)
        ends = _ends(experiment, target)
        for policy, place in between.items():
            row = {**layout, "remat": policy, **blank}
            row |= _least_accum(ends, place, limit_bytes)
            if row["bytes"] is not None and row["bytes"] > TOLERANCE * limit_bytes:
                row["reason"] = f"needs about {tree.binary(row['bytes'])} at accum={row['accum']}"
            yield row


def _build(source: Source, target: hardware.Target, layout: dict, policy: str) -> Experiment:
    return source.varied(**layout, remat=policy, accum=1).build(target.count)


def _ends(experiment: Experiment, target: hardware.Target) -> list[tuple[int, dict, dict]]:
    """(accum, estimate of `none`, of `full`) for every number of microbatches there can be."""
    vary = functools.partial(dataclasses.replace, experiment)
    return [
        (accum, *(analytic.estimate(vary(remat=p, accum=accum), target) for p in ("none", "full")))
        for accum in _divisors(experiment.batch_size // batch_shards(experiment.mesh))
    ]


def _least_accum(
    ends: Sequence[tuple[int, dict, dict]], place: _Between, limit_bytes: int
) -> dict[str, Any]:
    """The estimate with the fewest microbatches that fit, or with the most that there can be."""
    mix = lambda none, full, share: none + share * (full - none)  # noqa: E731
    for accum, none, full in ends:
        found = {"accum": accum, "bytes": None, **dict.fromkeys(TIMES)}
        sizes = [one["memory"]["total_bytes"] for one in (none, full)]
        if None not in sizes:
            found["bytes"] = round(mix(*sizes, 1 - place.kept))
        if None not in (none["step_s"], full["step_s"]):
            times = [
                mix(none[key], full[key], place.again)
                for key in ("compute_s", "memory_s", "network_s")
            ]
            found |= dict(zip(TIMES, analytic.bracket(*times), strict=True))
        if found["bytes"] is None or found["bytes"] <= limit_bytes:
            break
    return found


def judged(
    answer: Mapping[str, Any],
    experiment: Experiment,
    target: hardware.Target,
    *,
    limit_bytes: int | None = None,
) -> dict[str, Any]:
    """What a compiled step says of its layout: its memory, and times from its FLOPs and traffic."""
    needed = fit.needed_bytes(answer)
    found = {"fits": bool(fit.verdict(answer, limit_bytes)), "bytes": needed}
    if needed is None:
        return found | {"reason": f"did not compile: {fit.why(answer)}"}
    if not found["fits"]:
        return found | {"reason": f"needs {tree.binary(needed)} as compiled"}
    state, batch = experiment.abstract_state, experiment.abstract_batch
    flops = count.count(experiment.train_step.trace(state, batch)).total()
    dtype, _ = target.device.peak(jnp.dtype(experiment.module.dtype).name)
    times = analytic.bracket(
        flops / target.count / target.flops_per_s(dtype),
        memory.moved_bytes(experiment, target) / target.memory_bytes_per_s,
        network_s(answer["collectives"], experiment, target),
    )
    return found | dict(zip(TIMES, times, strict=True))


def network_s(
    bill: Sequence[Mapping[str, Any]], experiment: Experiment, target: hardware.Target
) -> float:
    """Seconds that the collectives of a compiled step take, one after another at their peaks."""
    total = 0.0
    for row in bill:
        axis = row["axis"].removeprefix("part of ")
        if axis == "all" or not row["wire_bytes"]:
            continue
        link = hardware.link(target, experiment.mesh.shape, axis, dcn=experiment.dcn)
        total += row["wire_bytes"] / link.bytes_per_s[row["kind"]]
    return total


def _different(rows: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first `most`, no mesh more than twice: neighbours are wrong by the same estimate."""
    chosen, meshes = [], Counter()
    for row in rows:
        if len(chosen) < most and meshes[row["mesh"]] < 2:
            chosen.append(row)
            meshes[row["mesh"]] += 1
    return chosen


def _fields(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in FIELDS}


def middle_s(row: Mapping[str, Any]) -> float:
    """Seconds of a step half of whose lesser parts hide behind the largest."""
    return (row["fastest_s"] + row["slowest_s"]) / 2


def _order(row: Mapping[str, Any]) -> tuple[int, float]:
    """Compiled ones that fit, then those that were only estimated, then those that cannot be."""
    rank = 0 if row["fits"] else 1 if not row["reason"] else 2
    return rank, math.inf if row["fastest_s"] is None else middle_s(row)


def _worse(row: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    said = f"{middle_s(row) / middle_s(best) - 1:+.1%} time"
    return said if row["fits"] else f"{said}, estimated"


# For people


HEAD = ("", *FIELDS, "a device", "step", "bound by", "reason")


def table(found: Sequence[Mapping[str, Any]], *, most: int = 20) -> str:
    """The first `most` layouts for people, and how many were rejected for what."""
    lines = [HEAD, *itertools.islice(_lines(found), most)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    if len(found) > most:
        text.append(f"and {len(found) - most} more, in --json and --html")
    return "\n".join(text)


def _lines(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for number, row in enumerate(found, 1):
        yield (
            str(number),
            *(str(row[name]) for name in FIELDS),
            "" if row["bytes"] is None else tree.binary(row["bytes"]),
            ""
            if row["fastest_s"] is None
            else f"{row['fastest_s']:.3g} .. {row['slowest_s']:.3g} s",
            row["binds"] or "",
            row["reason"] or ("compiled, fits" if row["fits"] else "estimated"),
        )


def section(found: Sequence[Mapping[str, Any]]) -> page.Markup:
    """The whole table for a page."""
    return page.section("Layouts", page.table(HEAD, _lines(found)))
