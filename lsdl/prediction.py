"""What a run is predicted to need, written beside it before its first step: `plan.json`.

The numbers of `lsdl.plan`, of the very program that runs and for the devices that are there: what
`lsdl.report` shows beside what was measured.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from lsdl.experiment import Experiment
from lsdl.planner import analytic, compiled, count, present, tree
from lsdl.rundir import versions


def make(experiment: Experiment, programs: Mapping[int, Callable]) -> dict[str, Any]:
    """JSON values; `programs` are the executables of the phases to come, by their first step.

    Of a batch ramp the phase that comes first is told of.
    """
    first, program = next(iter(programs.items()))
    (phase,) = (phase for phase in experiment.phases if phase.first_step == first)
    flops = count.count(phase.train_step.trace(experiment.abstract_state, phase.abstract_batch))
    again = count.recomputed(flops)
    there = experiment.mesh.devices.flatten().tolist()
    found = {
        "name": experiment.name,
        "mesh": dict(experiment.mesh.shape),
        "remat": experiment.remat,
        "parameters": experiment.num_parameters,
        "batch_size": phase.batch_size,
        "state_bytes_per_device": tree.device_bytes(experiment.abstract_state),
        "model_flops_per_example": round((flops.total() - again) / phase.batch_size),
        "step_flops_per_example": round(flops.total() / phase.batch_size),
        "compiled": compiled.memory(program, limit_bytes=present.memory_bytes()),
        "versions": versions(),
    }
    if target := present.target(there):
        found["analytic"] = analytic.estimate(experiment, target)
        peak = target.flops_per_s(found["analytic"]["dtype"])
        found["peak_flops_per_s"] = peak and peak * target.count
    return found


def measured(predicted: Mapping[str, Any], examples_per_s: float) -> dict[str, float]:
    """MFU by both conventions and the peak of this process's memory, where they can be known."""
    found = {}
    if peak := predicted.get("peak_flops_per_s"):
        found["mfu"] = examples_per_s * predicted["model_flops_per_example"] / peak
        if causal := predicted["analytic"]["model_flops_causal_per_example"]:
            found["mfu_causal"] = examples_per_s * causal / peak
    if stats := jax.local_devices()[0].memory_stats():
        found["memory_peak_bytes"] = stats["peak_bytes_in_use"]
    return found
