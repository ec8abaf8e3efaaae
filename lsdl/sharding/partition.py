"""Three ways to run one pure step on a mesh: `jit`, `shard_map`, `pmap`.

    jit        every layout: the compiler splits the program by the arrays' shardings
    shard_map  data, fsdp and stage, with the collectives written out: a parameter is gathered where
               it is used, and its gradient leaves the backward pass reduced and scattered
    pmap       data parallel, the older interface: the whole step inside, state replicated

The partitioner replaces the gradients' half of the step alone. The optimiser stays plain optax
under the same jit, so that norms are global without a line of ours (`pmap` is the exception: there
it runs on replicated arrays, which is the same thing).
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.errors import UserError, nearest
from lsdl.sharding import manual
from lsdl.sharding.mesh import AXES, BATCH_AXES
from lsdl.sharding.rules import Rules
from lsdl.state import Batch, TrainState

NAMES = ("jit", "shard_map", "pmap")
OFFERED = {"jit": AXES, "shard_map": manual.AXES, "pmap": ("data",)}
BATCH_SPEC = P(BATCH_AXES)


def check(name: str, mesh: Mesh | AbstractMesh) -> None:
    """Whether the partitioner `name` offers the layout of `mesh`."""
    if name not in NAMES:
        raise UserError(f"partitioner={name!r} is unknown; {nearest(name, NAMES)}")
    if name == "pmap" and jax.process_count() > 1:
        raise UserError("partitioner=pmap runs in one process alone: use shard_map or jit.")
    if name == "pmap" and isinstance(mesh, AbstractMesh):
        raise UserError("partitioner=pmap cannot be traced without its devices: use shard_map.")
    offered = OFFERED[name]
    split = [axis for axis, size in mesh.shape.items() if size > 1 and axis not in offered]
    if split:
        raise UserError(
            f"partitioner={name} offers the mesh axes {', '.join(offered)} and the mesh has "
            f"{split[0]}={mesh.shape[split[0]]}: use partitioner=jit, which offers all."
        )


def manual_axes(name: str, mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The mesh axes that split the batch by hand: what BatchNorm has to average over."""
    return () if name == "jit" else manual.batch_axes(mesh)


def partition(
    name: str,
    prepare: Callable[[Batch, TrainState], Batch],
    grads: Callable[..., Any],
    update: Callable[..., tuple[TrainState, dict]],
    *,
    mesh: Mesh,
    rules: Rules,
    shardings: TrainState,
    gradients: Any,
    precision: str,
) -> "Program":
    """The train step as a program for `mesh`.

    `prepare(batch, state) -> batch` sees the global batch. `grads(state, batch) -> sums` is a dict
    of trees of sums over the batch's rows, but for `model_state`, which is a value.
    `update(state, batch, sums) -> (state, metrics)` calls `sums`, which is `grads` over the global
    batch, once or at as many parameters as it wants. `gradients` are the shardings that its
    "grads" should have. The state is donated: its buffers become the new state's.
    """
    if name == "pmap":
        halves = _pmap(grads, update, mesh)
    else:
        make = {"jit": _placed, "shard_map": manual.by_hand}[name]
        sums = make(grads, mesh=mesh, shardings=shardings, gradients=gradients)
        halves = lambda state, batch: update(state, batch, sums)  # noqa: E731

    def train_step(state, batch):
        return halves(state, prepare(batch, state))

    return program(
        train_step,
        mesh=None if name == "pmap" else mesh,  # pmap makes a mesh of its own
        rules=rules,
        precision=precision,
        donate_argnums=0,
        out_shardings=(shardings, NamedSharding(mesh, P())),
    )


def _placed(grads: Callable, *, mesh: Mesh, shardings: TrainState, gradients: Any) -> Callable:
    if gradients == shardings.params:  # where the compiler puts them by itself
        return grads

    def sums(state, batch):
        found = grads(state, batch)
        return found | {"grads": lax.with_sharding_constraint(found["grads"], gradients)}

    return sums


def _pmap(grads: Callable, update: Callable, mesh: Mesh) -> Callable:
    size = mesh.shape["data"]

    def sums(state, batch):
        with nn.logical_axis_rules(()):
            return _psum(grads(state, batch))

    def body(state, batch):
        return update(state, batch, sums)

    mapped = jax.pmap(
        body,
        axis_name="data",
        in_axes=(None, 0),
        out_axes=None,
        devices=list(mesh.devices.flat),
    )

    def halves(state, batch):
        return mapped(state, jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), batch))

    return halves


def _psum(sums: dict) -> dict:
    """Sums over all devices; `model_state` is equal on all of them already."""
    rest = {name: value for name, value in sums.items() if name != "model_state"}
    return lax.psum(rest, "data") | {"model_state": sums["model_state"]}


def program(
    function: Callable, *, mesh: Mesh | None, rules: Rules, precision: str, **jit_options
) -> "Program":
    """`function` under jit on `mesh`, with the activations' rules and the matmul precision set."""
    return Program(jax.jit(function, **jit_options), mesh, rules, precision)


class Program:
    """A jitted function and the contexts that it has to be traced in."""

    def __init__(self, jitted: Callable, mesh: Mesh | None, rules: Rules, precision: str):
        self._jitted, self._mesh, self._rules, self._precision = jitted, mesh, rules, precision

    @contextlib.contextmanager
    def _contexts(self):
        with (
            self._on_mesh(),
            nn.logical_axis_rules(self._rules),
            jax.default_matmul_precision(self._precision),
        ):
            yield

    def _on_mesh(self):
        if isinstance(self._mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self._mesh)
        return jax.set_mesh(self._mesh) if self._mesh else contextlib.nullcontext()

    def __call__(self, *args):
        with self._contexts():
            return self._jitted(*args)

    def eval_shape(self, *args):
        """The shapes and types of what `args`, which may be abstract, are turned into."""
        with self._contexts():
            return self._jitted.eval_shape(*args)

    def lower(self, *args, platforms: Sequence[str] | None = None):
        """Trace and lower for `args`, which may be abstract; `.compile()` gives the executable.

        `platforms`: for which kinds of devices (default: the kind there is).
        """
        with self._contexts():
            return self._jitted.trace(*args).lower(lowering_platforms=platforms)

    def trace(self, *args):
        """The jaxpr for `args`, which may be abstract."""
        with self._contexts():
            return self._jitted.trace(*args).jaxpr.jaxpr
