"""Softmax attention: the plain form, the kernel of those devices that have one, and blocks on CPUs.

They differ in memory and time, not in mathematics: the kernel has no scores in memory.
Shape letters: B batch, L length, H heads, G key-value heads, K head_dim.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)
TPUS_WITHOUT = ("TPU v2", "TPU v3")  # the compiler refuses it for v3; v2, older: not tried
BLOCKS, LONG = 4, 256  # of the queries on CPUs, and the least length that is worth it
SCORED = (1 + 1 / BLOCKS) / 2  # of all pairs, those that they compute
IN_BLOCKS = "in_blocks"  # the scope of their operations, of which the planner's count is in full
KERNEL_HEAD_DIM = 128  # the largest that cuDNN's kernel takes on every GPU since Ampere


def segment_mask(segment_BL: jax.Array) -> jax.Array:
    """`(B, 1, L, L)` bool: whether query and key lie in the same segment (0, padding, is one)."""
    return (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]


def attend(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None) -> jax.Array:
    """`(B, L, H, K)`: softmax attention, within each segment if there are any."""
    return jax.nn.dot_product_attention(
        *(query_BLHK, key_BLGK, value_BLGK),
        mask=None if segment_BL is None else segment_mask(segment_BL),
        is_causal=causal,
        implementation="xla",
    )


def cudnn(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None) -> jax.Array:
    """`attend` by cuDNN's kernel, where it has one for the size of the heads.

    It takes even lengths alone: to an odd one comes a place that no other sees.
    Source: Dao et al. 2022, algorithms 1 and 4.
    """
    batch, length, _, head_dim = query_BLHK.shape
    given = query_BLHK, key_BLGK, value_BLGK
    if head_dim % 8 or head_dim > KERNEL_HEAD_DIM:
        return attend(*given, causal=causal, segment_BL=segment_BL)
    real_B = None
    if length % 2:
        given = (jnp.pad(x, ((0, 0), (0, 1), (0, 0), (0, 0))) for x in given)
        if segment_BL is None:
            real_B = jnp.full(batch, length, jnp.int32)
        else:
            segment_BL = jnp.pad(segment_BL, ((0, 0), (0, 1)), constant_values=-1)
    y_BLHK = jax.nn.dot_product_attention(
        *given,
        mask=None if segment_BL is None else segment_mask(segment_BL),
        key_value_seq_lengths=real_B,
        is_causal=causal,
        implementation="cudnn",
    )
    return y_BLHK[:, :length] if length % 2 else y_BLHK


def takes_blocks(length: int, *, causal: bool) -> bool:
    """Whether CPUs take the queries of such a sequence in blocks."""
    return causal and length >= LONG and length % BLOCKS == 0


def blocked(query_BLHK, key_BLGK, value_BLGK, *, causal: bool, segment_BL=None) -> jax.Array:
    """`attend`, the queries of a long causal sequence block after block, each with what it sees.

    Of 4 blocks the scores take 5/8 of the memory and of the products.
    """
    length = query_BLHK.shape[1]
    if not takes_blocks(length, causal=causal):
        return attend(query_BLHK, key_BLGK, value_BLGK, causal=causal, segment_BL=segment_BL)

    @jax.named_scope(IN_BLOCKS)
    def of(begin: int, end: int) -> jax.Array:
        mask = (jnp.arange(begin, end)[:, None] >= jnp.arange(end)[None])[None, None]
        if segment_BL is not None:
            mask &= (segment_BL[:, begin:end, None] == segment_BL[:, None, :end])[:, None]
        return jax.nn.dot_product_attention(
            *(query_BLHK[:, begin:end], key_BLGK[:, :end], value_BLGK[:, :end]),
            mask=mask,
            implementation="xla",
        )

    size = length // BLOCKS
    return jnp.concatenate([of(end - size, end) for end in range(size, length + 1, size)], axis=1)


def kernel(device: jax.Device, dtype: jnp.dtype) -> Callable | None:
    """The form of `attend` to use on `device` for activations of `dtype`; None: the plain one.

    Not a TPU's, which has to know the mesh (lsdl/sharding/splash.py).
    """
    if device.platform == "cpu":
        return blocked
    capability = float(getattr(device, "compute_capability", 0))  # which NVIDIA's alone have
    return cudnn if device.platform == "gpu" and has_kernel("gpu", "", dtype, capability) else None


def has_kernel(kind: str, name: str, dtype: jnp.dtype, compute_capability: float = 0.0) -> bool:
    """Whether a device has one for activations of `dtype`.

    `kind`: tpu, gpu or cpu. `name`: jax's for a TPU. An NVIDIA GPU has a compute capability.
    """
    if kind == "tpu":
        return name not in TPUS_WITHOUT and dtype == jnp.bfloat16
    return compute_capability >= 8.0 and dtype in KERNEL_DTYPES
