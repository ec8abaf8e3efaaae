"""Hugging Face's names for the convolutional networks: ResNet, RegNet, EfficientNet."""

from collections.abc import Iterator, Mapping

from lsdl.models.convert_rules import (
    CONV,
    POINT,
    Counterpart,
    Field,
    Rule,
    batch_norm,
    dense,
    labels,
    require,
)
from lsdl.models.efficientnet import STAGES, EfficientNet, scaled_width
from lsdl.models.regnet import RegNet
from lsdl.models.resnet import ResNet

Shapes = Mapping[str, tuple[int, ...]]


def _layer(conv: str, normalised: str, theirs: str) -> Iterator[Rule]:
    yield from dense(conv, f"{theirs}.convolution", op=CONV, bias=False)
    yield from batch_norm(normalised, f"{theirs}.normalization")


def _blocks(depths: tuple[int, ...], kind: str) -> Iterator[tuple[str, str]]:
    for stage, depth in enumerate(depths):
        for i in range(depth):
            yield f"stage_{stage}_block_{i}", f"{kind}.encoder.stages.{stage}.layers.{i}"


def _shared(model: ResNet | RegNet | EfficientNet, shapes: Shapes) -> Iterator[Field]:
    require(model.num_classes > 0, "num_classes", model.num_classes, ["1 or more"])
    channels = shapes["params/stem/kernel"][2]
    yield Field("num_channels", "the data's number of channels", channels, 3)
    yield Field("num_labels", "the data's number of classes", model.num_classes, 2)


def resnet(model: ResNet, shapes: Shapes) -> Counterpart:
    require(model.stem == "imagenet", "stem", model.stem, ["imagenet"])
    blocks = ["basic", "bottleneck"]
    require(model.block in blocks, "block", model.block, blocks)
    require(model.widening == 1, "widening", model.widening, [1])
    require(model.shortcut == "projection", "shortcut", model.shortcut, ["projection"])
    require(model.norm == "batch", "norm", model.norm, ["batch"])
    bottleneck = model.block == "bottleneck"
    widths = [model.width * 2**i * (4 if bottleneck else 1) for i in range(len(model.depths))]
    rules = [*_layer("stem", "stem_norm", "resnet.embedder.embedder")]
    for ours, theirs in _blocks(model.depths, "resnet"):
        for i in range(3 if bottleneck else 2):
            rules += _layer(f"{ours}/conv_{i}", f"{ours}/norm_{i}", f"{theirs}.layer.{i}")
        if f"params/{ours}/shortcut/kernel" in shapes:
            rules += _layer(f"{ours}/shortcut", f"{ours}/shortcut_norm", f"{theirs}.shortcut")
    rules += dense("head", "classifier.1")
    fields = [
        *_shared(model, shapes),
        Field("embedding_size", "model.width", model.width, 64),
        Field("hidden_sizes", "model.width", widths, [256, 512, 1024, 2048]),
        Field("depths", "model.depths", list(model.depths), [3, 4, 6, 3]),
        Field("layer_type", "model.block", model.block, "bottleneck"),
        Field("hidden_act", "lsdl's ResNet", "relu", "relu"),
        Field("downsample_in_first_stage", "lsdl's ResNet", False, False),
        Field("downsample_in_bottleneck", "lsdl's ResNet", False, False),
    ]
    return Counterpart(
        "ResNetForImageClassification",
        "resnet",
        tuple(rules),
        tuple(fields),
        prefix="resnet.",
        extra={"id2label": labels(model.num_classes)},
    )


def regnet(model: RegNet, shapes: Shapes) -> Counterpart:
    rules = [*_layer("stem", "stem_norm", "regnet.embedder.embedder")]
    places = (0, 1, 3) if model.excite else (0, 1, 2)  # 2 is the squeeze and excitation
    for ours, theirs in _blocks(model.depths, "regnet"):
        for i, place in enumerate(places):
            rules += _layer(f"{ours}/conv_{i}", f"{ours}/conv_{i}_norm", f"{theirs}.layer.{place}")
        if model.excite:
            rules += dense(f"{ours}/excite/reduce", f"{theirs}.layer.2.attention.0", op=POINT)
            rules += dense(f"{ours}/excite/expand", f"{theirs}.layer.2.attention.2", op=POINT)
        if f"params/{ours}/shortcut/kernel" in shapes:
            rules += _layer(f"{ours}/shortcut", f"{ours}/shortcut_norm", f"{theirs}.shortcut")
    rules += dense("head", "classifier.1")
    fields = [
        *_shared(model, shapes),
        Field("embedding_size", "lsdl's RegNet", shapes["params/stem/kernel"][3], 32),
        Field("hidden_sizes", "model.widths", list(model.widths), [128, 192, 512, 1088]),
        Field("depths", "model.depths", list(model.depths), [2, 6, 12, 2]),
        Field("groups_width", "model.group_width", model.group_width, 64),
        Field("layer_type", "model.excite", "y" if model.excite else "x", "y"),
        Field("hidden_act", "lsdl's RegNet", "relu", "relu"),
        Field("downsample_in_first_stage", "lsdl's RegNet", True, True),
    ]
    return Counterpart(
        "RegNetForImageClassification",
        "regnet",
        tuple(rules),
        tuple(fields),
        prefix="regnet.",
        extra={"id2label": labels(model.num_classes)},
    )


def efficientnet(model: EfficientNet, shapes: Shapes) -> Counterpart:
    """Theirs pads as ours where every layer of stride 2 sees an even size (224 pixels, not 240)."""

    def layer(ours, conv, normalised):
        yield from dense(ours, conv, op=CONV, bias=False)
        yield from batch_norm(f"{ours}_norm", normalised)

    kind = "efficientnet"
    rules = [*layer("stem", f"{kind}.embeddings.convolution", f"{kind}.embeddings.batchnorm")]
    i = 0
    while f"params/block_{i}/project/kernel" in shapes:
        ours, theirs = f"block_{i}", f"{kind}.encoder.blocks.{i}"
        for name, their, conv, normalised in (
            ("expand", "expansion", "expand_conv", "expand_bn"),
            ("depthwise", "depthwise_conv", "depthwise_conv", "depthwise_norm"),
            ("project", "projection", "project_conv", "project_bn"),
        ):
            if f"params/{ours}/{name}/kernel" in shapes:
                pair = f"{theirs}.{their}.{conv}", f"{theirs}.{their}.{normalised}"
                rules += layer(f"{ours}/{name}", *pair)
        for name in ("reduce", "expand"):
            rules += dense(f"{ours}/excite/{name}", f"{theirs}.squeeze_excite.{name}", op=POINT)
        i += 1
    rules += layer("top", f"{kind}.encoder.top_conv", f"{kind}.encoder.top_bn")
    rules += dense("head", "classifier")
    expansions, channels, repeats, strides, sizes = (
        list(column) for column in zip(*STAGES, strict=True)
    )
    inputs = [32, *channels[:-1]]
    widths = [scaled_width(width, model.width_factor) for width in (32, *channels)]
    # They never add the input of a stage's first block.
    added = any(widths[i] == widths[i + 1] and strides[i] == 1 for i in range(len(strides)))
    require(not added, "width_factor", model.width_factor, ["0.28 and more"])
    own = "lsdl's EfficientNet"
    fields = [
        *_shared(model, shapes),
        Field("width_coefficient", "model.width_factor", model.width_factor, 2.0),
        Field("depth_coefficient", "model.depth_factor", model.depth_factor, 3.1),
        Field("hidden_dim", "model.width_factor", shapes["params/top/kernel"][3], 2560),
        Field("expand_ratios", own, expansions, [1, 6, 6, 6, 6, 6, 6]),
        Field("in_channels", own, inputs, [32, 16, 24, 40, 80, 112, 192]),
        Field("out_channels", own, channels, [16, 24, 40, 80, 112, 192, 320]),
        Field("num_block_repeats", own, repeats, [1, 2, 2, 3, 3, 4, 1]),
        Field("strides", own, strides, [1, 2, 2, 2, 1, 2, 1]),
        Field("kernel_sizes", own, sizes, [3, 3, 5, 3, 5, 5, 3]),
        Field("depth_divisor", own, 8, 8),
        Field("squeeze_expansion_ratio", own, 0.25, 0.25),
        Field("pooling_type", own, "mean", "mean"),
        Field("hidden_act", own, "silu", "silu"),
        Field("batch_norm_eps", own, 1e-3, 1e-3),
    ]
    rates = {"dropout_rate": model.dropout, "drop_connect_rate": model.drop_path}
    return Counterpart(
        "EfficientNetForImageClassification",
        kind,
        tuple(rules),
        tuple(fields),
        prefix="efficientnet.",
        extra={"id2label": labels(model.num_classes)} | rates,
    )
