"""A dataset is what its readers and transforms give; mixtures, noise, and what does not fit."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from lsdl.data import dataset, text
from lsdl.data.captions import Tokenised
from lsdl.data.dataset import SPLITS
from lsdl.data.readers import Arrays, Interleaving, Mixture, NoisyLabels
from lsdl.errors import UserError

PAIRS = {"train": "pairs[:50%]", "valid": "pairs[50%:75%]", "test": "pairs[75%:]"}
IMAGENET = {"train": "train[:99%]", "valid": "train[99%:]", "test": "validation"}
CROPS = dict(
    transforms=("random_resized_crop:224", "flip"),
    eval_transforms=("resize_small:256", "center_crop:224"),
)
MASKED = dict(transforms=("mask:257:258",), eval_transforms=("mask:257:258",))


def make(source, **given):
    plain = dict(
        splits={split: split for split in SPLITS},
        declared=dict.fromkeys(SPLITS),
        transforms=(),
        eval_transforms=(),
        mixture=(),
        label_noise=0.0,
        tokenizer="bytes",
        seq_len=0,
        segments=False,
        in_memory_mib=256,
        seed=0,
    )
    assert given.keys() <= plain.keys()
    return dataset.make(source, **plain | given)


def shapes(features):
    return {name: (leaf.shape, np.dtype(leaf.dtype).name) for name, leaf in features.items()}


def example(data, split, i):
    """What the loader makes of the reader's example."""
    found = data.reader(split)[i]
    for transform in data.transforms(split):
        found = transform(found, np.random.default_rng(i))
    return found


# --- every source ---------------------------------------------------------------------------------

ALL = {
    "digits": (
        "digits",
        dict(transforms=("shift:1", "rotate:10")),
        (1257, 270, 270),
        {"image": ((8, 8, 1), "uint8"), "label": ((), "int32")},
    ),
    "wine": ("wine", {}, (124, 27, 27), {"features": ((13,), "float32"), "label": ((), "int32")}),
    "breast_cancer": (
        "breast_cancer",
        {},
        (399, 85, 85),
        {"features": ((30,), "float32"), "label": ((), "int32")},
    ),
    "spirals": (
        "spirals",
        {},
        (130, 1000, 1000),
        {"features": ((2,), "float32"), "label": ((), "int32")},
    ),
    "teacher": (
        "teacher:5:2:8",
        {},
        (8000, 1000, 1000),
        {"features": ((5,), "float32"), "target": ((2,), "float32")},
    ),
    "modular": (
        "modular:97:add",
        dict(splits=PAIRS),
        (4704, 2353, 2352),
        {"token": ((5,), "int32"), "loss_weight": ((4,), "float32")},
    ),
    "captioned_digits": (
        "captioned_digits",
        dict(seq_len=32, transforms=("shift:1",)),
        (1257, 270, 270),
        {"image": ((8, 8, 1), "uint8"), "label": ((), "int32"), "caption": ((32,), "int32")},
    ),
    "stdlib_text": (
        "stdlib_text",
        dict(seq_len=64, segments=True),
        None,  # the interpreter's own
        {"token": ((65,), "int32"), "segment": ((65,), "int32")},
    ),
    "masked": (
        "stdlib_text",
        dict(seq_len=64, splits={s: "valid" for s in SPLITS}, **MASKED),
        None,
        {"token": ((64,), "int32"), "target": ((64,), "int32"), "loss_weight": ((64,), "float32")},
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_features_and_counts_are_what_the_readers_give(name):
    source, given, counts, leaves = ALL[name]
    data = make(source, **given)
    assert shapes(data.features) == leaves
    data.check()
    for split, expected in zip(SPLITS, counts or data.counts.values(), strict=True):
        assert data.counts[split] == len(data.reader(split)) == expected
        for i in (0, expected - 1):
            found = example(data, split, i)
            for leaf, feature in data.features.items():
                assert np.shape(found[leaf]) == feature.shape
                same_kind = np.can_cast(np.asarray(found[leaf]).dtype, feature.dtype, "same_kind")
                assert same_kind


@pytest.mark.parametrize("name", ALL)
def test_streamed_and_in_memory_are_the_same(name):
    source, given, _, _ = ALL[name]
    kept, streamed = (make(source, in_memory_mib=mib, **given) for mib in (256, 0))
    for i in (0, 5, 17):
        one, two = (data.reader("train")[i] for data in (kept, streamed))
        for leaf in one:
            np.testing.assert_array_equal(one[leaf], two[leaf])


def test_each_split_has_its_transforms():
    data = make("digits", transforms=("shift:1", "flip"), eval_transforms=("resize:8",))
    assert [len(data.transforms(split)) for split in SPLITS] == [2, 1, 1]


def test_a_reader_is_opened_once():
    data = make("digits")
    assert data.reader("train") is data.reader("train")
    assert isinstance(data.reader("valid"), Arrays)


@pytest.mark.parametrize("source", ["digits", "wine", "spirals", "teacher:5:2:8"])
def test_subsets_are_slices(source):
    whole = make(source)
    data = make(source, splits={"train": "train[:30]", "valid": "valid[10:12]", "test": "test"})
    assert dict(data.counts) == {"train": 30, "valid": 2, "test": whole.counts["test"]}
    for split, i, j in (("train", 29, 29), ("valid", 1, 11)):
        for leaf, value in whole.reader(split)[j].items():
            np.testing.assert_array_equal(data.reader(split)[i][leaf], value)


@pytest.mark.parametrize("source", ["tfds:imagenet2012", "tfds:cifar10", "tfds:coco_captions"])
def test_cards_need_no_files(source, tmp_path, monkeypatch):
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "neither"))
    given = {
        "tfds:imagenet2012": dict(splits=IMAGENET, **CROPS),
        "tfds:cifar10": dict(
            splits={"train": "train[:90%]", "valid": "train[90%:]", "test": "test"}
        ),
        "tfds:coco_captions": dict(
            splits={"train": "train+restval", "valid": "val", "test": "test"}, seq_len=77, **CROPS
        ),
    }[source]
    data = make(source, **given)
    assert (
        list(data.counts.values())
        == {
            "tfds:imagenet2012": [1_268_355, 12_812, 50_000],
            "tfds:cifar10": [45_000, 5_000, 10_000],
            "tfds:coco_captions": [5 * 113_287, 25_000, 25_000],
        }[source]
    )
    side = 32 if source == "tfds:cifar10" else 224
    assert data.features["image"].shape == (side, side, 3)
    assert len(data.mean) == len(data.std) == 3
    with pytest.raises(UserError, match="not on disk"):
        data.check()
    assert not (tmp_path / "nothing").exists()


def test_what_tasks_need_to_know():
    digits = make("digits")
    assert (digits.num_classes, digits.class_names[3]) == (10, "three")
    assert (digits.vocab_size, digits.separator, digits.token_bytes) == (0, None, None)
    assert digits.caption is None
    words = make("stdlib_text", seq_len=8)
    assert (words.vocab_size, words.separator, words.num_classes) == (257, 256, 0)
    assert words.token_bytes.tolist() == [1] * 256 + [0]
    masked = make("stdlib_text", seq_len=8, **MASKED)
    assert masked.vocab_size == 258
    assert masked.token_bytes.tolist() == [1] * 256 + [0, 0]
    modular = make("modular:97:add", splits=PAIRS)
    assert (modular.vocab_size, modular.separator, modular.token_bytes) == (99, None, None)


def test_mask_leaves_separators_alone():
    data = make("stdlib_text", seq_len=512, **MASKED)
    for i in range(200):
        found = example(data, "valid", i)
        assert not (found["target"][found["loss_weight"] == 1] == 256).any()


def test_classes_are_captions_too():
    data = make("captioned_digits", seq_len=32)
    bytes_ = text.tokenizer("bytes")
    names = [data.prompt.format(name) for name in data.class_names]
    assert names[3] == "a handwritten three"
    classes = [data.caption(name) for name in names]
    assert [bytes_.decode(row[row > 0]) for row in classes] == names
    captions = np.stack([data.reader("train")[i]["caption"] for i in range(100)])
    assert captions.shape == (100, 32)
    for row in [*captions, *classes]:
        end = int(np.flatnonzero(row)[-1])
        assert row[end] == 256
        assert (row[:end] > 0).all()
        assert (row[:end] < 256).all()


def test_every_caption_of_an_image_is_an_example():
    """Five of each, in a row; where there are fewer they come again, and a sixth is left out."""
    images = [
        {"image": np.full((2, 2, 1), i, np.uint8), "captions": {"text": texts}}
        for i, texts in enumerate(([b"a", b"b", b"c", b"d", b"e", b"f"], [b"g", b"h"]))
    ]
    pairs = Tokenised(images, text.tokenizer("bytes"), length=3, per_image=5)
    assert len(pairs) == 10
    assert [int(pairs[i]["image"][0, 0, 0]) for i in range(10)] == [0] * 5 + [1] * 5
    assert bytes(pairs[i]["caption"][0] for i in range(10)) == b"abcdeghghg"
    assert pairs[7]["caption"].tolist() == [ord("g"), 256, 0]
    assert pairs[7]["caption"].dtype == np.int32


def test_a_long_caption_is_cut_and_still_ends():
    data = make("captioned_digits", seq_len=4)
    caption = data.caption("a handwritten three")
    assert caption.tolist() == [*b"a h", 256]


# --- sets on disk in TFDS's own format ------------------------------------------------------------

WRITE = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

F = tfds.features
draw = np.random.RandomState(0)

def picture(i):
    height, width = draw.randint(20, 90, size=2)
    pixels = np.full((height, width, 3), 20 * (i % 10), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    file.seek(0)
    return file

KINDS = {
    "photos": (
        {"image": F.Image(shape=(None, None, 3), encoding_format="jpeg"),
         "label": F.ClassLabel(names=["a", "b", "c", "d", "e"] + list("fghij"))},
        lambda i: {"image": picture(i), "label": i % 10},
    ),
    "stories": ({"text": F.Text()}, lambda i: {"text": f"story {i} " + "la " * (i % 7)}),
}

class Small(tfds.core.GeneratorBasedBuilder):
    name, VERSION = sys.argv[2], tfds.core.Version("1.0.0")

    def _info(self):
        features = F.FeaturesDict(KINDS[self.name][0])
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(16)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, KINDS[self.name][1](i)

tfds.disable_progress_bar()
config = tfds.download.DownloadConfig(compute_stats="skip")
Small(data_dir=sys.argv[1], file_format="array_record").download_and_prepare(download_config=config)
"""
CUT = {"train": "train[:30]", "valid": "train[30:]", "test": "test"}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    for name in ("photos", "stories"):
        subprocess.run([sys.executable, "-c", WRITE, str(folder), name], check=True)
    return folder


@pytest.fixture
def on_disk(disk, monkeypatch):
    monkeypatch.setenv("LSDL_DATA_DIR", str(disk))


@pytest.mark.usefixtures("on_disk")
def test_jpegs_of_varying_size_are_cropped_to_one():
    crops = dict(
        transforms=("random_resized_crop:16", "flip"),
        eval_transforms=("resize_small:20:bilinear", "center_crop:16"),
    )
    data = make("tfds:photos", splits=CUT, **crops)
    assert dict(data.counts) == {"train": 30, "valid": 10, "test": 16}
    assert data.class_names == tuple("abcdefghij")
    data.check()
    raw = {tuple(data.reader("train")[i]["image"].shape) for i in range(30)}
    assert len(raw) > 20
    for split in SPLITS:
        for i in range(data.counts[split]):
            found = example(data, split, i)
            assert found["image"].shape == (16, 16, 3)
            assert found["image"].dtype == np.uint8
            # The pictures are of one colour, which tells their class; JPEG may be a little off.
            assert np.abs(found["image"].astype(int) - 20 * found["label"]).max() <= 3


@pytest.mark.usefixtures("on_disk")
def test_images_that_nothing_makes_of_one_size_are_an_error():
    for given in (
        {},
        dict(transforms=("center_crop:8",)),
        dict(transforms=("flip", "resize_small:8"), eval_transforms=("center_crop:8",)),
    ):
        with pytest.raises(UserError, match=r"no fixed shape: .*such as 'center_crop:224'"):
            make("tfds:photos", splits=CUT, **given)


@pytest.mark.usefixtures("on_disk")
def test_documents_of_a_set_on_disk_become_windows():
    """The declared number of windows, of the stream of the split's documents."""
    data = make(
        "tfds:stories",
        splits=CUT,
        declared={"train": 20, "valid": 5, "test": 3},
        seq_len=10,
        segments=True,
    )
    assert list(data.counts.values()) == [20, 5, 3]
    data.check()
    reader = data.reader("train")
    first = text.tokenizer("bytes").decode(reader[0]["token"])
    assert first.startswith("story ")
    tokens = np.concatenate([reader[i]["token"][1:] for i in range(20)])
    numbers = [
        int(story.split()[0])
        for story in text.tokenizer("bytes").decode(tokens).split("story ")[1:]
    ]
    assert len(set(numbers)) == len(numbers) > 5
    assert set(numbers) <= set(range(40))


@pytest.mark.usefixtures("on_disk")
def test_windows_of_a_set_on_disk_have_to_be_declared():
    with pytest.raises(UserError, match=r"known once it is tokenised: set data\.train_examples"):
        make("tfds:stories", splits=CUT, seq_len=10)
    declared = {"train": 10**6, "valid": 1, "test": 1}
    data = make("tfds:stories", splits=CUT, declared=declared, seq_len=10)
    with pytest.raises(UserError, match=r"holds \d+ windows of 10 tokens where 1000000"):
        data.check()


@pytest.mark.parametrize("source", ["tfds:lm1b", "tfds:c4/en:3.1.0", "tfds:wikipedia/20230601.en"])
def test_known_sets_of_text_are_built_without_files(source):
    declared = {"train": 1000, "valid": 10, "test": 10}
    data = make(source, declared=declared, seq_len=1024, tokenizer="")
    assert shapes(data.features) == {"token": ((1025,), "int32")}
    assert dict(data.counts) == declared
    assert (data.vocab_size, data.token_bytes) == (0, None)


# --- mixtures -------------------------------------------------------------------------------------

WEIGHTS = [
    (1.0,),
    (1.0, 1.0),
    (3.0, 1.0),
    (0.7, 0.2, 0.1),
    (1, 2, 3, 4, 5),
    (0.001, 0.999),
    (0.35, 0.333, 0.317),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_every_prefix_holds_every_source_by_its_weight(weights):
    """Exactly, to within one example; and of each source the first so many, in order."""
    order = Interleaving(weights)
    share = np.array(weights) / sum(weights)
    seen = np.zeros(len(weights), int)
    for i in range(3000):
        which, place = order.locate(i)
        assert place == seen[which]
        seen[which] += 1
        assert np.abs(seen - share * (i + 1)).max() < 1
        if i % 97 == 0:
            assert order.used(i + 1) == seen.tolist()


def test_an_order_is_a_function_of_the_index():
    order = Interleaving((0.7, 0.2, 0.1))
    assert [order.locate(i) for i in (10**9, 3, 10**9)][::2] == [order.locate(10**9)] * 2
    which, place = order.locate(10**9 + 1)
    assert place == order.used(10**9 + 1)[which]


@pytest.mark.parametrize("seed", range(20))
def test_the_longest_mixture_without_repetition(seed):
    order = Interleaving((0.5, 0.3, 0.2))
    counts = np.random.default_rng(seed).integers(0, 12, 3)
    longest = order.longest(counts)
    assert all(u <= c for u, c in zip(order.used(longest), counts, strict=True))
    assert any(u > c for u, c in zip(order.used(longest + 1), counts, strict=True))


def numbers(start, count):
    return Arrays({"label": np.arange(start, start + count)})


def test_a_mixture_reads_its_readers_by_turns():
    order = Interleaving((2.0, 1.0))
    mixed = Mixture([numbers(0, 4), numbers(100, 10)], order, 6)
    assert len(mixed) == 6
    found = [int(mixed[i]["label"]) for i in range(6)]
    assert sorted(found) == [0, 1, 2, 3, 100, 101]
    longer = Mixture([numbers(0, 4), numbers(100, 10)], order, 9)
    assert [int(longer[i]["label"]) for i in range(9) if longer[i]["label"] < 100] == [
        *(0, 1, 2, 3, 0, 1)
    ]


def test_a_mixture_of_sources_trains_and_one_source_evaluates():
    both = (("modular:97:add", 2.0), ("modular:97:mul", 1.0))
    data = make("modular:97:add", splits=PAIRS, mixture=both)
    parts = [make(source, splits=PAIRS) for source, _ in both]
    order = Interleaving((2.0, 1.0))
    for i in range(data.counts["train"]):
        which, place = order.locate(i)
        expected = parts[which].reader("train")[place]["token"]
        np.testing.assert_array_equal(data.reader("train")[i]["token"], expected)
    # Each equation of the first source once, and half as many of the second.
    assert 7055 <= data.counts["train"] <= 7057
    np.testing.assert_array_equal(
        data.reader("valid")[9]["token"], parts[0].reader("valid")[9]["token"]
    )


def test_a_declared_mixture_may_repeat_a_short_source():
    data = make(
        "spirals",
        mixture=(("spirals", 3.0), ("spirals", 1.0)),
        declared={"train": 400, "valid": None, "test": None},
    )
    assert data.counts["train"] == len(data.reader("train")) == 400


def test_text_is_mixed_too():
    both = (("stdlib_text", 0.5), ("stdlib_text", 0.5))
    given = dict(splits=dict.fromkeys(SPLITS, "valid"), seq_len=64, mixture=both)
    data, alone = make("stdlib_text", **given), make("stdlib_text", **given | {"mixture": ()})
    assert data.counts["train"] == 2 * alone.counts["train"]
    for i in range(0, 20, 2):
        for j in (i, i + 1):
            found, expected = data.reader("train")[j], alone.reader("train")[i // 2]
            np.testing.assert_array_equal(found["token"], expected["token"])


# --- noise ----------------------------------------------------------------------------------------


def noisy(share, seed=0, count=20_000, classes=10):
    reader = Arrays({"label": np.arange(count) % classes})
    return NoisyLabels(reader, share=share, num_classes=classes, seed=seed)


def labels(reader, count=20_000):
    return np.array([int(reader[i]["label"]) for i in range(count)])


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_a_share_of_the_labels_is_drawn_uniformly(share):
    found, true = labels(noisy(share)), np.arange(20_000) % 10
    # A tenth of what is drawn is the true label.
    assert abs((found != true).mean() - 0.9 * share) < 0.015
    changed = found[found != true]
    assert np.abs(np.bincount(changed, minlength=10) / len(changed) - 0.1).max() < 0.02
    assert abs(np.corrcoef(found, true)[0, 1] - (1 - share)) < 0.05


def test_noise_is_a_function_of_seed_and_index():
    reader = noisy(0.5)
    whole = labels(reader, 500)
    np.testing.assert_array_equal(
        [int(reader[i]["label"]) for i in range(499, -1, -1)][::-1], whole
    )
    np.testing.assert_array_equal(labels(noisy(0.5, count=500), 500), whole)
    assert (labels(noisy(0.5, seed=1), 500) != whole).mean() > 0.3


def test_more_noise_keeps_the_noise_there_was():
    less, more = labels(noisy(0.2), 2000), labels(noisy(0.4), 2000)
    true = np.arange(2000) % 10
    np.testing.assert_array_equal(less[less != true], more[less != true])


def test_noise_is_in_the_training_labels_alone():
    clean, noise = make("digits"), make("digits", label_noise=1.0)
    for split in SPLITS:
        count = clean.counts[split]
        a, b = (labels(data.reader(split), count) for data in (clean, noise))
        assert (a != b).mean() == pytest.approx(0.9 if split == "train" else 0, abs=0.04)
        for i in (0, 7):
            images = [data.reader(split)[i]["image"] for data in (clean, noise)]
            np.testing.assert_array_equal(*images)


def test_a_subset_has_the_noise_of_the_whole():
    splits = {"train": "train[:100]", "valid": "valid", "test": "test"}
    whole, part = make("digits", label_noise=0.6), make("digits", label_noise=0.6, splits=splits)
    np.testing.assert_array_equal(
        labels(whole.reader("train"), 100), labels(part.reader("train"), 100)
    )


# --- what does not fit together -------------------------------------------------------------------

WRONG = {
    "text without length": ("stdlib_text", {}, r"seq_len=0 must be at least 1.*text"),
    "captions without length": ("captioned_digits", {}, r"seq_len=0 must be at least 1"),
    "negative length": ("stdlib_text", dict(seq_len=-1), r"seq_len=-1 must be at least 1"),
    "length of images": ("digits", dict(seq_len=8), r"seq_len=8 must be 0"),
    "length of equations": ("modular:97:add", dict(seq_len=4, splits=PAIRS), r"must be 0"),
    "segments of images": ("digits", dict(segments=True), r"segments=True is for text"),
    "tokenizer": ("stdlib_text", dict(seq_len=8, tokenizer="gpt2"), r"'gpt2' is no tokenizer"),
    "noise": ("digits", dict(label_noise=1.1), r"label_noise=1.1 must be within \[0, 1\]"),
    "negative noise": ("digits", dict(label_noise=-0.1), r"label_noise=-0.1 must be within"),
    "noise without labels": ("teacher:4:1:4", dict(label_noise=0.1), r"has no labels"),
    "split": ("modular:97:add", {}, r"no split 'valid': it has pairs, and slices of them"),
    "flip of a table": (
        "wine",
        dict(transforms=("flip",)),
        r"'flip' does not fit wine: it needs an image, and an example has features, label\.",
    ),
    "mask of an equation": (
        "modular:97:add",
        dict(splits=PAIRS, transforms=("mask:99:100",)),
        r"'mask:99:100' does not fit modular:97:add: it needs windows of text",
    ),
    "small vocabulary": (
        "stdlib_text",
        dict(seq_len=8, transforms=("mask:9:10",), eval_transforms=("mask:9:10",)),
        r"mask has a vocabulary of 10, .* 257",
    ),
    "mask in training alone": (
        "stdlib_text",
        dict(seq_len=8, transforms=("mask:257:258",)),
        r"must make the same of an example: token \(8,\) int32, .* and token \(9,\) int32\.",
    ),
    "sizes": (
        "digits",
        dict(transforms=("resize:16",)),
        r"same of an example: image \(16, 16, 1\) uint8, .* and image \(8, 8, 1\) uint8",
    ),
    "crop": (
        "digits",
        dict(transforms=("center_crop:9",)),
        r"'center_crop:9' does not fit digits: .* 8 x 8 pixels\.",
    ),
    "mixture of words": ("digits", dict(mixture=("digits", 1.0)), r"write \('SOURCE', WEIGHT\)"),
    "weight 0": ("digits", dict(mixture=(("digits", 0.0),)), r"the weight positive"),
    "weight as text": ("digits", dict(mixture=(("digits", "1"),)), r"entry \('digits', '1'\)"),
    "mixture of kinds": (
        "digits",
        dict(mixture=(("digits", 1.0), ("wine", 1.0))),
        r"has wine, whose examples differ from those of digits: features \(13,\) float32",
    ),
    "mixture of classes": (
        "spirals",
        dict(mixture=(("teacher:2:1:4", 1.0),)),
        r"has teacher:2:1:4, whose examples differ",
    ),
    "mixture of vocabularies": (
        "modular:97:add",
        dict(splits=PAIRS, mixture=(("modular:97:add", 1.0), ("modular:89:add", 1.0))),
        r"has modular:89:add, whose examples differ",
    ),
    "many digits": (
        "digits",
        dict(mixture=(("digits", 0.123456789), ("digits", 1.0))),
        r"give weights of fewer digits",
    ),
    "mixed source": ("digits", dict(mixture=(("digit", 1.0),)), r"'digit' is unknown"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_an_error(name):
    source, given, message = WRONG[name]
    with pytest.raises(UserError, match=message):
        make(source, **given)
