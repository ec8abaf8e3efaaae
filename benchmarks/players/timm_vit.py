"""timm's ViT-B/16, channels last."""

from pathlib import Path

import timm
import torch

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given, of_images

BLOCK = {  # of Hugging Face's ViT: timm's
    "layernorm_before": "norm1",
    "attention.output.dense": "attn.proj",
    "layernorm_after": "norm2",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


def renamed(tensors: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    """Hugging Face's ViT's tensors under timm's names."""
    at = lambda name: tensors[f"vit.{name}"]  # noqa: E731
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
    tensors, batches = given(match, folder)
    model = timm.create_model("vit_base_patch16_224", num_classes=match.fixed["classes"])
    model.load_state_dict(renamed(tensors, len(model.blocks)))
    model = model.to(memory_format=torch.channels_last)
    loss = of_images(match, lambda model, pixels: model(pixels))
    return Steps(match, model, batches, loss, version=f"timm {timm.__version__}")
