"""Pipeline parallelism: each stage holds some of the layers, and microbatches travel through them.

Tick t: stage s works on microbatch t - s, then passes it on. The first stage is done after M ticks,
the last one after M + S - 1; what a stage does before and after its M microbatches is thrown away.
Source: Huang et al. 2019, "GPipe", section 2.3.
Shape letters: B rows, M microbatches, S stages, b rows of a microbatch.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P


def make_pipe(mesh: Mesh | AbstractMesh, *, microbatches: int) -> Callable:
    """`pipe(blocks, params, x, *more) -> x`: the layers of `params`, stage after stage.

    `blocks(params, x, *more)` runs as many layers as `params` holds. Arrays of `more` with as many
    rows as `x` travel with it. Under `jit` the mesh axes beside `stage` stay the compiler's; under
    `shard_map` all are manual already.
    """
    stages = mesh.shape["stage"]

    def pipe(blocks: Callable, params: Any, x_B: jax.Array, *more: Any) -> jax.Array:
        run = functools.partial(_run, blocks, stages=stages, microbatches=microbatches)
        if "stage" not in jax.sharding.get_abstract_mesh().manual_axes:
            specs = (P("stage"), P(), P())
            run = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), axis_names={"stage"})
        return run(params, x_B, more)

    return pipe


def _run(blocks, params, x_B, more, *, stages: int, microbatches: int) -> jax.Array:
    def split(x):
        # Strided, so that each microbatch is spread over all devices that the batch is.
        rows = len(x) == len(x_B)
        return x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1) if rows else x[None]

    x_Mb, more = split(x_B), jax.tree.map(split, more)
    # What meets on all stages, here the gradient, does so in float32: XLA for CPU (jax 0.10.2)
    # aborts at a bfloat16 sum in a program that is by hand on one mesh axis alone.
    x_Mb = lax.pcast(x_Mb.astype(jnp.float32), "stage", to="varying").astype(x_B.dtype)
    stage = lax.axis_index("stage")
    onwards = [(s, (s + 1) % stages) for s in range(stages)]

    def tick(carry, t):
        arrived_b, done_Mb = carry
        own = jnp.clip(t - stage, 0, microbatches - 1)
        pick = lambda x: lax.dynamic_index_in_dim(x, own % len(x), keepdims=False)  # noqa: E731
        y_b = jnp.where(stage == 0, pick(x_Mb), arrived_b)
        y_b = blocks(params, y_b, *jax.tree.map(pick, more))
        last = jnp.maximum(t - (stages - 1), 0)
        kept_b = jnp.where(t >= stages - 1, y_b, done_Mb[last])
        done_Mb = lax.dynamic_update_index_in_dim(done_Mb, kept_b, last, 0)
        return (lax.ppermute(y_b, "stage", onwards), done_Mb), None

    start = (jnp.zeros_like(x_Mb[0]), jnp.zeros_like(x_Mb))
    (_, done_Mb), _ = lax.scan(tick, start, jnp.arange(microbatches + stages - 1))
    # The last stage has the results; all stages go on with them.
    done_Mb = lax.psum(jnp.where(stage == stages - 1, done_Mb, 0).astype(jnp.float32), "stage")
    return done_Mb.astype(x_B.dtype).swapaxes(0, 1).reshape(x_B.shape)
