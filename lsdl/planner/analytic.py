"""What a run takes on given hardware, by closed forms alone: no program is compiled or traced.

Every time is a least one: of the devices' published peaks, which no program reaches, and of the
bytes that the layout cannot do without. Products, memory and network may overlap, all or not at
all: a step lies between the largest of the three and their sum. How much of a peak is achieved is
measured, not known.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from lsdl.planner import architecture, collectives, hardware, memory, tree

HOUR_S = 3600
PEAKS = "times are of the published peaks, which no program reaches: a run takes longer"


def estimate(
    experiment: Any, target: hardware.Target, *, price_per_device_hour: float | None = None
) -> dict[str, Any]:
    """The plan of `experiment` on `target`, as JSON values; pairs are [least, most].

    None stands for what no closed form here tells, and `notes` say why. Raises `UserError` where
    the mesh has not as many devices as the target.
    """
    costs = architecture.costs(experiment.module, experiment.abstract_batch, experiment.task)
    notes = [PEAKS]
    flops = _flops(experiment, costs, notes)
    bytes_of_device = _memory(experiment, target, notes)
    traffic = _traffic(experiment, target, notes)
    dtype, peak = target.device.peak(jnp.dtype(experiment.module.dtype).name)
    if dtype != jnp.dtype(experiment.module.dtype).name:
        notes.append(f"{target.device.name} has no bfloat16: its peak is that of {dtype}")
    if not peak:
        notes.append(f"nobody published a peak of {target.device.name} in {dtype}: no times")
    found = {
        "target": target.text,
        "device": target.device.name,
        "devices": target.count,
        "dtype": dtype,
        "parameters": experiment.num_parameters,
        "batch_size": experiment.batch_size,
        "unit": experiment.task.unit,
        "units_per_example": experiment.task.units_per_example,
        **flops,
        "memory": bytes_of_device,
        "traffic": traffic,
    }
    found |= _times(experiment, target, found)
    found["run"] = _run(experiment, target, found["step_s"], price_per_device_hour)
    return found | {"notes": notes}


def _chunked(task: Any, rows: int) -> bool:
    """Whether the loss makes its logits in pieces, and so twice."""
    length = task.units_per_example if task.unit == "tokens" else rows
    return 0 < getattr(task, "chunk", 0) < length


def _flops(experiment: Any, costs: architecture.Costs | None, notes: list[str]) -> dict[str, Any]:
    if costs is None:
        name = type(experiment.module).__name__
        notes.append(f"{name} has no closed form: its FLOPs are counted, not computed")
        names = ("model_flops", "model_flops_causal", "recomputed_flops")
        return {f"{name}_per_example": None for name in names} | {"products": []}
    again = costs.recomputed_flops(
        experiment.remat, chunked=_chunked(experiment.task, experiment.batch_size)
    )
    if again is None:
        notes.append(f"what remat={experiment.remat} computes again is counted, not computed")
    return {
        "model_flops_per_example": round(costs.model_flops()),
        "model_flops_causal_per_example": round(costs.model_flops(causal=True)),
        "recomputed_flops_per_example": again if again is None else round(again),
        "products": [
            {"what": one.what, "forward_flops_per_example": round(one.forward_flops)}
            for one in costs.products
        ],
    }


def _memory(experiment: Any, target: hardware.Target, notes: list[str]) -> dict[str, Any]:
    """Bytes of one device."""
    state = tree.device_bytes(experiment.abstract_state)
    batch = tree.device_bytes(experiment.abstract_batch)
    gradients = tree.device_bytes(experiment.abstract_gradients)
    found = memory.activation_moments(experiment, target)
    if found is None:
        notes.append(
            "activations have no closed form for this model, mesh and remat: compile; the memory's "
            "time is of the state and the parameters alone"
        )
    moments = found[0] if found else None
    # Microbatches' gradients are summed beside the sum. Once the activations are gone the gradients
    # are there twice, before and after their reduction.
    summed = gradients if experiment.accum > 1 else 0
    total = moments and state + batch + gradients + summed + max(round(moments.peak), gradients)
    limit = target.memory_bytes
    return {
        "state_bytes": state,
        "batch_bytes": batch,
        "gradient_bytes": gradients,
        "sum_bytes": summed,  # of the microbatches' gradients
        "activation_bytes": moments and round(moments.peak),
        "activations": moments and {k: round(v) for k, v in moments._asdict().items()},
        "total_bytes": total,
        "limit_bytes": limit,
        "fits": None if total is None or limit is None else total <= limit,
    }


# Times


def _traffic(experiment: Any, target: hardware.Target, notes: list[str]) -> list[dict[str, Any]]:
    """One row for each collective that the layout needs: its bytes, network and time."""
    sizes, rows = experiment.mesh.shape, []
    bounds = collectives.lower_bounds(experiment)
    for (kind, axis), nbytes in sorted(bounds.items(), key=lambda item: item[0][1]):
        link = hardware.link(target, sizes, axis, dcn=experiment.dcn)
        per_s = link.bytes_per_s and link.bytes_per_s[kind]
        rows.append(
            {
                "kind": kind,
                "axis": axis,
                "network": link.network,
                "why": link.why,
                "wire_bytes": round(nbytes),
                "bytes_per_s": per_s,
                "time_s": per_s and nbytes / per_s,
            }
        )
    known = {axis for _, name in bounds for axis in name.split("+")}
    for axis, size in sizes.items():
        if size > 1 and axis not in known:
            notes.append(f"what {axis}={size} sends in this model is not known: compile")
    if any(row["time_s"] is None for row in rows):
        notes.append("a network's rate is not known: its time is left out")
    return rows


def bracket(compute_s: float, memory_s: float, network_s: float) -> tuple[float, float, str]:
    """(step where all three overlap, where none do, which is the largest)."""
    times = {"compute": compute_s, "memory": memory_s, "network": network_s}
    binds = max(times, key=times.__getitem__)
    return times[binds], sum(times.values()), binds


def _times(experiment: Any, target: hardware.Target, found: Mapping[str, Any]) -> dict[str, Any]:
    model, again = found["model_flops_per_example"], found["recomputed_flops_per_example"]
    peak = target.flops_per_s(found["dtype"])
    bandwidth = target.memory_bytes_per_s
    if not (peak and model and bandwidth):
        names = ("compute_s", "memory_s", "network_s", "binds", "step_s", "units_per_s")
        return dict.fromkeys((*names, "mfu", "mfu_causal", "hfu"))
    each = experiment.batch_size / target.count
    compute_s = (model + (again or 0)) * each / peak
    memory_s = memory.moved_bytes(experiment, target) / bandwidth
    network_s = sum(row["time_s"] or 0.0 for row in found["traffic"])
    least, most, binds = bracket(compute_s, memory_s, network_s)
    units = experiment.batch_size * experiment.task.units_per_example
    of_peak = lambda flops: [flops * each / peak / t for t in (most, least)]  # noqa: E731
    return {
        "compute_s": compute_s,
        "memory_s": memory_s,
        "network_s": network_s,
        "binds": binds,
        "step_s": [least, most],
        "units_per_s": [units / most, units / least],
        "mfu": of_peak(model),
        "mfu_causal": of_peak(found["model_flops_causal_per_example"]),
        "hfu": of_peak(model + again) if again is not None else None,
    }


def _run(
    experiment: Any,
    target: hardware.Target,
    step_s: Sequence[float] | None,
    price_per_device_hour: float | None,
) -> dict[str, Any] | None:
    if step_s is None:
        return None
    steps = experiment.ramp.total_examples / experiment.batch_size  # of the first batch size
    hours = [steps * one / HOUR_S for one in step_s]
    device_hours = [target.count * one for one in hours]
    price = price_per_device_hour
    return {
        "steps": experiment.total_steps,
        "days": [one / 24 for one in hours],
        "device_hours": device_hours,
        "price_per_device_hour": price,
        "money": price and [price * one for one in device_hours],
    }


# For people


def table(found: Mapping[str, Any]) -> str:
    """What `estimate` returned."""
    lines = {
        "target": f"{found['target']}: {found['devices']:,} x {found['device']}, {found['dtype']}",
        "parameters": f"{found['parameters']:,}",
        "FLOPs": _flops_line(found),
        "bytes per device": _memory_line(found["memory"]),
    }
    for row in found["traffic"]:
        at = f"at {_rate(row['bytes_per_s'])} ({row['why']})" if row["bytes_per_s"] else row["why"]
        took = "" if row["time_s"] is None else f", {_seconds(row['time_s'])}"
        lines[f"{row['kind']} on {row['axis']}"] = (
            f"{tree.binary(row['wire_bytes'])} over {row['network']} {at}{took}"
        )
    if found["step_s"]:
        lines |= _time_lines(found)
    width = max(map(len, lines))
    rows = [f"{what.ljust(width)}  {text}" for what, text in lines.items()]
    return "\n".join((*rows, *(f"note: {note}" for note in found["notes"])))


def _flops_line(found: Mapping[str, Any]) -> str:
    model, again = found["model_flops_per_example"], found["recomputed_flops_per_example"]
    if model is None:
        return "no closed form"
    per, causal = found["units_per_example"], found["model_flops_causal_per_example"]
    what = found["unit"].removesuffix("s")
    half = f" ({tree.decimal(causal / per)} with half of causal attention)"
    more = "unknown" if again is None else tree.decimal(again / per)
    return (
        f"{tree.decimal(model / per)} per {what}{half if causal != model else ''}, "
        f"{more} computed again"
    )


def _memory_line(sizes: Mapping[str, Any]) -> str:
    show = lambda nbytes: "unknown" if nbytes is None else tree.binary(nbytes)  # noqa: E731
    parts = ["state", "gradient", "activation", "batch"]
    parts += ["sum"] if sizes["sum_bytes"] else []
    sums = ", ".join(f"{part} {show(sizes[f'{part}_bytes'])}" for part in parts)
    if sizes["fits"] is None:
        return sums
    verdict = "fits in" if sizes["fits"] else "does NOT fit in"
    return f"{show(sizes['total_bytes'])} {verdict} {show(sizes['limit_bytes'])}: {sums}"


def _time_lines(found: Mapping[str, Any]) -> dict[str, str]:
    run = found["run"]
    span = lambda pair, show: " .. ".join(show(one) for one in pair)  # noqa: E731
    percent = lambda pair: span(pair, lambda one: f"{100 * one:.1f}%")  # noqa: E731
    times = ", ".join(f"{k} {_seconds(found[f'{k}_s'])}" for k in ("compute", "memory", "network"))
    hfu = f", HFU {percent(found['hfu'])}" if found["hfu"] else ""
    causal = found["mfu_causal"]
    half = f" ({percent(causal)} with half of causal attention)" if causal != found["mfu"] else ""
    lines = {
        "a step": f"{span(found['step_s'], _seconds)} ({times}: {found['binds']} binds)",
        f"{found['unit']} per second": span(found["units_per_s"], lambda one: f"{one:,.0f}"),
        "MFU at most": f"{percent(found['mfu'])}{half}{hfu}",
        "the run": f"{run['steps']:,} steps, {span(run['days'], lambda one: f'{one:,.2f}')} days, "
        f"{span(run['device_hours'], lambda one: f'{one:,.0f}')} device-hours",
    }
    if run["money"]:
        lines["money"] = (
            f"{span(run['money'], lambda one: f'{one:,.0f}')} at "
            f"{run['price_per_device_hour']:g} a device-hour"
        )
    return lines


def _rate(bytes_per_s: float) -> str:
    return hardware.shown("_bytes_per_s", bytes_per_s)


def _seconds(time_s: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if time_s * scale >= 1:
            return f"{time_s * scale:.3g} {unit}"
    return f"{time_s * 1e6:.3g} us"
