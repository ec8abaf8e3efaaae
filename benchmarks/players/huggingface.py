"""transformers' GPT-2 and ViT, with PyTorch's scaled_dot_product_attention."""

from pathlib import Path

import torch
import transformers

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import device, given

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
    loss = of_images(match) if images else of_tokens
    return Steps(match, model, batches, loss, version=transformers.__version__)


def of_tokens(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["token"][:, :-1].long()).logits
    target = batch["token"][:, 1:].long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def of_images(match):
    """The loss of images, made as lsdl's data are: by mean and standard deviation of a channel."""
    moments = (match.fixed["mean"], match.fixed["std"])
    mean, std = (torch.tensor(x, device=device(match)).view(1, 3, 1, 1) for x in moments)

    def loss(model, batch):
        image = batch["image"].permute(0, 3, 1, 2).float()
        logits = model(pixel_values=(image - mean) / std).logits
        return torch.nn.functional.cross_entropy(logits.float(), batch["label"].long())

    return loss
