"""A multilayer perceptron on 8x8 handwritten digits: the smallest job there is.

Command: python -m lsdl.train --config configs/digits_mlp.py
Hardware and time: 2 CPU cores, 4 to 5 s
Expected: test accuracy 0.96 or better
Measured: mean 0.9803 of 3 seeds (0.9778 to 0.9815), jax 0.10.2, commit 6e70bbc
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    smoke = "smoke" in parse_arg(arg, "smoke")
    config = template()
    config.name = "digits_mlp_smoke" if smoke else "digits_mlp"
    config.batch_size = 96

    config.data.source = "digits"

    config.model.name = "mlp"
    config.model.hidden = (240, 240)
    config.model.activation = "relu"
    config.model.norm = "none"
    config.model.dropout = 0.1

    config.optim.name = "adamw"
    config.optim.weight_decay = 0.05
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 1e-3
    config.optim.schedule.warmup_percent = 10.0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 40.0
        config.eval.every_epochs = 5.0
        config.checkpoint.every_epochs = 5.0
        config.log.every_steps = 10
    return config.lock()
