"""What each rematerialisation policy costs an experiment, and the cheapest that fits.

    counted    the FLOPs computed again, in the traced step
    read       the bytes that the loss keeps for its backward pass, in the traced loss
    compiled   the bytes of the step's temporaries on one device, by the target's compiler

A policy is dominated if another needs neither more memory nor more FLOPs, and less of one.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from lsdl import page
from lsdl.errors import UserError
from lsdl.experiment import Experiment
from lsdl.models import remat
from lsdl.planner import compiled, count, fit, present, residuals, tree
from lsdl.planner.hardware import Target
from lsdl.source import Source

LEAST_GAIN = 2  # layers from which on a nest of segments differs from `full`
MOST_POOR = 16  # layers: the program of `poor` grows with their square


def policies(experiment: Experiment) -> list[str]:
    """Those that are worth a row: each name alone, all of them, and every nest."""
    names, layers = experiment.activation_names, getattr(experiment.module, "num_layers", 0)
    found = ["none", "dots", "dots_no_batch"]
    found += [f"names:{name}" for name in names]
    found += [f"names:{','.join(names)}"] * (len(names) > 1)
    found += ["full"]
    if layers > LEAST_GAIN:
        found += ["every:2", "sqrt", "binomial"]
    if LEAST_GAIN < layers <= MOST_POOR:
        found += ["poor"]
    return found


def traced(policy: str, experiment: Experiment) -> dict[str, Any]:
    """What the traced step of `experiment`, built with `policy`, tells, as JSON values."""
    state, batch = experiment.abstract_state, experiment.abstract_batch
    flops = count.count(experiment.train_step.trace(state, batch))
    again = count.recomputed(flops)
    return {
        "policy": policy,
        "names": list(remat.names_of(policy)),
        "saved_bytes": residuals.kept_bytes(experiment.residuals.trace(state, batch)),
        "recomputed_flops": again,
        "recomputed": again / (flops.total() - again),
    }


def _all_traced(build: Callable[[str], Experiment]) -> list[dict[str, Any]]:
    """`traced` of every policy: first what computes the least again, of equals what saves most."""
    plain = build("none")
    found = []
    bar = tqdm(policies(plain), desc="policies", file=sys.stderr, disable=None, leave=False)
    for policy in bar:
        found.append(traced(policy, build(policy)))
    return sorted(found, key=lambda row: (row["recomputed_flops"], -row["saved_bytes"]))


def rows(
    source: Source, target: Target, *, limit_bytes: int | None = None, file: Path | None = None
) -> list[dict[str, Any]]:
    """One row for each policy, those that need the least FLOPs first; JSON values.

    `saved_bytes` are of a whole microbatch, `temporary_bytes` and `needed_bytes` (all that the step
    has to have) of one device of `target`, as compiled: None, with an `error`, where the compiler
    gave up. `limit_bytes`: by default what the target has. `file`: the user's own hardware.
    """
    found = _all_traced(lambda policy: source.varied(remat=policy).build(target.count))
    variants = [source.varied(remat=row["policy"]) for row in found]
    answers = compiled.ask_all(
        [(v.file, v.overrides) for v in variants],
        target.text,
        file=file,
        told=lambda i, answer: _tell(f"remat={found[i]['policy']}: {fit.in_short(answer)}"),
    )
    for row, answer in zip(found, answers, strict=True):
        row["needed_bytes"] = fit.needed_bytes(answer)
        row["fits"] = fit.verdict(answer, limit_bytes)
        row["temporary_bytes"] = answer.get("compiled", {}).get("temporary_bytes")
        row |= {"error": fit.why(answer)} if fit.why(answer) else {}
    for row in found:
        row["dominated_by"] = next((o["policy"] for o in found if _dominates(o, row)), None)
    return found


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    if a["needed_bytes"] is None or b["needed_bytes"] is None:
        return False
    ours, theirs = ((r["needed_bytes"], r["recomputed_flops"]) for r in (a, b))
    return ours != theirs and all(x <= y for x, y in zip(ours, theirs, strict=True))


def is_auto(policy: str) -> bool:
    """Whether `policy` stands for one that is to be chosen."""
    return remat.check(policy).startswith("auto")


def limit_of(policy: str) -> int | None:
    """The bytes of a device that `auto:16` gives in GiB."""
    gib = policy.partition(":")[2]
    return round(float(gib) * 2**30) if gib else None


def resolved(source: Source) -> Source:
    """`source` with the policy that `auto` stands for on the devices that are there."""
    if not is_auto(policy := source.field("remat")):
        return source
    build = lambda policy: source.varied(remat=policy).build()  # noqa: E731

    def step_bytes(policy: str) -> int | None:
        experiment = build(policy)
        step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
        try:
            return compiled.memory(step.compile())["needed_bytes"]
        except jax.errors.JaxRuntimeError:  # on a TPU what is too large does not compile
            return None

    limit = limit_of(policy) or present.memory_bytes()
    given = dict(devices=jax.device_count(), limit_bytes=limit)
    return source.varied(remat=choose(build, step_bytes, **given))


def choose(
    build: Callable[[str], Experiment],
    step_bytes: Callable[[str], int | None],
    *,
    devices: int,
    limit_bytes: int | None,
) -> str:
    """The policy of `auto`: of those that fit into `limit_bytes`, the one with the fewest FLOPs.

    `build(policy)` is the experiment, `step_bytes(policy)` what its compiled step needs on one
    device, None if it does not compile: it is asked for one policy after another, those that
    compute the least again first, until one fits. What was tried is told. Raises `UserError`
    without a limit, or if none fits.
    """
    if limit_bytes is None:
        raise UserError(
            "remat='auto' needs to know how much memory a device has, which this machine does not "
            "tell: write it in GiB, as auto:16, or choose a policy."
        )
    found = _all_traced(build)
    held, least = tree.device_bytes(build("none").abstract_state), None
    for row in found:
        policy, again = row["policy"], f"{row['recomputed']:.1%} computed again"
        if held + row["saved_bytes"] / devices > limit_bytes:  # however it is split
            _tell(f"remat={policy}: {again}, not compiled: saves {_gib(row['saved_bytes'])} in all")
            continue
        needed = step_bytes(policy)
        fits = needed is not None and needed <= limit_bytes
        size = "does not compile" if needed is None else f"{_gib(needed)} of {_gib(limit_bytes)}"
        _tell(f"remat={policy}: {again}, {size}{': chosen' if fits else ''}")
        if fits:
            return policy
        least = min((n for n in (needed, least) if n is not None), default=None)
    raise UserError(
        f"remat='auto' finds no policy that fits into {_gib(limit_bytes)}"
        + (f", the least needs {_gib(least)}" if least else "")
        + ": split the state over more devices (fsdp), or raise accum."
    )


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.2f} GiB"


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """The rows for people."""
    head = ("remat", "saved", "temporaries", "all, a device", "computed again", "")
    lines = [head, *_lines(found)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = (str.ljust, *(str.rjust,) * 4, str.ljust)
    text = [
        "  ".join(f(word, width) for f, word, width in zip(justify, line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _lines(found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for row in found:
        if row["needed_bytes"] is None:
            said = f"not compiled: {row['error']}"
        elif row["fits"] is False:
            said = "does not fit"
        else:
            said = f"dominated by {row['dominated_by']}" if row["dominated_by"] else ""
        sizes = (row[key] for key in ("saved_bytes", "temporary_bytes", "needed_bytes"))
        yield (
            row["policy"],
            *("" if size is None else tree.binary(size) for size in sizes),
            f"{row['recomputed']:.1%}",
            said,
        )


def section(found: Sequence[Mapping[str, Any]]) -> page.Markup:
    """Table and Pareto figure for a page."""
    from lsdl import plots  # matplotlib takes a second, and only a figure needs it

    shown = [row for row in found if row["needed_bytes"] is not None]
    points = {
        row["policy"]: ([row["needed_bytes"] / 2**30], [100 * row["recomputed"]]) for row in shown
    }
    figure = plots.scatter(
        points,
        title="Memory against recomputation",
        x="GiB on a device",
        y="FLOPs computed again, % of the model's",
        alt="each policy by the memory of its step and the FLOPs it computes again",
    )
    head = ("remat", "saved", "temporaries", "all, a device", "computed again", "")
    return page.section(
        "Rematerialisation",
        page.row(page.figure(figure.svg(prefix="remat", themed=True))),
        page.table(head, _lines(found)),
    )


def _tell(text: str) -> None:
    print(f"  {text}", file=sys.stderr)
