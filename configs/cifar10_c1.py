"""C1, a shallow AlexNet, on CIFAR-10 (Keskar et al. 2017).

Command: python -m lsdl.train --config configs/cifar10_c1.py
Hardware and time: one GPU; not yet run
Expected: test accuracy 0.800 (256), 0.773 (5k), in a sharper minimum: the paper
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template

BATCHES = {"256": 256, "5k": 5_000}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *BATCHES)
    smoke, batch = "smoke" in words, one_of(words, BATCHES, "256")
    config = template()
    config.name = f"cifar10_c1_{batch}" + "_smoke" * smoke
    config.batch_size = 16 if smoke else BATCHES[batch]

    # The paper trains on all 50,000 images, of which its large batch is a tenth.
    config.data.source = "tfds:cifar10"
    config.data.train_split = "train[:45000]"
    config.data.valid_split = "train[45000:]"

    config.model.name = "alexnet"
    config.model.widths = (8, 8) if smoke else (64, 64)
    config.model.hidden = (16, 16) if smoke else (384, 192)
    config.model.batch_norm = True
    config.model.dropout = 0.5

    # 20 epochs of Adam at Keras's rate: the script that the authors published beside the paper.
    config.optim.name = "adam"
    config.optim.schedule.name = "constant"
    config.optim.schedule.peak = 1e-3
    config.optim.schedule.warmup_steps = 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 20.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 10
    return config.lock()
