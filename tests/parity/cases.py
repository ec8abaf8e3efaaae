"""Models of lsdl's and the settings by which Hugging Face builds the same ones. No torch here.

Shape letters: B batch, H height, W width, L length, D embed, V vocabulary.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lsdl.models import bert, clip, efficientnet, gpt, regnet, resnet, vit

GOLDEN = Path(__file__).parents[1] / "golden"
LIMIT = 1e-4  # of max|a - b| / max|b|


@dataclass(frozen=True)
class Case:
    """One model. `golden`: small enough that its weights and outputs lie in tests/golden."""

    module: nn.Module
    cls: str  # in transformers
    settings: dict[str, Any]  # of its configuration, written by hand: not by lsdl's tables
    image: int = 0  # the side of the images, where it takes any
    length: int = 0  # of the tokens, where it takes any
    padding: int = 0  # tokens at the end of each sequence but the first that are padding
    parameters: int = 0  # the published number
    golden: bool = True


def _vit(**fields):
    """ViT's fields in their words."""
    names = dict(
        patch="patch_size",
        width="hidden_size",
        num_layers="num_hidden_layers",
        num_heads="num_attention_heads",
        mlp_dim="intermediate_size",
    )
    return {theirs: fields[ours] for ours, theirs in names.items()}


VIT_SMALL = dict(patch=4, width=24, num_layers=2, num_heads=3, mlp_dim=40)
VIT_OTHER = dict(patch=3, width=16, num_layers=3, num_heads=2, mlp_dim=24)
DEIT_TI = vit.SIZES["ti16"]
GPT_SMALL = dict(width=24, num_layers=2, num_heads=3, mlp_dim=96)
GPT_WIDE = dict(width=32, num_layers=1, num_heads=4, mlp_dim=48)
LLAMA = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40)
LLAMA_SMALL = dict(form="llama", vocab_size=53, max_length=64, width=32, num_layers=2, num_heads=4)
LLAMA_SMALL |= dict(mlp_dim=40, activation="silu", norm_eps=1e-6)
LLAMA_1B = gpt.LLAMA_SIZES["1b"] | dict(num_layers=2)
CLIP_HF = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32)
CLIP_TEXT = CLIP_HF | dict(vocab_size=37, max_position_embeddings=10)
CLIP_IMAGE = CLIP_HF | dict(hidden_size=16, num_attention_heads=2, image_size=12, patch_size=4)
CLIP_SMALL = dict(
    embed_dim=12,
    vocab_size=37,
    vocab_padded=40,
    max_length=10,
    vision_patch=4,
    vision_width=16,
    vision_num_layers=2,
    vision_num_heads=2,
    vision_mlp_dim=32,
    text_width=24,
    text_num_layers=2,
    text_num_heads=3,
    text_mlp_dim=32,
)
B32 = clip.SIZES["b32"]

CASES = {
    "vit_class": Case(
        vit.Vit(**VIT_SMALL, num_classes=5, norm_eps=1e-12),
        "ViTForImageClassification",
        _vit(**VIT_SMALL) | dict(image_size=12, num_labels=5),
    ),
    "vit_tanh": Case(
        vit.Vit(**VIT_OTHER, num_classes=3, activation="gelu_tanh", norm_eps=1e-2),
        "ViTForImageClassification",
        _vit(**VIT_OTHER)
        | dict(image_size=15, num_labels=3, hidden_act="gelu_new", layer_norm_eps=1e-2),
    ),
    "vit_b16": Case(
        vit.Vit(**vit.SIZES["b16"], num_classes=1000, norm_eps=1e-12, scan_layers=True),
        "ViTForImageClassification",
        dict(num_labels=1000),
        parameters=86_567_656,
        golden=False,
    ),
    "deit_small": Case(
        vit.Vit(**VIT_SMALL, num_classes=5, pool="distill", norm_eps=1e-12),
        "DeiTForImageClassificationWithTeacher",
        _vit(**VIT_SMALL) | dict(image_size=12, num_labels=5),
    ),
    "deit_ti16": Case(
        vit.Vit(**DEIT_TI, num_classes=1000, pool="distill", norm_eps=1e-12, scan_layers=True),
        "DeiTForImageClassificationWithTeacher",
        _vit(**DEIT_TI) | dict(num_labels=1000),
        parameters=5_910_800,
        golden=False,
    ),
    "gpt2_small": Case(
        gpt.Gpt("gpt2", vocab_size=53, vocab_padded=64, max_length=40, **GPT_SMALL),
        "GPT2LMHeadModel",
        dict(vocab_size=53, n_positions=40, n_embd=24, n_layer=2, n_head=3),
        length=40,
    ),
    "gpt2_untied": Case(
        gpt.Gpt(
            "gpt2",
            vocab_size=48,
            vocab_padded=48,
            max_length=24,
            activation="gelu",
            norm_eps=1e-2,
            tied=False,
            **GPT_WIDE,
        ),
        "GPT2LMHeadModel",
        dict(vocab_size=48, n_positions=24, n_embd=32, n_layer=1, n_head=4, n_inner=48)
        | dict(activation_function="gelu", layer_norm_epsilon=1e-2, tie_word_embeddings=False),
        length=20,
    ),
    "gpt2_124m": Case(
        gpt.Gpt(
            "gpt2",
            vocab_size=50257,
            vocab_padded=50304,
            max_length=1024,
            scan_layers=True,
            **gpt.GPT2_SIZES["124m"],
        ),
        "GPT2LMHeadModel",
        {},
        length=64,
        parameters=124_439_808,
        golden=False,
    ),
    "llama_grouped": Case(
        gpt.Gpt(**LLAMA_SMALL, vocab_padded=64, kv_heads=2, tied=False),
        "LlamaForCausalLM",
        LLAMA | dict(vocab_size=53, num_key_value_heads=2),
        length=40,
    ),
    "llama_single": Case(
        gpt.Gpt(**LLAMA_SMALL, vocab_padded=53, kv_heads=1, tied=True, rope_theta=500.0),
        "LlamaForCausalLM",
        LLAMA
        | dict(vocab_size=53, num_key_value_heads=1, tie_word_embeddings=True)
        | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        length=32,
    ),
    "llama_all_heads": Case(
        gpt.Gpt(**LLAMA_SMALL | dict(norm_eps=1e-2), vocab_padded=56, tied=False),
        "LlamaForCausalLM",
        LLAMA | dict(vocab_size=53, rms_norm_eps=1e-2),
        length=16,
        golden=False,
    ),
    "llama_1b_width": Case(
        gpt.Gpt(
            "llama",
            vocab_size=1000,
            vocab_padded=1024,
            max_length=2048,
            activation="silu",
            tied=False,
            scan_layers=True,
            **LLAMA_1B,
        ),
        "LlamaForCausalLM",
        dict(vocab_size=1000, hidden_size=2048, intermediate_size=8192, num_hidden_layers=2)
        | dict(num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5),
        length=64,
        golden=False,
    ),
    "bert_small": Case(
        bert.Bert(vocab_size=53, vocab_padded=64, max_length=20, **GPT_SMALL),
        "BertForMaskedLM",
        dict(vocab_size=53, max_position_embeddings=20, hidden_size=24, intermediate_size=96)
        | dict(num_hidden_layers=2, num_attention_heads=3),
        length=20,
        padding=7,
    ),
    "bert_relu": Case(
        bert.Bert(
            vocab_size=48,
            vocab_padded=48,
            max_length=24,
            activation="relu",
            norm_eps=1e-2,
            **GPT_WIDE,
        ),
        "BertForMaskedLM",
        dict(vocab_size=48, max_position_embeddings=24, hidden_size=32, intermediate_size=48)
        | dict(num_hidden_layers=1, num_attention_heads=4, hidden_act="relu")
        | dict(layer_norm_eps=1e-2),
        length=18,
    ),
    "bert_base": Case(
        bert.Bert(
            vocab_size=30522,
            vocab_padded=30592,
            max_length=512,
            scan_layers=True,
            **bert.SIZES["base"],
        ),
        "BertForMaskedLM",
        {},
        length=64,
        padding=20,
        parameters=109_514_298,
        golden=False,
    ),
    "clip_quick": Case(
        clip.Clip(**CLIP_SMALL),
        "CLIPModel",
        dict(text_config=CLIP_TEXT | dict(eos_token_id=36), vision_config=CLIP_IMAGE)
        | dict(projection_dim=12),
    ),
    "clip_gelu": Case(
        clip.Clip(**CLIP_SMALL, activation="gelu", norm_eps=1e-2),
        "CLIPModel",
        dict(
            text_config=CLIP_TEXT | dict(eos_token_id=2, hidden_act="gelu", layer_norm_eps=1e-2),
            vision_config=CLIP_IMAGE | dict(hidden_act="gelu", layer_norm_eps=1e-2),
            projection_dim=12,
        ),
    ),
    "clip_b32": Case(
        clip.Clip(**B32, vocab_size=49408, vocab_padded=49408, max_length=77, scan_layers=True),
        "CLIPModel",
        {},
        parameters=151_277_313,
        golden=False,
    ),
    "resnet_basic": Case(
        resnet.ResNet((2, 1, 2), width=8, num_classes=5),
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[2, 1, 2], layer_type="basic")
        | dict(num_labels=5),
        image=33,
    ),
    "resnet_bottleneck": Case(
        resnet.ResNet((2, 2), width=8, num_classes=5, block="bottleneck"),
        "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[32, 64], depths=[2, 2], num_labels=5),
        image=32,
    ),
    "resnet_50": Case(
        resnet.ResNet(**resnet.SIZES["50"], num_classes=1000),
        "ResNetForImageClassification",
        dict(num_labels=1000),
        image=96,
        parameters=25_557_032,
        golden=False,
    ),
    "regnet_y": Case(
        regnet.RegNet((1, 2), (16, 24), group_width=8, num_classes=5),
        "RegNetForImageClassification",
        dict(hidden_sizes=[16, 24], depths=[1, 2], groups_width=8, num_labels=5),
        image=32,
    ),
    "regnet_x": Case(
        regnet.RegNet((2, 1), (16, 24), group_width=4, num_classes=5, excite=False),
        "RegNetForImageClassification",
        dict(hidden_sizes=[16, 24], depths=[2, 1], groups_width=4, num_labels=5, layer_type="x"),
        image=33,
    ),
    "regnet_y_400mf": Case(
        regnet.RegNet(**regnet.SIZES["y_400mf"], num_classes=1000),
        "RegNetForImageClassification",
        dict(hidden_sizes=[48, 104, 208, 440], depths=[1, 3, 6, 6], groups_width=8)
        | dict(num_labels=1000),
        image=64,
        parameters=4_344_144,
        golden=False,
    ),
    "efficientnet_thin": Case(
        efficientnet.EfficientNet(5, width_factor=0.28, depth_factor=0.2),
        "EfficientNetForImageClassification",
        dict(width_coefficient=0.28, depth_coefficient=0.2, hidden_dim=360, num_labels=5),
        image=32,
    ),
    "efficientnet_wide": Case(
        efficientnet.EfficientNet(5, width_factor=0.3, depth_factor=0.6),
        "EfficientNetForImageClassification",
        dict(width_coefficient=0.3, depth_coefficient=0.6, hidden_dim=384, num_labels=5),
        image=64,
        golden=False,
    ),
    "efficientnet_b0": Case(
        efficientnet.EfficientNet(1000, **efficientnet.SIZES["b0"]),
        "EfficientNetForImageClassification",
        dict(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, num_labels=1000),
        image=64,
        parameters=5_288_548,
        golden=False,
    ),
}


def make_inputs(case: Case, image: int) -> dict[str, np.ndarray]:
    """Random arguments of the module, by name; `image` is the side where the model fixes it."""
    draw = np.random.default_rng(0)
    model = case.module
    image_BHWC = draw.standard_normal((2, *(case.image or image,) * 2, 3)).astype(np.float32)
    if isinstance(model, clip.Clip):
        length, last = model.max_length, model.vocab_size - 1
        caption_BL = draw.integers(0, last, (2, length), np.int32)
        caption_BL[0, -1] = caption_BL[1, length // 2] = last
        return {"image": image_BHWC, "caption": caption_BL}
    if not case.length:
        return {"image": image_BHWC}
    token_BL = draw.integers(0, model.vocab_size, (2, case.length), np.int32)
    if not case.padding:
        return {"token": token_BL}
    segment_BL = np.ones_like(token_BL)
    segment_BL[1:, -case.padding :] = 0
    return {"token": token_BL, "segment": segment_BL}


def outputs(module: nn.Module, weights: dict, inputs: dict[str, np.ndarray]) -> dict:
    """What the module says of `inputs`, in float32, under the names of the golden files."""

    @jax.jit
    def run(weights, *arguments):  # a dict would come in in another order
        variables = {"params": weights["params"], **weights["model_state"]}
        call = functools.partial(module.apply, variables, *arguments, train=False)
        with jax.default_matmul_precision("float32"):
            if isinstance(module, clip.Clip):
                return dict(zip(("image", "text", "scale"), call(), strict=False))
            if not isinstance(module, gpt.Gpt | bert.Bert):
                return {"logits": call()}
            hidden_BLD, table_VD, *bias_V = call()
            logits_BLV = hidden_BLD @ table_VD.T + sum(b[None, None] for b in bias_V)
            found = {"logits": logits_BLV[..., : module.vocab_size]}
            if isinstance(module, bert.Bert):
                found["hidden"] = call(features=True)
        if "segment" in inputs:
            real = arguments[1][..., None] > 0
            found = {name: jnp.where(real, value, 0) for name, value in found.items()}
        return found

    return jax.tree.map(np.asarray, run(weights, *inputs.values()))


def abstract(module: nn.Module, inputs: dict[str, np.ndarray]) -> dict:
    """The shapes of the module's weights."""
    make = functools.partial(module.init, train=False)
    variables = nn.unbox(jax.eval_shape(make, jax.random.key(0), *inputs.values()))
    return {"params": variables.pop("params"), "model_state": variables}


def difference(found: dict, expected: dict) -> float:
    """max|a - b| / max|b|, the largest over the outputs."""
    assert found.keys() == expected.keys()
    pairs = [(found[name], expected[name]) for name in expected]
    assert all(a.shape == b.shape and np.isfinite(a).all() for a, b in pairs)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def write_golden(name: str, *, versions: dict, settings: dict, **groups: dict) -> None:
    """Store arrays in `groups`, the versions that made them and their config.json."""
    flat = {f"{g}:{name}": value for g, group in groups.items() for name, value in group.items()}
    about = json.dumps({"versions": versions, "config": settings})
    np.savez_compressed(GOLDEN / f"parity_{name}.npz", about=about, **flat)


def read_golden(name: str) -> dict[str, dict]:
    """What `write_golden` stored: {"versions", "config", group: {name: array}}."""
    with np.load(GOLDEN / f"parity_{name}.npz") as file:
        stored = dict(file)
    golden = json.loads(str(stored.pop("about")))
    for key, value in stored.items():
        group, _, leaf = key.partition(":")
        golden.setdefault(group, {})[leaf] = value
    return golden
