"""Transforms of one example in numpy: `transform(example, rng) -> example`.

In training the generator depends on (seed, epoch, place in the epoch) alone, in evaluation on
(seed, index): an example comes out the same on every layout and process count.
Shape letters: H height, W width, C channels, L tokens.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lsdl.data.readers import Features, Leaf
from lsdl.errors import UserError, nearest

Example = dict[str, np.ndarray]
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


@dataclass(frozen=True)
class Transform:
    """What happens to an example, and what that makes of its features.

    `features` raises `ValueError` if the transform does not fit them.
    """

    apply: Callable[[Example, np.random.Generator], Example]
    features: Callable[[Features], Features]
    vocab_size: int = 0  # of the tokens it writes; 0: no new ones

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        return self.apply(example, rng)


def _of_image(
    change: Callable[[np.ndarray, np.random.Generator], np.ndarray],
    shape: Callable[[int | None, int | None], tuple[int | None, int | None]],
) -> Transform:
    """A transform of the leaf `image` alone: of the pixels, and of their height and width."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": change(example["image"], rng)}

    def features(before: Features) -> Features:
        if "image" not in before:
            raise ValueError(f"it needs an image, and an example has {', '.join(before)}")
        height, width, channels = before["image"].shape
        image = Leaf((*shape(height, width), channels), np.dtype(np.uint8))
        return {**before, "image": image}

    return Transform(apply, features)


def _same(height: int | None, width: int | None) -> tuple[int | None, int | None]:
    return height, width


def shift(pixels: int) -> Transform:
    """Move the image by up to `pixels` in each direction, filling with zeros."""
    if pixels < 0:
        raise ValueError("its pixels must not be negative")

    def change(image_HWC, rng):
        down, right = rng.integers(2 * pixels + 1), rng.integers(2 * pixels + 1)
        height, width, _ = image_HWC.shape
        padded = np.zeros((height + 2 * pixels, width + 2 * pixels, image_HWC.shape[2]), np.uint8)
        padded[pixels : pixels + height, pixels : pixels + width] = image_HWC
        return padded[down : down + height, right : right + width]

    return _of_image(change, _same)


def pad_crop(pixels: int) -> Transform:
    """Pad each side with `pixels` zeros and crop the old size at random: a shift by another name.

    Source: He et al. 2016, section 4.2.
    """
    return shift(pixels)


def flip() -> Transform:
    """Mirror the image left to right with probability 1/2."""
    return _of_image(lambda image, rng: image[:, ::-1] if rng.random() < 0.5 else image, _same)


def rotate(degrees: int) -> Transform:
    """Turn the image about its middle by up to `degrees` either way, filling with zeros."""
    _positive(degrees=degrees)

    def change(image_HWC, rng):
        angle = rng.uniform(-degrees, degrees)
        return _array(_picture(image_HWC).rotate(angle, Image.Resampling.BILINEAR))

    return _of_image(change, _same)


def random_resized_crop(size: int, resampling: str = "bicubic") -> Transform:
    """A random part of the image, resized to `size` x `size`.

    Its area is uniform in 8% to 100% of the image's, its ratio of width to height log-uniform in
    3/4 to 4/3. If ten draws do not fit, the largest square in the middle. Bicubic, as in the code
    that Goyal et al. 2017 follow (fb.resnet.torch).
    Source: Szegedy et al. 2015, section 6.
    """
    method = _resampling(size, resampling)

    def change(image_HWC, rng):
        box = _random_box(*image_HWC.shape[:2], rng)
        return _array(_picture(image_HWC).resize((size, size), method, box=box))

    return _of_image(change, lambda height, width: (size, size))


def resize(size: int, resampling: str = "bicubic") -> Transform:
    """Resize to `size` x `size`, whatever the ratio was."""
    method = _resampling(size, resampling)
    change = lambda image, rng: _array(_picture(image).resize((size, size), method))  # noqa: E731
    return _of_image(change, lambda height, width: (size, size))


def resize_small(size: int, resampling: str = "bicubic") -> Transform:
    """Resize so that the shorter side becomes `size`, keeping the ratio."""
    method = _resampling(size, resampling)

    def shape(height, width):
        if height is None or width is None:
            return None, None
        short = min(height, width)
        return round(height * size / short), round(width * size / short)

    def change(image_HWC, rng):
        height, width = shape(*image_HWC.shape[:2])
        return _array(_picture(image_HWC).resize((width, height), method))

    return _of_image(change, shape)


def center_crop(size: int) -> Transform:
    """The `size` x `size` pixels in the middle."""
    return _crop("center_crop", size, lambda room, rng: room // 2)


def random_crop(size: int) -> Transform:
    """`size` x `size` pixels from a place of the image that is drawn, all places alike."""
    return _crop("random_crop", size, lambda room, rng: rng.integers(room + 1))


def _crop(name: str, size: int, offset: Callable) -> Transform:
    """`offset(room, rng)` pixels are left out above and to the left, of `room` in all."""
    _positive(size=size)

    def shape(height, width):
        if None not in (height, width) and min(height, width) < size:
            raise UserError(f"{name}:{size} finds an image of {height} x {width} pixels.")
        return size, size

    def change(image_HWC, rng):
        height, width, _ = image_HWC.shape
        shape(height, width)
        top, left = offset(height - size, rng), offset(width - size, rng)
        return image_HWC[top : top + size, left : left + size]

    return _of_image(change, shape)


def mask(mask_id: int, vocab_size: int, special: Sequence[int] = ()) -> Transform:
    """Masked language modelling: hide 15% of the tokens and ask for them.

    token (L + 1,) -> token (L,) with the hidden ones replaced, target (L,) the originals and
    loss_weight (L,) 1 where one is asked for. Of those, 80% become `mask_id`, 10% a token drawn
    from the whole vocabulary, 10% stay. Tokens in `special` are never asked for.
    Source: Devlin et al. 2019, section 3.1 and appendix A.1.
    """
    if not 0 <= mask_id < vocab_size:
        raise ValueError(f"its mask id is outside of the vocabulary of {vocab_size}")

    def apply(example: Example, rng: np.random.Generator) -> Example:
        target_L = example["token"][:-1].astype(np.int32)
        places = np.flatnonzero(~np.isin(target_L, special))
        chosen = rng.permutation(places)[: max(round(0.15 * len(places)), 1)]
        kind = rng.random(len(chosen))
        drawn = rng.integers(vocab_size, size=len(chosen))
        token_L, weight_L = target_L.copy(), np.zeros(len(target_L), np.float32)
        token_L[chosen] = np.where(
            kind < 0.8, mask_id, np.where(kind < 0.9, drawn, target_L[chosen])
        )
        weight_L[chosen] = 1
        masked = {"token": token_L, "target": target_L, "loss_weight": weight_L}
        if "segment" in example:
            masked["segment"] = example["segment"][:-1]
        return example | masked

    def features(before: Features) -> Features:
        if "token" not in before or "loss_weight" in before:
            raise ValueError(f"it needs windows of text, and an example has {', '.join(before)}")
        length = before["token"].shape[0] - 1
        leaf = lambda dtype: Leaf((length,), np.dtype(dtype))  # noqa: E731
        after = {name: leaf(np.int32) for name in before}
        return after | {"target": leaf(np.int32), "loss_weight": leaf(np.float32)}

    return Transform(apply, features, vocab_size)


TRANSFORMS = {
    f.__name__: f
    for f in (
        *(shift, pad_crop, flip, rotate),
        *(random_resized_crop, random_crop, resize, resize_small, center_crop, mask),
    )
}


def parse(spec: str, *, special: Sequence[int] = ()) -> Transform:
    """The transform that `name:argument:...` stands for, such as `shift:1`.

    `special`: the ids that `mask` leaves alone.
    """
    name, *arguments = spec.split(":")
    if name not in TRANSFORMS:
        raise UserError(f"There is no transform {name!r}; {nearest(name, TRANSFORMS)}")
    make = TRANSFORMS[name]
    own = [p for p in inspect.signature(make).parameters.values() if p.name != "special"]
    least = sum(p.default is p.empty for p in own)
    words = [p.name.upper() if p.default is p.empty else f"[{p.name.upper()}]" for p in own]
    mistake = f"The transform {spec!r} is not of the form {':'.join([name, *words])}"
    if not least <= len(arguments) <= len(own):
        raise UserError(f"{mistake}.")
    try:
        values = [p.annotation(a) for p, a in zip(own, arguments, strict=False)]
    except ValueError as error:
        raise UserError(f"{mistake}.") from error
    more = {"special": tuple(special)} if name == "mask" else {}
    try:
        return make(*values, **more)
    except ValueError as error:
        raise UserError(f"{mistake}: {error}.") from error


def _random_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, ...]:
    """(left, top, right, bottom) of a random part of an image."""
    for _ in range(10):
        area = rng.uniform(0.08, 1) * height * width
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return int(left), int(top), int(left) + w, int(top) + h
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _resampling(size: int, name: str) -> Image.Resampling:
    _positive(size=size)
    if name not in RESAMPLING:
        raise ValueError(f"{name!r} is not one of {', '.join(RESAMPLING)}")
    return RESAMPLING[name]


def _positive(**number: int) -> None:
    for name, value in number.items():
        if value < 1:
            raise ValueError(f"its {name} must be positive")


def _picture(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def _array(picture: Image.Image) -> np.ndarray:
    """(H, W, C) uint8, with C = 1 for grey."""
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels
