"""Transforms: pure functions of (example, generator), and what they make of the features."""

import numpy as np
import pytest
from PIL import Image

from lsdl.data.readers import Leaf
from lsdl.data.transforms import parse
from lsdl.errors import UserError

MASK, VOCAB, SEPARATOR = 257, 258, 256


def image(height=5, width=4, channels=2, seed=0):
    shape = (height, width, channels)
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def described(example):
    """The features of an example."""
    leaves = {name: np.asarray(value) for name, value in example.items()}
    return {n: Leaf(leaf.shape, leaf.dtype) for n, leaf in leaves.items()}


def windows(length=200, seed=0, segments=True):
    token = np.random.default_rng(seed).integers(0, 256, length + 1).astype(np.int32)
    token[::17] = SEPARATOR
    segment = (token == SEPARATOR).cumsum().astype(np.int32)
    return {"token": token} | ({"segment": segment} if segments else {})


class Fixed:
    """A generator that draws what it is told, and notes what it was asked for."""

    def __init__(self, value):
        self.value, self.asked = value, []

    def random(self):
        return self.value

    def uniform(self, low, high):
        self.asked.append((low, high))
        return self.value


IMAGE_WORDS = [
    *("shift:2", "shift:0", "pad_crop:4", "flip", "rotate:15"),
    *("random_resized_crop:6", "random_resized_crop:3:bilinear", "resize:7", "resize:9:bilinear"),
    *("resize_small:12", "resize_small:3:bilinear", "center_crop:4"),
    "random_crop:4",
]
SIZES = [(8, 8, 1), (5, 9, 3), (12, 7, 3)]


# --- laws of all of them --------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("word", IMAGE_WORDS)
def test_features_are_what_comes_out(word, size):
    example = {"image": image(*size), "label": np.int32(3)}
    transform = parse(word)
    promised = transform.features(described(example))
    for seed in range(5):
        assert described(transform(example, np.random.default_rng(seed))) == promised


@pytest.mark.parametrize("segments", [False, True])
def test_features_of_masked_windows_are_what_comes_out(segments):
    example = windows(segments=segments)
    transform = parse(f"mask:{MASK}:{VOCAB}", special=(SEPARATOR,))
    promised = transform.features(described(example))
    assert described(transform(example, np.random.default_rng(0))) == promised
    assert set(promised) == set(example) | {"target", "loss_weight"}


@pytest.mark.parametrize("word", [*IMAGE_WORDS, f"mask:{MASK}:{VOCAB}"])
def test_a_transform_is_a_function_of_example_and_generator(word):
    """And changes neither the example nor the leaves that are not its own."""
    example = {"image": image(9, 8, 3), "label": 2, "unused": "text", **windows()}
    before = {name: np.array(value) for name, value in example.items()}
    transform = parse(word)
    one, two = (transform(example, np.random.default_rng(7)) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    for name, value in before.items():
        np.testing.assert_array_equal(example[name], value)
    own = {"token", "segment", "target", "loss_weight"} if "mask" in word else {"image"}
    for name in example.keys() - own:
        assert one[name] is example[name]


@pytest.mark.parametrize("word", ["flip", "shift:1", "resize:4", "resize_small:4", "center_crop:4"])
def test_images_of_varying_size_stay_so_unless_the_transform_fixes_it(word):
    features = {"image": Leaf((None, None, 3), np.dtype(np.uint8))}
    fixed = word in ("resize:4", "center_crop:4")
    shape = parse(word).features(features)["image"].shape
    assert shape == ((4, 4, 3) if fixed else (None, None, 3))


# --- moving ---------------------------------------------------------------------------------------


def shifted(image, down, right):
    """Independent of the code under test: pixel by pixel."""
    out = np.zeros_like(image)
    height, width, _ = image.shape
    for y in range(height):
        for x in range(width):
            if 0 <= y - down < height and 0 <= x - right < width:
                out[y, x] = image[y - down, x - right]
    return out


@pytest.mark.parametrize("word", ["shift:0", "shift:1", "shift:2", "shift:4", "pad_crop:2"])
def test_shift_reaches_every_offset_and_no_other(word):
    """All `(2 pixels + 1)^2` of them, equally often, and what moves in is zero."""
    picture, pixels = image(), int(word[-1])
    offsets = range(-pixels, pixels + 1)
    expected = {shifted(picture, y, x).tobytes(): 0 for y in offsets for x in offsets}
    rng = np.random.default_rng(0)
    for _ in range(60 * len(offsets) ** 2):
        moved = parse(word)({"image": picture}, rng)["image"]
        assert (moved.shape, moved.dtype) == (picture.shape, picture.dtype)
        expected[moved.tobytes()] += 1
    assert min(expected.values()) >= 25


def test_flip_mirrors_left_to_right_half_of_the_time():
    picture = image()
    rng = np.random.default_rng(0)
    found = [parse("flip")({"image": picture}, rng)["image"] for _ in range(2000)]
    mirrored = [np.array_equal(f, picture[:, ::-1]) for f in found]
    assert all(m or np.array_equal(f, picture) for m, f in zip(mirrored, found, strict=True))
    assert abs(np.mean(mirrored) - 0.5) < 0.05


def test_flip_is_an_involution():
    example = {"image": image()}
    once = parse("flip")(example, Fixed(0.0))
    assert not np.array_equal(once["image"], example["image"])
    again = parse("flip")(once, Fixed(0.0))
    np.testing.assert_array_equal(again["image"], example["image"])


@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("channels", [1, 3])
def test_rotations_by_right_angles_are_exact(turns, channels):
    picture = image(8, 8, channels)
    turned = parse("rotate:180")({"image": picture}, Fixed(90.0 * turns))["image"]
    np.testing.assert_array_equal(turned, np.rot90(picture, turns))


def test_rotations_stay_within_the_degrees():
    rng = Fixed(3.0)
    parse("rotate:15")({"image": image(8, 8, 1)}, rng)
    assert rng.asked == [(-15, 15)]


def test_what_is_turned_in_is_zero():
    turned = parse("rotate:45")({"image": np.full((8, 8, 1), 200, np.uint8)}, Fixed(45.0))["image"]
    corners = turned[[0, 0, -1, -1], [0, -1, 0, -1], 0]
    np.testing.assert_array_equal(corners, 0)
    assert turned[3:5, 3:5].min() == 200


# --- cropping and resizing ------------------------------------------------------------------------


def coordinates(height, width):
    """An image whose pixels say where they are, up to 256 of them a side."""
    y, x = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.stack([y, x, 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(200, 200), (250, 150), (120, 240)], ids=str)
def test_random_crops_have_the_areas_and_ratios_of_the_paper(size):
    height, width = size
    areas, ratios, tops = [], [], []
    crop = parse("random_resized_crop:64:bilinear")
    rng = np.random.default_rng(0)
    for _ in range(400):
        found = crop({"image": coordinates(height, width)}, rng)["image"].astype(float)
        # The middle of the outermost pixels lies half a step inside of the box.
        h, w = ((np.ptp(found[..., c]) + 1e-9) * 64 / 63 for c in (0, 1))
        areas.append(h * w / (height * width))
        ratios.append(w / h)
        tops.append(found[..., 0].min() / height)
    slack = 0.04  # pixels are whole numbers
    assert 0.08 - slack < min(areas) < 0.15
    assert 0.6 < max(areas) < 1 + slack
    assert 3 / 4 - slack < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 4 / 3 + 2 * slack
    assert abs(np.mean(np.log(ratios))) < (0.05 if height == width else 0.2)
    assert min(tops) < 0.05
    assert max(tops) > 0.4


def test_a_crop_is_a_part_resized():
    """Whatever was drawn: some box, found by its corners, gives exactly these pixels."""
    picture = coordinates(60, 50)
    seen = {}

    class Spy(np.random.Generator):
        def integers(self, high):
            seen.setdefault("corner", []).append((high, value := super().integers(high)))
            return value

    found = parse("random_resized_crop:8")({"image": picture}, Spy(np.random.PCG64(3)))["image"]
    (wide, left), (high, top) = seen["corner"]
    box = (left, top, left + 50 - wide + 1, top + 60 - high + 1)
    expected = Image.fromarray(picture).crop(box).resize((8, 8), Image.Resampling.BICUBIC)
    # A crop knows nothing of the pixels beyond it; resizing with a box may look there.
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [(10, 250), (250, 10)], ids=str)
def test_where_no_box_fits_the_middle_is_taken(size):
    picture = coordinates(*size)
    found = parse("random_resized_crop:10")({"image": picture}, np.random.default_rng(0))["image"]
    expected = picture[:, 120:130] if size[0] == 10 else picture[120:130]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", [(30, 50), (50, 30), (40, 40), (33, 200)], ids=str)
def test_resize_small_fixes_the_shorter_side_and_keeps_the_ratio(size):
    found = parse("resize_small:20")({"image": image(*size, 3)}, None)["image"]
    assert min(found.shape[:2]) == 20
    assert abs(found.shape[0] / found.shape[1] - size[0] / size[1]) < 0.5 * max(size) / 400


@pytest.mark.parametrize("word", ["resize:16", "resize_small:16", "resize:16:bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_resizing_to_the_same_size_changes_nothing(word, channels):
    picture = image(16, 16, channels)
    np.testing.assert_array_equal(parse(word)({"image": picture}, None)["image"], picture)


def test_resizing_averages_what_it_makes_smaller():
    """Not every other pixel: a chequerboard becomes grey."""
    board = (np.indices((32, 32)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    found = parse("resize:4:bilinear")({"image": board}, None)["image"]
    assert np.abs(found.astype(int) - 127).max() < 8


@pytest.mark.parametrize(("size", "crop"), [((9, 7), 3), ((8, 6), 6), ((4, 4), 4)])
def test_center_crop_takes_the_middle(size, crop):
    picture = coordinates(*size)
    found = parse(f"center_crop:{crop}")({"image": picture}, None)["image"]
    top, left = (size[0] - crop) // 2, (size[1] - crop) // 2
    np.testing.assert_array_equal(found, picture[top : top + crop, left : left + crop])


def test_a_random_crop_is_of_every_place_alike():
    picture, crop = coordinates(5, 4), parse("random_crop:3")
    rng, found = np.random.default_rng(0), {}
    for _ in range(1_200):
        part = crop({"image": picture}, rng)["image"]
        found[part.tobytes()] = found.get(part.tobytes(), 0) + 1
    places = {
        picture[top : top + 3, left : left + 3].tobytes() for top in range(3) for left in range(2)
    }
    assert found.keys() == places
    assert all(140 < times < 260 for times in found.values())  # of 200, each 4.6 deviations


@pytest.mark.parametrize("word", ["center_crop", "random_crop"])
def test_an_image_that_is_too_small_is_an_error(word):
    crop = parse(f"{word}:6")
    with pytest.raises(UserError, match=f"{word}:6 finds an image of 5 x 9 pixels"):
        crop({"image": image(5, 9, 3)}, None)
    with pytest.raises(UserError, match="5 x 9"):
        crop.features({"image": Leaf((5, 9, 3), np.dtype(np.uint8))})


# --- masking --------------------------------------------------------------------------------------


def masked(seed, length=200, special=(SEPARATOR,)):
    example = windows(length, seed)
    transform = parse(f"mask:{MASK}:{VOCAB}", special=special)
    return example, transform(example, np.random.default_rng(seed))


def test_masking_asks_for_15_percent_of_what_is_no_special_token():
    for seed in range(20):
        example, found = masked(seed)
        asked = found["loss_weight"] == 1
        assert set(found["loss_weight"]) == {0, 1}
        assert asked.sum() == round(0.15 * (example["token"][:-1] != SEPARATOR).sum())
        assert not (found["target"][asked] == SEPARATOR).any()


def test_what_is_not_asked_for_stays_and_targets_are_the_originals():
    for seed in range(20):
        example, found = masked(seed)
        np.testing.assert_array_equal(found["target"], example["token"][:-1])
        np.testing.assert_array_equal(found["segment"], example["segment"][:-1])
        calm = found["loss_weight"] == 0
        np.testing.assert_array_equal(found["token"][calm], found["target"][calm])


def test_what_is_asked_for_is_masked_drawn_or_kept_80_10_10():
    shares, drawn = np.zeros(3), []
    for seed in range(300):
        _, found = masked(seed)
        asked = found["loss_weight"] == 1
        token, target = found["token"][asked], found["target"][asked]
        kinds = [token == MASK, (token != MASK) & (token != target), token == target]
        shares += [kind.sum() for kind in kinds]
        drawn += token[kinds[1]].tolist()
    shares /= shares.sum()
    assert np.abs(shares - [0.8, 0.1, 0.1]).max() < 0.015
    assert len(set(drawn)) > 200  # of 258
    assert min(drawn) < 10
    assert max(drawn) > 250


def test_every_place_is_asked_for_equally_often():
    transform = parse(f"mask:{MASK}:{VOCAB}")
    example = {"token": np.zeros(41, np.int32)}
    rng = np.random.default_rng(0)
    counts = sum(transform(example, rng)["loss_weight"] for _ in range(2000))
    assert np.abs(counts / 2000 - 0.15).max() < 0.04


def test_a_window_of_special_tokens_asks_for_nothing():
    transform = parse(f"mask:{MASK}:{VOCAB}", special=(SEPARATOR,))
    found = transform({"token": np.full(9, SEPARATOR, np.int32)}, np.random.default_rng(0))
    assert found["loss_weight"].sum() == 0
    np.testing.assert_array_equal(found["token"], SEPARATOR)


def test_a_short_window_asks_for_one():
    found = parse(f"mask:{MASK}:{VOCAB}")(
        {"token": np.zeros(3, np.int32)}, np.random.default_rng(0)
    )
    assert found["loss_weight"].sum() == 1


# --- words ----------------------------------------------------------------------------------------

BAD = [
    *("shift", "shift:", "shift:x", "shift:1.5", "shift:1:2", "shift:-1", "flip:1", "", ":"),
    *("rotate", "rotate:0", "resize:0", "resize:8:nearest", "resize_small:-4", "center_crop:x"),
    *("random_resized_crop", "random_resized_crop:8:bicubic:1", "mask:257", "mask:258:258"),
    *("mask:-1:258", "mask:a:b", "pad_crop:4:4"),
]


@pytest.mark.parametrize("text", BAD)
def test_bad_transforms_are_errors(text):
    with pytest.raises(UserError, match=r"no transform|not of the form"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("shift:x", r"'shift:x' is not of the form shift:PIXELS\."),
        ("resize:8:nearest", r"form resize:SIZE:\[RESAMPLING\]: 'nearest' is not one of bilinear"),
        ("mask:300:258", r"mask:MASK_ID:VOCAB_SIZE: its mask id is outside of the vocabulary"),
        ("flip:1", r"form flip\."),
    ],
)
def test_the_error_says_the_form(text, form):
    with pytest.raises(UserError, match=form):
        parse(text)


def test_a_mistyped_transform_is_told_the_nearest():
    with pytest.raises(UserError, match="did you mean 'shift'"):
        parse("shfit:1")


@pytest.mark.parametrize("word", ["flip", "random_resized_crop:4", "center_crop:2"])
def test_transforms_of_images_need_images(word):
    with pytest.raises(ValueError, match="it needs an image, and an example has token"):
        parse(word).features(described(windows(segments=False)))


def test_masking_needs_text():
    for example in ({"image": image()}, {"token": np.zeros(5), "loss_weight": np.zeros(4)}):
        with pytest.raises(ValueError, match="it needs windows of text"):
            parse(f"mask:{MASK}:{VOCAB}").features(described(example))
