"""ResNet-50 on ImageNet with batches of 128 to 64k images (Goyal et al. 2017), LARS up to 32k.

Command: python -m lsdl.train --config configs/imagenet_resnet50.py:8k
Hardware and time: 256 P100 GPUs: 1 hour for 8k (the paper); not yet run
Expected: test accuracy 0.764 at 256, 0.763 at 8k, 0.752 at 16k, 0.660 at 64k (the paper); with
lars 0.758 at 256, 0.725 at 32k (You et al. 2017, their table 6, stronger augmentation)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.errors import UserError
from lsdl.models.resnet import SIZES

# --config.accum=K takes any batch on fewer devices, BatchNorm then sees microbatches.
BATCHES = {"128": 128, "256": 256, "512": 512} | {f"{2**i}k": 1024 * 2**i for i in range(7)}
# You, Gitman and Ginsburg 2017: (best rate, epochs of warm-up) with LARS.
LARS = {"256": (4.0, 5.0), "1k": (9.0, 5.0), "8k": (30.0, 5.0), "16k": (33.0, 12.0)}
LARS |= {"32k": (40.0, 12.0)}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "lars", *BATCHES)
    smoke, batch, lars = "smoke" in words, one_of(words, BATCHES, "256"), "lars" in words
    if lars and batch not in LARS:
        raise UserError(f"The paper trains {batch} without LARS alone: choose from {list(LARS)}.")
    config = template()
    config.name = "imagenet_resnet50" + "_lars" * lars + f"_{batch}" + "_smoke" * smoke
    config.batch_size = 8 if smoke else BATCHES[batch]

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 64 if smoke else 224
    config.data.transforms = (f"random_resized_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side * 8 // 7}", f"center_crop:{side}")

    # The paper normalises over each GPU's 32 images, lsdl over the global batch.
    config.model.name = "resnet"
    config.model.update(SIZES["50"])
    if smoke:
        config.model.depths = (1, 1, 1, 1)
    config.model.norm = "batch"
    config.model.zero_gamma = True
    config.model.head_std = 0.01
    config.model.dropout = 0.0

    config.optim.momentum = 0.9
    if lars:
        config.optim.name = "lars"
        config.optim.weight_decay = 5e-4
        config.optim.schedule.name = "polynomial"
        config.optim.schedule.peak, warmup_epochs = LARS[batch]
    else:
        config.optim.name = "sgd"
        config.optim.nesterov = True
        config.optim.weight_decay = 1e-4
        config.optim.schedule.name = "step"
        config.optim.schedule.peak = 0.1
        config.optim.schedule.scaling = "linear"
        config.optim.schedule.base_batch = 256
        config.optim.schedule.start_factor = 1.0  # from 0.1, whatever the batch
        config.optim.schedule.boundaries_percent = tuple(100 * e / 90 for e in (30, 60, 80))
        warmup_epochs = 5.0 if BATCHES[batch] > 256 else 0.0
    config.optim.schedule.warmup_epochs = 0.0 if smoke else warmup_epochs

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 90.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 20
    return config.lock()
