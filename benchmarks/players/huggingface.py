"""transformers' GPT-2 and ViT, with PyTorch's scaled_dot_product_attention."""

from pathlib import Path

import torch
import transformers

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given, of_images

DROPOUT = {
    "GPT2LMHeadModel": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "ViTForImageClassification": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}


def Player(match, folder: Path) -> Steps:
    """The model of a match, from lsdl's initial parameters."""
    _, batches = given(match, folder)
    images = "image" in batches[0]
    name = "ViTForImageClassification" if images else "GPT2LMHeadModel"
    model = getattr(transformers, name).from_pretrained(
        folder / "weights",
        attn_implementation="sdpa",
        dtype=torch.float32,
        **dict.fromkeys(DROPOUT[name], 0.0),
        **({} if images else {"use_cache": False}),
    )
    loss = of_images(match, of_pixels) if images else of_tokens
    return Steps(match, model, batches, loss, version=transformers.__version__)


def of_tokens(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["token"][:, :-1].long()).logits
    target = batch["token"][:, 1:].long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def of_pixels(model, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).logits
