"""What the PyTorch players share: a train step in mixed precision, compiled, with fused AdamW."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file


def device(match) -> str:
    return "cuda" if match.kind == "gpu" else "cpu"


def given(match, folder: Path) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """(lsdl's initial parameters, the batches), once lsdl wrote them.

    The parameters are tensors as Hugging Face names them, or arrays as lsdl does.
    """
    while not (folder / "ready").exists():
        time.sleep(0.2)
    arrays = np.load(folder / "batches.npz")
    number = len(arrays["weight"])
    batches = [
        {name: torch.from_numpy(arrays[name][i]).to(device(match)) for name in arrays.files}
        for i in range(number)
    ]
    if (folder / "parameters.npz").exists():
        return dict(np.load(folder / "parameters.npz")), batches
    return load_file(folder / "weights" / "model.safetensors"), batches


def of_images(match, logits: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable:
    """`loss(model, batch)` of images, scaled as lsdl's data are: by a channel's mean and std."""
    moments = (match.fixed["mean"], match.fixed["std"])
    mean, std = (torch.tensor(x, device=device(match)).view(1, 3, 1, 1) for x in moments)

    def loss(model, batch):
        image = batch["image"].permute(0, 3, 1, 2).float()
        found = logits(model, (image - mean) / std)
        return torch.nn.functional.cross_entropy(found.float(), batch["label"].long())

    return loss


class Player:
    """Takes steps of `loss(model, batch)`; the model's parameters are its own."""

    def __init__(
        self,
        match,
        model: torch.nn.Module,
        batches: list[dict[str, torch.Tensor]],
        loss: Callable[[Any, dict[str, torch.Tensor]], torch.Tensor],
        **told: Any,
    ):
        fixed, gpu = match.fixed, match.kind == "gpu"
        torch.set_float32_matmul_precision("high")
        self.told = told | {
            "parameters": sum(p.numel() for p in model.parameters()),
            "versions": {"torch": torch.__version__},
        }
        model = model.to(device(match)).train()
        parameters = list(model.parameters())
        decayed = [p for p in parameters if p.dim() >= 2]
        groups = [
            dict(params=decayed, weight_decay=fixed["weight_decay"]),
            dict(params=[p for p in parameters if p.dim() < 2], weight_decay=0.0),
        ]
        self._optimizer = torch.optim.AdamW(
            groups,
            lr=fixed["rate"],
            betas=(fixed["b1"], fixed["b2"]),
            eps=fixed["eps"],
            fused=gpu,
        )
        self._parameters, self._batches, self._clip = parameters, batches, fixed["clip"]
        self._of, self._gpu, self._taken = loss, gpu, 0
        self._model = torch.compile(model) if fixed.get("compile", True) else model
        self._loss = torch.zeros(())

    def steps(self, number: int) -> None:
        """So many steps are sent to the device."""
        for _ in range(number):
            batch = self._batches[self._taken % len(self._batches)]
            with torch.autocast("cuda", torch.bfloat16, enabled=self._gpu):
                loss = self._of(self._model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._loss, self._taken = loss.detach(), self._taken + 1

    def loss(self) -> float:
        """Of the last step, once all is done."""
        if self._gpu:
            torch.cuda.synchronize()
        return float(self._loss)

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self._gpu else None
