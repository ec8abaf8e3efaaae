"""The bill of collectives: what a compiled step sends, beside the least that its layout could send.

Lower bounds are bytes that one device sends in one step, on a ring: `{(kind, axis): bytes}`. They
are of numbers alone, so that a reader can check them by hand, and they add up: the bound of a mixed
mesh is that of its parameters and that of each axis that splits something else.
"""

import contextlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lsdl.errors import UserError
from lsdl.models import remat
from lsdl.models.moe import Experts
from lsdl.planner import hlo, tree
from lsdl.sharding.mesh import BATCH_AXES
from lsdl.sharding.placement import Placement
from lsdl.sharding.rules import axes_of

TOKEN_AXES = (*BATCH_AXES, "sequence")  # on them devices have different tokens
Bounds = Counter[tuple[str, str]]
# Machine code that need not be fast: the program and its collectives are the same.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OVER = 1.05  # times its bound: a row that has to say why
MOST_VIRTUAL = 64  # CPU devices that one process stands in for


def parameters(
    placements: Sequence[Placement],
    sizes: Mapping[str, int],
    *,
    token_axes: Sequence[str] = TOKEN_AXES,
    accum: int = 1,
    policy: str = "none",
    itemsize: int | None = None,
) -> Bounds:
    """What parameters and gradients need on the axes that split the batch's tokens, leaf by leaf.

    P bytes of a leaf that n devices hold in full: its gradient is reduced once, 2 (n-1)/n P. The
    same where each keeps its part of the optimiser's state (`placements` of moments that are split
    further than their parameter): the gradient is reduced and scattered, (n-1)/n P, the new
    parameter gathered, (n-1)/n P. A leaf that the axes split: gathered for its use, (n-1)/n P, and
    its gradient reduced and scattered, (n-1)/n P; those in a stack of blocks are gathered each time
    that the remat `policy` computes their layer. Axes such as tensor that split the leaf and not
    the tokens divide P, and so does expert, where the tokens come to the leaf.

    `itemsize`: bytes of an element as the step computes with it, where it is kept in more; only
    the new parameter is gathered as it is kept.

    In `accum` microbatches gradients of split leaves are scattered in each, and the leaves of a
    scanned stack gathered in each; the others are sums that wait, and weights that stay.
    Source: Rajbhandari et al. 2020, sections 7.1 and 7.2: 2 and 3 times the parameters.
    """
    bounds = Counter()
    moments = _moment_axes(placements, sizes)

    def add(kind: str, axes: Iterable[str], nbytes: float, times: float = 1) -> None:
        n = math.prod(sizes[axis] for axis in axes)
        name = "+".join(axis for axis in sizes if axis in axes)
        if n > 1:
            bounds[kind, name] += times * hlo.WIRE[kind](nbytes, n)

    for placement in placements:
        if not placement.path.startswith("params/"):
            continue
        own = _axes(placement, sizes)
        kept_bytes = placement.nbytes / math.prod(sizes[axis] for axis in own)
        narrower = (itemsize or math.inf) * math.prod(placement.shape) / placement.nbytes
        local = kept_bytes * min(1, narrower)
        split = own & set(token_axes) - ({"expert"} if "experts" in placement.names else set())
        stacked = "layers" in placement.names
        layers = _layers(placement, placements, sizes)
        times = remat.evaluations(policy, layers) / layers if layers else 1
        whole = local * math.prod(sizes[axis] for axis in split)
        add("all-gather", split, whole, (accum if stacked else 1) * times)
        add("reduce-scatter", split, local, accum)
        rest = {axis for axis in token_axes if sizes.get(axis, 1) > 1} - own
        kept = rest & moments.get(placement.path, set())  # axes that split the moments alone
        part = local / math.prod(sizes[axis] for axis in kept)
        add("reduce-scatter", kept, part)
        add("all-reduce", rest - kept, part)
        add("all-gather", kept, kept_bytes)
    return bounds


def _layers(placement: Placement, placements: Sequence[Placement], sizes: Mapping[str, int]) -> int:
    """How many blocks the stack has that the parameter is in, on one stage; 0: it is in none."""
    before, found, after = placement.path.partition("/stack/")
    if not found:
        return 0
    if after.startswith("blocks/"):
        return placement.shape[0] // sizes.get("stage", 1)
    inside = (p.path.removeprefix(before + found) for p in placements)
    return len({path.partition("/")[0] for path in inside if path.startswith("block_")})


def _axes(placement: Placement, sizes: Mapping[str, int]) -> set[str]:
    """The mesh axes of more than one device that split the array."""
    return {axis for axes in placement.spec for axis in axes_of(axes) if sizes[axis] > 1}


def _moment_axes(placements: Sequence[Placement], sizes: Mapping[str, int]) -> dict[str, set[str]]:
    """{parameter: the axes that split what the optimiser keeps for it}."""
    shapes = {p.path: p.shape for p in placements if p.path.startswith("params/")}
    result = {}
    for placement in placements:
        parts = placement.path.split("/")
        owners = ("/".join(("params", *parts[i:])) for i in range(1, len(parts)))
        owner = next((path for path in owners if shapes.get(path) == placement.shape), None)
        if parts[0] == "opt_state" and owner:
            result[owner] = _axes(placement, sizes)
    return result


def tensor_parallel(
    activation_bytes: float,
    t: int,
    *,
    layers: int,
    attention: bool = True,
    mlp: bool = True,
    ends: int = 2,
    policy: str = "none",
) -> Bounds:
    """Transformer blocks split over `t` devices, heads and MLP by columns and then by rows.

    `activation_bytes` A: rows x length x width of the step, as one device has them. In each layer 4
    all-reduces of A: the results of attention's and the MLP's last product, and the gradients of
    their inputs. A layer that is computed again by the remat `policy` needs both results again; the
    last time, where no other layer waits for it, attention's alone, which the MLP is computed from;
    and none where the results of products are kept. Half of it where the rules leave `attention` or
    the `mlp` whole.
    `ends`: one for looking up a table split by its rows, where all but one device add zeros, and
    one for the gradient of the hidden states from logits split by their columns; 0 where the table
    is whole. Norms and residuals see whole activations: their parameters need nothing. With those
    split by length (tp_sp) each all-reduce is an all-gather and a reduce-scatter, of as many bytes.
    Source: Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.
    """
    policy = "none" if policy.startswith("dots") else policy
    again = remat.evaluations(policy, layers) - layers
    times = attention * (2 * layers + again) + ends
    times += mlp * (2 * layers + again - remat.unneeded(policy, layers))
    return Counter({("all-reduce", "tensor"): times * hlo.WIRE["all-reduce"](activation_bytes, t)})


def pipeline(microbatch_bytes: float, *, microbatches: int, stages: int) -> Bounds:
    """One activation of a microbatch in each of M + S - 1 ticks, and its gradient on the way back.

    What the schedule sends, filling and draining included, and not the broadcast of the last
    stage's results. Source: Huang et al. 2019, section 2.2.
    """
    ticks = microbatches + stages - 1
    return Counter({("collective-permute", "stage"): 2 * ticks * microbatch_bytes})


def ring_attention(key_value_bytes: float, n: int, *, layers: int, policy: str = "none") -> Bounds:
    """Keys and values visit the other n - 1 devices, and their gradients travel back.

    `key_value_bytes`: those of one layer that a device makes, both together. They travel forward
    each time that the remat `policy` computes a layer. To gather them instead sends as much.
    Source: Liu et al. 2023, section 3.
    """
    times = layers + remat.evaluations(policy, layers)
    return Counter({("collective-permute", "sequence"): times * (n - 1) * key_value_bytes})


def experts(slot_bytes: float, n: int, *, layers: int, policy: str = "none") -> Bounds:
    """Tokens travel to their experts and back, and so do their gradients.

    `slot_bytes`: those that one device sends of a layer, the slots of its sequences on all experts,
    full or empty. The tokens travel each time that the remat `policy` computes a layer.
    Source: Lepikhin et al. 2021, section 3.
    """
    times = 2 * (layers + remat.evaluations(policy, layers))
    return Counter({("all-to-all", "expert"): times * hlo.WIRE["all-to-all"](slot_bytes, n)})


def bill(
    text: str, sizes: Mapping[str, int], *, bounds: Bounds, least_bytes: int = 0
) -> list[dict[str, Any]]:
    """The collectives of the optimised program `text`, one row for each kind and axis, and all.

    `asynchronous`: so many of `count` leave the device free to compute meanwhile.
    `bytes` are of results, `wire_bytes` what one device sends; of arrays of at least `least_bytes`.
    `lower_bound_bytes` is 0 for what the layout could do without, and None on axes that `bounds`
    does not know. `ratio` is that of wire bytes to the lower bound, where there are both.
    `largest`: of a row beyond its bound by 5%, the instructions that send most.
    """
    rows = {key: [0, 0, 0, 0.0] for key in bounds}
    sources = defaultdict(Counter)
    for one in hlo.collectives(text, sizes):
        if nbytes := one.nbytes(least_bytes):
            source = f"{one.times} x {one.shape} {one.op_name}".strip()
            sources[one.kind, one.axis][source] += round(one.wire_bytes(least_bytes))
            row = rows.setdefault((one.kind, one.axis), [0, 0, 0, 0.0])
            more = (one.times, one.times * one.asynchronous, nbytes, one.wire_bytes(least_bytes))
            row[:] = map(sum, zip(row, more, strict=True))
    known = {axis for _, name in bounds for axis in name.split("+")}
    unknown = {axis for axis, size in sizes.items() if size > 1} - known

    def priced(kind: str, axis: str, numbers: Sequence[float], bound: float) -> dict[str, Any]:
        count, asynchronous, nbytes, wire = numbers
        lost = unknown if axis == "all" else unknown & set(axis.removeprefix("part of ").split("+"))
        return {
            "kind": kind,
            "axis": axis,
            "count": count,
            "asynchronous": asynchronous,
            "bytes": nbytes,
            "wire_bytes": round(wire),
            "lower_bound_bytes": None if lost else round(bound),
            "ratio": wire / bound if wire and bound and not lost else None,
            "largest": [
                {"what": what, "wire_bytes": wire_bytes}
                for what, wire_bytes in sources[kind, axis].most_common(3)
                if not lost and wire > OVER * bound
            ],
        }

    total = [sum(column) for column in zip([0, 0, 0, 0.0], *rows.values(), strict=True)]
    order = sorted(rows, key=lambda key: (key[1], key[0]))
    return [
        *(priced(*key, rows[key], bounds[key]) for key in order),
        priced("all", "all", total, bounds.total()),
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The bill for people."""
    lines = [
        ("collective", "axis", "count", "async", "bytes", "on the wire", "lower bound", "ratio")
    ]
    for row in rows:
        bound, ratio = row["lower_bound_bytes"], row["ratio"]
        lines.append(
            (
                *(row["kind"], row["axis"], f"{row['count']:,}", f"{row['asynchronous']:,}"),
                *(tree.binary(row["bytes"]), tree.binary(row["wire_bytes"])),
                "unknown" if bound is None else tree.binary(bound),
                "" if ratio is None else f"{ratio:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    justify = (str.ljust, str.ljust, *(str.rjust,) * 6)
    return "\n".join(
        (
            *(
                "  ".join(
                    f(word, width) for f, word, width in zip(justify, line, widths, strict=True)
                )
                for line in lines
            ),
            *_beyond(rows),
        )
    )


def _beyond(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines on rows that send more than their bound, where it is more than 1% of all."""
    for row in rows:
        over = row["wire_bytes"] - (row["lower_bound_bytes"] or 0)
        if row["largest"] and over > rows[-1]["wire_bytes"] / 100:
            yield f"{row['kind']} over {row['axis']}: {tree.binary(over)} beyond its bound, most in"
            for one in row["largest"]:
                yield f"  {tree.binary(one['wire_bytes']):>11}  {one['what'][:150]}"


def lower_bounds(experiment) -> Bounds:
    """What the layout of an `Experiment` needs.

    For its parameters and, in transformers over tokens, for tensor, sequence, expert and pipeline
    parallelism. Nothing is said about others. What rematerialisation computes again is that of
    scanned layers; of layers one after another the compiler may leave out a segment's last.
    """
    sizes, placements = experiment.mesh.shape, experiment.placements
    policy = experiment.remat
    itemsize = jnp.dtype(experiment.module.dtype).itemsize
    further = _conv_axes(experiment.rules)
    bounds = Counter()
    for conv, axes in ((False, TOKEN_AXES), (True, (*TOKEN_AXES, *further))):
        own = [
            p
            for p in placements
            if not p.path.startswith("params/") or (p.names[-1:] == ("conv_out",)) == conv
        ]
        kept = dict(accum=experiment.accum, policy=policy, itemsize=itemsize)
        bounds += parameters(own, sizes, token_axes=axes, **kept)
    if experiment.task.unit != "tokens":
        return bounds
    module, nbytes = experiment.module, activation_bytes(experiment)
    tensor, sequence = sizes["tensor"], sizes.get("sequence", 1)
    stack = dict(layers=module.num_layers, policy=policy)
    if tensor > 1:
        split = {
            role
            for p in placements
            if p.path.startswith("params/")
            for role, axes in zip(p.names, p.spec, strict=False)  # a spec ends with what is split
            if "tensor" in axes_of(axes)
        }
        halves = dict(attention="heads" in split, mlp="mlp" in split)
        ends = 2 if "vocab" in split else 0
        bounds += tensor_parallel(nbytes, tensor, **halves, ends=ends, **stack)
    if sequence > 1:
        kv_heads = getattr(module, "kv_heads", 0) or module.num_heads
        own = math.lcm(kv_heads, tensor) / tensor / module.num_heads  # the rest are repeats
        bounds += ring_attention(2 * own * nbytes, sequence, **stack)
    if (stages := sizes.get("stage", 1)) > 1:
        pieces = experiment.microbatches
        bounds += pipeline(nbytes / pieces, microbatches=pieces, stages=stages)
    if (number := getattr(module, "num_experts", 0)) and sizes.get("expert", 1) > 1:
        length = experiment.task.units_per_example
        own = Experts(number, module.experts_per_token, module.capacity_factor)
        slots = number * own.capacity(length) / length  # for each token
        bounds += experts(slots * nbytes, sizes["expert"], **stack)
    return bounds


def _conv_axes(rules: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """The axes that split convolutions' batches and no others: one_weird_trick has one."""
    axes = next((axes_of(axes) for role, axes in rules if role == "conv_batch"), ())
    return tuple(axis for axis in axes if axis not in TOKEN_AXES)


def activation_bytes(experiment) -> int:
    """Of a step's hidden states of width D between two layers, those that one device has."""
    pieces = math.prod(experiment.mesh.shape.get(axis, 1) for axis in TOKEN_AXES)
    tokens = experiment.batch_size * experiment.task.units_per_example // pieces
    return tokens * experiment.module.width * jnp.dtype(experiment.module.dtype).itemsize


def of_experiment(experiment, *, least_bytes: int = 0) -> list[dict[str, Any]]:
    """The bill of an `Experiment`'s train step, compiled for its mesh of real devices."""
    step = experiment.train_step.lower(experiment.abstract_state, experiment.abstract_batch)
    on_cpu = experiment.mesh.devices.flat[0].platform == "cpu"
    return bill(
        step.compile(QUICK if on_cpu else None).as_text(),
        experiment.mesh.shape,
        bounds=lower_bounds(experiment),
        least_bytes=least_bytes,
    )


def devices(number: int) -> list[jax.Device]:
    """`number` devices to compile for: this machine's, or CPU devices that are not there.

    Raises `UserError` where there are too few. To be called before anything else that needs a
    device, since virtual ones are made when jax starts.
    """
    if number <= MOST_VIRTUAL:
        with contextlib.suppress(RuntimeError):  # once jax has started
            jax.config.update("jax_num_cpu_devices", max(number, jax.config.jax_num_cpu_devices))
    there = jax.devices()
    if len(there) < number:
        platform = there[0].platform
        raise UserError(
            f"The bill of collectives needs {number} devices and there are {len(there)} "
            f"({platform}): "
            + (
                f"up to {MOST_VIRTUAL} CPU devices stand in for others, so use a smaller mesh."
                if platform == "cpu"
                else f"set JAX_PLATFORMS=cpu, where up to {MOST_VIRTUAL} stand in for others."
            )
        )
    return there[:number]
