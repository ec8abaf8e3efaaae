"""Losses that need care with memory or with who holds which rows: as sums over rows.

Shape letters: B rows on this device (under `jit`: of the whole microbatch), N rows of all
devices, L length, D embed, V vocabulary (padded), E shared embedding, c rows or positions of a
chunk, S parts of the batch.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.sharding import PartitionSpec

Sums = dict[str, jax.Array]


def _chunked(sums: Callable[..., Sums], chunks) -> Sums:
    """The sum of `sums(*chunk)` over the leading dim of `chunks`.

    The intermediate results of one chunk exist at a time: the backward pass makes them again.
    """
    _, parts = lax.scan(lambda _, chunk: (None, jax.checkpoint(sums)(*chunk)), None, chunks)
    return jax.tree.map(lambda part: part.sum(0), parts)


@jax.custom_vjp
def _project(hidden_BLD: jax.Array, table_VD: jax.Array) -> jax.Array:
    """The logits `(B, L, V)` in float32. Their gradient is rounded to the type of what they are of.

    Left to itself jax multiplies by the gradient in float32, and the products are a quarter of a
    small model's: on one H200 GPT-2 124M took 1.28 times as long a step as nanoGPT, whose products
    are in bfloat16 all.
    """
    return _project_forward(hidden_BLD, table_VD)[0]


def _project_forward(hidden_BLD, table_VD):
    # In plain jax, and so is the backward pass: a Hessian goes forward through both.
    kept = hidden_BLD, table_VD
    return jnp.einsum("BLD,VD->BLV", *kept, preferred_element_type=jnp.float32), kept


def _project_backward(kept, gradient_BLV):
    hidden_BLD, table_VD = kept
    gradient_BLV = gradient_BLV.astype(hidden_BLD.dtype)
    return (
        jnp.einsum("BLV,VD->BLD", gradient_BLV, table_VD),
        jnp.einsum("BLV,BLD->VD", gradient_BLV, hidden_BLD),
    )


_project.defvjp(_project_forward, _project_backward)


def token_cross_entropy(
    hidden_BLD: jax.Array,
    table_VD: jax.Array,
    target_BL: jax.Array,
    weight_BL: jax.Array,
    *,
    vocab_size: int,
    bias_V: jax.Array | None = None,
    z_loss: float = 0.0,
    chunk: int = 0,
) -> Sums:
    """Cross-entropy in nats of the logits `hidden @ table.T + bias`, summed with `weight_BL`.

    Rows of the table from `vocab_size` on are padding and get no probability. `chunk` positions
    of each sequence have their logits in memory at one time; 0: all. `z_loss` times the squared
    log-partition is added to the loss (Chowdhery et al. 2022, section 5). Returns the sums `loss`,
    `cross_entropy`, which leaves that out, and `accuracy` (the most probable token is the target).
    """
    table_VD = table_VD.astype(hidden_BLD.dtype)

    def sums(table_VD, bias_V, hidden_BLD, target_BL, weight_BL, *, placed=_placed) -> Sums:
        logits_BLV = _project(hidden_BLD, table_VD)
        if bias_V is not None:
            logits_BLV += bias_V.astype(jnp.float32)[None, None]
        logits_BLV = placed(logits_BLV)
        token_V = jnp.arange(len(table_VD))[None, None]
        logits_BLV = jnp.where(token_V >= vocab_size, -1e30, logits_BLV)
        log_z_BL = jax.nn.logsumexp(logits_BLV, axis=-1)
        # By a sum, which shares the pass of another; a gather has its own, and so its gradient.
        chosen_BL = jnp.where(token_V == target_BL[..., None], logits_BLV, 0).sum(-1)
        loss_BL = log_z_BL - chosen_BL
        correct_BL = logits_BLV.argmax(-1) == target_BL
        return {
            "loss": ((loss_BL + z_loss * log_z_BL**2) * weight_BL).sum(),
            "cross_entropy": (loss_BL * weight_BL).sum(),
            "accuracy": (correct_BL * weight_BL).sum(),
        }

    length = target_BL.shape[1]
    if not 0 < chunk < length:
        return sums(table_VD, bias_V, hidden_BLD, target_BL, weight_BL)
    missing = -length % chunk
    axes = _batch_axes(len(target_BL))
    number = math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)

    def spread(x):
        """One of `x` for each part of the batch: their gradients meet after the last chunk."""
        parts = jnp.broadcast_to(x, (number, *x.shape))
        names = ("batch", "vocab", None)[: parts.ndim] if axes else (None,) * parts.ndim
        return nn.with_logical_constraint(parts, names)

    def split(x_BL):
        x_BL = jnp.pad(x_BL, ((0, 0), (0, missing), *((0, 0),) * (x_BL.ndim - 2)))
        # Strided, so that each chunk is spread over all devices that the length is split over.
        return jnp.moveaxis(x_BL.reshape(len(x_BL), chunk, -1, *x_BL.shape[2:]), 2, 0)

    own = jax.tree.map(spread, (table_VD, bias_V))
    alone = functools.partial(sums, placed=_placed_alone if axes else _placed)
    each = jax.vmap(alone, spmd_axis_name=axes or None)

    def part(*chunk):
        return each(*own, *(x.reshape(number, -1, *x.shape[1:]) for x in chunk))

    parts = _chunked(part, jax.tree.map(split, (hidden_BLD, target_BL, weight_BL)))
    return jax.tree.map(lambda part_S: part_S.sum(), parts)


def _batch_axes(rows: int) -> tuple[str, ...]:
    """The mesh axes that split a batch of `rows`, where the partitioner is XLA's."""
    mesh = jax.sharding.get_abstract_mesh()
    (axes,) = nn.logical_to_mesh_axes(("batch",))
    if mesh.empty or not axes:
        return ()
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


def _placed(logits_BLV: jax.Array) -> jax.Array:
    return nn.with_logical_constraint(logits_BLV, ("batch", "length", "vocab"))


def _placed_alone(logits_BLV: jax.Array) -> jax.Array:
    """Of one part of the batch, under `vmap`."""
    _, *rest = nn.logical_to_mesh_axes(("batch", "length", "vocab"))
    return lax.with_sharding_constraint(logits_BLV, PartitionSpec(None, *rest))


def _of_all_devices(tree):
    """The rows of all devices, where the batch is split by hand (`shard_map`, `pmap`)."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in mesh.manual_axes if mesh.shape[axis] > 1)
    return lax.all_gather(tree, axes, tiled=True) if axes else tree


def contrastive(
    image_BE: jax.Array,
    text_BE: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    row_B: jax.Array,
    weight_B: jax.Array,
    *,
    form: str,
    chunk: int = 0,
) -> Sums:
    """The loss of matching each image with its text among those of the global batch.

    `form` softmax: the symmetric InfoNCE, in nats (Radford et al. 2021, figure 3). sigmoid: each
    pair is a yes or no (Zhai et al. 2023, eq. 1). `row_B` are the rows' numbers in the global
    batch, by which pairs are known; rows of weight 0 are neither matched nor matched against.
    `chunk` rows have their logits in memory at one time; 0: all. Returns the sums over rows
    `loss` and `accuracy` (the image's most similar text is its own).
    """
    columns = _of_all_devices((image_BE, text_BE, row_B, weight_B))
    image_NE, text_NE, row_N, weight_N = columns

    def one_way(own_BE, other_NE, row_B, weight_B):
        logits_BN = scale * own_BE @ other_NE.T + bias
        pair_BN = row_B[:, None] == row_N[None]
        real_BN = jnp.broadcast_to(weight_N[None] > 0, pair_BN.shape)
        if form == "sigmoid":
            loss_BN = -jax.nn.log_sigmoid(jnp.where(pair_BN, logits_BN, -logits_BN))
            loss_B = jnp.where(real_BN, loss_BN, 0).sum(1)
        else:
            logits_BN = jnp.where(real_BN | pair_BN, logits_BN, -1e30)
            chosen_B = jnp.where(pair_BN, logits_BN, 0).sum(1)
            loss_B = jax.nn.logsumexp(logits_BN, axis=1) - chosen_B
        best_B = row_N[jnp.where(real_BN, logits_BN, -1e30).argmax(1)]
        return (loss_B * weight_B).sum(), ((best_B == row_B) * weight_B).sum()

    def sums(image_BE, text_BE, row_B, weight_B) -> Sums:
        loss, correct = one_way(image_BE, text_NE, row_B, weight_B)
        if form == "softmax":
            back, _ = one_way(text_BE, image_NE, row_B, weight_B)
            loss = (loss + back) / 2
        return {"loss": loss, "accuracy": correct}

    rows = (image_BE, text_BE, row_B, weight_B)
    if not 0 < chunk < len(row_B):
        return sums(*rows)
    # Strided, so that each chunk is spread over all devices.
    split = lambda x: x.reshape(-1, len(x) // chunk, *x.shape[1:]).swapaxes(0, 1)  # noqa: E731
    return _chunked(sums, jax.tree.map(split, rows))
