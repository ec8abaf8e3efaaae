"""The plan of a run: one JSON object, and the table that says it."""

from collections.abc import Mapping
from typing import Any

from jax.extend.core import Jaxpr

from lsdl.planner import count, tree


def make_model(
    name: str,
    params: Mapping,
    forward: Jaxpr,
    *,
    root: str,
    batch_size: int,
    padding: Mapping[count.Path, int],
) -> tree.Node:
    """The modules: their (abstract) parameters, and one example's share of the program `forward`.

    `root`: the class of the outermost module. `padding`: as in `tree.make_tree`.
    """
    flops = count.by_module(count.count(forward), set(tree.paths(params)), root=root)
    flops = {path: round(number / batch_size) for path, number in flops.items()}
    outside = flops.pop(count.OUTSIDE, 0)
    if outside:  # a line of its own, the last one
        flops[count.OUTSIDE] = outside
        params = {**params, count.OUTSIDE[0]: {}}
    return tree.make_tree(name, params, flops=flops, padding=padding)


def make_plan(model: tree.Node, step: Jaxpr, experiment: Any) -> dict[str, Any]:
    """What a run takes, as JSON values.

    `model` has the FLOPs of one example's forward pass, `step` is the train step's program;
    `experiment`: what has `total_steps`, a `ramp` and `abstract_state`, `abstract_gradients` and
    `abstract_batch`, with shardings.
    """
    state, batch = experiment.abstract_state, experiment.abstract_batch
    total_steps = experiment.total_steps
    (batch_size,) = {leaf.shape[0] for leaf in batch.values()}
    flops = count.count(step)
    again = count.recomputed(flops)
    model_flops = round((flops.total() - again) / batch_size)
    parts = {
        part: tree.device_bytes(getattr(state, part))
        for part in ("params", "opt_state", "model_state")
    }
    return {
        "parameters": model.total("parameters"),
        "modules": list(tree.rows(model)),
        "batch_size": batch_size,
        "state_bytes_per_device": tree.device_bytes(state),
        "state_bytes_per_device_by_part": parts,
        "batch_bytes_per_device": tree.device_bytes(batch),
        "gradient_bytes_per_device": tree.device_bytes(experiment.abstract_gradients),
        "forward_flops_per_example": model.total("flops"),
        "model_flops_per_example": model_flops,
        "step_flops_per_example": round(flops.total() / batch_size),
        "total_steps": total_steps,
        "total_flops": model_flops * experiment.ramp.total_examples,
    }


def summary(plan: Mapping[str, Any]) -> str:
    """The totals of `make_plan`, for people."""
    parts = plan["state_bytes_per_device_by_part"]
    decimal, binary = tree.decimal, tree.binary
    again = plan["step_flops_per_example"] - plan["model_flops_per_example"]
    lines = {
        "parameters": f"{plan['parameters']:,}",
        "FLOPs per example": f"{decimal(plan['forward_flops_per_example'])} forward, "
        f"{decimal(plan['model_flops_per_example'])} forward and backward, "
        f"{decimal(again)} computed again",
        "FLOPs of the run": f"{decimal(plan['total_flops'])} in {plan['total_steps']:,} steps of "
        f"{plan['batch_size']:,} examples",
        "bytes per device": f"{binary(plan['state_bytes_per_device'])} state ("
        + ", ".join(f"{part} {binary(nbytes)}" for part, nbytes in parts.items())
        + f"), {binary(plan['batch_bytes_per_device'])} batch",
        "temporaries": f"{binary(plan['gradient_bytes_per_device'])} gradients per device, "
        "activations on top",
    }
    width = max(map(len, lines))
    return "\n".join(f"{what.ljust(width)}  {text}" for what, text in lines.items())
