"""RegNetY-400MF on ImageNet (Radosavovic et al. 2020).

Command: python -m lsdl.train --config configs/imagenet_regnet.py
Hardware and time: one node of 8 GPUs; not yet run
Expected: test accuracy 0.741 after 100 epochs (the paper)
Measured: not yet run
"""

from lsdl.config import parse_arg, template
from lsdl.models.regnet import SIZES


def get_config(arg=None):
    smoke = "smoke" in parse_arg(arg, "smoke")
    config = template()
    config.name = "imagenet_regnet_smoke" if smoke else "imagenet_regnet"
    config.batch_size = 8 if smoke else 1024

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 64 if smoke else 224
    config.data.transforms = (f"random_resized_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side * 8 // 7}", f"center_crop:{side}")

    config.model.name = "regnet"
    config.model.update(SIZES["y_400mf"])
    if smoke:
        config.model.depths = (1, 1, 1, 1)
    config.model.excite = True

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.nesterov = True
    config.optim.weight_decay = 5e-5
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 0.8
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
