"""timm's ViT-B/16."""

from pathlib import Path

import torch

from benchmarks.players.timm_model import Tensors, player
from benchmarks.players.torch_steps import Player as Steps

BLOCK = {  # of Hugging Face's ViT: timm's
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def renamed(tensors: Tensors) -> Tensors:
    """Hugging Face's ViT's tensors under timm's names."""
    at = lambda name: tensors[f"vit.{name}"]  # noqa: E731
    layers = sum(name.endswith("query.weight") for name in tensors)
    made = {
        "cls_token": at("embeddings.cls_token"),
        "pos_embed": at("embeddings.position_embeddings"),
    }
    for kind in ("weight", "bias"):
        made[f"patch_embed.proj.{kind}"] = at(f"embeddings.patch_embeddings.projection.{kind}")
        made[f"norm.{kind}"] = at(f"layernorm.{kind}")
        made[f"head.{kind}"] = tensors[f"classifier.{kind}"]
        for i in range(layers):
            layer = f"encoder.layer.{i}"
            names = (f"{layer}.attention.attention.{n}.{kind}" for n in ("query", "key", "value"))
            made[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat([at(name) for name in names])
            for theirs, name in BLOCK.items():
                made[f"blocks.{i}.{name}.{kind}"] = at(f"{layer}.{theirs}.{kind}")
    return made


def Player(match, folder: Path) -> Steps:
    """The ViT of a match, from lsdl's initial parameters."""
    return player(match, folder, "vit_base_patch16_224", renamed)
