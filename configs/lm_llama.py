"""The LLaMA form of the language model on C4: rotary, RMSNorm, gated MLP (Touvron et al. 2023).

Command: python -m lsdl.train --config configs/lm_llama.py:110m --config.data.tokenizer=llama.json
Hardware and time: 8 GPUs of 80 GB at 110m; not yet run
Expected: validation loss at or below GPT-2's of the same size and tokens (configs/lm_gpt2.py)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.gpt import LLAMA_SIZES

# LLaMA 2 has 32,000 tokens and a context of 4,096; Llama 3 has 128,256 and 8,192.
THIRD = ("1b", "8b", "70b")


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *LLAMA_SIZES)
    smoke = "smoke" in words
    size = one_of(words, LLAMA_SIZES, "110m")
    config = template()
    config.name = f"lm_llama_{size}" + ("_smoke" if smoke else "")
    config.task = "language"
    config.batch_size = 8 if smoke else 512
    config.precision = "bfloat16"

    config.data.source = "tfds:c4/en"
    config.data.tokenizer = ""
    config.data.seq_len = {"110m": 1024, "7b": 4096}.get(size, 8192)
    config.data.segments = True
    config.data.train_examples = 9_000_000_000 // config.data.seq_len
    config.data.valid_split = "validation[:50%]"
    config.data.test_split = "validation[50%:]"
    config.data.valid_examples = config.data.test_examples = 4_096

    config.model.name = "gpt"
    config.model.update(LLAMA_SIZES[size])
    config.model.form = "llama"
    config.model.vocab_size = config.model.vocab_padded = 128_256 if size in THIRD else 32_000
    config.model.max_length = config.data.seq_len
    config.model.num_experts = 0
    config.model.experts_per_token = 0
    config.model.capacity_factor = 0.0
    config.model.rope_theta = 500_000.0 if size in THIRD else 10_000.0
    config.model.activation = "silu"
    config.model.norm_eps = 1e-5
    config.model.tied = size in ("110m", "1b")
    config.model.dropout = 0.0
    config.model.scan_layers = True
    config.remat = "full"
    config.loss.chunk = 128

    config.optim.name = "adamw"
    config.optim.b2 = 0.95
    config.optim.weight_decay = 0.1
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 6e-4 if size == "110m" else 3e-4
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
