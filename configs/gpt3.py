"""GPT-3, from 125M to 175B parameters, by its table 2.1 and appendix B (Brown et al. 2020).

Command: python -m lsdl.plan --config configs/gpt3.py:175b
Hardware and time: 175b: 3.14e23 FLOPs, 355 V100-years at 28 TFLOP/s; not yet run
Expected: 175b: 1.73 nats per token on the paper's own text (2.57 C^-0.048, figure 3.1)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.gpt import GPT3_SIZES

# Table 2.1: sequences in a batch (0.5, 1, 2 and 3.2 million tokens), and the peak rate.
RECIPES = {
    "125m": (256, 6e-4),
    "350m": (256, 3e-4),
    "760m": (256, 2.5e-4),
    "1.3b": (512, 2e-4),
    "2.7b": (512, 1.6e-4),
    "6.7b": (1024, 1.2e-4),
    "13b": (1024, 1e-4),
    "175b": (1536, 6e-5),
}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *GPT3_SIZES)
    smoke = "smoke" in words
    size = one_of(words, GPT3_SIZES, "125m")
    batch_size, peak = RECIPES[size]
    config = template()
    config.name = f"gpt3_{size}" + ("_smoke" if smoke else "")
    config.task = "language"
    config.batch_size = 8 if smoke else batch_size
    config.precision = "bfloat16"

    # The paper's mixture of web pages, books and Wikipedia was not published: C4 stands in for it.
    config.data.source = "tfds:c4/en"
    config.data.tokenizer = ""
    config.data.seq_len = 2048
    config.data.segments = False  # as in the paper: documents of a window see one another
    config.data.train_examples = 300_000_000_000 // 2048
    config.data.valid_split = "validation[:50%]"
    config.data.test_split = "validation[50%:]"
    config.data.valid_examples = config.data.test_examples = 2_048

    config.model.name = "gpt"
    config.model.update(GPT3_SIZES[size])
    config.model.form = "gpt2"
    config.model.vocab_size = 50_257
    config.model.vocab_padded = 50_304
    config.model.max_length = 2048
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
    # The paper's cosine ends at 10% after 260 billion tokens and stays there; ours ends with the
    # run. Its ramp of the batch size over the first billions of tokens is left out.
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = peak
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
        config.total_tokens = 300_000_000_000
        config.eval.every_steps = 1_000
        config.checkpoint.every_steps = 1_000
        config.log.every_steps = 10
    return config.lock()
