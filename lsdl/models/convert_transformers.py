"""Hugging Face's names for the transformers: ViT, DeiT, GPT-2, LLaMA, BERT, CLIP.

Their tensor names are those of the files, which newer versions of transformers rename on loading.
"""

import math
from collections.abc import Iterator, Mapping

from lsdl.errors import UserError
from lsdl.models.bert import TOKEN_TYPES, Bert
from lsdl.models.clip import Clip
from lsdl.models.convert_rules import (
    CONV,
    DENSE,
    JOIN,
    LEADING,
    SAME,
    SPLIT,
    Counterpart,
    Field,
    Op,
    Rule,
    activation,
    dense,
    labels,
    norm,
    require,
    rows,
    rule,
)
from lsdl.models.gpt import Gpt
from lsdl.models.vit import CLASS_TOKENS, Vit

Shapes = Mapping[str, tuple[int, ...]]

# {a block's layer: theirs}.
VIT_BLOCK = {
    "attn_norm": "layernorm_before",
    "attn/query": "attention.attention.query",
    "attn/key": "attention.attention.key",
    "attn/value": "attention.attention.value",
    "attn/out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
BERT_BLOCK = {
    "attn_norm": "attention.output.LayerNorm",
    "attn/query": "attention.self.query",
    "attn/key": "attention.self.key",
    "attn/value": "attention.self.value",
    "attn/out": "attention.output.dense",
    "mlp_norm": "output.LayerNorm",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
CLIP_BLOCK = {
    "attn_norm": "layer_norm1",
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn/query": "self_attn.q_proj",
    "attn/key": "self_attn.k_proj",
    "attn/value": "self_attn.v_proj",
    "attn/out": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
}
GPT2_BLOCK = {
    "attn_norm": "ln_1",
    "attn/out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def _blocks(
    stack: str, theirs: str, number: int, names: Mapping, *, op: Op = DENSE, bias: bool = True
) -> Iterator[Rule]:
    for i in range(number):
        for ours, name in names.items():
            pair = f"{stack}/block_{i}/{ours}", f"{theirs}.{i}.{name}"
            if ours.endswith("norm"):
                yield from norm(*pair, bias=bias)
            else:
                yield from dense(*pair, op=op, bias=bias)


def _sizes(model: Vit | Bert) -> Iterator[Field]:
    """The fields that ViT, DeiT and BERT share."""
    yield Field("hidden_size", "model.width", model.width, 768)
    yield Field("num_hidden_layers", "model.num_layers", model.num_layers, 12)
    yield Field("num_attention_heads", "model.num_heads", model.num_heads, 12)
    yield Field("intermediate_size", "model.mlp_dim", model.mlp_dim, 3072)
    yield Field("hidden_act", "model.activation", activation(model.activation), "gelu")
    yield Field("layer_norm_eps", "model.norm_eps", model.norm_eps, 1e-12)


def _image(encoder: str, patch: int, class_tokens: int, shapes: Shapes) -> tuple[int, int]:
    """The side and the channels of the images that an encoder's arrays are made for."""
    patches = shapes[f"params/{encoder}/position"][0] - class_tokens
    side = math.isqrt(patches)
    require(side**2 == patches, "patch", patch, ["square images alone"])
    return side * patch, shapes[f"params/{encoder}/patches/kernel"][2]


def vit(model: Vit, shapes: Shapes) -> Counterpart:
    """ViT, or DeiT where there is a distillation token."""
    require(model.pool != "mean", "pool", model.pool, ("class", "distill"))
    require(not model.stem, "stem", model.stem, (0,))
    require(model.num_classes > 0, "num_classes", model.num_classes, ["1 or more"])
    distill = model.pool == "distill"
    kind = "deit" if distill else "vit"
    side, channels = _image("encoder", model.patch, CLASS_TOKENS[model.pool], shapes)
    tokens = [f"{kind}.embeddings.{name}" for name in ("cls_token", "distillation_token")]
    heads = (
        {"head": "cls_classifier", "distill_head": "distillation_classifier"}
        if distill
        else {"head": "classifier"}
    )
    rules = [
        Rule(("params/encoder/class",), tuple(tokens), JOIN)
        if distill
        else rule("params/encoder/class", tokens[0], LEADING),
        rule("params/encoder/position", f"{kind}.embeddings.position_embeddings", LEADING),
        *dense("encoder/patches", f"{kind}.embeddings.patch_embeddings.projection", op=CONV),
        *_blocks("encoder/stack", f"{kind}.encoder.layer", model.num_layers, VIT_BLOCK),
        *norm("encoder/norm", f"{kind}.layernorm"),
        *(r for ours, theirs in heads.items() for r in dense(ours, theirs)),
    ]
    fields = [
        *_sizes(model),
        Field("patch_size", "model.patch", model.patch, 16),
        Field("image_size", "the data's image size", side, 224),
        Field("num_channels", "the data's number of channels", channels, 3),
        Field("num_labels", "the data's number of classes", model.num_classes, 2),
        Field("qkv_bias", "lsdl's ViT", True, True),
    ]
    return Counterpart(
        "DeiTForImageClassificationWithTeacher" if distill else "ViTForImageClassification",
        kind,
        tuple(rules),
        tuple(fields),
        prefix=f"{kind}.",
        extra={"id2label": labels(model.num_classes)},
    )


def gpt(model: Gpt, shapes: Shapes) -> Counterpart:
    """GPT-2 or LLaMA, as the form says."""
    del shapes
    if model.num_experts:
        raise UserError(
            f"model.num_experts={model.num_experts} has no counterpart at Hugging Face that lsdl "
            "knows: models with num_experts=0 do."
        )
    return {"gpt2": _gpt2, "llama": _llama}[model.form](model)


def _tokens(model: Gpt) -> dict:
    """Beginning and end of text have a token where the vocabulary is the published one."""
    unknown = {"bos_token_id": None, "eos_token_id": None}
    return {} if model.vocab_size in (50257, 32000) else unknown


def _output(model: Gpt) -> Iterator[Rule]:
    if not model.tied:
        table = rows(model.vocab_size, model.vocab_padded)
        yield rule("params/output", "lm_head.weight", table)


def _gpt2(model: Gpt) -> Counterpart:
    table = rows(model.vocab_size, model.vocab_padded)
    rules = [
        rule("params/embedding", "transformer.wte.weight", table),
        rule("params/position", "transformer.wpe.weight"),
        # Their dense layers hold IO, as ours do.
        *_blocks("stack", "transformer.h", model.num_layers, GPT2_BLOCK, op=SAME),
        *norm("norm", "transformer.ln_f"),
        *_output(model),
    ]
    for i in range(model.num_layers):
        for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
            three = tuple(
                f"params/stack/block_{i}/attn/{n}/{ours}" for n in ["query", "key", "value"]
            )
            rules.append(Rule(three, (f"transformer.h.{i}.attn.c_attn.{theirs}",), SPLIT))
    fields = [
        Field("vocab_size", "model.vocab_size", model.vocab_size, 50257),
        Field("n_positions", "model.max_length", model.max_length, 1024),
        Field("n_embd", "model.width", model.width, 768),
        Field("n_layer", "model.num_layers", model.num_layers, 12),
        Field("n_head", "model.num_heads", model.num_heads, 12),
        Field("n_inner", "model.mlp_dim", model.mlp_dim, 4 * model.width),
        Field("activation_function", "model.activation", activation(model.activation), "gelu_new"),
        Field("layer_norm_epsilon", "model.norm_eps", model.norm_eps, 1e-5),
        Field("tie_word_embeddings", "model.tied", model.tied, True),
        Field("scale_attn_weights", "lsdl's GPT-2", True, True),
        Field("scale_attn_by_inverse_layer_idx", "lsdl's GPT-2", False, False),
        Field("add_cross_attention", "lsdl's GPT-2", False, False),
    ]
    dropout = {name: model.dropout for name in ("embd_pdrop", "resid_pdrop")}
    return Counterpart(
        "GPT2LMHeadModel",
        "gpt2",
        tuple(rules),
        tuple(fields),
        prefix="transformer.",
        ignored=r"\.attn\.(bias|masked_bias)$",
        tied={"lm_head.weight": "transformer.wte.weight"} if model.tied else {},
        extra=_tokens(model) | dropout | {"attn_pdrop": 0.0},
    )


def _llama(model: Gpt) -> Counterpart:
    table = rows(model.vocab_size, model.vocab_padded)
    rules = [
        rule("params/embedding", "model.embed_tokens.weight", table),
        *_blocks("stack", "model.layers", model.num_layers, LLAMA_BLOCK, bias=False),
        *norm("norm", "model.norm", bias=False),
        *_output(model),
    ]
    heads = model.num_heads
    fields = [
        Field("vocab_size", "model.vocab_size", model.vocab_size, 32000),
        Field("hidden_size", "model.width", model.width, 4096),
        Field("intermediate_size", "model.mlp_dim", model.mlp_dim, 11008),
        Field("num_hidden_layers", "model.num_layers", model.num_layers, 32),
        Field("num_attention_heads", "model.num_heads", heads, 32),
        Field("num_key_value_heads", "model.kv_heads", model.kv_heads or heads, heads),
        Field(
            "head_dim", "model.width / model.num_heads", model.width // heads, model.width // heads
        ),
        Field("hidden_act", "model.activation", activation(model.activation), "silu"),
        Field("rms_norm_eps", "model.norm_eps", model.norm_eps, 1e-6),
        Field("rope_parameters.rope_theta", "model.rope_theta", model.rope_theta, 10_000.0),
        Field("rope_parameters.rope_type", "lsdl's LLaMA", "default", "default"),
        Field("tie_word_embeddings", "model.tied", model.tied, False),
        Field("attention_bias", "lsdl's LLaMA", False, False),
        Field("mlp_bias", "lsdl's LLaMA", False, False),
    ]
    # Older versions of transformers read the base from there.
    theta = {"rope_theta": model.rope_theta, "max_position_embeddings": model.max_length}
    return Counterpart(
        "LlamaForCausalLM",
        "llama",
        tuple(rules),
        tuple(fields),
        prefix="model.",
        ignored=r"rotary_emb\.inv_freq$",
        tied={"lm_head.weight": "model.embed_tokens.weight"} if model.tied else {},
        extra=_tokens(model) | theta,
    )


def bert(model: Bert, shapes: Shapes) -> Counterpart:
    del shapes
    table = rows(model.vocab_size, model.vocab_padded)
    embeddings, head = "bert.embeddings", "cls.predictions"
    rules = [
        rule("params/embedding", f"{embeddings}.word_embeddings.weight", table),
        rule("params/position", f"{embeddings}.position_embeddings.weight"),
        rule("params/token_type", f"{embeddings}.token_type_embeddings.weight"),
        *norm("embed_norm", f"{embeddings}.LayerNorm"),
        *_blocks("stack", "bert.encoder.layer", model.num_layers, BERT_BLOCK),
        *dense("head_transform", f"{head}.transform.dense"),
        *norm("head_norm", f"{head}.transform.LayerNorm"),
        rule("params/head_bias", f"{head}.bias", table),
    ]
    fields = [
        *_sizes(model),
        Field("vocab_size", "model.vocab_size", model.vocab_size, 30522),
        Field("max_position_embeddings", "model.max_length", model.max_length, 512),
        Field("type_vocab_size", "lsdl's BERT", TOKEN_TYPES, 2),
        Field("tie_word_embeddings", "lsdl's BERT", True, True),
        Field("is_decoder", "lsdl's BERT", False, False),
    ]
    return Counterpart(
        "BertForMaskedLM",
        "bert",
        tuple(rules),
        tuple(fields),
        prefix="bert.",
        ignored=r"position_ids$|(^|\.)pooler\.|^cls\.seq_relationship\.",
        tied={
            f"{head}.decoder.weight": f"{embeddings}.word_embeddings.weight",
            f"{head}.decoder.bias": f"{head}.bias",
        },
        extra={"hidden_dropout_prob": model.dropout, "attention_probs_dropout_prob": 0.0},
    )


def clip(model: Clip, shapes: Shapes) -> Counterpart:
    require(not model.bias_init, "bias_init", model.bias_init, ("0.0 (the softmax loss)",))
    image, text = "vision_model", "text_model"
    table = rows(model.vocab_size, model.vocab_padded)
    reverse = Op(LEADING.write, LEADING.read)
    layers = "encoder.layers"
    rules = [
        rule("params/log_scale", "logit_scale"),
        rule("params/vision/class", f"{image}.embeddings.class_embedding", reverse),
        rule("params/vision/position", f"{image}.embeddings.position_embedding.weight"),
        *dense("vision/patches", f"{image}.embeddings.patch_embedding", op=CONV, bias=False),
        *norm("vision/embed_norm", f"{image}.pre_layrnorm"),
        *_blocks("vision/stack", f"{image}.{layers}", model.vision_num_layers, CLIP_BLOCK),
        *norm("vision/norm", f"{image}.post_layernorm"),
        *dense("vision_projection", "visual_projection", bias=False),
        rule("params/text/embedding", f"{text}.embeddings.token_embedding.weight", table),
        rule("params/text/position", f"{text}.embeddings.position_embedding.weight"),
        *_blocks("text/stack", f"{text}.{layers}", model.text_num_layers, CLIP_BLOCK),
        *norm("text/norm", f"{text}.final_layer_norm"),
        *dense("text_projection", "text_projection", bias=False),
    ]
    side, channels = _image("vision", model.vision_patch, 1, shapes)
    fields = [
        Field("projection_dim", "model.embed_dim", model.embed_dim, 512),
        Field("text_config.vocab_size", "model.vocab_size", model.vocab_size, 49408),
        Field("text_config.max_position_embeddings", "model.max_length", model.max_length, 77),
        Field("vision_config.patch_size", "model.vision_patch", model.vision_patch, 32),
        Field("vision_config.image_size", "the data's image size", side, 224),
        Field("vision_config.num_channels", "the data's number of channels", channels, 3),
        # By 2 they mean what lsdl does: a caption is read at its largest token.
        Field("text_config.eos_token_id", "lsdl's CLIP", 2, 2),
        *_tower(model, "text", 512, 12, 8, 2048),
        *_tower(model, "vision", 768, 12, 12, 3072),
    ]
    return Counterpart(
        "CLIPModel",
        "clip",
        tuple(rules),
        tuple(fields),
        extra={f"{tower}_config.projection_dim": model.embed_dim for tower in ("text", "vision")},
    )


def _tower(model: Clip, tower: str, *defaults: int) -> Iterator[Field]:
    names = {
        "width": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
    }
    for (ours, theirs), default in zip(names.items(), defaults, strict=True):
        own = f"{tower}_{ours}"
        yield Field(f"{tower}_config.{theirs}", f"model.{own}", getattr(model, own), default)
    act = activation(model.activation)
    yield Field(f"{tower}_config.hidden_act", "model.activation", act, "quick_gelu")
    yield Field(f"{tower}_config.layer_norm_eps", "model.norm_eps", model.norm_eps, 1e-5)
