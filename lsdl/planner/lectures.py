"""The numbers of the lectures, computed again from the models and the hardware table.

Where a lecture's number is another than the computed one, both are printed, and what the lecture's
is the number of. Letters as in the lectures' own rows: GPT-3, CLIP, ResNet-50, AlphaFold 2.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsdl.models import clip, resnet
from lsdl.models.alexnet import AlexNet
from lsdl.models.gpt import GPT3_SIZES, Gpt
from lsdl.planner import architecture, hardware

DAY_S = 24 * 3600
YEAR_S = 365.25 * DAY_S
GB = 1e9
GPT3_TOKENS = 300e9  # Brown et al. 2020, table 2.1
HALF_BYTES, STATE_BYTES = 2, 16  # of a parameter: float16; with mixed-precision Adam (ZeRO, 3.1)
V100_GB, A100_YEARS, V100_FLOPS_PER_S = 16, 90, 28e12
IMAGENET = 1_281_167  # training images


class Number(NamedTuple):
    """One number of the lectures."""

    what: str
    said: float | str | None  # None: the lectures have none, the row stands beside theirs
    computed: float
    unit: str
    how: str
    errs: str = ""  # what the lectures' number is, where it is not this one
    discrepancy: str = ""  # its number in docs/coverage.md


def numbers() -> list[Number]:
    """All of them, in the lectures' order."""
    parts = (_sizes, _data_sets, _memory, _compute, _training, _thresholds)
    return [number for part in parts for number in part()]


@functools.cache
def gpt3() -> architecture.Costs:
    """Of GPT-3 175B and a sequence of 2,048 tokens."""
    module = Gpt(
        form="gpt2",
        vocab_size=50_257,
        vocab_padded=50_257,
        max_length=2048,
        **GPT3_SIZES["175b"],
    )
    return architecture.gpt(module, 2048)


@functools.cache
def clip_costs(size: str, *, batch: int) -> architecture.Costs:
    """Of a CLIP model and a pair of an image of 224 x 224 and a caption of 77 tokens."""
    module = clip.Clip(vocab_size=49_408, vocab_padded=49_408, max_length=77, **clip.SIZES[size])
    return architecture.clip(module, (224, 224, 3), 77, batch=batch, form="softmax")


@functools.cache
def resnet50() -> architecture.Costs:
    """Of ResNet-50 and an image of 224 x 224."""
    return architecture.resnet(resnet.ResNet(**resnet.SIZES["50"], num_classes=1000), (224, 224, 3))


def _sizes() -> list[Number]:
    init = lambda: AlexNet(1000).init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=False)  # noqa: E731
    alexnet = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(jax.eval_shape(init)))
    l14 = clip_costs("l14", batch=1).parameters
    row = functools.partial(Number, unit="parameters")
    return [
        row("AlexNet", 60e6, alexnet, how="the model's own"),
        row("ResNet-50", 25e6, resnet50().parameters, how="closed form"),
        row(
            "CLIP ViT-L/14",
            600e6,
            l14,
            how="closed form",
            errs="a count that the published model does not have",
            discrepancy="D-04",
        ),
        row("GPT-3", 175e9, gpt3().parameters, how="closed form, as in the paper's table D.1"),
    ]


def _data_sets() -> list[Number]:
    pixels = lambda images, side: images * side**2 * 3  # noqa: E731
    return [
        Number(
            "ImageNet-1k",
            0.4e12,
            pixels(1.4e6, 224),
            "B",
            "1.4 M images x 224 x 224 x 3 B",
            "the size neither of raw images of that side nor of their JPEG files",
            "D-01",
        ),
        Number(
            "ImageNet-1k, images",
            1.4e6,
            IMAGENET + 50_000 + 100_000,
            "images",
            "1,281,167 for training, 50,000 for validation, 100,000 for the test",
            f"all splits together; a training sees {IMAGENET:,}",
        ),
        Number(
            "FFHQ",
            2.5e12,
            pixels(70e3, 1024),
            "B",
            "70 k images x 1024 x 1024 x 3 B",
            "the whole published bundle, not the 1,024-pixel images",
            "D-01",
        ),
        Number(
            "LAION-400M",
            400e6,
            413e6,
            "pairs",
            "Schuhmann et al. 2021, abstract: its name is rounded",
        ),
        Number(
            "LAION-5B",
            5e9,
            5.85e9,
            "pairs",
            "Schuhmann et al. 2022, abstract",
            "its name, rounded down",
        ),
        Number(
            "Big Fantastic Database",
            2.4e9,
            2_204_359_010,
            "sequences",
            "Jumper et al. 2021, supplement 1.2.4",
            "more than the paper's",
            "D-02",
        ),
    ]


def _memory() -> list[Number]:
    weights = HALF_BYTES * 175e9
    state = STATE_BYTES * 175e9
    cards = lambda nbytes: math.ceil(nbytes / (V100_GB * GB))  # noqa: E731
    return [
        Number(
            "GPT-3, half-precision weights",
            350e9,
            HALF_BYTES * gpt3().parameters,
            "B",
            "2 B a parameter",
        ),
        Number("V100 of 16 GB that hold them", 22, cards(weights), "GPUs", "350 GB / 16 GB"),
        Number(
            "GPT-3, memory for training",
            350e9,
            state,
            "B",
            "16 B a parameter: half-precision weights and gradients, float32 copy and two moments",
            "the weights alone, which is what it takes to run the model",
            "D-05",
        ),
        Number(
            "V100 of 16 GB for training",
            22,
            cards(state),
            "GPUs",
            "2.8 TB / 16 GB, activations left out",
            "those that hold the weights",
            "D-05",
        ),
    ]


def gpt3_flops() -> float:
    """Of GPT-3's training, 6 N D as in Brown et al. 2020, table D.1."""
    return 6 * gpt3().parameters * GPT3_TOKENS


def _compute() -> list[Number]:
    flops, a100 = gpt3_flops(), hardware.parse("gpu:a100-40:1x1").flops_per_s("bfloat16")
    v100 = hardware.parse("gpu:v100-16:1x1").flops_per_s("float16")
    implied = flops / (A100_YEARS * YEAR_S)
    attention = gpt3().model_flops() * GPT3_TOKENS / 2048
    percent = lambda rate, peak: f"{100 * rate / peak:.0f}% of {peak / 1e12:.0f} TFLOP/s"  # noqa: E731
    years = functools.partial(Number, unit="years")
    return [
        Number(
            "GPT-3, a training",
            3.14e23,
            flops,
            "FLOPs",
            f"6 x parameters x 300 G tokens; {attention:.3g} with attention and without lookups",
            "a number of operations, FLOPs, printed as the rate FLOPS",
            "D-06",
        ),
        years(
            "on one V100",
            355,
            flops / V100_FLOPS_PER_S / YEAR_S,
            how=f"at 28 TFLOP/s, {percent(V100_FLOPS_PER_S, v100)}",
        ),
        years(
            "on one A100",
            A100_YEARS,
            flops / 110.6e12 / YEAR_S,
            how=f"at 110.6 TFLOP/s, {percent(implied, a100)}",
        ),
        Number(
            "the rate that 90 A100-years stand for", None, implied, "FLOP/s", "FLOPs / 90 years"
        ),
        years("on one A100 at its peak", None, flops / a100 / YEAR_S, how="at 312 TFLOP/s"),
        Number(
            "on 2,000 A100",
            16,
            A100_YEARS * YEAR_S / 2000 / DAY_S,
            "days",
            "90 years / 2,000: as if scaling were perfect",
        ),
    ]


def _training() -> list[Number]:
    a100 = hardware.parse("gpu:a100-40:1x1").flops_per_s("bfloat16")
    v100 = hardware.parse("gpu:v100-16:1x1").flops_per_s("float16")
    tpu = hardware.parse("tpu:v3:8x8")
    pairs, gpus, batch = 34.5e9, 1480, 88_800
    gpu_s = gpus * 8 * DAY_S
    flops = clip_costs("g14", batch=batch).model_flops() * pairs
    mfu, gpt3_rate = flops / gpu_s / a100, gpt3_flops() / (A100_YEARS * YEAR_S)
    images = 90 * IMAGENET
    image_s = images / (20 * 3600)
    rate = image_s * resnet50().model_flops()
    days = 11
    return [
        Number(
            "openCLIP ViT-g/14, 34.5 G pairs on 1,480 A100",
            8,
            flops / (gpus * gpt3_rate) / DAY_S,
            "days",
            f"{flops:.3g} FLOPs, each GPU as fast as in 90 A100-years of GPT-3",
            f"at an MFU of {100 * mfu:.0f}%; GPT-3's is {100 * gpt3_rate / a100:.0f}%",
        ),
        Number("its MFU in 8 days", None, mfu, "", "FLOPs / (GPUs x time x peak)"),
        Number("its GPU-hours", None, gpu_s / 3600, "hours", "1,480 x 8 days"),
        Number("its pairs per second and GPU", None, pairs / gpu_s, "pairs/s", "34.5 G / GPU-time"),
        Number("its steps", None, pairs / batch, "steps", "34.5 G / 88,800 = 1,480 x 60"),
        Number(
            "ResNet-50, 90 epochs on one V100",
            20,
            images / 1270 / 3600,
            "hours",
            "at 1,270 images/s, NVIDIA's own figure for one V100 (DeepLearningExamples, 2021)",
            f"{image_s:,.0f} images/s, {rate / 1e12:.0f} TFLOP/s, "
            f"{100 * rate / v100:.0f}% of its peak",
        ),
        Number(
            "AlphaFold 2 on 128 TPU v3 cores",
            "few weeks",
            days,
            "days",
            "a week and four days of fine-tuning (Jumper et al. 2021)",
            "rounded up: 11 days",
            "D-03",
        ),
        Number(
            "its device-days",
            None,
            tpu.count * days,
            "device-days",
            f"{tpu.count} cores of {tpu.shape[0] * tpu.shape[1]} chips x {days} days; at most "
            f"{tpu.count * days * DAY_S * tpu.flops_per_s('bfloat16'):.2g} FLOPs",
        ),
    ]


def threshold(target: str, sizes: dict[str, int], axis: str) -> float:
    """Tokens of a device from which splitting a batch over `axis` is bound by products.

    Forward and backward products take 6 FLOPs a parameter and token, the gradients' reduction
    moves 6 bytes a parameter less a part: C / W, for a bidirectional ring C / 2W of a link.
    Source: Austin et al. 2025, How to Scale Your Model, chapters 5 and 12.
    """
    found = hardware.parse(target)
    return (
        found.flops_per_s("bfloat16") / hardware.link(found, sizes, axis).bytes_per_s["all-gather"]
    )


def _thresholds() -> list[Number]:
    row = functools.partial(Number, unit="tokens", said=None)
    book = "How to Scale Your Model has {}"
    return [
        row(
            "TPU v5p, tokens per device, data over one axis",
            computed=threshold("tpu:v5p:4x4x4", {"data": 4, "fsdp": 16}, "data"),
            how=book.format("2,550"),
        ),
        row(
            "TPU v5p, over three axes",
            computed=threshold("tpu:v5p:4x4x4", {"data": 64}, "data"),
            how=book.format("850"),
        ),
        row(
            "H100, within a node",
            computed=threshold("gpu:h100:1x8", {"data": 8}, "data"),
            how=book.format("2,200"),
        ),
        row(
            "H100, across nodes",
            computed=threshold("gpu:h100:4x8", {"data": 32}, "data"),
            how=book.format("2,475"),
        ),
        Number(
            "TPU v5p, tensor parallelism of an MLP of 28,672",
            None,
            28_672 / threshold("tpu:v5p:4x4x4", {"data": 16, "tensor": 4}, "tensor"),
            "ways",
            "mlp_dim / threshold: about 11",
        ),
    ]


# For people


def table() -> str:
    """All numbers, what the lectures say beside what was computed, and the differences."""
    lines = [("number", "lectures", "computed", "how")]
    notes = []
    for one in numbers():
        said = one.said or ""
        if isinstance(one.said, int | float):
            said = shown(one.said, one.unit)
        mark = ""
        if one.errs:
            named = f" ({one.discrepancy})" if one.discrepancy else ""
            notes.append(f"[{len(notes) + 1}] {one.what}: the lectures' {said}: {one.errs}{named}")
            mark = f" [{len(notes)}]"
        lines.append((one.what, said + mark, shown(one.computed, one.unit), one.how))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
    return "\n".join([*rows, "", *notes])


def shown(value: float, unit: str) -> str:
    """`350.00 GB`: `value` in `unit`, large ones shortened; a share without one as percent."""
    if not unit:
        return f"{100 * value:.1f}%"
    if unit in ("B", "FLOP/s"):
        number, prefix = f"{_decimal(value)} ".split(" ")[:2]
        return f"{number} {prefix}{unit}"
    if value >= 1e6:
        return f"{_decimal(value)} {unit}"
    return f"{value:,.{0 if value >= 100 or value == round(value) else 1}f} {unit}"


def _decimal(value: float) -> str:
    for power, prefix in (
        (24, "Y"),
        (21, "Z"),
        (18, "E"),
        (15, "P"),
        (12, "T"),
        (9, "G"),
        (6, "M"),
    ):
        if value >= 10**power:
            return f"{value / 10**power:.4g} {prefix}"
    return f"{value:.4g}"
