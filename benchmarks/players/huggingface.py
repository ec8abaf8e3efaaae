"""transformers' GPT-2, with PyTorch's scaled_dot_product_attention."""

from pathlib import Path

import torch
import transformers

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given


def Player(match, folder: Path) -> Steps:
    """The GPT-2 of a match, from lsdl's initial parameters."""
    _, batches = given(match, folder)
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder / "weights",
        attn_implementation="sdpa",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        dtype=torch.float32,
    )

    def loss(model, batch):
        logits = model(input_ids=batch["token"][:, :-1].long()).logits
        target = batch["token"][:, 1:].long()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())

    return Steps(match, model, batches, loss, version=transformers.__version__)
