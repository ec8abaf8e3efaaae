"""Tokenizers, the cache of tokens on disk, the windows that are read from it, stdlib_text."""

import hashlib
import json
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from lsdl.data import corpus, stdlib, text
from lsdl.data.corpus import Tokens, Windows, num_windows, open_windows, tokenised
from lsdl.errors import UserError

BYTES = text.tokenizer("bytes")
SAMPLES = [
    "def f(x):\n\treturn  x + 1\n",
    "  two spaces, a naïve café, 漢字 and an 🙂 — none of them in the training text",
    "",
    "\r\n\x00\x7f",
    "a <|endoftext|> b </s> c [SEP] d",
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A data folder of each test's own."""
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


# --- tokenizers -----------------------------------------------------------------------------------


def library(files=40):
    """Some text to train tokenizers on."""
    found = stdlib.Documents(stdlib.files()["valid"][:files])
    return [found[i].decode(errors="replace") for i in range(len(found))]


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A byte-level BPE as GPT-2's, with settings that its user may have left in the file."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<pad>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(library(), trainer)
    model.add_tokens(["spaces"])
    model.enable_truncation(5)
    model.enable_padding(length=9)
    file = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    model.save(str(file))
    return file


def train_sentencepiece(folder, **options):
    (folder / "text").write_text("\n".join(library()))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "small"),
        vocab_size=600,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        minloglevel=2,
        **options,
    )
    return folder / "small.model"


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("pieces"))


@pytest.fixture(params=["bytes", "bpe", "pieces"])
def tokenizer(request):
    name = request.param
    return text.tokenizer(name if name == "bytes" else str(request.getfixturevalue(name)))


@pytest.mark.parametrize("sample", SAMPLES)
def test_text_comes_back(tokenizer, sample):
    assert tokenizer.decode(tokenizer.encode(sample)) == sample
    assert tokenizer.decode(tokenizer.encode(sample.encode())) == sample


@pytest.mark.parametrize("sample", SAMPLES)
def test_token_bytes_add_up_to_the_text(tokenizer, sample):
    ids = tokenizer.encode(sample)
    assert tokenizer.token_bytes[ids].sum() == len(sample.encode())


def test_token_bytes_are_those_of_each_token(tokenizer):
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.min() == 0
    assert tokenizer.token_bytes[tokenizer.separator] == 0
    for token in tokenizer.encode(SAMPLES[0]):
        assert tokenizer.token_bytes[token] == len(tokenizer.decode([token]).encode())


def test_a_batch_is_its_texts(tokenizer):
    batch = tokenizer.encode_batch([s.encode() for s in SAMPLES])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(s) for s in SAMPLES]


def test_text_that_spells_the_separator_is_text(tokenizer):
    """A document cannot end itself."""
    for ids in tokenizer.encode_batch(SAMPLES):
        assert tokenizer.separator not in ids
        assert len(ids) == 0 or ids.max() < tokenizer.vocab_size


def test_the_vocabularies(bpe, pieces):
    assert (BYTES.vocab_size, BYTES.separator) == (257, 256)
    found = text.tokenizer(str(bpe))
    assert (found.vocab_size, found.separator) == (601, 1)
    assert text.tokenizer(str(pieces)).vocab_size == 600


def test_learned_vocabularies_make_text_shorter(bpe, pieces):
    sample = library(3)[2][:5000]
    for file in (bpe, pieces):
        assert len(text.tokenizer(str(file)).encode(sample)) < 0.9 * len(sample.encode())


def test_truncation_and_padding_of_the_file_do_not_count(bpe):
    assert len(text.tokenizer(str(bpe)).encode("x y z " * 40)) > 40
    assert text.tokenizer(str(bpe)).encode("") == []


def test_bytes_that_are_no_text_come_through():
    every = bytes(range(256))
    assert BYTES.encode(every) == list(every)
    assert BYTES.decode([0xFF, 256, 65]) == "\ufffdA"


def test_word_pieces_are_counted_without_their_marks(tmp_path):
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "walk": 2, "##ing": 3, "é": 4}
    model = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.add_special_tokens(["[UNK]", "[SEP]"])
    model.decoder = decoders.WordPiece()
    model.save(str(tmp_path / "words.json"))
    found = text.tokenizer(str(tmp_path / "words.json"))
    assert found.token_bytes.tolist() == [0, 0, 4, 3, 2]
    assert found.separator == 1


def test_a_fingerprint_is_the_files_contents(bpe, tmp_path):
    copy = tmp_path / "other.json"
    copy.write_text(bpe.read_text())
    fingerprint = text.tokenizer(str(bpe)).fingerprint
    assert text.tokenizer(str(copy)).fingerprint == fingerprint
    copy.write_text(bpe.read_text() + "\n")
    assert text.tokenizer(str(copy)).fingerprint != fingerprint


@pytest.mark.parametrize("name", ["byte", "gpt2", "missing.json", "missing.model", "."])
def test_an_unknown_tokenizer_is_an_error(name):
    with pytest.raises(UserError, match=r"is no tokenizer: use 'bytes'"):
        text.tokenizer(name)


@pytest.mark.parametrize("suffix", [".json", ".model"])
def test_a_file_that_is_none_is_an_error(tmp_path, suffix):
    file = tmp_path / f"broken{suffix}"
    file.write_text("{}")
    with pytest.raises(UserError, match="could not be read"):
        text.tokenizer(str(file))


@pytest.mark.parametrize(
    ("package", "suffix"), [("tokenizers", ".json"), ("sentencepiece", ".model")]
)
def test_a_missing_package_names_the_extra(tmp_path, monkeypatch, package, suffix):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / f"some{suffix}").touch()
    with pytest.raises(UserError, match=rf"needs the package {package}: .*\[text\]"):
        text.tokenizer(str(tmp_path / f"some{suffix}"))


def test_a_tokenizer_without_separator_is_an_error(tmp_path):
    model = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    model.save(str(tmp_path / "a.json"))
    with pytest.raises(UserError, match="no token to separate documents"):
        text.tokenizer(str(tmp_path / "a.json"))


def test_a_sentencepiece_model_without_separator_is_an_error(tmp_path):
    model = train_sentencepiece(tmp_path, bos_id=-1, eos_id=-1)
    with pytest.raises(UserError, match="neither an end nor a begin token"):
        text.tokenizer(str(model))


def test_a_tokenizer_to_come_says_so_when_it_is_needed():
    later = text.tokenizer("")
    for use in (lambda: later.encode("a"), lambda: tokenised("x", documents("a"), later)):
        with pytest.raises(UserError, match=r"data.tokenizer='' is to be given"):
            use()


# --- windows --------------------------------------------------------------------------------------


class Texts(list):
    """Documents in memory that count how often they are read."""

    identity = "texts"
    reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)


def documents(*texts):
    found = Texts(t.encode() for t in texts)
    found.identity = repr(texts)
    return found


def random_documents(count=30, seed=0):
    draw = np.random.default_rng(seed)
    return documents(
        *("".join(map(chr, draw.integers(97, 123, n))) for n in draw.integers(0, 40, count))
    )


@pytest.mark.parametrize("length", [1, 7, 32])
def test_windows_predict_every_token_once_and_in_order(length):
    texts = random_documents()
    stream = [t for d in list.__iter__(texts) for t in (256, *d)]
    windows = open_windows(
        "texts", texts, BYTES, length=length, examples=num_windows(len(stream), length=length)
    )
    tokens = windows.rows(np.arange(len(windows)))["token"]
    assert tokens.shape == (len(windows), length + 1)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 1:].ravel(), stream[1 : 1 + tokens[:, 1:].size])
    np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])
    assert tokens[0, 0] == 256
    assert len(stream) - 1 - tokens[:, 1:].size < length


def test_every_byte_is_counted_once():
    """So that bits per byte are bits of this text."""
    texts = random_documents()
    size = sum(map(len, list.__iter__(texts)))
    windows = open_windows("texts", texts, BYTES, length=1, examples=size + len(texts) - 1)
    targets = windows.rows(np.arange(len(windows)))["token"][:, 1:]
    assert BYTES.token_bytes[targets].sum() == size


@pytest.mark.parametrize("length", [1, 5, 64])
def test_segments_count_the_documents_of_a_window(length):
    texts = random_documents()
    owner = np.concatenate([[i] * (len(d) + 1) for i, d in enumerate(list.__iter__(texts))])
    count = num_windows(len(owner), length=length)
    windows = open_windows("t", texts, BYTES, length=length, examples=count, segments=True)
    for i in range(count):
        window = windows[i]
        own = owner[i * length : i * length + length + 1]
        np.testing.assert_array_equal(window["segment"], own - own[0] + 1)
        changes = np.flatnonzero(np.diff(window["segment"])) + 1
        np.testing.assert_array_equal(changes, np.flatnonzero(window["token"][1:] == 256) + 1)
        assert window["segment"].dtype == np.int32


@pytest.mark.parametrize("segments", [False, True])
def test_rows_are_examples_in_any_order(segments):
    windows = open_windows("t", random_documents(), BYTES, length=9, examples=40, segments=segments)
    assert len(windows) == 40
    index = np.array([39, 3, 3, 0])
    rows = windows.rows(index)
    for name, leaf in rows.items():
        np.testing.assert_array_equal(leaf, np.stack([windows[i][name] for i in index]))


@pytest.mark.parametrize(("tokens", "windows"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_whole_windows(tokens, windows):
    assert num_windows(tokens, length=4) == windows


def test_too_few_windows_are_an_error():
    texts = documents("abcdefgh", "ij")  # 12 tokens
    assert len(open_windows("texts", texts, BYTES, length=4, examples=2)) == 2
    with pytest.raises(UserError, match=r"holds 2 windows of 4 tokens where 3 were expected"):
        open_windows("texts", texts, BYTES, length=4, examples=3)
    assert len(open_windows("texts", texts, BYTES, length=4, examples=3, at_most=True)) == 2
    with pytest.raises(UserError, match="holds 0 windows"):
        open_windows("texts", texts, BYTES, length=40, examples=3, at_most=True)


def test_a_window_is_read_in_microseconds():
    tokens = np.random.default_rng(0).integers(0, 256, 2_000_000).astype(np.uint16)
    stream = Tokens(tokens, np.arange(0, len(tokens), 1000), complete=True)
    windows = Windows(stream, length=512, examples=3000, segments=True)
    index = np.random.default_rng(1).integers(0, 3000, 256)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        windows.rows(index)
        times.append(time.perf_counter() - start)
    assert min(times) / 256 < 200e-6  # about 10 on an idle core


# --- the cache ------------------------------------------------------------------------------------


def cached(folder):
    return sorted(p.name for p in (folder / "tokens").rglob("*") if p.is_file())


def test_the_cache_is_plain_files(folder, bpe):
    texts = random_documents()
    found = tokenised("Some/texts:1", texts, text.tokenizer(str(bpe)))
    (place,) = (folder / "tokens").iterdir()
    assert place.name.startswith("Some-texts-1-")
    assert cached(folder) == [".lock", "meta.json", "shards.json", "starts.npy", "tokens.npy"]
    tokens = np.load(place / "tokens.npy")
    assert tokens.dtype == np.uint16
    np.testing.assert_array_equal(tokens, found.tokens)
    meta = json.loads((place / "meta.json").read_text())
    assert meta["tokens"] == len(tokens) == np.load(place / "tokens.npy", mmap_mode="r").shape[0]
    assert meta["bytes"] == sum(map(len, list.__iter__(texts)))
    assert meta["documents"] == len(found.starts) == len(texts)
    assert meta["tokenizer"] == hashlib.sha256(bpe.read_bytes()).hexdigest()
    assert meta["complete"]
    assert isinstance(found.tokens, np.memmap)


def test_large_vocabularies_take_four_bytes():
    class Large:
        vocab_size, separator, fingerprint = 70_000, 69_999, "large"

        def encode_batch(self, texts):
            return [np.array([66_000 + len(t)]) for t in texts]

    found = tokenised("large", documents("a", "bc"), Large())
    assert found.tokens.dtype == np.uint32
    assert found.tokens.tolist() == [69_999, 66_001, 69_999, 66_002]


def test_text_is_tokenised_once():
    texts = random_documents()
    first = tokenised("t", texts, BYTES)
    assert texts.reads == len(texts)
    again = tokenised("t", texts, BYTES)
    assert texts.reads == len(texts)
    np.testing.assert_array_equal(first.tokens, again.tokens)


def test_other_text_and_other_tokenizers_have_their_own_cache(folder, bpe):
    for texts in (documents("a"), documents("b")):
        for tokenizer in (BYTES, text.tokenizer(str(bpe))):
            tokenised("t", texts, tokenizer)
    assert len(list((folder / "tokens").iterdir())) == 4


def test_a_cache_that_was_not_finished_is_made_again(folder):
    texts = random_documents()
    expected = np.array(tokenised("t", texts, BYTES).tokens)
    (place,) = (folder / "tokens").iterdir()
    (place / "tokens.npy").write_bytes(b"half")
    (place / "meta.json").unlink()
    np.testing.assert_array_equal(tokenised("t", texts, BYTES).tokens, expected)


def test_a_writer_that_is_stopped_leaves_nothing_that_is_read(folder):
    texts = documents(*"abcdef")
    fails = type("Fails", (Texts,), {"__getitem__": lambda self, i: 1 / (4 - i) and b"x"})(texts)
    fails.identity = texts.identity
    with pytest.raises(ZeroDivisionError):
        tokenised("t", fails, BYTES)
    assert "meta.json" not in cached(folder)
    assert len(tokenised("t", texts, BYTES).tokens) == 12


def test_only_what_is_needed_is_tokenised(monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 10)
    texts = random_documents(100)
    whole = [t for d in list.__iter__(texts) for t in (256, *d)]
    some = tokenised("t", texts, BYTES, at_least=150)
    assert 150 <= len(some.tokens) < len(whole) / 2
    assert not some.complete
    np.testing.assert_array_equal(some.tokens, whole[: len(some.tokens)])
    reads = texts.reads
    assert reads < 30
    assert len(tokenised("t", texts, BYTES, at_least=len(some.tokens)).tokens) == len(some.tokens)
    assert texts.reads == reads
    more = tokenised("t", texts, BYTES, at_least=len(some.tokens) + 1)
    assert len(more.tokens) > len(some.tokens)
    everything = tokenised("t", texts, BYTES)
    assert everything.complete
    np.testing.assert_array_equal(everything.tokens, whole)
    assert tokenised("t", texts, BYTES, at_least=10**9).complete


WRITE = """
import pathlib, sys, time, zlib
from lsdl.data import corpus, text

class Documents:
    identity = "the same"
    def __len__(self):
        return 50
    def __getitem__(self, i):
        with open(sys.argv[3], "a") as log:
            log.write(f"{i}\\n")
        time.sleep(0.005)
        return b"document %d" % i

me, other = (pathlib.Path(name) for name in sys.argv[1:3])
me.touch()
while not other.exists():
    time.sleep(0.001)
stream = corpus.tokenised("shared", Documents(), text.tokenizer("bytes"))
print(zlib.crc32(stream.tokens.tobytes()))
"""


def test_processes_that_start_together_tokenise_once(tmp_path):
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    log = tmp_path / "log"
    both = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, *order, str(log)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for order in (names, names[::-1])
    ]
    printed = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    stream = b"".join(np.array([256, *b"document %d" % i], np.uint16).tobytes() for i in range(50))
    assert [out.strip() for out, _ in printed] == [str(zlib.crc32(stream))] * 2
    assert log.read_text().split() == [str(i) for i in range(50)]


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "file" / "data"))
    with pytest.raises(UserError, match="cannot be written"):
        tokenised("t", documents("a"), BYTES)


# --- the standard library -------------------------------------------------------------------------


def test_library_files_are_disjoint_and_plain_library():
    splits = stdlib.files()
    names = [f.path for files in splits.values() for f in files]
    assert len(set(names)) == len(names) > 400
    assert {"os.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    for name in names:
        assert not {"test", "tests", "idle_test", "site-packages"} & set(Path(name).parts)
        assert not name.startswith(("_sysconfigdata", "config-"))
    assert splits == {s: tuple(sorted(f, key=lambda x: x.path)) for s, f in splits.items()}


def test_library_splits_have_their_sizes():
    """Some 10 MB of train, 1 MB of valid and the rest of test, by bytes."""
    sizes = {split: sum(f.size for f in files) for split, files in stdlib.files().items()}
    total = sum(sizes.values())
    assert 8e6 < total < 16e6
    assert 0.85 < sizes["train"] / total < 0.94
    assert 0.05 < sizes["valid"] / total < 0.12
    assert 0.01 < sizes["test"] / total < 0.06


@pytest.mark.parametrize(
    ("path", "split"),
    [("os.py", "train"), ("abc.py", "train"), ("datetime.py", "valid"), ("string.py", "test")],
)
def test_a_files_split_never_changes(path, split):
    assert stdlib.split_of(path) == split


def test_sizes_are_known_without_opening_a_file(monkeypatch):
    from lsdl.data.part import make_part

    def refuse(*args, **kwargs):
        raise AssertionError("opened")

    stdlib.files.cache_clear()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    part = make_part("stdlib_text", tokenizer="bytes", seq_len=128, segments=False)
    counted = {split: part.count(split) for split in ("train", "valid", "test", "valid[:5]")}
    monkeypatch.undo()
    for split in ("valid", "test", "valid[:5]"):
        assert len(part.open(split, examples=counted[split])) == counted[split]
        with pytest.raises(UserError, match="windows of 128 tokens"):
            part.open(split, examples=counted[split] + 1)


def test_windows_of_the_library_are_its_files_with_a_manifest(folder):
    found = stdlib.Documents(stdlib.files()["test"])
    stream = tokenised("stdlib_text", found, BYTES)
    assert len(stream.starts) == len(found)
    for i in (0, 7, len(found) - 1):
        end = stream.starts[i + 1] if i + 1 < len(found) else len(stream.tokens)
        data = stream.tokens[stream.starts[i] + 1 : end].astype(np.uint8).tobytes()
        assert data == (Path(json.__file__).parents[1] / found.files[i].path).read_bytes()
        assert stream.tokens[stream.starts[i]] == 256
    (place,) = (folder / "tokens").iterdir()
    manifest = json.loads((place / "manifest.json").read_text())
    assert [m["path"] for m in manifest] == [f.path for f in found.files]
    for entry, i in zip(manifest, range(len(found)), strict=True):
        assert entry["sha256"] == hashlib.sha256(found[i]).hexdigest()
        assert entry["size"] == len(found[i])
