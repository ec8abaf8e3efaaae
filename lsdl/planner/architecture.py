"""Parameters and FLOPs of the architectures whose sizes tell them: closed forms, to check by hand.

FLOPs are of one example's forward pass, two for each multiply-add of a product, nothing for all
else, as planner/count.py counts them in the traced program. The backward pass takes twice as many,
but for a product whose input needs no gradient: once.
Source: Kaplan et al. 2020, table 1; Chowdhery et al. 2022, appendix B (6 N and 12 L H Q T a token).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lsdl.models.bert import TOKEN_TYPES, Bert
from lsdl.models.clip import Clip
from lsdl.models.gpt import Gpt
from lsdl.models.moe import Experts
from lsdl.models.resnet import ResNet
from lsdl.models.vit import CLASS_TOKENS, Vit
from lsdl.planner.activations import Block


class Product(NamedTuple):
    """Matrix products or convolutions of one kind."""

    what: str
    forward_flops: float  # of an example
    first: bool = False  # its input is data: no gradient goes there
    again: str = ""  # what makes its forward pass run twice: full (remat of its block) | chunk
    causal: bool = False  # half of it is masked


@dataclass(frozen=True)
class Costs:
    """Of one architecture, and an example of one size."""

    parameters: int  # a vocabulary's padding left out
    products: tuple[Product, ...]

    def forward_flops(self) -> float:
        """Of an example."""
        return sum(one.forward_flops for one in self.products)

    def model_flops(self, *, causal: bool = False) -> float:
        """Forward and backward of an example; `causal`: only the half that a mask leaves."""
        return sum(
            one.forward_flops * (2 if one.first else 3) / (2 if causal and one.causal else 1)
            for one in self.products
        )

    def recomputed_flops(self, remat: str, *, chunked: bool) -> float | None:
        """What rematerialisation adds; None where only the program tells.

        full: the products of a block but the last, whose result no backward pass needs. dots: the
        results are kept. Logits made in chunks are made twice, whatever `remat` is.
        """
        if remat not in ("none", "full", "dots"):
            return None
        kinds = ("full",) * (remat == "full") + ("chunk",) * chunked
        return sum(one.forward_flops for one in self.products if one.again in kinds)


def layer_parameters(b: Block, *, bias: bool) -> int:
    """Of one transformer block: attention, MLP and two norms."""
    ways = 2 if b.gated else 1
    kernels = b.width * (2 * b.width + 2 * b.kv_width + (ways + 1) * b.mlp_dim)
    biases = 3 * b.width + 2 * b.kv_width + ways * b.mlp_dim
    return kernels + biases * bias + 2 * b.width * {"layer": 2, "rms": 1}[b.norm]


def layers(
    b: Block, number: int, length: float, *, causal: bool = False, experts: Experts | None = None
) -> list[Product]:
    """The products of `number` blocks, of an example of `length` tokens."""
    tokens, width = number * length, b.width
    ways = 2 if b.gated else 1
    slots = 1.0
    mixture = []
    if experts:  # all slots are computed, full or empty
        slots = experts.number * experts.capacity(length) / length
        mixture = [Product("routers", 2 * tokens * width * experts.number, again="full")]
    kernels = width * (2 * width + 2 * b.kv_width)
    wide = 2 * tokens * slots * width * b.mlp_dim
    last = "full" if b.post_norm or experts else ""
    return [
        Product("queries, keys, values, output", 2 * tokens * kernels, again="full"),
        Product("attention", 4 * tokens * length * width, again="full", causal=causal),
        *mixture,
        Product("MLP, but its last product", ways * wide, again="full"),
        Product("MLP, its last product", wide, again=last),
    ]


def _experts_parameters(b: Block, experts: Experts, *, bias: bool) -> int:
    """Of a block's mixture beyond those of one MLP."""
    ways = 2 if b.gated else 1
    mlp = (ways + 1) * b.width * b.mlp_dim + bias * (ways * b.mlp_dim + b.width)
    return (experts.number - 1) * mlp + b.width * experts.number


def gpt(module: Gpt, length: int) -> Costs:
    """A decoder of `length` tokens, its logits included."""
    b, experts = block_of(module), module.make_style().experts
    gpt2 = module.form == "gpt2"
    each = layer_parameters(b, bias=gpt2)
    if experts:
        each += _experts_parameters(b, experts, bias=gpt2)
    tables = module.vocab_size * (1 if module.tied else 2) + (module.max_length if gpt2 else 0)
    norm = module.width * (2 if gpt2 else 1)
    logits = 2 * length * module.width * module.vocab_padded
    return Costs(
        tables * module.width + module.num_layers * each + norm,
        (
            *layers(b, module.num_layers, length, causal=True, experts=experts),
            Product("logits", logits, again="chunk"),
        ),
    )


def bert(module: Bert, length: int) -> Costs:
    """An encoder of `length` tokens with the masked-language head."""
    b, width = block_of(module), module.width
    rows = module.vocab_size + module.max_length + TOKEN_TYPES
    ends = 2 * width + (width**2 + width) + 2 * width + module.vocab_size
    return Costs(
        rows * width + module.num_layers * layer_parameters(b, bias=True) + ends,
        (
            *layers(b, module.num_layers, length),
            Product("head", 2 * length * width**2),
            Product("logits", 2 * length * width * module.vocab_padded, again="chunk"),
        ),
    )


def _encoder(
    b: Block, number: int, image: Sequence[int], *, patch: int, classes: int, stem: int = 0
) -> Costs:
    """An image's: stem, patches, class tokens, blocks and the norm after them."""
    height, wide, channels = image
    patches = (height // patch) * (wide // patch)
    length, width = patches + classes, b.width
    convolutions, parameters, inputs = [], 0, channels
    for i in range(stem):
        kernel = 9 * inputs * width
        parameters += kernel + width
        convolutions.append(Product("stem", 2 * height * wide * kernel, first=i == 0))
        inputs = width
    kernel = patch**2 * inputs * width
    parameters += kernel + width + (classes + length) * width + 2 * width
    return Costs(
        parameters + number * layer_parameters(b, bias=True),
        (
            *convolutions,
            Product("patches", 2 * patches * kernel, first=not stem),
            *layers(b, number, length),
        ),
    )


def vit(module: Vit, image: Sequence[int]) -> Costs:
    """A classifier of images of (height, width, channels)."""
    encoder = _encoder(
        block_of(module),
        module.num_layers,
        image,
        patch=module.patch,
        classes=CLASS_TOKENS[module.pool],
        stem=module.stem,
    )
    heads = (2 if module.pool == "distill" else 1) if module.num_classes else 0
    return Costs(
        encoder.parameters + heads * (module.width + 1) * module.num_classes,
        (
            *encoder.products,
            Product("head", heads * 2 * module.width * module.num_classes),
        ),
    )


def clip(module: Clip, image: Sequence[int], length: int, *, batch: int, form: str) -> Costs:
    """Two towers and the similarities of a pair with the `batch` others."""
    vision, text = clip_blocks(module)
    encoder = _encoder(
        vision, module.vision_num_layers, image, patch=module.vision_patch, classes=1
    )
    # CLIP's patches have no bias, and a norm comes before the first block.
    towers = encoder.parameters - vision.width + 2 * vision.width
    towers += (module.vocab_size + module.max_length + 2) * text.width
    towers += module.text_num_layers * layer_parameters(text, bias=True)
    joint = (vision.width + text.width) * module.embed_dim
    ways = 2 if form == "softmax" else 1
    return Costs(
        towers + joint + 1 + bool(module.bias_init),
        (
            *encoder.products,
            *layers(text, module.text_num_layers, length, causal=True),
            Product("projections", 2 * joint),
            Product("similarities", ways * 2 * batch * module.embed_dim, again="chunk"),
        ),
    )


def resnet(module: ResNet, image: Sequence[int]) -> Costs:
    """A classifier of images of (height, width, channels)."""
    height, wide, channels = image
    bottleneck, preact = module.block == "bottleneck", module.block == "preact"
    last = "" if preact else "full"  # what is only added, no backward pass needs
    parameters, products = 0, []

    def convolve(what, size, inputs, outputs, stride, *, norm=True, **fields) -> None:
        nonlocal height, wide, parameters
        height, wide = -(-height // stride), -(-wide // stride)
        kernel = size**2 * inputs * outputs
        parameters += kernel + 2 * outputs * norm  # its own, or before the next convolution
        products.append(Product(what, 2 * height * wide * kernel, **fields))

    imagenet = module.stem == "imagenet"
    convolve(
        "stem",
        *((7, channels, module.width, 2) if imagenet else (3, channels, module.width, 1)),
        first=True,
    )
    if imagenet:  # and pooled
        height, wide = -(-height // 2), -(-wide // 2)
    width = module.width
    for stage, depth in enumerate(module.depths):
        features = module.width * module.widening * 2**stage * (4 if bottleneck else 1)
        for i in range(depth):
            stride = 2 if stage and not i else 1
            before = height, wide
            if bottleneck:
                convolve("blocks", 1, width, features // 4, 1, again="full")
                convolve("blocks", 3, features // 4, features // 4, stride, again="full")
                convolve("blocks", 1, features // 4, features, 1, again="full")
            else:
                convolve("blocks", 3, width, features, stride, again="full")
                convolve("blocks", 3, features, features, 1, again=last)
            if module.shortcut == "projection" and (stride > 1 or width != features):
                height, wide = before
                convolve("shortcuts", 1, width, features, stride, norm=not preact, again=last)
            width = features
    parameters += (width + 1) * module.num_classes
    products.append(Product("head", 2 * width * module.num_classes))
    return Costs(parameters, tuple(products))


def block_of(module: Any) -> Block:
    """The block of a Gpt, Bert or Vit."""
    fields = dict(width=module.width, num_heads=module.num_heads, mlp_dim=module.mlp_dim)
    fields |= dict(activation=module.activation, dropout=module.dropout > 0)
    if isinstance(module, Gpt):
        style = module.make_style()
        fields |= dict(kv_heads=style.kv_heads, norm=style.norm, gated=style.gated)
    return Block(**fields, post_norm=isinstance(module, Bert))


def clip_blocks(module: Clip) -> tuple[Block, Block]:
    """Those of the image's and the text's tower."""
    towers = []
    for name in ("vision", "text"):
        sizes = (getattr(module, f"{name}_{field}") for field in ("width", "num_heads", "mlp_dim"))
        towers.append(Block(*sizes, module.activation))
    return tuple(towers)


def costs(module: Any, batch: Any, task: Any) -> Costs | None:
    """Of an experiment's `module`, by the shapes of its abstract `batch`; None: no closed form."""
    if isinstance(module, Gpt):
        return gpt(module, task.units_per_example)
    if isinstance(module, Bert):
        return bert(module, task.units_per_example)
    if not isinstance(module, Vit | ResNet | Clip):
        return None
    rows, *image = batch["image"].shape
    if isinstance(module, Clip):
        length = batch["caption"].shape[1]
        return clip(module, image, length, batch=rows, form=task.form)
    return vit(module, image) if isinstance(module, Vit) else resnet(module, image)
