"""What the timm players share: a model of timm's, channels last, from lsdl's initial parameters."""

from collections.abc import Callable
from pathlib import Path

import timm
import torch

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given, of_images

Tensors = dict[str, torch.Tensor]


def player(match, folder: Path, name: str, renamed: Callable[[Tensors], Tensors], **sizes) -> Steps:
    """Timm's model `name`; `renamed` gives Hugging Face's tensors its names."""
    tensors, batches = given(match, folder)
    model = timm.create_model(name, num_classes=match.fixed["classes"], **sizes)
    model.load_state_dict(renamed(tensors))
    model = model.to(memory_format=torch.channels_last)
    loss = of_images(match, lambda model, pixels: model(pixels))
    return Steps(match, model, batches, loss, version=f"timm {timm.__version__}")
