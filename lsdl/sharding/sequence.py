"""Attention over a sequence whose length is split over the mesh axis `sequence`.

ring    keys and values travel from device to device: none holds more than its part and a guest's
gather  each device gathers all keys and values: one collective, and memory for the whole length

Shape letters, of a device's part: B batch, L queries, M keys, G key-value heads, R query heads that
share one of them, H = G R heads, K head_dim.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lsdl.sharding.mesh import BATCH_AXES

AXIS = "sequence"
# Every axis that splits anything is named, so that the partitioner gathers none of them inside.
HEADS_SPEC = P(BATCH_AXES, AXIS, "tensor")
SEGMENT_SPEC = P(BATCH_AXES, AXIS)

_dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def make_attention(mesh: Mesh | AbstractMesh, form: str) -> Callable[..., jax.Array]:
    """`attention.attend` on a `mesh` that splits the length, `form` being one of `FORMS`.

    Takes whole arrays, under jit; the axis's size has to divide the length. Where `tensor` does
    not divide the key-value heads, each is repeated until it does.
    """

    def attention(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None):
        heads, tensor = key_BLGK.shape[2], mesh.shape["tensor"]
        repeats = math.lcm(heads, tensor) // heads
        if repeats > 1:
            key_BLGK, value_BLGK = (jnp.repeat(x, repeats, axis=2) for x in (key_BLGK, value_BLGK))
        local = jax.shard_map(
            functools.partial(FORMS[form], causal),
            mesh=mesh,
            in_specs=(HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, SEGMENT_SPEC),
            out_specs=HEADS_SPEC,
        )
        return local(query_BLHK, key_BLGK, value_BLGK, segment_BL)

    return attention


def _visible(causal: bool, segment_BL, segment_BM, *, shape: tuple[int, int], start) -> jax.Array:
    """`(B or 1, L, M)` bool: which keys, the first at the place `start`, each query here sees."""
    mask = jnp.ones((1, *shape), bool)
    if causal:
        place_L = lax.axis_index(AXIS) * shape[0] + jnp.arange(shape[0])
        mask &= (place_L[:, None] >= start + jnp.arange(shape[1])[None])[None]
    if segment_BL is not None:
        mask = mask & (segment_BL[:, :, None] == segment_BM[:, None])
    return mask


def _gathered(causal: bool, query_BLHK, key_BMGK, value_BMGK, segment_BL) -> jax.Array:
    key_BMGK, value_BMGK, segment_BM = lax.all_gather(
        (key_BMGK, value_BMGK, segment_BL), AXIS, axis=1, tiled=True
    )
    shape = query_BLHK.shape[1], key_BMGK.shape[1]
    mask_BLM = _visible(causal, segment_BL, segment_BM, shape=shape, start=0)
    return jax.nn.dot_product_attention(query_BLHK, key_BMGK, value_BMGK, mask=mask_BLM[:, None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(causal: bool, query_BLHK, key_BMGK, value_BMGK, segment_BL) -> jax.Array:
    """Softmax in float32 over the blocks of keys as they come by.

    The block at hand alone has scores in memory, in the backward pass too.
    Source: Liu, Zaharia & Abbeel 2023, section 3; backward: Dao et al. 2022, algorithm 4.
    """
    return _ring_forward(causal, query_BLHK, key_BMGK, value_BMGK, segment_BL)[0]


def _ring_forward(causal: bool, query_BLHK, key_BMGK, value_BMGK, segment_BL):
    query_BLGRK = _grouped(query_BLHK, key_BMGK)

    def visit(state, _, block, source):
        out_BGRLK, max_BGRL, sum_BGRL = state
        key_BMGK, value_BMGK, segment_BM = block
        score_BGRLM = _scores(causal, query_BLGRK, key_BMGK, segment_BL, segment_BM, source)
        new_BGRL = jnp.maximum(max_BGRL, score_BGRLM.max(-1))
        weight_BGRLM = jnp.exp(score_BGRLM - new_BGRL[..., None])
        shrink_BGRL = jnp.exp(max_BGRL - new_BGRL)
        sum_BGRL = sum_BGRL * shrink_BGRL + weight_BGRLM.sum(-1)
        values = _dot("BGRLM,BMGK->BGRLK", weight_BGRLM.astype(value_BMGK.dtype), value_BMGK)
        return (out_BGRLK * shrink_BGRL[..., None] + values, new_BGRL, sum_BGRL), ()

    zero_BGRLK = jnp.zeros_like(query_BLGRK.transpose(0, 2, 3, 1, 4), jnp.float32)
    zero_BGRL = zero_BGRLK[..., 0]
    # A query sees itself, in the block that comes first: from there on the maximum is finite.
    state = zero_BGRLK, zero_BGRL - jnp.inf, zero_BGRL
    (out_BGRLK, max_BGRL, sum_BGRL), () = _travel(
        visit, state, (), (key_BMGK, value_BMGK, segment_BL), causal=causal
    )
    out_BLGRK = (out_BGRLK / sum_BGRL[..., None]).transpose(0, 3, 1, 2, 4)
    out_BLHK = out_BLGRK.reshape(query_BLHK.shape)
    log_sum_BGRL = max_BGRL + jnp.log(sum_BGRL)
    # In float32 for the backward pass, where it is subtracted from something nearly equal.
    saved = query_BLHK, key_BMGK, value_BMGK, segment_BL, out_BLHK, log_sum_BGRL
    return out_BLHK.astype(query_BLHK.dtype), saved


def _ring_backward(causal: bool, saved: tuple, d_out_BLHK: jax.Array):
    query_BLHK, key_BMGK, value_BMGK, segment_BL, out_BLHK, log_sum_BGRL = saved
    grouped = (_grouped(x, key_BMGK) for x in (query_BLHK, out_BLHK, d_out_BLHK))
    query_BLGRK, out_BLGRK, d_out_BLGRK = grouped
    scale, dtype = query_BLHK.shape[-1] ** -0.5, query_BLHK.dtype
    mean_BGRL = _dot("BLGRK,BLGRK->BGRL", out_BLGRK, d_out_BLGRK)

    def visit(d_query_BLGRK, sums, block, source):
        d_key_BMGK, d_value_BMGK = sums
        key_BMGK, value_BMGK, segment_BM = block
        score_BGRLM = _scores(causal, query_BLGRK, key_BMGK, segment_BL, segment_BM, source)
        weight_BGRLM = jnp.exp(score_BGRLM - log_sum_BGRL[..., None])
        d_weight_BGRLM = _dot("BLGRK,BMGK->BGRLM", d_out_BLGRK, value_BMGK)
        d_score_BGRLM = weight_BGRLM * (d_weight_BGRLM - mean_BGRL[..., None]) * scale
        weight_BGRLM, d_score_BGRLM = weight_BGRLM.astype(dtype), d_score_BGRLM.astype(dtype)
        d_query_BLGRK += _dot("BGRLM,BMGK->BLGRK", d_score_BGRLM, key_BMGK)
        d_key_BMGK += _dot("BGRLM,BLGRK->BMGK", d_score_BGRLM, query_BLGRK)
        d_value_BMGK += _dot("BGRLM,BLGRK->BMGK", weight_BGRLM, d_out_BLGRK)
        return d_query_BLGRK, (d_key_BMGK, d_value_BMGK)

    zeros = functools.partial(jnp.zeros_like, dtype=jnp.float32)
    d_query_BLGRK, (d_key_BMGK, d_value_BMGK) = _travel(
        visit,
        zeros(query_BLGRK),
        (zeros(key_BMGK), zeros(value_BMGK)),
        (key_BMGK, value_BMGK, segment_BL),
        causal=causal,
    )
    d_query_BLHK = d_query_BLGRK.reshape(query_BLHK.shape).astype(dtype)
    return d_query_BLHK, d_key_BMGK.astype(dtype), d_value_BMGK.astype(dtype), None


_ring.defvjp(_ring_forward, _ring_backward)

FORMS = {"ring": _ring, "gather": _gathered}


def _grouped(x_BLHK: jax.Array, key_BMGK: jax.Array) -> jax.Array:
    """The heads that share a key-value head, `(B, L, G, R, K)`."""
    batch, length, _, head_dim = x_BLHK.shape
    return x_BLHK.reshape(batch, length, key_BMGK.shape[2], -1, head_dim)


def _scores(causal: bool, query_BLGRK, key_BMGK, segment_BL, segment_BM, source) -> jax.Array:
    """`(B, G, R, L, M)` float32: scaled products with the keys of the device `source`."""
    shape = query_BLGRK.shape[1], key_BMGK.shape[1]
    mask_BLM = _visible(causal, segment_BL, segment_BM, shape=shape, start=source * shape[1])
    score_BGRLM = _dot("BLGRK,BMGK->BGRLM", query_BLGRK, key_BMGK) * key_BMGK.shape[-1] ** -0.5
    return jnp.where(mask_BLM[:, None, None], score_BGRLM, -jnp.inf)


def _travel(visit: Callable, state: Any, sums: Any, block: Any, *, causal: bool) -> tuple:
    """`state, sums = visit(state, sums, block, source)` for the block of each device, own first.

    `state` stays here; the block travels n - 1 times, and what is summed up for it n times, the
    last time home. With `causal` what would be wholly masked, a later device's, is passed over.
    """
    n, place = lax.axis_size(AXIS), lax.axis_index(AXIS)
    rotate = functools.partial(
        lax.ppermute, axis_name=AXIS, perm=[(i, (i + 1) % n) for i in range(n)]
    )

    def meet(state, sums, block, tick):
        source = (place - tick) % n
        if not causal:
            return visit(state, sums, block, source)
        skip = lambda state, sums, *_: (state, sums)  # noqa: E731
        return lax.cond(source <= place, visit, skip, state, sums, block, source)

    def step(carry, tick):
        state, sums, block = carry
        state, sums = meet(state, sums, block, tick)
        return (state, rotate(sums), rotate(block)), None

    (state, sums, block), _ = lax.scan(step, (state, sums, block), jnp.arange(n - 1))
    state, sums = meet(state, sums, block, n - 1)
    return state, rotate(sums)
