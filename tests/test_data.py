"""Where examples come from: the embedded digits, and TFDS sets mocked and on disk."""

import json
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits

from lsdl.data import captions, folder, sources
from lsdl.data.digits import SPLITS, split_ids
from lsdl.data.readers import in_memory
from lsdl.errors import DataError, NoDataError, UserError
from lsdl.experiment import build

ORIGINAL = load_digits()


def read(split, source="digits"):
    """Everything in a split: {name: array}, in the reader's order."""
    reader = sources.open_reader(source, split, expected=sources.num_examples(source, split))
    return in_memory(reader, tuple(reader[0])).arrays


def python(code, **popen):
    """A second Python that runs `code`, with what it prints as text."""
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-W", "error", "-c", code], **pipes, **popen)


def finish(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Prepared anew: what lies in the cache may be of older code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LSDL_DATA_DIR", str(tmp_path_factory.mktemp("digits")))
        return {split: read(split) for split in SPLITS}


# --- digits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("split", "count"), [("train", 1257), ("valid", 270), ("test", 270)])
def test_split_sizes(digits, split, count):
    assert sources.num_examples("digits", split) == count
    assert {name: array.shape for name, array in digits[split].items()} == {
        "image": (count, 8, 8, 1),
        "label": (count,),
        "id": (count,),
    }
    assert digits[split]["image"].dtype == np.uint8


def test_splits_are_disjoint_and_cover_the_set(digits):
    ids = np.concatenate([digits[split]["id"] for split in SPLITS])
    np.testing.assert_array_equal(np.sort(ids), np.arange(1797))


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_stratified(digits, split):
    """Each class's share is the split's, to within the one example that rounding takes."""
    share = SPLITS[split] / 1797 * np.bincount(ORIGINAL.target)
    assert np.abs(np.bincount(digits[split]["label"], minlength=10) - share).max() < 1


@pytest.mark.parametrize("split", SPLITS)
def test_pixels_and_labels_are_the_originals(digits, split):
    ids = digits[split]["id"]
    np.testing.assert_array_equal(digits[split]["image"][..., 0], ORIGINAL.images[ids])
    np.testing.assert_array_equal(digits[split]["label"], ORIGINAL.target[ids])


@pytest.mark.parametrize(
    ("split", "checksum"), [("train", 618381502), ("valid", 4052253787), ("test", 3651936497)]
)
def test_the_split_never_changes(split, checksum):
    ids = np.sort(split_ids(ORIGINAL.target)[split]).astype("<i8")
    assert zlib.crc32(ids.tobytes()) == checksum


def test_prepared_twice_is_the_same(digits, tmp_path, monkeypatch):
    """Records and their order do not depend on the folder they are prepared in."""
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "elsewhere"))
    for split in SPLITS:
        again = read(split)
        for name, array in digits[split].items():
            np.testing.assert_array_equal(again[name], array)
    assert (tmp_path / "elsewhere" / "digits").is_dir()


def test_card_mean_is_that_of_the_train_pixels(digits):
    assert sources.card("digits").mean == (round(float(digits["train"]["image"].mean()), 2),)


def test_card_std_is_that_of_the_train_pixels(digits):
    assert sources.card("digits").std == (round(float(digits["train"]["image"].std()), 2),)


def test_card_is_the_prepared_set(digits):
    card = sources.card("digits")
    assert card.splits == {split: len(arrays["label"]) for split, arrays in digits.items()}
    assert card.features["image"].shape == digits["train"]["image"].shape[1:]
    assert card.num_classes == len(np.unique(digits["train"]["label"]))


PREPARE = """
import pathlib, sys, time, zlib
from lsdl.data import sources
me, other = (pathlib.Path(folder) for folder in sys.argv[1:])
me.touch()
while not other.exists():
    time.sleep(0.001)
reader = sources.open_reader("digits", "valid", expected=270)
print(zlib.crc32(b"".join(reader[i]["image"].tobytes() for i in range(270))))
"""


def test_processes_that_start_together_prepare_once(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "data"))
    code = "import sys; sys.argv[1:] = {!r}\n" + PREPARE
    flags = [str(tmp_path / "a"), str(tmp_path / "b")]
    both = [python(code.format(order)) for order in (flags, flags[::-1])]
    expected = str(zlib.crc32(digits["valid"]["image"].tobytes()))
    assert [finish(process) for process in both] == [[expected], [expected]]


def test_tensorflow_is_never_imported(tmp_path, monkeypatch):
    """Not even where it is installed: a stand-in lies on the path."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").touch()
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = """
import sys
import lsdl.experiment, lsdl.data.loader
from lsdl.data import sources
reader = sources.open_reader("digits", "train[:10%]", expected=126)
reader[0]
print("tensorflow" in sys.modules)
"""
    assert finish(python(code)) == ["False"]


def test_a_data_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(UserError, match=r"cannot be written .* set LSDL_DATA_DIR"):
        sources.open_reader("digits", "train", expected=1257)


def test_data_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LSDL_DATA_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert folder.data_dir() == tmp_path / "lsdl" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert folder.data_dir() == Path.home() / ".cache" / "lsdl" / "data"


def test_in_memory_is_the_reader():
    reader = sources.open_reader("digits", "test", expected=270)
    memory = in_memory(reader, ("image", "label"))
    assert len(memory) == len(reader) == 270
    for i in (0, 1, 269):
        assert memory[i].keys() == {"image", "label"}
        np.testing.assert_array_equal(memory[i]["image"], reader[i]["image"])
        assert memory[i]["label"] == reader[i]["label"]


# --- tables and generated sets --------------------------------------------------------------------

TABLES = {
    "wine": {"train": 124, "valid": 27, "test": 27},
    "breast_cancer": {"train": 399, "valid": 85, "test": 85},
    "spirals": {"train": 130, "valid": 1000, "test": 1000, "poison": 260},
    "teacher:6:3:16": {"train": 8000, "valid": 1000, "test": 1000},
    "modular:13:add": {"pairs": 169},
    "modular:13:div": {"pairs": 156},
}


@pytest.mark.parametrize("source", TABLES)
def test_cards_of_tables_are_what_is_in_them(source):
    card = sources.card(source)
    assert card.splits == TABLES[source]
    for split, count in card.splits.items():
        arrays = read(split, source)
        assert {n: (count, *leaf.shape) for n, leaf in card.features.items()} == {
            n: array.shape for n, array in arrays.items()
        }
        assert all(arrays[n].dtype == leaf.dtype for n, leaf in card.features.items())
        if card.num_classes:
            assert len(np.unique(arrays["label"])) == card.num_classes == len(card.class_names)


@pytest.mark.parametrize("source", ["wine", "breast_cancer", "spirals", "teacher:6:3:16"])
def test_tables_are_standardised_by_their_train_split(source):
    card = sources.card(source)
    scaled = (read("train", source)["features"] - np.array(card.mean)) / np.array(card.std)
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1, atol=1e-4)


@pytest.mark.parametrize("source", ["wine", "breast_cancer"])
def test_tables_are_cut_into_disjoint_stratified_splits(source):
    original = getattr(sklearn.datasets, f"load_{source}")()
    parts = [read(split, source) for split in SPLITS]
    rows = np.concatenate([part["features"] for part in parts])
    labels = np.concatenate([part["label"] for part in parts])
    order, expected = (np.lexsort(x.T) for x in (rows, original.data.astype(np.float32)))
    np.testing.assert_array_equal(rows[order], original.data.astype(np.float32)[expected])
    np.testing.assert_array_equal(labels[order], original.target[expected])
    for part in parts:
        share = len(part["label"]) / len(labels) * np.bincount(original.target)
        assert np.abs(np.bincount(part["label"]) - share).max() < 1


@pytest.mark.parametrize(
    ("source", "split", "leaf", "kind", "checksum"),
    [
        ("wine", "test", "features", "<f4", 3017230522),
        ("breast_cancer", "test", "features", "<f4", 1695417535),
        ("modular:97:add", "pairs", "token", "<i4", 2659219068),
        ("modular:97:div", "pairs", "token", "<i4", 1055693149),
    ],
)
def test_tables_never_change(source, split, leaf, kind, checksum):
    assert zlib.crc32(read(split, source)[leaf].astype(kind).tobytes()) == checksum


def test_spirals_are_two_arms_of_one_and_a_half_turns():
    for split in TABLES["spirals"]:
        arrays = read(split, "spirals")
        x, y = arrays["features"].T.astype(np.float64)
        radius = np.hypot(x, y)
        assert 0.02**0.5 - 1e-6 <= radius.min() < radius.max() <= 1 + 1e-6
        angle = np.arctan2(y, x) - 3 * np.pi * radius - np.pi * arrays["label"]
        np.testing.assert_allclose(np.cos(angle), 1, atol=1e-9)
        assert np.bincount(arrays["label"]).tolist() == [len(x) // 2] * 2


def test_no_point_of_a_spiral_is_in_two_splits():
    points = np.concatenate([read(split, "spirals")["features"] for split in TABLES["spirals"]])
    assert len(np.unique(points, axis=0)) == len(points)


OPERATIONS = {
    "add": lambda a, b, c, p: (a + b - c) % p == 0,
    "sub": lambda a, b, c, p: (a - b - c) % p == 0,
    "mul": lambda a, b, c, p: (a * b - c) % p == 0,
    "div": lambda a, b, c, p: ((c * b - a) % p == 0) & (b > 0),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("modulus", [2, 7, 97])
def test_equations_hold_and_are_all_there(operation, modulus):
    arrays = read("pairs", f"modular:{modulus}:{operation}")
    a, op, b, equals, c = arrays["token"].T
    assert (op == modulus).all()
    assert (equals == modulus + 1).all()
    assert OPERATIONS[operation](a, b, c, modulus).all()
    assert c.min() >= 0
    assert c.max() < modulus
    pairs = modulus * (modulus - (operation == "div"))
    assert len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(a) == pairs
    assert sources.card(f"modular:{modulus}:{operation}").vocab_size == modulus + 2
    np.testing.assert_array_equal(arrays["loss_weight"], [[0, 0, 0, 1]] * pairs)


def test_equations_are_in_no_order():
    a, _, b, _, _ = read("pairs", "modular:97:add")["token"].T
    assert abs(np.corrcoef(a, np.arange(len(a)))[0, 1]) < 0.05
    assert abs(np.corrcoef(b[1:], b[:-1])[0, 1]) < 0.05


def test_slices_of_equations_are_disjoint():
    parts = [read(f"pairs[{s}]", "modular:97:add") for s in (":40%", "40%:70%", "70%:")]
    np.testing.assert_array_equal(
        np.concatenate([part["token"] for part in parts]), read("pairs", "modular:97:add")["token"]
    )


def test_one_network_taught_all_splits():
    """Its hidden units explain every target exactly; nothing linear does."""
    train, test = (read(split, "teacher:6:3:16") for split in ("train", "test"))
    first = np.random.RandomState(0).normal(size=(6, 16)) / np.sqrt(6)
    features = lambda part: np.tanh(part["features"].astype(np.float64) @ first)  # noqa: E731
    second, *_ = np.linalg.lstsq(features(train), train["target"], rcond=None)
    np.testing.assert_allclose(features(test) @ second, test["target"], atol=1e-5)
    line, *_ = np.linalg.lstsq(train["features"], train["target"], rcond=None)
    assert np.square(test["features"] @ line - test["target"]).mean() > 0.005


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("modular", "not of the form modular:MODULUS:OPERATION"),
        ("modular:97", "not of the form modular:MODULUS:OPERATION"),
        ("modular:97:add:1", "not of the form"),
        ("modular:x:add", "'x' must be a whole number from 2 on"),
        ("modular:1:add", "'1' must be a whole number from 2 on"),
        ("modular:97:pow", "unknown operation"),
        ("modular:97:ad", "did you mean 'add'"),
        ("modular:91:div", "needs a prime modulus: 91 is none"),
        ("teacher:4:0:8", "'0' must be a whole number from 1 on"),
        ("teacher:4:2", "not of the form teacher:FEATURES:TARGETS:HIDDEN"),
        ("wine:3", "not of the form wine"),
    ],
)
def test_bad_parameters_of_a_source_are_errors(source, message):
    with pytest.raises(UserError, match=message):
        sources.card(source)


# --- captioned digits -----------------------------------------------------------------------------


def captioned(split="train"):
    reader = sources.open_reader("captioned_digits", split)
    return [reader[i] for i in range(len(reader))]


def test_captions_name_their_digit(digits):
    examples = captioned("valid")
    assert len(examples) == 270
    for example, image in zip(examples, digits["valid"]["image"], strict=True):
        (caption,) = example["captions"]["text"]
        named = [i for i, name in enumerate(captions.DIGIT_NAMES) if name in caption.split()]
        assert named == [example["label"]]
        np.testing.assert_array_equal(example["image"], image)


def test_every_template_is_used_for_every_digit_alike():
    counts = {}
    for example in captioned():
        (caption,) = example["captions"]["text"]
        name = captions.DIGIT_NAMES[example["label"]]
        key = (caption.replace(name, "{}"), int(example["label"]))
        counts[key] = counts.get(key, 0) + 1
    templates = captions.DIGIT_TEMPLATES
    assert set(counts) == {(t, label) for t in templates for label in range(10)}
    assert min(counts.values()) >= 8  # of 125 / 6, about 21


def test_a_slice_does_not_change_a_caption():
    whole, part = captioned("valid"), captioned("valid[100:110]")
    for a, b in zip(whole[100:110], part, strict=True):
        assert a["captions"] == b["captions"]


# --- splits and slices ----------------------------------------------------------------------------

# 1,257 and 48 training examples; a percentage is rounded to the closest example.
SLICES = {
    "train": (1257, 48),
    "train[:90%]": (1131, 43),
    "train[90%:]": (126, 5),
    "train[40:]": (1217, 8),
    "train[-10%:]": (126, 5),
    "train[-7:]": (7, 7),
    "train[10:20]": (10, 10),
    "train[:25%]+test": (314 + 270, 12 + 16),
}


@pytest.mark.parametrize("split", SLICES)
def test_slices_hold_what_was_counted(split):
    assert sources.num_examples("digits", split) == SLICES[split][0]
    assert len(sources.open_reader("digits", split, expected=SLICES[split][0])) == SLICES[split][0]


@pytest.mark.parametrize(
    "parts", [("train[:90%]", "train[90%:]"), ("train[:100]", "train[100:]"), ("train[:-10%]",)]
)
def test_slices_are_cut_from_the_split_in_order(digits, parts):
    ids = np.concatenate([read(part)["id"] for part in parts])
    np.testing.assert_array_equal(ids, digits["train"]["id"][: len(ids)])
    assert len(ids) == (1257 if len(parts) == 2 else 1131)


@pytest.mark.parametrize(
    "split", ["validation", "train[", "", "train[:200%]", "train[1258:]", "train[:-1258]"]
)
def test_unknown_splits_are_errors(split):
    with pytest.raises(UserError, match=r"has no split .*train, valid, test"):
        sources.num_examples("digits", split)


@pytest.mark.parametrize("split", ["train[0:0]", "train[50%:40%]", "valid[270:]"])
def test_empty_slices_are_errors(split):
    with pytest.raises(UserError, match="no split"):
        sources.num_examples("digits", split)


@pytest.mark.parametrize("split", ["validation", "train[", "train[:200%]", "train[0:0]"])
def test_opening_an_unknown_split_is_an_error(split):
    with pytest.raises(UserError, match="no split"):
        sources.open_reader("digits", split, expected=100)


def test_declared_examples_win():
    assert sources.num_examples("tfds:not_on_disk", "nope", declared=7) == 7


@pytest.mark.parametrize("expected", [1256, 1258])
def test_a_wrong_number_of_examples_is_an_error(expected):
    with pytest.raises(UserError, match=f"holds 1257 examples where {expected} were expected"):
        sources.open_reader("digits", "train", expected=expected)


@pytest.mark.parametrize("source", ["digit", "cifar10", ""])
def test_an_unknown_source_is_an_error(source):
    with pytest.raises(UserError, match=r"use digits, .*, or tfds:NAME"):
        sources.card(source)


# --- a small set in TFDS's own format, known by its name alone ------------------------------------

WRITE = """
import io, sys
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

class Small(tfds.core.GeneratorBasedBuilder):
    name, VERSION = sys.argv[2], tfds.core.Version(sys.argv[3])

    def _info(self):
        image = tfds.features.Image(shape=eval(sys.argv[4]))
        label = eval(sys.argv[5], {"tfds": tfds, "np": np})
        features = tfds.features.FeaturesDict({"image": image, "label": label, "id": np.int64})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 48), "test": self._generate_examples(48, 64)}

    def _generate_examples(self, start, stop):
        pixels = np.random.RandomState(0).randint(256, size=(64, 16, 16, 3)).astype(np.uint8)
        for i in range(start, stop):
            file = io.BytesIO()
            odd = self.name == "odd_pictures" and i == 3
            Image.fromarray(pixels[i][:12] if odd else pixels[i]).save(file, "PNG")
            file.seek(0)
            yield i, {"image": file, "label": i % 4, "id": i}

tfds.disable_progress_bar()
config = tfds.download.DownloadConfig(compute_stats="skip")
Small(data_dir=sys.argv[1], file_format="array_record").download_and_prepare(download_config=config)
"""


LABEL = "tfds.features.ClassLabel(num_classes=4)"


def write_small(folder, name="small_pictures", version="1.0.0", shape="16, 16, 3", label=LABEL):
    arguments = [str(folder), name, version, shape, label]
    finish(python(f"import sys; sys.argv[1:] = {arguments!r}\n{WRITE}"))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    write_small(folder)
    return folder


@pytest.fixture
def small(small_folder, monkeypatch):
    monkeypatch.setenv("LSDL_DATA_DIR", str(small_folder))
    return "tfds:small_pictures"


def test_card_of_a_set_on_disk(small):
    card = sources.card(small)
    assert (card.splits, card.features["image"].shape) == ({"train": 48, "test": 16}, (16, 16, 3))
    assert card.num_classes == 4
    assert len(card.mean) == len(card.std) == 3


def test_records_of_a_set_on_disk_are_what_was_written(small):
    pixels = np.random.RandomState(0).randint(256, size=(64, 16, 16, 3)).astype(np.uint8)
    for split, ids in {"train": range(48), "test": range(48, 64)}.items():
        arrays = read(split, small)
        np.testing.assert_array_equal(np.sort(arrays["id"]), ids)
        np.testing.assert_array_equal(arrays["image"], pixels[arrays["id"]])
        np.testing.assert_array_equal(arrays["label"], arrays["id"] % 4)
        assert arrays["image"].dtype == np.uint8


@pytest.mark.parametrize("split", SLICES)
def test_slices_of_a_set_on_disk(small, split):
    assert sources.num_examples(small, split) == SLICES[split][1]
    assert len(sources.open_reader(small, split, expected=SLICES[split][1])) == SLICES[split][1]


@pytest.mark.parametrize("split", ["valid", "train[49:]"])
def test_unknown_splits_of_a_set_on_disk_are_errors(small, split):
    with pytest.raises(UserError, match=r"has no split .*train, test"):
        sources.num_examples(small, split)


def test_a_version_can_be_named(small):
    reader = sources.open_reader(f"{small}:1.0.0", "train", expected=48)
    assert len(reader) == 48


def test_a_set_without_random_access_says_so(small_folder, tmp_path, monkeypatch):
    """TFDS's default format, tfrecord, can only be read in order."""
    folder = tmp_path / "small_pictures" / "1.0.0"
    shutil.copytree(small_folder / "small_pictures" / "1.0.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"without random access.*file_format='array_record'"):
        sources.open_reader("tfds:small_pictures", "train", expected=48)


def test_images_of_no_fixed_shape_have_none_on_their_card(tmp_path, monkeypatch):
    write_small(tmp_path, shape="None, None, 3")
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    assert sources.card("tfds:small_pictures").features["image"].shape == (None, None, 3)


def test_labels_that_are_no_classes_are_an_error(tmp_path, monkeypatch):
    write_small(tmp_path, label="np.int64")
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="small_pictures"):
        sources.card("tfds:small_pictures")


def test_a_set_on_disk_without_images_says_so(tmp_path, small_folder, monkeypatch):
    shutil.copytree(small_folder / "small_pictures", tmp_path / "small_pictures")
    file = tmp_path / "small_pictures" / "1.0.0" / "features.json"
    written = json.loads(file.read_text())
    features = written["featuresDict"]["features"]
    features["picture"] = features.pop("image")
    file.write_text(json.dumps(written))
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"^(?!.*not on disk).*image"):
        sources.card("tfds:small_pictures")


def test_an_image_of_another_shape_is_named(tmp_path, monkeypatch):
    """TFDS writes it without a word."""
    write_small(tmp_path, name="odd_pictures")
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    said = r"shape \(12, 16, 3\), where the set declares \(16, 16, 3\) \(.*odd_pictures train\)"
    with pytest.raises(DataError, match=f"{said}.*prepare it again as you did"):
        read("train", "tfds:odd_pictures")


@pytest.mark.parametrize(
    ("name", "again"),
    [("small_pictures", "prepare it again as you did"), ("cifar10", r"download_and_prepare\(\)")],
)
def test_a_damaged_set_is_prepared_again_as_it_was(
    small_folder, tmp_path, monkeypatch, name, again
):
    """By TFDS's command if it has code for the set."""
    folder = tmp_path / name / "1.0.0"
    shutil.copytree(small_folder / "small_pictures" / "1.0.0", folder)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("small_pictures", name))
    for file in folder.glob("small_pictures-*"):
        file.rename(folder / file.name.replace("small_pictures", name)).write_bytes(b"")
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=f"delete {folder}, and .*{again}"):
        sources.open_reader(f"tfds:{name}", "train")


def test_a_small_set_trains_by_its_name(small, load):
    experiment = build(
        load(
            "digits_vit:smoke",
            f"data.source={small}",
            "data.valid_split=train[-8:]",
            "data.train_split=train[:-8]",
            *("model.patch=4", "model.width=8", "model.num_heads=2", "batch_size=8"),
        )
    )
    experiment.check_data()
    batch = experiment.train_loader().batch(0)
    assert batch["image"].shape == (8, 16, 16, 3)
    assert [experiment.eval_loader(s).num_examples for s in ("train", "valid", "test")] == [
        *(40, 8, 16)
    ]


# --- names that TFDS knows ------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path, monkeypatch):
    """Neither lsdl's nor TFDS's own folder holds anything."""
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path / "tensorflow_datasets"))
    return tmp_path / "data"


@pytest.mark.parametrize(
    "source", ["tfds:mnist", "tfds:cifar10", "tfds:imagenet2012", "tfds:c4/en"]
)
def test_a_missing_set_names_the_command_that_prepares_it(empty, source):
    name = source.removeprefix("tfds:")
    command = rf"builder\('{name}', data_dir='{empty}', file_format='array_record'\)"
    with pytest.raises(NoDataError, match=rf"not on disk.*{command}.download_and_prepare\(\)"):
        sources.open_reader(source, "train", expected=1)


def test_a_missing_set_without_card_is_an_error(empty):
    with pytest.raises(UserError, match=r"not on disk.*download_and_prepare"):
        sources.num_examples("tfds:svhn_cropped", "train")


def test_a_name_that_nobody_knows_is_an_error(empty):
    with pytest.raises(UserError, match=f"TFDS knows no data set 'nothing'.*{empty}"):
        sources.card("tfds:nothing")


def test_a_name_with_a_slip_is_told_the_set_that_is_there(empty):
    with pytest.raises(UserError, match=r"docs/howto/data\.md"):
        sources.card("tfds:toyshapes")
    (empty / "toy_shapes").mkdir(parents=True)
    with pytest.raises(UserError, match=r"Did you mean 'tfds:toy_shapes'\?"):
        sources.card("tfds:toyshapes")


@pytest.mark.parametrize("name", ["", "a b", "../a", "cifar10/nothing", "cifar10:9.9.9", "titanic"])
def test_a_name_that_tfds_refuses_is_an_error(empty, name):
    with pytest.raises(UserError, match=r"knows no data set|not on disk|names a file"):
        sources.open_reader(f"tfds:{name}", "train", expected=1)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("cifar10", str(tfds.builder_cls("cifar10").VERSION)),
        ("cifar10", "3.0.0"),  # not the version of today's class
        ("titanic", "4.0.0"),  # whose class needs TensorFlow
    ],
)
def test_a_prepared_stock_set_is_read_from_disk(empty, name, version):
    write_small(empty, name, version)
    reader = sources.open_reader(f"tfds:{name}", "train", expected=48)
    assert reader[0]["image"].shape == (16, 16, 3)


@pytest.mark.parametrize("name", ["cifar10", "titanic", "small_pictures"])
def test_tfds_own_folder_is_read_too(empty, name):
    write_small(tfds.core.constants.DATA_DIR, name)
    assert len(sources.open_reader(f"tfds:{name}", "train", expected=48)) == 48


def test_lsdls_folder_comes_before_tfds_own(empty):
    write_small(tfds.core.constants.DATA_DIR, label="tfds.features.ClassLabel(num_classes=7)")
    assert sources.card("tfds:small_pictures").num_classes == 7
    write_small(empty)
    assert sources.card("tfds:small_pictures").num_classes == 4


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("cifar10", (32, 32, 3), 10), ("mnist", (28, 28, 1), 10)]
)
def test_stock_sets_have_their_cards_shapes(empty, name, shape, classes):
    """Through TFDS's mock, which knows features but no sub-splits."""
    with tfds.testing.mock_data(num_examples=12):
        reader = sources.open_reader(f"tfds:{name}", "train", expected=12)
        arrays = in_memory(reader, ("image", "label")).arrays
    card = sources.card(f"tfds:{name}")
    assert (card.features["image"].shape, card.num_classes) == (shape, classes)
    assert len(card.mean) == len(card.std) == shape[-1]
    assert (arrays["image"].shape, arrays["image"].dtype) == ((12, *shape), np.uint8)
    assert (arrays["label"].shape, arrays["label"].dtype) == ((12,), np.int64)
    assert arrays["label"].max() < classes


# TFDS needs TensorFlow to so much as describe coco_captions.
@pytest.mark.parametrize(
    "source", sorted(s for s in sources.CARDS if s.startswith("tfds:") and "coco" not in s)
)
def test_cards_are_what_tfds_says(empty, source):
    builder = tfds.builder(source.removeprefix("tfds:"))
    card = sources.card(source)
    assert card.features["image"].shape == builder.info.features["image"].shape
    assert card.num_classes == builder.info.features["label"].num_classes


def test_mocked_cifar10_trains(empty, load):
    experiment = build(
        load(
            "digits_vit:smoke",
            *("data.source=tfds:cifar10", "data.train_split=train[:90%]"),
            *("data.valid_split=train[90%:]", "data.test_split=test"),
            *(f"data.{split}_examples=24" for split in ("train", "valid", "test")),
            *("batch_size=8", "model.patch=8", "model.width=8", "model.num_layers=1"),
            *("model.num_heads=2", "model.mlp_dim=16", "model.stem=0", "optim.name=sgd"),
        ),
        devices=jax.devices()[:1],
    )
    with tfds.testing.mock_data(num_examples=24):
        experiment.check_data()
        batch = experiment.train_loader().batch(0)
    assert {n: (a.shape, str(a.dtype)) for n, a in batch.items()} == {
        "image": ((8, 32, 32, 3), "uint8"),
        "label": ((8,), "int32"),
        "weight": ((8,), "float32"),
    }
    state, metrics = experiment.train_step(experiment.init(), batch)
    assert int(state.step) == 1
    assert np.isfinite(jax.device_get(metrics["loss"]))


def test_the_card_is_checked_when_cifar10_is_opened(empty, load):
    experiment = build(
        load(
            "digits_vit:smoke",
            *("data.source=tfds:cifar10", "data.valid_split=test", "model.patch=8"),
        )
    )
    with (
        tfds.testing.mock_data(num_examples=24),
        pytest.raises(UserError, match="holds 24 examples where 50000 were expected"),
    ):
        experiment.check_data()
