"""A ViT with patches of 4 on CIFAR-10, with MixUp and label smoothing (Dosovitskiy et al. 2021).

Command: python -m lsdl.train --config configs/cifar10_vit.py
Hardware and time: one GPU; not yet run
Expected: no published figure for this recipe
Measured: not yet run
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    smoke = "smoke" in parse_arg(arg, "smoke")
    config = template()
    config.name = "cifar10_vit_smoke" if smoke else "cifar10_vit"
    config.batch_size = 32 if smoke else 512

    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[:45000]"
    config.data.valid_split = "train[45000:]"
    config.data.transforms = ("pad_crop:4", "flip")

    config.model.name = "vit"
    config.model.patch = 4
    config.model.width = 192
    config.model.num_layers = 2 if smoke else 9
    config.model.num_heads = 12
    config.model.mlp_dim = 384
    config.model.pool = "mean"
    config.model.activation = "gelu"
    config.model.norm_eps = 1e-6
    config.model.stem = 0
    config.model.dropout = 0.0
    config.model.scan_layers = False

    config.loss.label_smoothing = 0.1
    config.loss.mixup = 0.8
    config.optim.name = "adamw"
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 1e-3
    config.optim.schedule.warmup_percent = 5.0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 200.0
        config.eval.every_epochs = 5.0
        config.checkpoint.every_epochs = 10.0
        config.log.every_steps = 50
    return config.lock()
