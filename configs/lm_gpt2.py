"""GPT-2 on C4, packed to 1,024 tokens (Radford et al. 2019).

Command: python -m lsdl.train --config configs/lm_gpt2.py:124m --config.data.tokenizer=gpt2.json
Hardware and time: 8 GPUs of 80 GB; not yet run
Expected: no published figure: the original learned from text that was not published
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.gpt import GPT2_SIZES


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *GPT2_SIZES)
    smoke = "smoke" in words
    size = one_of(words, GPT2_SIZES, "124m")
    config = template()
    config.name = f"lm_gpt2_{size}" + ("_smoke" if smoke else "")
    config.task = "language"
    config.batch_size = 8 if smoke else 512
    config.precision = "bfloat16"

    # The 124M to 1.5B models learned from 40 GB of web pages that were not published. C4 stands
    # in for them; the examples are windows of 1,024 tokens, 9 billion tokens in all.
    config.data.source = "tfds:c4/en"
    config.data.tokenizer = ""
    config.data.seq_len = 1024
    config.data.segments = True
    config.data.train_examples = 8_789_062
    config.data.train_split = "train"
    config.data.valid_split = "validation[:50%]"
    config.data.test_split = "validation[50%:]"
    config.data.valid_examples = config.data.test_examples = 4_096

    config.model.name = "gpt"
    config.model.update(GPT2_SIZES[size])
    config.model.form = "gpt2"
    config.model.vocab_size = 50_257
    config.model.vocab_padded = 50_304
    config.model.max_length = 1024
    config.model.kv_heads = 0
    config.model.num_experts = 0
    config.model.experts_per_token = 0
    config.model.capacity_factor = 0.0
    config.model.rope_theta = 0.0
    config.model.activation = "gelu_tanh"
    config.model.norm_eps = 1e-5
    config.model.tied = True
    config.model.dropout = 0.0
    config.model.scan_layers = True
    config.remat = "full"
    config.loss.chunk = 128

    config.optim.name = "adamw"
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = {"124m": 6e-4, "350m": 3e-4, "774m": 2.5e-4, "1.5b": 2e-4}[size]
    config.optim.schedule.end_factor = 0.1
    config.optim.schedule.warmup_tokens = 375_000_000

    if smoke:
        config.total_steps = 20
        config.optim.schedule.warmup_tokens = None
        config.optim.schedule.warmup_steps = 5
        config.data.valid_examples = config.data.test_examples = 16
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_tokens = 9_000_000_000
        config.eval.every_steps = 1_000
        config.checkpoint.every_steps = 1_000
        config.log.every_steps = 10
    return config.lock()
