"""The optimiser comparison of the last lecture: one hidden layer of 100 ELUs on Fashion-MNIST.

Command: python -m lsdl.train --config configs/fashion_mnist_mlp.py
Hardware and time: 2 CPU cores; not yet run
Expected: the lecture's notebook shows curves and no number
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw")


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *OPTIMIZERS)
    smoke, optimizer = "smoke" in words, one_of(words, OPTIMIZERS, "adam")
    config = template()
    config.name = f"fashion_mnist_mlp_{optimizer}" + ("_smoke" if smoke else "")
    config.batch_size = 1024

    config.data.source = "tfds:fashion_mnist"
    config.data.train_split = "train[:55000]"
    config.data.valid_split = "train[55000:]"

    config.model.name = "mlp"
    config.model.hidden = (100,)
    config.model.activation = "elu"
    config.model.norm = "none"
    config.model.dropout = 0.0

    config.optim.name = "sgd" if optimizer == "momentum" else optimizer
    config.optim.momentum = 0.9 if optimizer == "momentum" else 0.0
    config.optim.weight_decay = 0.01 if optimizer == "adamw" else 0.0
    config.optim.schedule.name = "constant"
    config.optim.schedule.peak = 4e-4
    config.optim.schedule.warmup_steps = 0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 10.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 10
    return config.lock()
