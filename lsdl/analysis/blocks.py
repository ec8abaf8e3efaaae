"""Block-diagonal layers: groups of inputs that have outputs of their own.

Shape letters: B batch, G groups, I inputs and O outputs of a group, D all inputs, F all outputs.
"""

import jax
import jax.numpy as jnp


def block_dense(x_BD: jax.Array, w_GIO: jax.Array) -> jax.Array:
    """Each group's product with its own matrix, one after the other, `(B, G * O)`."""
    groups, inputs, _ = w_GIO.shape
    x_BGI = x_BD.reshape(len(x_BD), groups, inputs)
    return jnp.einsum("bgi,gio->bgo", x_BGI, w_GIO).reshape(len(x_BD), -1)


def block_diagonal(w_GIO: jax.Array) -> jax.Array:
    """`w_DF`, the dense layer's matrix that computes the same: zero outside the blocks."""
    return jax.scipy.linalg.block_diag(*w_GIO)
