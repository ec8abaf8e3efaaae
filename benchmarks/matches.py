"""The matches: the same model, batch, precision and optimiser, by lsdl and by its peers.

A player is a module of `benchmarks.players`; `Player(match, folder)` makes what takes steps. lsdl's
is `ours`. What a match fixes for all of them stands here, what each of them calls it there.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Match:
    """A match: `ours`, a config with overrides, against `peers` with the numbers in `fixed`."""

    kind: str  # of the devices: cpu | gpu
    title: str
    config: str
    overrides: tuple[str, ...]
    peers: tuple[str, ...]  # modules of benchmarks.players
    fixed: dict[str, Any]  # what a peer is told
    unit: str  # tokens | images
    steps: int  # of a burst, which is what is timed
    close: float  # the most that two losses of a step may differ by, from the same parameters
    compared: int = 10  # steps, from the same parameters, before anything is timed


ADAMW = dict(rate=6e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, clip=1.0)
# Of the channels' values, as lsdl's cards of the data have them.
RGB = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
CIFAR = dict(mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7))
_ADAMW = (
    *("optim.name=adamw", "optim.b1=0.9", "optim.b2=0.95", "optim.weight_decay=0.1"),
    *("optim.clip_norm=1.0", "optim.schedule.name=constant", "optim.schedule.peak=6e-4"),
    *("optim.schedule.warmup_steps=0", "optim.schedule.end_factor=1.0", "remat=none"),
)


def gpt(
    title: str,
    config: str,
    *,
    kind: str,
    batch: int,
    length: int,
    vocab: int,
    layers: int,
    width: int,
    heads: int,
    peers: tuple[str, ...],
    steps: int,
    mlp: int = 0,
    activation: str = "",
    more: tuple[str, ...] = (),
) -> Match:
    """A GPT, by default in GPT-2's form, on windows of random tokens; on a GPU in bfloat16."""
    gpu = kind == "gpu"
    activation = activation or ("gelu_tanh" if gpu else "gelu")
    sizes = {"num_layers": layers, "width": width, "num_heads": heads}
    sizes |= {"mlp_dim": mlp or 4 * width}
    sizes |= {"max_length": length, "vocab_size": vocab, "vocab_padded": vocab}
    return Match(
        kind,
        title,
        config,
        (
            *_ADAMW,
            *("data.segments=False", "loss.chunk=0", "model.scan_layers=False"),
            *(f"model.{name}={size}" for name, size in sizes.items()),
            *(f"batch_size={batch}", f"data.seq_len={length}", f"model.activation={activation}"),
            f"precision={'bfloat16' if gpu else 'float32'}",
            *more,
        ),
        peers,
        dict(batch=batch, length=length, vocab=vocab, layers=layers, width=width, heads=heads)
        | dict(activation=activation, compile=True)
        | ADAMW,
        unit="tokens",
        steps=steps,
        close=0.02 if gpu else 1e-3,
    )


MATCHES = {
    "gpt_4x128": gpt(
        *("GPT of 4 x 128, 12 x 64 tokens, float32, AdamW", "configs/lm_gpt2.py:124m,smoke"),
        **dict(kind="cpu", batch=12, length=64, vocab=256, layers=4, width=128, heads=4),
        **dict(peers=("nanogpt",), steps=50),
    ),
    "gpt_6x384": gpt(
        *("GPT of 6 x 384, 16 x 256 tokens, float32, AdamW", "configs/lm_gpt2.py:124m,smoke"),
        **dict(kind="cpu", batch=16, length=256, vocab=256, layers=6, width=384, heads=6),
        **dict(peers=("nanogpt",), steps=3),
    ),
    "vit_ti": Match(
        "cpu",
        "ViT-Ti/4, 64 images of 32 x 32, float32, AdamW",
        "configs/cifar10_vit.py:smoke",
        (
            *_ADAMW,
            *("model.num_layers=12", "model.num_heads=3", "model.mlp_dim=768", "model.pool=class"),
            *("loss.mixup=0.0", "loss.label_smoothing=0.0", "batch_size=64"),
        ),
        ("huggingface",),
        dict(batch=64, classes=10) | CIFAR | ADAMW,
        unit="images",
        steps=3,
        close=1e-3,
    ),
    "resnet20": Match(
        "cpu",
        "ResNet-20, 128 images of 32 x 32, float32, AdamW",
        "configs/cifar10_resnet.py:20,smoke",
        (*_ADAMW, "model.depths=(3,3,3)", "batch_size=128"),
        ("torch_resnet",),
        dict(batch=128, classes=10, depth=20) | CIFAR | ADAMW,
        unit="images",
        steps=5,
        close=1e-3,
    ),
    "gpt2_124m": gpt(
        *("GPT-2 124M, 32 x 1,024 tokens, bfloat16, AdamW", "configs/lm_gpt2.py:124m,smoke"),
        **dict(kind="gpu", batch=32, length=1024, vocab=50_304, layers=12, width=768, heads=12),
        **dict(peers=("nanogpt", "huggingface"), steps=20),
    ),
    "gpt2_1.5b": gpt(
        *("GPT-2 1.5B, 8 x 1,024 tokens, bfloat16, AdamW", "configs/lm_gpt2.py:1.5b,smoke"),
        **dict(kind="gpu", batch=8, length=1024, vocab=50_304, layers=48, width=1600, heads=25),
        **dict(peers=("nanogpt",), steps=5),
    ),
    "llama_1b": gpt(
        *("LLaMA of 1.1B, 8 x 2,048 tokens, bfloat16, AdamW", "configs/lm_llama.py:110m,smoke"),
        **dict(kind="gpu", batch=8, length=2048, vocab=32_000, layers=16, width=2048, heads=16),
        **dict(mlp=7168, activation="silu", more=("model.kv_heads=16", "model.tied=False")),
        **dict(peers=("huggingface",), steps=5),
    ),
    "vit_b16": Match(
        "gpu",
        "ViT-B/16, 256 images of 224 x 224, bfloat16, AdamW",
        "configs/imagenet_vit.py:b16,smoke",
        (
            *_ADAMW,
            *("model.pool=class", "loss.mixup=0.0", "model.scan_layers=False", "batch_size=256"),
        ),
        ("timm_vit",),
        dict(batch=256, classes=1000) | RGB | ADAMW,
        unit="images",
        steps=10,
        close=0.05,
    ),
    "resnet50": Match(
        "gpu",
        "ResNet-50, 256 images of 224 x 224, bfloat16, AdamW",
        "configs/imagenet_resnet50.py:256",
        (
            *_ADAMW,
            *("optim.schedule.scaling=none", "optim.schedule.base_batch=0", "precision=bfloat16"),
        ),
        ("timm_resnet",),
        dict(batch=256, classes=1000, depths=(3, 4, 6, 3)) | RGB | ADAMW,
        unit="images",
        steps=10,
        close=0.05,
    ),
}

# What is wanted: at most this much of the peer's time, or at least this MFU.
GOALS = {
    ("gpt_4x128", "nanogpt"): ("ratio", 1.0),
    ("gpt_6x384", "nanogpt"): ("ratio", 1.0),
    ("vit_ti", "huggingface"): ("ratio", 0.77),
    ("resnet20", "torch_resnet"): ("ratio", 1.0),
    ("gpt2_124m", "nanogpt"): ("ratio", 0.77),
    ("gpt2_124m", "huggingface"): ("ratio", 0.5),
    ("gpt2_1.5b", "nanogpt"): ("mfu", 0.55),
    ("llama_1b", "huggingface"): ("mfu_causal", 0.6),
    ("vit_b16", "timm_vit"): ("ratio", 0.77),
    ("resnet50", "timm_resnet"): ("ratio", 1.0),
}
