"""Plain ReLU nets of 14, 22 and 30 layers on ImageNet, from He's first weights (He et al. 2015).

Command: python -m lsdl.train --config configs/imagenet_msra.py:30
Hardware and time: one node of 8 GPUs; not yet run
Expected: test accuracy 0.662 (14), 0.661 (14,inverse), 0.614 (30), none (30,inverse): the paper,
each a mean over ten views where lsdl tests one; of 22 the loss with and without `inverse`
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.msra import SIZES


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "inverse", *SIZES)
    smoke, inverse, size = "smoke" in words, "inverse" in words, one_of(words, SIZES, "14")
    config = template()
    config.name = f"imagenet_msra_{size}" + "_inverse" * inverse + "_smoke" * smoke
    config.batch_size = 8 if smoke else 128

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 32 if smoke else 224
    config.data.transforms = (f"resize_small:{side * 8 // 7}", f"random_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side * 8 // 7}", f"center_crop:{side}")

    config.model.name = "msra"
    config.model.update(SIZES[size])
    config.model.hidden = (4096, 4096)
    config.model.gain = 1.0 if inverse else 2.0  # of the weights' first variance, times the inputs
    config.model.dropout = 0.5
    if smoke:
        config.model.depths = (1,) * len(SIZES[size]["depths"])
        config.model.widths = (8,) * len(SIZES[size]["widths"])
        config.model.stem_width = 8
        config.model.hidden = (16, 16)

    # Sizes, rates and epochs are from memory of the paper, whose text was not at hand. It turns to
    # the next rate where the error stalls; here both starts turn at the same epochs, or the one
    # that stalls would have another schedule.
    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 5e-4
    config.optim.schedule.name = "step"
    config.optim.schedule.peak = 1e-2
    config.optim.schedule.boundaries_percent = (50.0, 75.0)
    config.optim.schedule.warmup_steps = 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 80.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 20
    return config.lock()
