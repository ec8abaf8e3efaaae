"""Grokking: a two-layer transformer learns modular arithmetic late (Power et al. 2022).

Command: python -m lsdl.train --config configs/modular_transformer.py
Hardware and time: 2 CPU cores; by this command, and :paper, not yet run
Expected: train accuracy near 1 long before valid accuracy; valid follows
Measured: by `python -m lsdl.study run grokking --slow`, which gives it up to 6,000 steps: valid
reached 0.95 after 13.5 times as many steps as train 0.99, where valid was 0.384; 1 seed, jax 0.10.2
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "paper")
    smoke, paper = "smoke" in words, "paper" in words
    config = template()
    config.name = "modular_transformer" + "".join(f"_{word}" for word in sorted(words))
    config.task = "language"
    config.batch_size = 512

    # The paper's headline is division modulo 97 with half of the pairs, 1e5 to 1e6 updates; the
    # default is of a size for 2 cores.
    config.data.source = "modular:97:div" if paper else "modular:53:add"
    share = 50 if paper else 40
    config.data.train_split = f"pairs[:{share}%]"
    config.data.valid_split = f"pairs[{share}%:80%]"
    config.data.test_split = "pairs[80%:]"

    config.model.name = "gpt"
    config.model.form = "gpt2"
    config.model.vocab_size = 99 if paper else 55
    config.model.vocab_padded = 104 if paper else 56
    config.model.max_length = 4
    config.model.width = 128
    config.model.num_layers = 2
    config.model.num_heads = 4
    config.model.mlp_dim = 512
    config.model.kv_heads = 0
    config.model.num_experts = 0
    config.model.experts_per_token = 0
    config.model.capacity_factor = 0.0
    config.model.rope_theta = 0.0
    config.model.activation = "relu"
    config.model.norm_eps = 1e-5
    config.model.tied = False
    config.model.dropout = 0.0
    config.model.scan_layers = False

    config.optim.name = "adamw"
    config.optim.b2 = 0.98
    config.optim.weight_decay = 1.0
    config.optim.decay_mask = ((r".*", True),)
    config.optim.schedule.name = "constant"
    config.optim.schedule.peak = 1e-3
    config.optim.schedule.warmup_steps = 10

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_steps = 100_000 if paper else 3_000
        config.eval.every_steps = 1_000 if paper else 100
        config.checkpoint.every_steps = 10_000 if paper else 1_000
        config.log.every_steps = 10
    return config.lock()
