"""transformers' models; attention is PyTorch's scaled_dot_product_attention."""

import json
from pathlib import Path

import torch
import transformers

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given, of_images

_SDPA = {"attn_implementation": "sdpa"}
FIELDS = {
    "GPT2LMHeadModel": _SDPA
    | dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    | {"use_cache": False},
    "LlamaForCausalLM": _SDPA | {"use_cache": False},
    "ViTForImageClassification": _SDPA
    | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    "ResNetForImageClassification": {},
}


def Player(match, folder: Path) -> Steps:
    """The model of a match, from lsdl's initial parameters."""
    _, batches = given(match, folder)
    (name,) = json.loads((folder / "weights" / "config.json").read_text())["architectures"]
    model = getattr(transformers, name).from_pretrained(
        folder / "weights", dtype=torch.float32, **FIELDS[name]
    )
    loss = of_images(match, of_pixels) if "image" in batches[0] else of_tokens
    return Steps(match, model, batches, loss, version=transformers.__version__)


def of_tokens(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["token"][:, :-1].long()).logits
    target = batch["token"][:, 1:].long()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def of_pixels(model, pixels: torch.Tensor) -> torch.Tensor:
    return model(pixel_values=pixels).logits
