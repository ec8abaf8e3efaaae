"""nanoGPT: its model.py, from $LSDL_PEERS_DIR/nanogpt_model.py."""

import importlib.util
import os
from pathlib import Path

import torch

from benchmarks.players.torch_steps import Player as Steps
from benchmarks.players.torch_steps import given

COMMIT = "3adf61e"  # of karpathy/nanoGPT, which the file is of
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def Player(match, folder: Path) -> Steps:
    """The GPT of a match, from lsdl's initial parameters."""
    path = Path(os.environ["LSDL_PEERS_DIR"]) / "nanogpt_model.py"
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensors, batches = given(match, folder)
    fixed = match.fixed
    sizes = dict(block_size=fixed["length"], vocab_size=fixed["vocab"], n_layer=fixed["layers"])
    sizes |= dict(n_head=fixed["heads"], n_embd=fixed["width"], dropout=0.0, bias=True)
    model = module.GPT(module.GPTConfig(**sizes))
    if fixed["activation"] == "gelu_tanh":  # GPT-2's own; nanoGPT has the exact one
        for block in model.transformer.h:
            block.mlp.gelu = torch.nn.GELU("tanh")
    ours = {}
    for name, tensor in tensors.items():
        name = name if name.startswith("transformer.") else f"transformer.{name}"
        ours[name] = tensor.t().contiguous() if name.endswith(TRANSPOSED) else tensor
    ours = {name: ours[name] for name in ours if name in model.state_dict()}
    ours["lm_head.weight"] = ours["transformer.wte.weight"]
    model.load_state_dict(ours)

    def loss(model, batch):
        return model(batch["token"][:, :-1].long(), batch["token"][:, 1:].long())[1]

    return Steps(match, model, batches, loss, version=COMMIT)
