"""Wide residual networks on CIFAR-10 (Zagoruyko and Komodakis 2016).

Command: python -m lsdl.train --config configs/cifar10_wrn.py:28-10
Hardware and time: one GPU; not yet run
Expected: test accuracy 0.950 (16-4), 0.960 (28-10), 0.961 (28-10,dropout): the paper
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.resnet import wide

SIZES = ("16-4", "28-10")  # depth and widening


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "dropout", *SIZES)
    smoke, dropout, size = "smoke" in words, "dropout" in words, one_of(words, SIZES, "16-4")
    config = template()
    config.name = f"cifar10_wrn_{size}" + "_dropout" * dropout + "_smoke" * smoke
    config.batch_size = 16 if smoke else 128

    # The paper trains on all 50,000 images, and fills what a shift bares with their reflection.
    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[:45000]"
    config.data.valid_split = "train[45000:]"
    config.data.transforms = ("pad_crop:4", "flip")

    depth, widening = (int(word) for word in size.split("-"))
    config.model.name = "resnet"
    config.model.update(wide(10, 2) if smoke else wide(depth, widening))
    config.model.norm = "batch"
    config.model.zero_gamma = False
    config.model.head_std = 0.0
    config.model.dropout = 0.3 if dropout else 0.0

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-4
    config.optim.schedule.name = "step"
    config.optim.schedule.peak = 0.1
    config.optim.schedule.boundaries_percent = (30.0, 60.0, 80.0)
    config.optim.schedule.step_factor = 0.2
    config.optim.schedule.warmup_steps = 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 200.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 50
    return config.lock()
