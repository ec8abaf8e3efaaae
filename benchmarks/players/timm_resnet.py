"""timm's ResNet with bottlenecks, as ResNet-50 is."""

import re
from pathlib import Path

from benchmarks.players.timm_model import Tensors, player
from benchmarks.players.torch_steps import Player as Steps

LAYER = re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.(?:layer\.(\d+)|shortcut)\.")
NAMES = {"convolution": "conv", "normalization": "bn"}
SHORTCUT = {"convolution": "downsample.0", "normalization": "downsample.1"}


def renamed(tensors: Tensors) -> Tensors:
    """Hugging Face's ResNet's tensors under timm's names."""
    return {_name(name): tensor for name, tensor in tensors.items()}


def _name(theirs: str) -> str:
    *_, kind, leaf = theirs.split(".")
    if theirs.startswith("classifier."):
        return f"fc.{leaf}"
    if not (found := LAYER.match(theirs)):
        return f"{NAMES[kind]}1.{leaf}"
    stage, block, layer = found.groups()
    place = SHORTCUT[kind] if layer is None else f"{NAMES[kind]}{int(layer) + 1}"
    return f"layer{int(stage) + 1}.{block}.{place}.{leaf}"


def Player(match, folder: Path) -> Steps:
    """The ResNet of a match, from lsdl's initial parameters."""
    return player(match, folder, "resnet50", renamed, layers=match.fixed["depths"])
