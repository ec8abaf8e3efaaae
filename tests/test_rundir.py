"""The run folder: writes are whole or absent, one trainer at a time, and a history of changes."""

import calendar
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest

from lsdl import rundir
from lsdl.errors import LOCKED, LockedError, UserError
from lsdl.files import write_json
from lsdl.rundir import RunDir

# Creation


def test_folder_is_created_with_its_parents_and_may_exist(tmp_path):
    folder = RunDir(tmp_path / "a" / "b")
    folder.create()
    (folder.path / "kept").write_text("x")
    folder.create()
    assert [path.name for path in folder.path.iterdir()] == ["kept"]


def test_path_is_absolute_and_knows_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert RunDir("~/run").path == RunDir("run").path == RunDir(str(tmp_path / "run")).path
    assert RunDir("run").path == tmp_path / "run"


def test_everything_lies_in_the_folder(tmp_path):
    folder = RunDir(tmp_path / "run")
    places = (folder.config, folder.env, folder.metrics, folder.tensorboard, folder.checkpoints)
    assert sorted(path.name for path in places) == [
        "checkpoints",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "tensorboard",
    ]
    assert {path.parent for path in places} == {folder.path}
    assert not folder.path.exists()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "is a file"),
        ("file/run", "is a file"),
        ("file/a/b", "is a file"),
        ("x" * 300, "File name too long"),
    ],
)
def test_folder_that_cannot_be_is_one_sentence(tmp_path, name, why):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(UserError) as error:
        RunDir(tmp_path / name).create()
    sentence = str(error.value)
    assert str(tmp_path / name) in sentence
    assert why in sentence
    assert sentence.endswith("choose another --workdir.")
    assert len(sentence.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.threat(9)
def test_folder_that_is_not_writable_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: not mode & os.W_OK)  # root may write all
    with pytest.raises(UserError, match="not writable"):
        RunDir(tmp_path).create()


# Writes


def test_json_is_written_whole_and_alone(tmp_path):
    path = tmp_path / "x.json"
    for value in ({"a": [1, 2.5, None, "ü"]}, {}):
        write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert path.read_text().endswith("\n")
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.threat(42)
@pytest.mark.parametrize("fails", ["json.dumps", "os.fsync", "os.replace"])
def test_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, fails):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})

    def fail(*args, **kwargs):
        for file in args:
            if hasattr(file, "write"):
                file.write('{"ne')
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(fails, fail)
        with pytest.raises(OSError, match="disk full"):
            write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    write_json(path, {"newer": 3})
    assert json.loads(path.read_text()) == {"newer": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_value_that_is_not_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": 2, "object": object()})
    assert json.loads(path.read_text()) == {"old": 1}


@pytest.mark.threat(4, 42)
def test_content_is_on_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, _n=name, _c=call: (order.append(_n), _c(*a)))
    write_json(tmp_path / "x.json", {})
    assert order == ["fsync", "replace", "fsync"]  # the last one is the folder's


# The lock

HOLD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job has it ignored
from lsdl.rundir import RunDir
folder = RunDir(sys.argv[1])
folder.create()
folder.acquire()
print("held", flush=True)
sys.stdin.readline()
folder.release()
print("released", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holder(path):
    """Another process that holds the lock of `path`; a line on its stdin makes it let go."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def folder(tmp_path):
    folder = RunDir(tmp_path / "run")
    folder.create()
    yield folder
    folder.release()


@pytest.mark.threat(10)
def test_second_trainer_is_told_who_holds_the_folder(folder):
    with holder(folder.path) as other:
        with pytest.raises(LockedError) as error:
            folder.acquire()
        sentence = str(error.value)
        assert f"process {other.pid} on {platform.node()}:" in sentence
        assert str(folder.path) in sentence
        assert len(sentence.splitlines()) == 1
        assert error.value.exit_code == LOCKED == 73


@pytest.mark.threat(10)
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_lock_dies_with_its_holder(folder, end):
    with holder(folder.path) as other:
        with pytest.raises(LockedError):
            folder.acquire()
        other.send_signal(end)
        other.wait(30)
        folder.acquire()


def test_lock_is_released_by_a_live_holder(folder):
    with holder(folder.path) as other:
        other.stdin.write("\n")
        other.stdin.flush()
        assert other.stdout.readline() == "released\n"
        folder.acquire()
        assert other.poll() is None


def test_lock_names_the_last_holder_alone(folder):
    with holder(folder.path) as other:
        first = other.pid
    folder.acquire()
    with pytest.raises(LockedError) as error:
        RunDir(folder.path).acquire()
    assert f"in use by process {os.getpid()} on " in str(error.value)
    assert str(first) not in str(error.value).replace(str(folder.path), "")


def test_refused_trainer_does_not_disturb_the_holder(folder):
    folder.acquire()
    before = (folder.path / ".lock").read_text()
    for _ in range(2):
        with pytest.raises(LockedError):
            RunDir(folder.path).acquire()
    assert (folder.path / ".lock").read_text() == before


def test_locks_of_two_folders_are_independent(tmp_path):
    folders = [RunDir(tmp_path / name) for name in "ab"]
    for folder in folders:
        folder.create()
        folder.acquire()
    for folder in folders:
        folder.release()


def test_release_may_come_twice_or_without_a_lock(folder):
    folder.release()
    folder.acquire()
    folder.release()
    folder.release()
    folder.acquire()


# config.json


def entry(**changes):
    return {
        "source": "configs/x.py",
        "overrides": {"seed": 1},
        "fields": {},
        "changes": {},
    } | changes


def test_new_folder_has_no_config(folder):
    assert folder.read_config() is None


def test_config_is_stored_with_its_source_and_overrides(folder):
    before = time.time()
    folder.write_config(**entry(fields={"seed": 1, "name": "x"}))
    stored = folder.read_config()
    assert stored.keys() == {"id", "source", "overrides", "config", "history"}
    assert stored["source"] == "configs/x.py"
    assert stored["overrides"] == {"seed": 1}
    assert stored["config"] == {"seed": 1, "name": "x"}
    [first] = stored["history"]
    assert first.keys() == {"time", "overrides"}
    assert first["overrides"] == {"seed": 1}
    assert_now(first["time"], before)


def assert_now(text, before):
    seconds = calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))
    assert before - 1 <= seconds <= time.time() + 1


def test_history_grows_with_changes_only(folder):
    folder.write_config(**entry())
    folder.write_config(**entry())
    folder.write_config(**entry(overrides={}))
    assert len(folder.read_config()["history"]) == 1
    first = folder.read_config()["history"][0]

    folder.write_config(**entry(changes={"mesh": ("data=8", "data=4"), "total_steps": (5, None)}))
    folder.write_config(**entry())
    folder.write_config(**entry(overrides={"seed": 2}, changes={"rules": ("dp", "tp")}))
    history = folder.read_config()["history"]
    assert history[0] == first
    assert [h.get("changes") for h in history] == [
        None,
        {"mesh": ["data=8", "data=4"], "total_steps": [5, None]},
        {"rules": ["dp", "tp"]},
    ]
    assert [h["overrides"] for h in history] == [{"seed": 1}, {"seed": 1}, {"seed": 2}]


def test_newest_config_is_the_one_stored(folder):
    folder.write_config(**entry(fields={"mesh": "data=8"}))
    changes = {"mesh": ("data=8", "data=4")}
    folder.write_config(**entry(fields={"mesh": "data=4"}, overrides={}, changes=changes))
    stored = folder.read_config()
    assert stored["config"] == {"mesh": "data=4"}
    assert stored["overrides"] == {}


@pytest.mark.parametrize("text", ["", "{", '{"config": {}', "not json"])
def test_config_that_is_no_json_is_named(folder, text):
    folder.config.write_text(text)
    with pytest.raises(UserError) as error:
        folder.read_config()
    assert str(folder.config) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# All of it


def claim(folder, **fields):
    return folder.claim(
        source="x.py", overrides=fields, fields=fields, devices={"as": fields}, total_steps=9
    )


def recorded(folder):
    return {p.name: p.read_text() for p in folder.path.iterdir() if p.name != ".lock"}


def test_claim_creates_locks_and_records(tmp_path):
    folder = RunDir(tmp_path / "a" / "run")
    assert claim(folder, seed=1, mesh="data=8") == {}
    with pytest.raises(LockedError):
        RunDir(folder.path).acquire()
    stored = folder.read_config()
    assert stored["config"] == {"seed": 1, "mesh": "data=8"}
    assert (stored["source"], stored["overrides"]) == ("x.py", {"seed": 1, "mesh": "data=8"})
    assert json.loads(folder.env.read_text())["devices"]["as"] == {"seed": 1, "mesh": "data=8"}
    folder.release()


def test_claim_returns_and_records_what_a_resume_changes(folder):
    claim(folder, seed=1, mesh="data=8")
    folder.release()
    assert claim(folder, seed=1, mesh="data=4") == {"mesh": ("data=8", "data=4")}
    folder.release()
    assert claim(folder, seed=1, mesh="data=4") == {}
    assert [h.get("changes") for h in folder.read_config()["history"]] == [
        None,
        {"mesh": ["data=8", "data=4"]},
    ]


def test_claim_for_another_config_changes_nothing(folder):
    claim(folder, seed=1, mesh="data=8")
    before = recorded(folder)
    folder.release()
    with pytest.raises(UserError, match="seed=1"):
        claim(folder, seed=2, mesh="data=4")
    assert recorded(folder) == before


def test_claim_that_is_refused_holds_no_lock(folder):
    claim(folder, seed=1)
    folder.release()
    with pytest.raises(UserError, match="seed=1"):
        claim(folder, seed=2)
    other = RunDir(folder.path)
    other.acquire()
    other.release()


@pytest.mark.threat(10)
def test_claim_of_a_folder_in_use_changes_nothing(folder):
    claim(folder, seed=1, mesh="data=8")
    before = recorded(folder)
    with pytest.raises(LockedError):
        claim(RunDir(folder.path), seed=1, mesh="data=4")
    assert recorded(folder) == before


# env.json


def test_env_says_what_made_the_run(folder, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/lib/lsdl/train.py", "--config", "x.py"])
    before = time.time()
    folder.write_env(devices={"count": 8, "kind": "cpu"})
    env = json.loads(folder.env.read_text())
    assert env.keys() == {
        "time",
        "command",
        "python",
        "versions",
        "platform",
        "cpu_count",
        "devices",
        "data",
        "commit",
        "resumed",
    }
    assert_now(env["time"], before)
    assert env["command"] == ["train.py", "--config", "x.py"]
    assert env["python"] == ".".join(map(str, sys.version_info[:3]))
    assert env["devices"] == {"count": 8, "kind": "cpu"}
    assert env["versions"].keys() >= {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain"}
    for name, version in env["versions"].items():
        assert version == importlib.metadata.version(name)


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository that `commit()` takes for lsdl's own; the fixture's value runs git in it."""
    (tmp_path / "lsdl").mkdir()
    source = tmp_path / "lsdl" / "rundir.py"
    source.write_text("first\n")
    monkeypatch.setattr(rundir, "__file__", str(source))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "x")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "x@example.org")

    def git(*arguments):
        command = ["git", "-C", tmp_path, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    return git


def test_commit_is_the_head_and_a_plus_marks_changes(repository, tmp_path):
    repository("init", "-q")
    repository("add", ".")
    repository("commit", "-q", "-m", "first")
    head = repository("rev-parse", "HEAD")
    assert rundir.commit() == head
    (tmp_path / "notes").write_text("untracked")
    assert rundir.commit() == head
    (tmp_path / "lsdl" / "rundir.py").write_text("second\n")
    assert rundir.commit() == f"{head}+"


def test_no_commit_outside_git_or_before_the_first(repository):
    assert rundir.commit() is None
    repository("init", "-q")
    assert rundir.commit() is None


def test_no_commit_without_the_git_program(repository, monkeypatch, tmp_path):
    repository("init", "-q")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rundir.commit() is None


@pytest.mark.threat(16)
def test_a_resume_adds_its_environment_and_keeps_the_first(folder):
    claim(folder, seed=1)
    first = json.loads(folder.env.read_text())
    folder.release()
    claim(folder, seed=1)
    again = json.loads(folder.env.read_text())
    assert {**again, "resumed": []} == first
    assert len(again["resumed"]) == 1


def test_a_complete_run_leaves_its_environment_alone(folder):
    claim(folder, seed=1)
    folder.release()
    before = folder.env.read_bytes()
    (folder.checkpoints / "9").mkdir(parents=True)
    claim(folder, seed=1)
    assert folder.env.read_bytes() == before


@pytest.mark.threat(14)
def test_a_run_does_not_go_on_with_other_data(tmp_path):
    def claim(data):
        folder = RunDir(tmp_path / "run")
        facts = dict(source="x.py", overrides={}, fields={"seed": 0}, devices={}, total_steps=3)
        try:
            return folder.claim(**facts, data=data)
        finally:
            folder.release()

    claim("a")
    assert claim("a") == {}
    with pytest.raises(UserError, match=r"on other data \(fingerprint a, now b\)"):
        claim("b")
    assert json.loads((tmp_path / "run" / "env.json").read_text())["data"] == "a"
