"""He et al.'s ResNet for CIFAR in plain PyTorch, channels last."""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import device, given, of_images

WIDTHS = (16, 32, 64)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


class Block(nn.Module):
    """Two convolutions and the input, subsampled and padded with zero channels where it must be."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.stride, self.extra = 1 + (outputs > inputs), outputs - inputs
        self.conv_0, self.norm_0 = convolution(inputs, outputs, self.stride), norm(outputs)
        self.conv_1, self.norm_1 = convolution(outputs, outputs), norm(outputs)

    def forward(self, x):
        y = functional.relu(self.norm_0(self.conv_0(x)))
        y = self.norm_1(self.conv_1(y))
        half = self.extra // 2
        x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return functional.relu(x + y)


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1)


class ResNet(nn.Module):
    def __init__(self, depth: int, classes: int):
        super().__init__()
        self.stem, self.stem_norm = convolution(3, WIDTHS[0]), norm(WIDTHS[0])
        self.blocks = nn.ModuleDict()
        inputs = WIDTHS[0]
        for stage, width in enumerate(WIDTHS):
            for i in range((depth - 2) // 6):
                self.blocks[f"stage_{stage}_block_{i}"] = Block(inputs, width)
                inputs = width
        self.head = nn.Linear(inputs, classes)

    def forward(self, x):
        x = functional.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks.values():
            x = block(x)
        return self.head(x.mean((2, 3)))


def renamed(arrays) -> dict[str, torch.Tensor]:
    """The parameters of lsdl under the names, and in the layouts, of this model."""
    made = {}
    for path, array in arrays.items():
        *names, leaf = path.split("/")
        names = ["blocks", *names] if names[0].startswith("stage_") else names
        tensor = torch.from_numpy(array)
        if leaf == "kernel":
            tensor = tensor.permute(3, 2, 0, 1) if tensor.dim() == 4 else tensor.T
        made[".".join([*names, "bias" if leaf == "bias" else "weight"])] = tensor.contiguous()
    return made


def Player(match, folder: Path) -> Steps:
    """The ResNet of a match, from lsdl's initial parameters."""
    arrays, batches = given(match, folder)
    model = ResNet(match.fixed["depth"], match.fixed["classes"])
    left = model.load_state_dict(renamed(arrays), strict=False)
    assert not left.unexpected_keys
    assert all("running" in name or "tracked" in name for name in left.missing_keys)
    model = model.to(device(match), memory_format=torch.channels_last)
    loss = of_images(match, lambda model, pixels: model(pixels))
    return Steps(match, model, batches, loss, version=f"PyTorch {torch.__version__}")
