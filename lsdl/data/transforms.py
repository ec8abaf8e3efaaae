"""Transforms of one training example in numpy: `(example, rng) -> example`.

The generator depends on (seed, epoch, place in the epoch) alone, so that an example is augmented
the same way on every layout and process count.
Shape letters: H height, W width, C channels.
"""

from collections.abc import Callable

import numpy as np

from lsdl.errors import UserError, nearest

Example = dict[str, np.ndarray]
Transform = Callable[[Example, np.random.Generator], Example]


def shift(pixels: int) -> Transform:
    """Move the image by up to `pixels` in each direction, filling with zeros."""
    if pixels < 0:
        raise ValueError(f"{pixels} pixels")

    def apply(example: Example, rng: np.random.Generator) -> Example:
        down, right = rng.integers(0, 2 * pixels + 1, size=2)
        image_HWC = example["image"]
        height, width, _ = image_HWC.shape
        padded = np.zeros((height + 2 * pixels, width + 2 * pixels, image_HWC.shape[2]), np.uint8)
        padded[pixels : pixels + height, pixels : pixels + width] = image_HWC
        return example | {"image": padded[down : down + height, right : right + width]}

    return apply


def flip() -> Transform:
    """Mirror the image left to right with probability 1/2."""

    def apply(example: Example, rng: np.random.Generator) -> Example:
        return example | {"image": example["image"][:, ::-1]} if rng.random() < 0.5 else example

    return apply


TRANSFORMS = {"shift": shift, "flip": flip}


def parse(spec: str) -> Transform:
    """The transform that `name` or `name:number` stands for, such as `shift:1`."""
    name, colon, number = spec.partition(":")
    if name not in TRANSFORMS:
        raise UserError(f"There is no transform {name!r}; {nearest(name, TRANSFORMS)}")
    try:
        return TRANSFORMS[name](*([int(number)] if colon else []))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The transform {spec!r} is not of the form shift:PIXELS or flip."
        ) from error
