"""EfficientNet-B0 on ImageNet with the plain recipe of the RegNet paper (Tan and Le 2019).

Command: python -m lsdl.train --config configs/imagenet_efficientnet.py
Hardware and time: one node of 8 GPUs; not yet run
Expected: test accuracy 0.751 after 100 epochs (Radosavovic et al. 2020, table 4)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.efficientnet import SIZES

SIDES = {"b0": 224, "b1": 240, "b2": 260, "b3": 300}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *SIZES)
    smoke, size = "smoke" in words, one_of(words, SIZES, "b0")
    config = template()
    config.name = f"imagenet_efficientnet_{size}" + "_smoke" * smoke
    config.batch_size = 8 if smoke else 256

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 64 if smoke else SIDES[size]
    config.data.transforms = (f"random_resized_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side + 32}", f"center_crop:{side}")

    config.model.name = "efficientnet"
    config.model.update(SIZES[size])
    if smoke:
        config.model.width_factor = config.model.depth_factor = 0.3
    config.model.drop_path = 0.2

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.nesterov = True
    config.optim.weight_decay = 1e-5
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 0.4
    config.optim.schedule.start_factor = 0.1
    config.optim.schedule.warmup_epochs = 0.0 if smoke else 5.0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 100.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 20
    return config.lock()
