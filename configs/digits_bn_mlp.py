"""Deep BatchNorm MLP on 8x8 handwritten digits: the large-batch laboratory's net.

Command: python -m lsdl.train --config configs/digits_bn_mlp.py
Hardware and time: 2 CPU cores, 8 to 11 s
Expected: valid accuracy 0.976 at a batch of 32 (a pilot of 4 seeds)
Measured: valid 0.9914, test mean 0.9716 of 3 seeds (0.9630 to 0.9815), jax 0.10.2, commit 4ab6830
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    smoke = "smoke" in parse_arg(arg, "smoke")
    config = template()
    config.name = "digits_bn_mlp_smoke" if smoke else "digits_bn_mlp"
    config.batch_size = 32

    config.data.source = "digits"

    config.model.name = "mlp"
    config.model.hidden = (64,) * 8
    config.model.activation = "relu"
    config.model.norm = "batch"
    config.model.dropout = 0.0

    config.optim.name = "sgd"
    config.optim.weight_decay = 1e-4
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 0.1
    config.optim.schedule.warmup_percent = 0.0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 12.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 6.0
        config.log.every_steps = 10
    return config.lock()
