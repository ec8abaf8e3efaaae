"""One tiny experiment of every model, from its shipped config: {name: (config, overrides...)}."""

BLOCK = ("width=16", "num_layers=1", "num_heads=4", "mlp_dim=32")
VIT = ("digits_vit:smoke", *(f"model.{field}" for field in BLOCK), "model.dropout=0.1")
TEXT = (
    *(f"model.{field}" for field in BLOCK),
    *("model.num_layers=2", "model.max_length=8", "data.seq_len=8"),
    *("model.vocab_size=37", "model.vocab_padded=48"),
)
EXPERTS = (
    *("model.num_experts=4", "model.experts_per_token=2", "model.capacity_factor=0.75"),
    *("loss.balance=0.1", "model.dropout=0.1", "model.scan_layers=false", "remat=none"),
)
MASK = ("data.transforms=('mask:3:37',)", "data.eval_transforms=('mask:3:37',)")
CLIP = (
    *(f"model.{tower}_{field}" for tower in ("vision", "text") for field in BLOCK),
    *("model.embed_dim=16", "model.max_length=8", "data.seq_len=8"),
)
CROP = ("data.transforms=('center_crop:32',)", "data.eval_transforms=('center_crop:32',)")
ZOO = {
    "mlp": ("digits_mlp:smoke", "model.hidden=(16,32,16)"),
    "mlp regression": (
        *("digits_mlp:smoke", "model.hidden=(16,32,16)"),
        *("task=regression", "data.source=teacher:6:3:8"),
    ),
    "vit mean": VIT,
    "vit class": (*VIT, "model.pool=class", "loss.mixup=0.3", "loss.label_smoothing=0.1"),
    "vit distill": (*VIT, "model.pool=distill", "model.scan_layers=true"),
    "gpt2": ("lm_gpt2:smoke", *TEXT, "loss.chunk=3", "loss.z_loss=0.01", "model.dropout=0.1"),
    "llama": ("lm_llama:smoke", *TEXT, "model.kv_heads=2", "model.tied=false"),
    "experts": ("lm_gpt2:smoke", *TEXT, *EXPERTS),
    "bert": ("lm_bert:smoke", *TEXT, *MASK, "model.scan_layers=false"),
    "clip": ("digits_clip:smoke", *CLIP),
    "clip chunked": ("digits_clip:smoke", *CLIP, "loss.chunk=1"),
    "clip sigmoid": ("digits_clip:sigmoid,smoke", *CLIP),
    "clip sigmoid chunked": ("digits_clip:sigmoid,smoke", *CLIP, "loss.chunk=1"),
    "alexnet": (
        *("imagenet_alexnet:smoke", "model.widths=(8,16,16,16,16)", "model.hidden=(16,16)"),
    ),
    "msra": (
        *("imagenet_msra:smoke", "model.depths=(2,1)", "model.widths=(8,16)"),
        *("data.transforms=('center_crop:16',)", "data.eval_transforms=('center_crop:16',)"),
    ),
    "resnet": (
        *("imagenet_resnet50:smoke", "model.width=8", "model.depths=(1,1)", *CROP),
        "model.zero_gamma=false",
    ),
    "resnet wide": ("cifar10_wrn:dropout,smoke", "model.width=8", "model.depths=(1,1)"),
    "regnet": (
        *("imagenet_regnet:smoke", "model.depths=(1,1)", "model.widths=(16,32)", *CROP),
        "model.group_width=8",
    ),
    "efficientnet": ("imagenet_efficientnet:smoke", *CROP),
    "inception": ("imagenet_inception:smoke", *CROP),
}
CONVNETS = {"alexnet", "msra", "resnet", "resnet wide", "regnet", "efficientnet", "inception"}
# Plain enough that a wrong gradient shows: no clipping, no Adam, a momentum that starts as the
# gradient, and a rate at which rounding does not grow from step to step.
SAME = (
    *("batch_size=16", "precision=float32"),
    *("optim.name=sgd", "optim.momentum=0.9", "optim.nesterov=false"),
    *("optim.weight_decay=0.0", "optim.clip_norm=0.0"),
    *("optim.schedule.name=constant", "optim.schedule.peak=1e-4"),
    "optim.schedule.warmup_steps=0",
)


def small(load, name, *overrides):
    """The config of the tiny experiment `name`."""
    config, *own = ZOO[name]
    return load(config, *SAME, *own, *overrides)
