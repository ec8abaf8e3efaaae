"""BERT by masked tokens alone, on packed windows of 512 (Devlin et al. 2019; Liu et al. 2019).

Command: python -m lsdl.train --config configs/lm_bert.py:base --config.data.tokenizer=bert.json
Hardware and time: 8 GPUs of 80 GB; not yet run
Expected: base: masked-token perplexity 3.99 at 31 passes over the paper's 16 GB of text
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.bert import SIZES


def get_config(arg=None):
    words = parse_arg(arg, "smoke", *SIZES)
    smoke = "smoke" in words
    size = one_of(words, SIZES, "base")
    config = template()
    config.name = f"lm_bert_{size}" + ("_smoke" if smoke else "")
    config.task = "masked_language"
    config.batch_size = 8 if smoke else 256
    config.precision = "bfloat16"

    config.data.source = "tfds:c4/en"
    config.data.tokenizer = ""
    config.data.seq_len = 512
    config.data.segments = True
    config.data.train_examples = 8_000_000
    config.data.valid_split = "validation[:50%]"
    config.data.test_split = "validation[50%:]"
    config.data.valid_examples = config.data.test_examples = 4_096
    config.data.transforms = config.data.eval_transforms = ("mask:103:30522",)  # [MASK] is 103

    config.model.name = "bert"
    config.model.update(SIZES[size])
    config.model.vocab_size = 30_522
    config.model.vocab_padded = 30_592
    config.model.max_length = 512
    config.model.activation = "gelu"
    config.model.norm_eps = 1e-12
    config.model.dropout = 0.1
    config.model.scan_layers = True
    config.loss.chunk = 128

    config.optim.name = "adamw"
    config.optim.eps = 1e-6
    config.optim.weight_decay = 0.01
    config.optim.clip_norm = 1.0
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = 1e-4
    config.optim.schedule.warmup_percent = 1.0

    if smoke:
        config.total_steps = 20
        config.data.valid_examples = config.data.test_examples = 16
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_steps = 1_000_000
        config.eval.every_steps = 10_000
        config.checkpoint.every_steps = 10_000
        config.log.every_steps = 100
    return config.lock()
