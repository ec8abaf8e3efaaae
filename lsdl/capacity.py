"""Whether a run can fit into its devices at all: told before anything is compiled or allocated.

What certainly has to be there at one time are the state and the gradients. What a step needs
besides is known once it is compiled, as `lsdl.plan --target` does for devices that are elsewhere.
"""

import math
from typing import Any

import jax

from lsdl.errors import UserError
from lsdl.experiment import Experiment
from lsdl.planner import present, tree

SHOWN = 5  # of the largest arrays


def check(experiment: Experiment) -> None:
    """Raise `UserError`, with the numbers, if state and gradients are more than a device has."""
    trees = {"state": experiment.abstract_state, "gradients": experiment.abstract_gradients}
    state, gradients = (tree.device_bytes(part) for part in trees.values())
    limit = present.capacity_bytes()
    if state + gradients <= limit:
        return
    whole = sum(tree.whole_bytes(part) for part in trees.values())
    device = experiment.mesh.devices.flat[0].device_kind
    raise UserError(
        f"The run does not fit: on each device {tree.binary(state)} of state and "
        f"{tree.binary(gradients)} of gradients, of which a {device} here has room for "
        f"{tree.binary(limit)}. Split them by fsdp or tensor in mesh, over at least "
        f"{math.ceil(whole / limit)} of these (the whole is {tree.binary(whole)}), or make the "
        f"model smaller; the largest on a device: {_largest(trees)}."
    )


def _largest(trees: dict[str, Any]) -> str:
    rows = []
    for part, abstract in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            rows.append((tree.device_bytes(leaf), f"{part}/{name}"))
    rows.sort(key=lambda row: (-row[0], row[1]))
    return ", ".join(f"{name} {tree.binary(size)}" for size, name in rows[:SHOWN])
