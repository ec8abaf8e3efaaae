"""A small byte-level GPT on the source text of Python's standard library (Radford et al. 2019).

Command: python -m lsdl.train --config configs/stdlib_gpt.py
Hardware and time: 2 CPU cores, some 3 min after start-up; :experts 6 min of CPU time
Expected: below 2.66 bits per byte on valid, the text's order-2 entropy
Measured: 2.422 on 2,000 windows of valid, 2.189 on test; :experts 2.409 and 2.202, with 3.5% of the
choices dropped; 1 seed, jax 0.10.2

:experts has 8 experts of half the width in each layer, of which a token goes to 2.
"""

from lsdl.config import parse_arg, template


def get_config(arg=None):
    words = parse_arg(arg, "experts", "smoke")
    smoke, experts = "smoke" in words, "experts" in words
    config = template()
    config.name = "_".join(["stdlib_gpt", *sorted(words)])
    config.task = "language"
    config.batch_size = 16

    config.data.source = "stdlib_text"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 128
    config.data.segments = True
    config.data.valid_examples = 64 if smoke else 2_000  # windows, of some 8,000
    if smoke:
        config.data.test_examples = 64

    config.model.name = "gpt"
    config.model.form = "gpt2"
    config.model.vocab_size = 257
    config.model.vocab_padded = 320
    config.model.max_length = 128
    config.model.width = 64 if smoke else 128
    config.model.num_layers = 2 if smoke else 4
    config.model.num_heads = 4
    config.model.mlp_dim = 256 if smoke else 512
    config.model.kv_heads = 0
    config.model.num_experts = 0
    config.model.experts_per_token = 0
    config.model.capacity_factor = 0.0
    if experts:  # a token meets as many parameters as without
        config.model.mlp_dim //= 2
        config.model.num_experts = 8
        config.model.experts_per_token = 2
        config.model.capacity_factor = 1.25
        config.loss.balance = 0.01
    config.model.rope_theta = 0.0
    config.model.activation = "gelu_tanh"
    config.model.norm_eps = 1e-5
    config.model.tied = True
    config.model.dropout = 0.0
    config.model.scan_layers = False

    config.optim.name = "adamw"
    config.optim.b2 = 0.99
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 3e-3
    config.optim.schedule.warmup_percent = 5.0

    if smoke:
        config.total_steps = 20
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_steps = 1000
        config.eval.every_steps = 500
        config.checkpoint.every_steps = 250
        config.log.every_steps = 10
    return config.lock()
