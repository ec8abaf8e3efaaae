"""ViT-B/16 and S/16 on ImageNet from scratch, 90 epochs (Beyer et al. 2022).

Command: python -m lsdl.train --config configs/imagenet_vit.py:s16
Hardware and time: 8 TPU v3 cores: about 6 h 30 min for s16 (the paper); not yet run
Expected: s16: test accuracy 0.765 after 90 epochs (the paper, with RandAugment, which is not here)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.vit import SIZES


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "distill", *SIZES)
    smoke, distill = "smoke" in words, "distill" in words
    size = one_of(words, SIZES, "s16")
    config = template()
    config.name = f"imagenet_vit_{size}" + ("_distill" if distill else "")
    config.name += "_smoke" if smoke else ""
    config.batch_size = 8 if smoke else 1024
    config.precision = "bfloat16"

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    config.data.transforms = ("random_resized_crop:224", "flip")
    config.data.eval_transforms = ("resize_small:256", "center_crop:224")

    config.model.name = "vit"
    config.model.update(SIZES[size])
    # DeiT (Touvron et al. 2021): give --config.teacher=RUN and --config.loss.distill_weight=0.5.
    config.model.pool = "distill" if distill else "mean"
    config.model.activation = "gelu"
    config.model.norm_eps = 1e-6
    config.model.stem = 0
    config.model.dropout = 0.0
    config.model.scan_layers = not smoke

    config.loss.mixup = 0.2
    config.optim.name = "adamw"
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 1e-3

    if smoke:
        config.total_steps = 20
        config.optim.schedule.warmup_steps = 5
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 90.0
        config.optim.schedule.warmup_steps = 10_000
        config.eval.every_epochs = 5.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 50
    return config.lock()
