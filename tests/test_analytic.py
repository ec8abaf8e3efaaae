"""Closed forms against the programs: parameters, FLOPs, what a block keeps, bytes of a device."""

import dataclasses
import json
import math
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from jax.extend.core import jaxprs_in_params

from lsdl import experiment
from lsdl.models import attention
from lsdl.models.gpt import GPT3_SIZES
from lsdl.models.layers import ACTIVATIONS
from lsdl.models.transformer import Stack, Style
from lsdl.planner import activations, analytic, architecture, collectives, count, hardware, tree
from lsdl.planner.activations import Block, Split


@pytest.fixture
def built(load):
    """`built("gpt3:125m", "mesh=data=8", ..., devices=8)`: an experiment, on no devices."""

    def built(name, *overrides, devices=1):
        return experiment.build(load(name, "mesh=data=-1", *overrides), devices=devices)

    return built


def costs(of):
    return architecture.costs(of.module, of.abstract_batch, of.task)


# Parameters and FLOPs

FAMILIES = ("lm_llama:8b", "lm_bert:base", "imagenet_vit:b16", "cifar10_resnet", "clip:g14")
FAMILIES += ("cifar10_wrn:28-10",)
MORE_FAMILIES = [
    *(f"gpt3:{size}" for size in GPT3_SIZES),
    *("lm_gpt2:124m", "lm_llama:110m", "lm_llama:70b", "stdlib_gpt", "stdlib_gpt:experts"),
    *("digits_vit", "imagenet_resnet50", "digits_resnet", "clip:b32", "clip:b32,sigmoid"),
]


def check_parameters(of):
    assert costs(of).parameters == of.num_parameters


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_by_closed_form_are_those_of_the_state(built, name):
    check_parameters(built(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_FAMILIES)
def test_parameters_of_more_families(built, name):
    check_parameters(built(name))


def test_published_counts():
    """He et al. 2016 as counted everywhere; Brown et al. 2020, table 2.1."""
    from lsdl.models.resnet import SIZES, ResNet

    fifty = ResNet(**SIZES["50"], num_classes=1000)
    assert architecture.resnet(fifty, (224, 224, 3)).parameters == 25_557_032
    size = GPT3_SIZES["175b"]
    b = Block(size["width"], size["num_heads"], size["mlp_dim"], "gelu_tanh")
    stack = size["num_layers"] * architecture.layer_parameters(b, bias=True)
    assert stack + (50_257 + 2048 + 2) * b.width == 174_604_259_328


COUNTED = {
    "gpt2 form": ("gpt3:125m,smoke", "remat=full", "loss.chunk=128"),
    "ViT": ("digits_vit:smoke", "remat=full", "model.scan_layers=true"),
    "wide ResNet": ("cifar10_wrn:dropout,smoke", "remat=full"),
}
COUNTED_IN_FULL = {
    "GPT-3": ("gpt3:175b",),
    "GPT-2": ("lm_gpt2:124m", "remat=dots"),
    "LLaMA": ("lm_llama:8b",),
    "ViT-B/16": ("imagenet_vit:b16",),
    "DeiT": ("imagenet_vit:b16", "model.pool=distill", "model.stem=2", "remat=full"),
    "BERT": ("lm_bert:base", "remat=full"),
    "ResNet-50": ("imagenet_resnet50",),
    "ResNet-50, computed again": ("imagenet_resnet50", "remat=full"),
    "ResNet-20": ("cifar10_resnet",),
    "WRN-16-4": ("cifar10_wrn:16-4",),
    "CLIP B/32": ("clip:b32",),
    "CLIP g/14": ("clip:g14",),
    "SigLIP": ("clip:b32,sigmoid",),
    "mixture": ("stdlib_gpt:experts", "remat=full"),
    "CLIP of digits": ("digits_clip:smoke",),
}


def check_flops(of):
    flops = count.count(of.train_step.trace(of.abstract_state, of.abstract_batch))
    again = count.recomputed(flops)
    found = costs(of)
    assert found.model_flops() * of.batch_size == pytest.approx(flops.total() - again, rel=1e-4)
    estimated = analytic.estimate(of, hardware.parse("cpu:1"))
    assert estimated["recomputed_flops_per_example"] * of.batch_size == pytest.approx(
        again, rel=1e-4
    )
    assert estimated["model_flops_per_example"] == round(found.model_flops())


@pytest.mark.parametrize("name", COUNTED)
def test_flops_are_those_counted_in_the_program(built, name):
    check_flops(built(*COUNTED[name]))


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED_IN_FULL)
def test_flops_are_those_counted_in_full_sized_programs(built, name):
    check_flops(built(*COUNTED_IN_FULL[name]))


def test_flops_of_the_textbook(built):
    """6 N and 12 N_layers L D a token (Chowdhery et al. 2022, appendix B); half of that causal."""
    of = built("gpt3:175b")
    layers, width, length = 96, 12288, 2048
    found = costs(of)
    multiplied = 12 * layers * width**2 + 50_304 * width
    attention = 12 * layers * length * width
    assert found.model_flops() == length * (6 * multiplied + attention)
    assert found.model_flops(causal=True) == length * (6 * multiplied + attention / 2)
    assert found.forward_flops() * 3 == found.model_flops()


def test_what_only_the_program_tells_is_none(built):
    found = costs(built("gpt3:125m"))
    assert found.recomputed_flops("names:attn_out", chunked=False) is None
    assert found.recomputed_flops("none", chunked=False) == 0


# What a block keeps


WIDE, HEADS, MLP, LAYERS, ROWS, LENGTH = 32, 4, 48, 3, 5, 8


def kept(style, dtype, dropout, attend=None):
    """(bytes that a scanned stack keeps of its examples, numbers that it keeps of its kernels)."""
    sizes = LAYERS, HEADS, MLP, dropout, jnp.dtype(dtype), style
    stack = Stack(*sizes, scan_layers=True, attention=attend)
    x_BLD = jnp.zeros((ROWS, LENGTH, WIDE), dtype)
    keys = {"dropout": jax.random.key(1)}
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), x_BLD, train=False))

    def loss(params, x_BLD):
        return stack.apply(params, x_BLD, train=True, rngs=keys)[0].astype(jnp.float32).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x_BLD).jaxpr
    forward = next(scans(jaxpr))
    outs = [out.aval for out in forward.outvars if out.aval.shape[:1] == (LAYERS,)]
    of_examples = [out for out in outs if ROWS in out.shape]
    kernels = [out for out in outs if ROWS not in out.shape and out.size > LAYERS * MLP]
    return (
        sum(out.size * out.dtype.itemsize for out in of_examples),
        sum(out.size for out in kernels),
    )


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


STYLES = {
    "gpt2": dict(activation="gelu_tanh", norm_eps=1e-5, causal=True),
    "llama": dict(activation="silu", norm_eps=1e-5, norm="rms", gated=True, bias=False)
    | dict(kv_heads=2, rope_theta=1e4, causal=True),
    "bert": dict(activation="gelu", norm_eps=1e-12, post_norm=True),
    **{name: dict(activation=name, norm_eps=1e-6) for name in ACTIVATIONS},
    "gated tanh": dict(activation="tanh", norm_eps=1e-6, gated=True),
    "gated gelu": dict(activation="gelu", norm_eps=1e-6, gated=True),
}


def check_lines(name, dtype, attend=None):
    style = Style(**STYLES[name])
    dropout = 0.1 if name == "bert" else 0.0
    b = Block(
        *(WIDE, HEADS, MLP, style.activation),
        kv_heads=style.kv_heads,
        norm=style.norm,
        gated=style.gated,
        dropout=dropout > 0,
        kernel=attend is not None,
    )
    itemsize = jnp.dtype(dtype).itemsize
    lines = activations.block(b, LENGTH, itemsize)
    nbytes, kernels = kept(style, dtype, dropout, attend)
    assert LAYERS * sum(line.nbytes(ROWS * LENGTH, Split()) for line in lines) == nbytes
    assert len({line.what for line in lines}) == len(lines)
    assert LAYERS * activations.kept_weights(b, itemsize) == kernels


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("gpt2", "float32"), ("llama", "bfloat16"), ("bert", "float32"), ("quick_gelu", "float32")],
)
def test_a_block_keeps_what_the_lines_say(name, dtype):
    check_lines(name, dtype)


def test_with_a_kernel_a_block_keeps_no_scores():
    with mock.patch.object(fused_attention_stablehlo, "check_cudnn_version", return_value=91_000):
        check_lines("llama", "bfloat16", attention.cudnn)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", STYLES)
def test_a_block_of_any_style_keeps_what_the_lines_say(name, dtype):
    check_lines(name, dtype)


# Bytes of a device

LAYOUTS = {
    "dp": "data=8",
    "fsdp": "fsdp=8",
    "tp_sp": "data=2,tensor=4",
    "fsdp_tp": "fsdp=4,tensor=2",
}


def check_bytes(load, name, rules, remat, *overrides):
    """State to the byte; activations, which are temporary bytes but gradients, within 15%.

    Of the float32 program that XLA compiles for 8 CPUs, the batch and length those of the config.
    """
    config = load(
        *(name, f"mesh={LAYOUTS[rules]}", f"rules={rules}", f"remat={remat}", "precision=float32"),
        *overrides,
    )
    of = experiment.build(config, devices=jax.devices())
    found = analytic.estimate(of, hardware.parse("cpu:8"))["memory"]
    step = of.train_step.lower(of.abstract_state, of.abstract_batch)
    compiled = step.compile(collectives.QUICK).memory_analysis()
    assert found["state_bytes"] + found["batch_bytes"] == compiled.argument_size_in_bytes
    took = compiled.temp_size_in_bytes - found["gradient_bytes"]
    assert found["activation_bytes"] == pytest.approx(took, rel=0.15)


SHORT = ("batch_size=32", "data.seq_len=512", "model.max_length=512")


def test_bytes_of_a_device_are_those_compiled(load):
    # At its own length: with 512 tokens gradients are a fifth, and lie where activations were.
    check_bytes(load, "gpt3:125m", "tp_sp", "full", "batch_size=16")


@pytest.mark.slow
@pytest.mark.parametrize("rules", LAYOUTS)
def test_bytes_of_the_llama_form_are_those_compiled(load, rules):
    check_bytes(load, "lm_llama:110m", rules, "none", *SHORT, "data.segments=false")


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("rules", LAYOUTS)
@pytest.mark.parametrize("size", ["125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b"])
def test_bytes_of_gpt3_are_those_compiled(load, size, rules, remat):
    check_bytes(load, f"gpt3:{size}", rules, remat)


def test_moments_by_hand():
    """A block of width 2, 1 head and mlp 4 over 3 tokens, two layers, nothing split."""
    b = Block(2, 1, 4, "gelu", norm="rms")
    given = dict(layers=2, length=3, tokens=3, itemsize=4, split=Split(), vocab=5)
    norms = 2 * (3 * 2 + 2 + 2)
    attention = 2 + 4 + 3 + 3 + 2 + 2
    mlp = 2 * 4
    one = 4 * 3 * (norms + attention + mlp)
    none = activations.moments(b, remat="none", **given)
    full = activations.moments(b, remat="full", **given)
    assert none.saved == 2 * one
    assert full.saved == 2 * (4 * 3 * 2)
    assert (none.weights, full.weights) == (2 * 4 * 2 * 6, 0)
    scores, hidden, wide = 4 * 3 * 3, 4 * 3 * 2, 4 * 3 * 4
    own = 4 * 3 * (norms / 2 + attention)
    assert none.attention == full.attention == own + 1.75 * scores + 3 * hidden
    assert none.mlp == 4 * 3 * (norms / 2 + mlp) + 2 * wide + 3 * hidden
    assert full.mlp == own + 4 * 3 * norms / 2 + 4 * wide + 3 * hidden
    assert none.loss == 3 * (3 * 5 * 4) + 2 * 5 * 2 * 4 + 6 * hidden
    fewer = activations.moments(b, remat="full", chunk=1, **given)
    assert fewer.loss == none.loss - 3 * (3 * 5 * 4) + 5 * (1 * 5 * 4)
    assert none.peak == none.weights + none.saved + max(none[2:])
    split = activations.moments(b, remat="full", **given | {"split": Split(2, 1, 1, 1, 1)})
    assert split.saved == full.saved / 2
    assert full.attention - split.attention == 4 * 3 * (norms / 2) / 2


def test_the_rules_split_the_tensors(built):
    for rules, mesh, expected in (
        ("dp", "data=8", Split(8, 8, 8, 8, 8, 8, 1, 1)),
        ("fsdp", "fsdp=8", Split(8, 8, 8, 8, 8, 8, 1, 8)),
        ("tp", "data=2,tensor=4", Split(2, 2, 8, 8, 8, 8, 4, 4)),
        ("tp_sp", "data=2,tensor=4", Split(8, 2, 8, 8, 8, 8, 4, 4)),
        ("fsdp_tp", "fsdp=4,tensor=2", Split(4, 4, 8, 8, 8, 8, 2, 8)),
    ):
        of = built("gpt3:125m", f"mesh={mesh}", f"rules={rules}", devices=8)
        b, length = analytic.memory.stack_of(of, hardware.parse("cpu:8"))
        assert analytic.memory.split_of(of, b, length) == expected, rules


# The estimate


def test_times_and_money_by_hand(built):
    """The 175 B model on 1,024 v5p, as README plans it."""
    of = built("gpt3:175b", "mesh=data=4,fsdp=64,tensor=4", devices=1024)
    found = analytic.estimate(of, hardware.parse("tpu:v5p:8x8x16"), price_per_device_hour=2.0)
    assert found["parameters"] == 174_604_259_328
    flops = found["model_flops_per_example"] + found["recomputed_flops_per_example"]
    assert found["compute_s"] == pytest.approx(1536 * flops / (1024 * 459e12))
    assert found["network_s"] == pytest.approx(sum(row["time_s"] for row in found["traffic"]))
    bounds = collectives.lower_bounds(of)
    assert {(row["kind"], row["axis"]): row["wire_bytes"] for row in found["traffic"]} == {
        key: round(nbytes) for key, nbytes in bounds.items()
    }
    fsdp = 2 * 2 * 90e9  # two torus dims, both ways
    (gather,) = (row for row in found["traffic"] if row["kind"] == "all-gather")
    assert gather["time_s"] == pytest.approx(bounds["all-gather", "fsdp"] / fsdp)
    parts = [found[f"{part}_s"] for part in ("compute", "memory", "network")]
    assert found["binds"] == "compute"
    assert found["step_s"] == pytest.approx([max(parts), sum(parts)])
    tokens = 1536 * 2048
    assert found["units_per_s"] == pytest.approx([tokens / sum(parts), tokens / max(parts)])
    peak = 1024 * 459e12
    ceiling = 1536 * found["model_flops_per_example"] / max(parts) / peak
    assert found["mfu"][1] == pytest.approx(ceiling)
    assert found["mfu_causal"][1] < ceiling
    assert found["hfu"][1] == pytest.approx(1.0)  # compute binds, at its peak
    hours = [95_368 * step / 3600 for step in found["step_s"]]
    assert found["run"]["device_hours"] == pytest.approx([1024 * h for h in hours], rel=1e-4)
    assert found["run"]["money"] == pytest.approx([2 * 1024 * h for h in hours], rel=1e-4)
    assert found["run"]["days"] == pytest.approx([h / 24 for h in hours], rel=1e-4)
    assert found["memory"]["fits"]
    assert json.loads(json.dumps(found)) == found
    text = analytic.table(found)
    for words in (
        "1,024 x TPU v5p",
        "174,604,259,328",
        "compute binds",
        "fits in 95.00 GiB",
        "at 2",
    ):
        assert words in text


def test_what_does_not_fit_says_so(built):
    of = built("gpt3:6.7b", "mesh=data=8", devices=8)
    found = analytic.estimate(of, hardware.parse("gpu:h100:1x8"))
    memory = found["memory"]
    assert memory["fits"] is False
    parts = ("state_bytes", "batch_bytes", "gradient_bytes", "activation_bytes")
    assert memory["total_bytes"] == sum(memory[part] for part in parts)
    assert "does NOT fit in 79.11 GiB" in analytic.table(found)
    pieces = analytic.estimate(dataclasses.replace(of, accum=8), hardware.parse("gpu:h100:1x8"))[
        "memory"
    ]
    assert pieces["activation_bytes"] < memory["activation_bytes"] / 6
    assert pieces["sum_bytes"] == pieces["gradient_bytes"] == memory["gradient_bytes"]
    # Once the activations are gone the gradients are there twice.
    pieces["activation_bytes"] = max(pieces["activation_bytes"], pieces["gradient_bytes"])
    assert pieces["total_bytes"] == sum(pieces[part] for part in (*parts, "sum_bytes"))


def test_moved_bytes_by_hand(built):
    of = built("digits_mlp", "mesh=data=2", "model.hidden=(24,)", devices=2)
    state = tree.device_bytes(of.abstract_state)
    gradients = tree.device_bytes(of.abstract_gradients)
    assert analytic.memory.moved_bytes(of, hardware.parse("cpu:1")) == 2 * state + 5 * gradients


def test_whole_parameters_are_gathered_where_the_batch_splits_them(built):
    whole = lambda *o: analytic.memory.whole_parameter_bytes(built("gpt3:125m", *o, devices=8), 2)  # noqa: E731
    one = whole("mesh=data=8")
    assert one == whole("mesh=fsdp=8", "rules=fsdp") == 2 * (125_226_240 + 47 * 768)
    # But for norms, positions and two biases of each block.
    rest = 2 * ((2 * 12 + 1) * 2 * 768 + 2048 * 768 + 12 * 2 * 768)
    assert whole("mesh=data=2,tensor=4", "rules=tp") == (one - rest) / 4 + rest


def test_what_no_closed_form_tells_is_none_and_said(built):
    of = built("digits_mlp", "mesh=data=8", devices=8)
    found = analytic.estimate(of, hardware.parse("cpu:8"))
    assert found["model_flops_per_example"] is None
    assert found["memory"]["activation_bytes"] is None
    assert found["memory"]["fits"] is None
    assert found["step_s"] is None
    assert found["run"] is None
    words = " ".join(found["notes"])
    for expected in ("Mlp has no closed form", "activations have no", "published a peak of CPU"):
        assert expected in words
    assert "no closed form" in analytic.table(found)
    vit = built("digits_vit:smoke", "mesh=data=2,tensor=2,sequence=2", devices=8)
    found = analytic.estimate(vit, hardware.parse("gpu:a100:1x8"))
    assert found["memory"]["activation_bytes"] is None
    assert "what tensor=2 sends in this model is not known" in " ".join(found["notes"])


def test_bfloat16_runs_on_v100_at_the_peak_of_float16(built):
    of = built("imagenet_resnet50", "precision=bfloat16")
    found = analytic.estimate(of, hardware.parse("gpu:v100:1x1"))
    assert found["dtype"] == "float16"
    assert math.isclose(found["compute_s"], 256 * found["model_flops_per_example"] / 125e12)
    assert "has no bfloat16" in " ".join(found["notes"])
