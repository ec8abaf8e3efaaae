"""Data that are damaged or not there: found before anything is compiled, and named."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lsdl.data import corpus, shards, sources, text
from lsdl.data.loader import Loader
from lsdl.errors import DATA, NO_DATA, DataError, UserError
from lsdl.experiment import build
from tests.conftest import CONFIGS, ROOT

SMOKE = "digits_mlp:smoke"
SHORT = ("--config.total_steps=2", "--config.eval.every_steps=2", "--config.log.tensorboard=false")


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data folder of its own with the digits in it; returns the set's folder."""
    folder = tmp_path / "data"
    shutil.copytree(ROOT / ".cache" / "data" / "digits", folder / "digits")
    monkeypatch.setenv("LSDL_DATA_DIR", str(folder))
    place = folder / "digits" / "1.0.0"
    (place / shards.MANIFEST).unlink(missing_ok=True)
    sources.open_reader("digits", "train")
    for split in ("valid", "test"):
        sources.open_reader("digits", split)
    assert len(json.loads((place / shards.MANIFEST).read_text())["shards"]) == 3
    return place


@pytest.fixture
def shard(data):
    (found,) = data.glob("digits-train*")
    return found


@pytest.fixture
def refused(train, tmp_path):
    """`refused()`: the one sentence that refuses the digits, before a step is compiled."""

    def refused(code=DATA):
        events = []
        jax.monitoring.register_event_duration_secs_listener(lambda e, *_, **__: events.append(e))
        began = time.monotonic()
        found, out, err = train(SMOKE, f"--workdir={tmp_path / 'run'}", *SHORT)
        assert (found, out) == (code, "")
        assert time.monotonic() - began < 20
        assert len(err.splitlines()) == 1
        assert not any("backend_compile" in event for event in events)
        assert not (tmp_path / "run").exists()
        return err

    return refused


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def swap(path):
    """Another split's file under this one's name."""
    (other,) = path.parent.glob("digits-test*")
    shutil.copy(other, path)


# {damage: what the sentence says}
DAMAGES = {
    halve: ["163,840 bytes", "327,680 bytes", "1,257 examples"],
    lambda path: path.write_bytes(path.read_bytes()[:-1]): ["327,679 bytes", "327,680"],
    lambda path: path.write_bytes(b""): ["has 0 bytes"],
    lambda path: path.unlink(): ["is not there"],
    flip: ["has the sha256"],
    link: ["no regular file"],
    pipe: ["no regular file"],
    swap: ["131,072 bytes", "327,680 bytes"],
}


@pytest.mark.threat(21, 36)
@pytest.mark.parametrize(("damage", "words"), DAMAGES.items(), ids=range(len(DAMAGES)))
def test_a_damaged_shard_is_named_before_anything_is_compiled(refused, shard, damage, words):
    damage(shard)
    sentence = refused()
    for word in [f"The shard {shard}", "delete", *words]:
        assert word in sentence


@pytest.mark.threat(21)
def test_a_truncated_shard_is_found_without_a_manifest(shard, refused):
    """An array_record that has lost its end opens, and holds nothing."""
    (shard.parent / shards.MANIFEST).unlink()
    halve(shard)
    assert re.search(r"holds (0 examples|no records.*), where 1,257 examples are exp", refused())


@pytest.mark.threat(21)
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda rows: rows[0].update(examples=269), ["269 examples", "270 examples"]),
        (lambda rows: rows[1].update(bytes=7), ["7 bytes"]),
        (lambda rows: rows[1].update(sha256="0" * 64), ["000000000000..."]),
        (lambda rows: rows[0].update(examples="270"), ["is not what lsdl writes"]),
        (lambda rows: rows[0].update(more=1), ["is not what lsdl writes"]),
        (lambda rows: rows.append(rows[0]), ["is not what lsdl writes"]),
    ],
)
def test_a_manifest_that_says_otherwise_is_told(data, refused, edit, words):
    manifest = json.loads((data / shards.MANIFEST).read_text())
    edit(manifest["shards"])
    (data / shards.MANIFEST).write_text(json.dumps(manifest))
    sentence = refused()
    for word in words:
        assert word in sentence


@pytest.mark.threat(21)
def test_large_shards_are_read_on_request(shard, monkeypatch, load):
    monkeypatch.setattr(shards, "QUICK_BYTES", 0)
    experiment = build(load(SMOKE))
    experiment.check_data()
    assert len(experiment.check_digests()) == 3
    flip(shard)
    experiment = build(load(SMOKE))
    experiment.check_data()
    with pytest.raises(DataError, match=f"{shard.name} has the sha256"):
        experiment.check_digests()


@pytest.mark.threat(21)
def test_a_manifest_is_made_where_there_is_none_and_where_it_may_be(data, monkeypatch):
    content = (data / shards.MANIFEST).read_text()
    (data / shards.MANIFEST).unlink()

    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_json", refuse)
        assert len(sources.open_reader("digits", "train")) == 1257
    assert not (data / shards.MANIFEST).exists()
    for split in ("train", "valid", "test"):
        sources.open_reader("digits", split)
    assert (data / shards.MANIFEST).read_text() == content


@pytest.mark.threat(20)
def test_a_corrupt_record_is_named_by_its_shard(shard, train, tmp_path):
    (shard.parent / shards.MANIFEST).unlink()  # whose digest would tell earlier
    flip(shard)
    code, _, err = train(SMOKE, f"--workdir={tmp_path / 'run'}", *SHORT)
    assert code == DATA
    number = int(re.match(r"lsdl: Record (\d+) of the shard", err)[1])
    assert f"of the shard {shard} cannot be read (example {number} of digits train;" in err
    assert len(err.splitlines()) == 1
    reader = sources.open_reader("digits", "train")
    assert reader[number - 1]
    with pytest.raises(DataError, match=f"Record {number} "):
        reader[number]


@pytest.mark.threat(20)
def test_records_of_slices_are_named_by_their_place_in_the_shard():
    class Broken:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            raise RuntimeError("hash mismatch\nat byte 9")

    parts = [("a", 5, 3), ("b", 0, 7)]  # the last three of the first shard, and the second one
    records = shards.Records(Broken(), parts, what="x train[5:]", mend="delete it.")
    for i, said in {0: "5 of the shard a", 2: "7 of the shard a", 3: "0 of the shard b"}.items():
        with pytest.raises(DataError, match=f"Record {said} .*example {i} of x .*RuntimeError: ha"):
            records[i]
    with pytest.raises(IndexError):
        records[10]


# Tokens


class Texts(list):
    identity = "texts"


@pytest.mark.threat(21)
@pytest.mark.parametrize("damage", [halve, flip, lambda path: path.unlink(), link])
@pytest.mark.parametrize("file", ["tokens.npy", "starts.npy"])
def test_damaged_tokens_are_found(tmp_path, monkeypatch, damage, file):
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    texts = Texts(f"text {i}" for i in range(100))
    corpus.tokenised("texts", texts, text.tokenizer("bytes"))
    (place,) = (tmp_path / "tokens").iterdir()
    damage(place / file)
    with pytest.raises(DataError, match=f"{file} .*the next run tokenises texts again"):
        corpus.tokenised("texts", texts, text.tokenizer("bytes"))


@pytest.mark.threat(21)
@pytest.mark.parametrize("meta", ["{", "[]", '{"tokens": 9}', '{"tokens": "9", "documents": 1}'])
def test_tokens_whose_record_is_torn_are_written_again(tmp_path, monkeypatch, meta):
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    texts = Texts(f"text {i}" for i in range(100))
    first = np.array(corpus.tokenised("texts", texts, text.tokenizer("bytes")).tokens)
    (place,) = (tmp_path / "tokens").iterdir()
    (place / "meta.json").write_text(meta)
    again = corpus.tokenised("texts", texts, text.tokenizer("bytes"))
    np.testing.assert_array_equal(first, again.tokens)


# Data that are not there, and the network

NO_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        print("tried", event, args, file=sys.stderr, flush=True)
        raise OSError(101, "Network is unreachable")
sys.addaudithook(refuse)
from lsdl.train import main
sys.exit(main(sys.argv[1:]))
"""


def alone(folder, *arguments):
    """lsdl.train where no connection can be made, by Python or by anything below it."""
    command = [sys.executable, "-c", NO_NETWORK, "--config", f"{CONFIGS / 'digits_mlp.py'}:smoke"]
    apart = ["unshare", "--user", "--map-root-user", "--net"]
    if subprocess.run([*apart, "true"], capture_output=True).returncode == 0:
        command = [*apart, *command]
    env = os.environ | {"LSDL_DATA_DIR": str(folder / "data"), "PYTHONPATH": str(ROOT)}
    command += [f"--workdir={folder / 'run'}", *SHORT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)


@pytest.fixture(scope="module")
def sockets():
    """The connections that are tried from here on; a hook of Python's stays, and is then deaf."""
    tried, open_ = [], [True]

    def hear(event, args):
        if open_ and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            tried.append(args)

    sys.addaudithook(hear)
    yield tried
    open_.clear()


@pytest.mark.threat(22)
def test_with_the_data_on_disk_no_connection_is_tried(data, load, sockets):
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", 1), timeout=1)
    assert len(sockets) > 0  # the hook hears
    sockets.clear()
    experiment = build(load(SMOKE))
    experiment.check_data()
    for batches in (experiment.train_loader(), experiment.eval_loader("test")):
        batches.batch(0)
    assert sockets == []


@pytest.mark.faults
@pytest.mark.threat(22)
def test_a_run_with_the_data_on_disk_needs_no_network(data, tmp_path):
    done = alone(tmp_path)
    assert done.returncode == 0
    assert "tried" not in done.stderr


@pytest.mark.faults
@pytest.mark.threat(22)
def test_the_embedded_data_are_prepared_without_a_connection(tmp_path):
    done = alone(tmp_path)
    assert done.returncode == 0
    assert "tried" not in done.stderr
    assert (tmp_path / "data" / "digits" / "1.0.0" / shards.MANIFEST).exists()


@pytest.mark.faults
@pytest.mark.threat(22)
def test_data_that_are_not_there_are_named_with_their_command(tmp_path):
    began = time.monotonic()
    source = ["--config.data.source=tfds:cifar10", "--config.data.valid_split=test"]
    done = alone(tmp_path, *source)
    assert done.returncode == NO_DATA
    assert time.monotonic() - began < 60  # 5 s, on a machine with nothing else to do
    assert done.stderr.startswith("lsdl: tfds:cifar10 is not on disk. Prepare it once: pip install")
    assert "t.builder('cifar10', data_dir='" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()


# Reading ahead


class Failing:
    def __len__(self):
        return 40

    def __getitem__(self, i):
        if i == 9:
            raise DataError("Record 9 of the shard a cannot be read.")
        return {"x": np.float32(i)}


def loader(reader, **more):
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), P("data"))
    spec = {"x": jax.ShapeDtypeStruct((4,), np.float32)}
    return Loader(reader, spec=spec, batch_size=4, sharding=sharding, train=True, **more)


@pytest.mark.threat(24)
@pytest.mark.parametrize("prefetch", [1, 2, 16])
def test_what_fails_while_reading_ahead_comes_up_and_leaves_no_thread(prefetch):
    made = loader(Failing(), prefetch=prefetch)
    before = threading.active_count()
    began = time.monotonic()
    with pytest.raises(DataError, match="Record 9"):
        list(made.batches(0, made.num_batches))
    assert time.monotonic() - began < 20
    assert threading.active_count() <= before + prefetch


# Fingerprint


@pytest.mark.threat(15)
def test_the_fingerprint_is_that_of_the_records(data, load):
    found = lambda *overrides: build(load(SMOKE, *overrides)).data_fingerprint  # noqa: E731
    plain = found()
    assert (
        plain == found("seed=1") == found("data.transforms=('shift:1',)") == found("batch_size=8")
    )
    (data / shards.MANIFEST).unlink()
    assert plain == found()  # whoever opens them first
    others = [
        found("data.train_split=train[:50%]"),
        found("data.train_split=valid"),
        found("data.label_noise=0.5"),
        found("data.mixture=(('digits', 1.0),)"),
    ]
    assert len({plain, *others}) == 5


@pytest.mark.threat(15)
def test_the_fingerprint_of_a_tfds_set_has_its_files(data, tmp_path, monkeypatch, load):
    shutil.copytree(data.parent, tmp_path / "data" / "other_digits")
    place = tmp_path / "data" / "other_digits" / "1.0.0"
    for file in place.glob("digits-*"):
        file.rename(file.with_name(file.name.replace("digits-", "other_digits-")))
    info = place / "dataset_info.json"
    info.write_text(info.read_text().replace('"name": "digits"', '"name": "other_digits"'))
    (place / shards.MANIFEST).unlink()
    from lsdl.data.part import make_part

    part = make_part("digits", tokenizer="bytes", seq_len=0, segments=False)
    monkeypatch.setattr(sources, "card", lambda source: part.card)
    other = make_part("tfds:other_digits", tokenizer="bytes", seq_len=0, segments=False)
    before = other.identity("train")
    assert before == other.identity("train")
    (file,) = place.glob("*train*")
    (place / shards.MANIFEST).unlink()
    file.write_bytes(file.read_bytes() + b"\0")
    with pytest.raises((DataError, UserError)):
        other.identity("train")
