"""Inception-v1 (GoogLeNet) on ImageNet, as the LARS paper trains it (You et al. 2017).

Command: python -m lsdl.train --config configs/imagenet_inception.py
Hardware and time: one node of 8 GPUs; not yet run
Expected: test accuracy 0.692 with batches of 256 after 150 epochs (the paper)
Measured: not yet run
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "plain")
    smoke, plain = "smoke" in words, "plain" in words
    config = template()
    config.name = "imagenet_inception" + "_plain" * plain + "_smoke" * smoke
    config.batch_size = 8 if smoke else 256

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 64 if smoke else 224
    config.data.transforms = (f"random_resized_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side * 8 // 7}", f"center_crop:{side}")

    config.model.name = "inception"
    config.model.width_factor = 0.125 if smoke else 1.0
    config.model.stem_multiplier = 8
    config.model.batch_norm = not plain
    config.model.dropout = 0.4

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.schedule.name = "polynomial"
    config.optim.schedule.power = 2.0
    # The paper does not print its rate; these are guesses that nobody has tried.
    config.optim.schedule.peak = 0.01 if plain else 0.1
    config.optim.schedule.warmup_steps = 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 150.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 20
    return config.lock()
