"""Digests of trees of arrays, on their devices: equal for equal bits, however they are split."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

LANES = 2  # 32 bits each


def of_tree(tree: Any) -> jax.Array:
    """uint32 (LANES,) of all leaves: sums, modulo 2^32, of a hash of each number's bits.

    Whole numbers add up to the same in any order, and so under any sharding. The hash of a number
    is drawn by its leaf's path and its place there, and is one to one: no change of a single number
    goes unseen, and two that changed places do not either but by chance, 2^-64.
    """
    total = jnp.zeros((LANES,), jnp.uint32)
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        salt = zlib.crc32(jax.tree_util.keystr(keys).encode())
        total += jnp.stack([_sum(leaf, salt ^ zlib.crc32(bytes([lane]))) for lane in range(LANES)])
    return total


def _sum(leaf: jax.Array, salt: int) -> jax.Array:
    bits = _bits(leaf)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for dim in range(bits.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, dim)
        place = place * jnp.uint32(bits.shape[dim] % 2**32) + index
    return jnp.sum(_mixed(bits ^ _mixed(place ^ jnp.uint32(salt))), dtype=jnp.uint32)


def _bits(leaf: jax.Array) -> jax.Array:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = jnp.dtype(f"uint{8 * min(leaf.dtype.itemsize, 4)}")  # of 8 bytes it makes two
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """Every bit of `x` in every bit. Source: MurmurHash3 (Appleby 2011), its finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
