"""Residual networks on CIFAR-10 (He et al. 2016, section 4.2), and PreAct ResNet-18.

Command: python -m lsdl.train --config configs/cifar10_resnet.py:56
Hardware and time: one GPU; not yet run
Expected: test accuracy 0.913 (20), 0.925 (32), 0.928 (44), 0.930 (56), 0.936 (110): the paper;
0.944 (preact18), as Zhang et al. 2018 print it beside MixUp's 0.958
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.resnet import SIZES, cifar

NETS = ("20", "32", "44", "56", "110", "preact18")


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "plain", *NETS)
    smoke, plain, net = "smoke" in words, "plain" in words, one_of(words, NETS, "20")
    config = template()
    config.name = f"cifar10_resnet_{net}" + "_plain" * plain + "_smoke" * smoke
    config.batch_size = 128

    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[:45000]"
    config.data.valid_split = "train[45000:]"
    config.data.transforms = ("pad_crop:4", "flip")

    config.model.name = "resnet"
    if net == "preact18":
        config.model.update(SIZES["18"], block="preact", stem="cifar")
        config.model.width = 8 if smoke else 64
    else:
        config.model.update(cifar(8 if smoke else int(net)))
    if plain:
        config.model.shortcut = "none"
    config.model.norm = "batch"
    config.model.zero_gamma = False
    config.model.head_std = 0.0
    config.model.dropout = 0.0

    config.optim.name = "sgd"
    config.optim.momentum = 0.9
    config.optim.weight_decay = 1e-4
    config.optim.schedule.name = "step"
    config.optim.schedule.peak = 0.1
    config.optim.schedule.boundaries_percent = (50.0, 75.0)
    config.optim.schedule.step_factor = 0.1
    # The paper trains 110 layers at 0.01 until the error is below 80%, for about 400 steps.
    config.optim.schedule.start_factor = 0.1
    config.optim.schedule.warmup_steps = 400 if net == "110" and not smoke else 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        if net == "preact18":
            config.total_epochs = 200.0
        else:
            config.total_steps = 64_000
        config.eval.every_steps = 1_000
        config.checkpoint.every_steps = 4_000
        config.log.every_steps = 50
    return config.lock()
