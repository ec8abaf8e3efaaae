"""The gradients' half of a step with its collectives written out, under `jax.shard_map`.

Each device runs the body on its rows of the batch. A parameter that is split is gathered where it
is used, layer by layer, and its gradient leaves the backward pass reduced and scattered; all other
sums meet at the end. So the traffic is what the layout needs and no more.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from flax import struct
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lsdl.sharding.mesh import BATCH_AXES
from lsdl.sharding.rules import axes_of
from lsdl.state import TrainState

AXES = ("data", "fsdp", "stage")  # what can be split by hand


class Shard(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A device's part of a parameter, in a box that Flax opens where the parameter is used.

    Opening it gathers the parameter; what autodiff makes of that reduces and scatters the gradient.
    `axes`: for each dim the mesh axes that split it. Source: Rajbhandari et al. 2020, section 5.3.
    """

    value: jax.Array
    axes: tuple[tuple[str, ...], ...] = struct.field(pytree_node=False)

    def unbox(self) -> jax.Array:
        whole = self.value
        for dim, axes in enumerate(self.axes):
            whole = lax.all_gather(whole, axes, axis=dim, tiled=True) if axes else whole
        return whole

    def replace_boxed(self, val: Any) -> "Shard":
        return self.replace(value=val)

    def add_axis(self, index: int, params: dict) -> "Shard":
        return self.replace(axes=(*self.axes[:index], (), *self.axes[index:]))

    def remove_axis(self, index: int, params: dict) -> "Shard":
        return self.replace(axes=(*self.axes[:index], *self.axes[index + 1 :]))


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that do split the batch: a sum over one of size 1 would stay in the program."""
    return tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)


def by_hand(
    grads: Callable, *, mesh: Mesh | AbstractMesh, shardings: TrainState, gradients: Any
) -> Callable:
    """`grads(state, batch) -> sums` of the global batch, from one of a device's rows.

    `shardings` are the state's, `gradients` those that `sums["grads"]` is to have: split as the
    parameters, or further.
    """
    over = batch_axes(mesh)
    specs = lambda tree: jax.tree.map(lambda s: _spec(s.spec, mesh), tree)  # noqa: E731
    params, model_state = specs(shardings.params), specs(shardings.model_state)
    scattered = specs(gradients)

    def body(state: TrainState, batch):
        local = state.replace(
            params=jax.tree.map(lambda x, s: _boxed(_varying(x, s, over), s), state.params, params),
            model_state=jax.tree.map(_boxed, state.model_state, model_state),
        )
        with nn.logical_axis_rules(()):  # every mesh axis is manual: nothing to constrain
            sums = jax.tree.map(_value, grads(local, batch), is_leaf=_is_shard)
        apart = {name: sums.pop(name) for name in ("grads", "model_state")}
        apart["grads"] = _reduced(apart["grads"], params, scattered, over)
        return (lax.psum(sums, over) if over else sums) | apart

    state_specs = TrainState(P(), params, model_state, (), P(), ())
    out_specs = {name: P() for name in ("loss", "weight", "metrics")}
    out_specs |= {"grads": scattered, "model_state": model_state}
    mapped = jax.shard_map(body, mesh=mesh, in_specs=(state_specs, P(over)), out_specs=out_specs)
    return lambda state, batch: mapped(state.replace(opt_state=(), guard=()), batch)


def _spec(spec: P, mesh: Mesh | AbstractMesh) -> P:
    """`spec` without axes of size 1 and those that this partitioner does not split."""
    large = [axis for axis in AXES if mesh.shape[axis] > 1]
    return P(*(tuple(axis for axis in axes_of(dim) if axis in large) for dim in spec))


def _used(spec: P) -> set[str]:
    return {axis for dim in spec for axis in axes_of(dim)}


def _varying(x: jax.Array, spec: P, over: Sequence[str]) -> jax.Array:
    # Without the cast autodiff would sum the gradient over devices itself, and `_reduced` a second
    # time: a silent factor of the device count.
    whole = tuple(axis for axis in over if axis not in _used(spec))
    return lax.pcast(x, whole, to="varying") if whole else x


def _boxed(x: jax.Array, spec: P) -> jax.Array | Shard:
    """A stage has its layers to itself: they are not gathered."""
    axes = tuple(tuple(axis for axis in axes_of(dim) if axis != "stage") for dim in spec)
    return Shard(x, axes) if any(axes) else x


def _is_shard(leaf: Any) -> bool:
    return isinstance(leaf, Shard)


def _value(leaf: Any) -> Any:
    return leaf.value if _is_shard(leaf) else leaf


def _reduced(gradient: Any, params: Any, scattered: Any, over: Sequence[str]) -> Any:
    """The sum over the axes of the batch; of each leaf the part that its device is to have."""
    leaves, tree = jax.tree.flatten(gradient)
    sums, left = [], []
    specs = zip(tree.flatten_up_to(params), tree.flatten_up_to(scattered), strict=True)
    for x, (own, wanted) in zip(leaves, specs, strict=True):
        for dim, axes in enumerate(wanted):
            more = tuple(axis for axis in axes_of(axes) if axis not in _used(own))
            if more:
                x = lax.psum_scatter(x, more, scatter_dimension=dim, tiled=True)
        done = _used(own) | _used(wanted)
        sums.append(x)
        left.append(tuple(axis for axis in over if axis not in done))
    for axes in filter(None, dict.fromkeys(left)):  # one collective for all that need the same
        which = [i for i, other in enumerate(left) if other == axes]
        for i, x in zip(which, lax.psum([sums[i] for i in which], axes), strict=True):
            sums[i] = x
    return jax.tree.unflatten(tree, sums)
