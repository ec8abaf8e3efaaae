"""Attention by the kernel that jax has for TPUs, on each device's part of the rows and heads.

The compiler does not split a kernel: it is called under `jax.shard_map`, over those mesh axes that
are not by hand already. Its time on a TPU: not yet run.
Shape letters: B batch, L length, H heads, G key-value heads, K head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from lsdl.sharding.mesh import BATCH_AXES

LANES = 128  # numbers in a row of a TPU's vector unit: a block has as many places, or a multiple
BLOCK = 512  # the most; which is fastest on a TPU: not yet run
SHORTEST = 512  # below, what the kernel keeps padded to whole lanes can be more than the scores


def takes(length: int, head_dim: int) -> bool:
    """Whether the kernel is used for sequences of `length` places and heads of this size."""
    return length >= SHORTEST and head_dim % 8 == 0


def make_attention(mesh: Mesh, plain: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`attention.attend` on the TPUs of `mesh`; `plain` is that itself, for what is left to it.

    Under jit, `shard_map` and `pmap`. Where `tensor` does not divide the key-value heads, each is
    repeated until it does; mesh axes that do not divide the rows or the query heads split none.
    """

    def attention(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None):
        given = query_BLHK, key_BLGK, value_BLGK
        if not takes(query_BLHK.shape[1], query_BLHK.shape[3]):
            return plain(*given, causal=causal, segment_BL=segment_BL)
        _, out, _ = _specs(mesh, query_BLHK)
        if out[2]:
            repeats = math.lcm(key_BLGK.shape[2], mesh.shape["tensor"]) // key_BLGK.shape[2]
            given = query_BLHK, *(jnp.repeat(x, repeats, axis=2) for x in given[1:])
        given = _varying(given, _axes((given, segment_BL)))
        return _attention(mesh, causal, *given, segment_BL)

    return attention


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(mesh: Mesh, causal: bool, query_BLHK, key_BLGK, value_BLGK, segment_BL):
    """With a derivative of its own: jax's types cannot tell over which axes a kernel's varies."""
    specs, out, _ = _specs(mesh, query_BLHK)
    local = _local(mesh, functools.partial(_kernel, causal), specs, out)
    return local(query_BLHK, key_BLGK, value_BLGK, segment_BL)


def _forward(mesh: Mesh, causal: bool, query_BLHK, key_BLGK, value_BLGK, segment_BL):
    def run(*given):
        *given, segment_BL = given
        out_BLHK, pull = jax.vjp(lambda *given: _kernel(causal, *given, segment_BL), *given)
        return out_BLHK, jax.tree.map(lambda x: x[None], pull)

    specs, out, each = _specs(mesh, query_BLHK)
    return _local(mesh, run, specs, (out, each))(query_BLHK, key_BLGK, value_BLGK, segment_BL)


def _backward(mesh: Mesh, causal: bool, pull: Any, d_out_BLHK: jax.Array):
    def run(pull, d_out_BLHK):
        return jax.tree.map(lambda x: x[0], pull)(d_out_BLHK)

    (*given, _), out, each = _specs(mesh, d_out_BLHK)
    return *_local(mesh, run, (each, out), tuple(given))(pull, d_out_BLHK), None


_attention.defvjp(_forward, _backward)


def _free(mesh: Mesh) -> tuple[Any, dict[str, int]]:
    """The mesh that the call is on, and its axes that are not by hand already, with their sizes."""
    context = jax.sharding.get_abstract_mesh()  # of pmap it is another
    mesh = mesh if context.empty else context
    return mesh, {axis: n for axis, n in mesh.shape.items() if axis not in context.manual_axes}


def _specs(mesh: Mesh, x_BLHK: jax.Array) -> tuple[tuple[P, ...], P, P]:
    """Of the arguments, of the result, and of what devices keep, put one after the other."""
    _, free = _free(mesh)

    def dividing(size: int, *axes: str) -> tuple[str, ...]:
        axes = tuple(axis for axis in axes if axis in free)
        return () if size % math.prod(free[axis] for axis in axes) else axes

    rows, heads = dividing(len(x_BLHK), *BATCH_AXES), dividing(x_BLHK.shape[2], "tensor")
    out = P(rows, None, heads)
    return (out, out, out, P(rows)), out, P(rows + heads)


def _local(mesh: Mesh, run: Callable, in_specs: Any, out_specs: Any) -> Callable:
    """`run` on each device's part. What it gives varies by hand as what it is given."""
    mesh, free = _free(mesh)
    mapped = jax.shard_map(
        # Times one: unchecked, the product has none of the types that the kernel's result lacks.
        lambda *given: run(*jax.tree.map(lambda x: x * 1, given)),
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(free or mesh.axis_names),
        check_vma=False,
    )
    return lambda *given: _varying(mapped(*given), _axes(given))


def _axes(tree: Any) -> frozenset[str]:
    """The axes by hand over which any of the arrays varies."""
    types = map(jax.typeof, jax.tree.leaves(tree))
    return frozenset().union(*(of.manual_axis_type.varying for of in types))


def _varying(tree: Any, axes: frozenset[str]) -> Any:
    def cast(x):
        more = tuple(sorted(axes - jax.typeof(x).manual_axis_type.varying))
        return lax.pcast(x, more, to="varying") if more else x

    return jax.tree.map(cast, tree)


def _kernel(causal: bool, query_BLHK, key_BLGK, value_BLGK, segment_BL) -> jax.Array:
    """What one device computes; lengths are filled up to whole blocks.

    Source: Dao et al. 2022, algorithms 1 and 4; blocks that are masked whole are left out.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length, heads, head_dim = query_BLHK.shape[1:]
    whole = -(-length // LANES) * LANES
    if whole > length and segment_BL is None and not causal:
        segment_BL = jnp.zeros(query_BLHK.shape[:2], jnp.int32)
    if segment_BL is not None:
        segment_BL = jnp.pad(segment_BL, ((0, 0), (0, whole - length)), constant_values=-1)
        segment_BL = splash.SegmentIds(segment_BL, segment_BL)
    block = max(n for n in range(LANES, BLOCK + 1, LANES) if whole % n == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    mask = (splash.CausalMask if causal else splash.FullMask)((whole, whole))
    attend = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(names, block)),
        head_shards=1,
        q_seq_shards=1,
    )

    def lay(x_BLHK):
        return jnp.pad(x_BLHK, ((0, 0), (0, whole - length), (0, 0), (0, 0))).swapaxes(1, 2)

    query_BLHK *= jnp.asarray(head_dim**-0.5, query_BLHK.dtype)
    y_BHLK = jax.vmap(attend)(*map(lay, (query_BLHK, key_BLGK, value_BLGK)), segment_BL)
    return y_BHLK.swapaxes(1, 2)[:, :length]
