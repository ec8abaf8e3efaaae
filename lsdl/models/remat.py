"""Rematerialisation: what a block keeps for its backward pass. Changes memory, never numbers."""

import jax
from flax import linen as nn

POLICIES = ("none", "full", "dots")


def wrap(block: type[nn.Module], policy: str, *, scanned: bool = False) -> type[nn.Module]:
    """`block`, recomputing in its backward pass all that `policy` does not save.

    none: save everything. full: save the block's inputs alone. dots: save the results of matrix
    products too (`jax.checkpoint_policies.dots_saveable`). Inside a scan the loop already keeps
    XLA from merging the recomputation with the forward pass (`prevent_cse`).
    Source: Chen et al. 2016, "Training deep nets with sublinear memory cost".
    """
    if policy == "none":
        return block
    saved = {"full": None, "dots": jax.checkpoint_policies.dots_saveable}[policy]
    return nn.remat(block, policy=saved, prevent_cse=not scanned)
