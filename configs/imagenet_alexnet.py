"""AlexNet and AlexNet-BN on ImageNet, with LARS and without (You et al. 2017).

Command: python -m lsdl.train --config configs/imagenet_alexnet.py:bn,lars,8k
Hardware and time: one node of 8 GPUs; not yet run
Expected: test accuracy 0.588 (512), 0.602 (bn), 0.601 (bn,lars,8k), 0.578 (bn,lars,32k): the paper
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.errors import UserError

BATCHES = {"512": 512, "4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}
# (lars, bn) -> the paper's best rate for each batch size
RATES = {
    (False, False): {"512": 0.02, "4k": 0.05, "8k": 0.03},
    (False, True): {"512": 0.02, "4k": 0.18, "8k": 0.30},
    (True, False): {"512": 2.0, "4k": 10.0, "8k": 10.0, "16k": 14.0, "32k": 14.0},
    (True, True): {"512": 2.0, "4k": 10.0, "8k": 14.0, "16k": 23.0, "32k": 22.0},
}
WARMUP_EPOCHS = {(False, False): 2.5, (False, True): 0.0, (True, False): 2.0, (True, True): 5.0}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "bn", "lars", *BATCHES)
    smoke, batch = "smoke" in words, one_of(words, BATCHES, "512")
    form = lars, bn = "lars" in words, "bn" in words
    if batch not in RATES[form]:
        raise UserError(f"The paper trains no batch of {batch} without LARS: write {batch},lars.")
    config = template()
    config.name = "imagenet_alexnet" + "_bn" * bn + "_lars" * lars + f"_{batch}" + "_smoke" * smoke
    config.batch_size = 8 if smoke else BATCHES[batch]

    config.data.source = "tfds:imagenet2012"
    config.data.train_split = "train[:99%]"
    config.data.valid_split = "train[99%:]"
    config.data.test_split = "validation"
    side = 67 if smoke else 227
    config.data.transforms = (f"random_resized_crop:{side}", "flip")
    config.data.eval_transforms = (f"resize_small:{side + 29}", f"center_crop:{side}")

    config.model.name = "alexnet"
    config.model.widths = (96, 256, 384, 384, 256)
    config.model.hidden = (64, 64) if smoke else (4096, 4096)
    config.model.batch_norm = bn
    config.model.dropout = 0.5

    config.optim.name = "lars" if lars else "sgd"
    config.optim.momentum = 0.9
    config.optim.trust_coefficient = 0.001
    config.optim.weight_decay = 5e-4
    config.optim.schedule.name = "polynomial"
    config.optim.schedule.power = 2.0
    config.optim.schedule.peak = RATES[form][batch]
    config.optim.schedule.warmup_epochs = 0.0 if smoke else WARMUP_EPOCHS[form]

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
