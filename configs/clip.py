"""CLIP from B/32 to g/14, on COCO captions in place of web pairs (Radford et al. 2021).

Command: python -m lsdl.train --config configs/clip.py:b32 --config.data.tokenizer=clip.json
Hardware and time: b32, 400M pairs: about 36 h on 128 A100 (Cherti et al. 2023); not yet run
Expected: on LAION-400M, zero-shot ImageNet accuracy 62.96% (b32), 72.77% (l14)
Measured: not yet run
"""

from lsdl.config import one_of, parse_arg, template
from lsdl.models.clip import SIZES

# Radford et al. 2021, table 20; Cherti et al. 2023, section 3.
PEAKS = {"b32": 5e-4, "b16": 5e-4, "l14": 4e-4, "h14": 5e-4, "g14": 1e-3}


def get_config(arg=None):
    words = parse_arg(arg, "smoke", "sigmoid", *SIZES)
    smoke, sigmoid = "smoke" in words, "sigmoid" in words
    size = one_of(words, SIZES, "b32")
    config = template()
    config.name = f"clip_{size}" + ("_sigmoid" if sigmoid else "") + ("_smoke" if smoke else "")
    config.task = "contrastive"
    config.batch_size = 8 if smoke else 32_768
    config.precision = "bfloat16"
    config.remat = "full"

    # 118,287 images with five captions each: the runnable stand-in for 400 million pairs.
    config.data.source = "tfds:coco_captions"
    config.data.tokenizer = ""
    config.data.seq_len = 77
    config.data.train_split = "train"
    config.data.valid_split = "val"
    config.data.test_split = "restval"
    config.data.transforms = ("random_resized_crop:224",)
    config.data.eval_transforms = ("resize_small:224", "center_crop:224")

    config.model.name = "clip"
    config.model.update(SIZES[size])
    config.model.vocab_size = config.model.vocab_padded = 49_408
    config.model.max_length = 77
    config.model.norm_eps = 1e-5
    # Zhai et al. 2023, section 3.2: the sigmoid loss starts at scale 10 and bias -10.
    config.model.scale_init = 10.0 if sigmoid else 1 / 0.07
    config.model.bias_init = -10.0 if sigmoid else 0.0
    config.model.scan_layers = True

    config.loss.form = "sigmoid" if sigmoid else "softmax"
    config.loss.chunk = 0 if smoke else 2_048
    config.optim.name = "adamw"
    config.optim.b2 = 0.98
    config.optim.eps = 1e-6
    config.optim.weight_decay = 0.2
    config.optim.decay_mask = ((r".*(bias|scale|log_scale)", False), (r".*", True))
    config.optim.schedule.name = "warmup_cosine"
    config.optim.schedule.peak = PEAKS[size]

    if smoke:
        config.total_steps = 20
        config.optim.schedule.warmup_steps = 5
        config.eval.every_steps = 10
        config.checkpoint.every_steps = 10
        config.log.every_steps = 1
    else:
        config.total_epochs = 32.0
        config.optim.schedule.warmup_percent = 5.0
        config.eval.every_epochs = 1.0
        config.checkpoint.every_epochs = 1.0
        config.log.every_steps = 1
    return config.lock()
