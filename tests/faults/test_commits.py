"""Commits: whole or absent, verified before use, chosen by number, and never the last one lost."""

import json
import os
import random
import shutil
import socket

import pytest

from lsdl import commits, verify
from lsdl.commits import MANIFEST, REJECTED, SAVING, TRASH
from lsdl.errors import FINISHED, STORAGE
from tests.faults.steps import DAMAGES, FILES, all_files, committed, damage, tree


def allow():
    """The owner is still the owner."""


# What a commit is


def test_a_committed_step_verifies_and_its_manifest_is_read_back(tmp_path):
    more = {"metrics": {"loss": 0.5}, "notes": {"skipped": [[3, 4]]}, "config_digest": "c"}
    folder = committed(tmp_path, 12, run="r", **more)
    assert commits.verify(folder, run="r") is None
    manifest = commits.read_manifest(folder)
    assert (manifest.step, manifest.run, manifest.owner) == (12, "r", "0123456789ab")
    assert (manifest.metrics, manifest.notes) == (more["metrics"], more["notes"])
    assert manifest.files.keys() == FILES.keys()
    assert [p.name for p in tmp_path.iterdir()] == ["12"]


@pytest.mark.threat(4)
def test_all_bytes_and_names_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    """And the rename is, before anything else is done."""
    log, real = [], {name: getattr(os, name) for name in ("fsync", "rename")}

    def fsync(opened):
        log.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{opened}"))))
        real["fsync"](opened)

    def rename(old, new):
        log.append(("rename", os.path.basename(new)))
        real["rename"](old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    committed(tmp_path, 7)
    staging = commits.staging(tmp_path, 7, "0123456789ab", 1).name
    *before, manifest, folder, renamed, parent = log
    assert {name for _, name in before} == {"a1", "b2", "_METADATA", "notes", "d", "state"}
    places = {name: i for i, (_, name) in enumerate(before)}
    assert max(places[n] for n in ("a1", "b2")) < places["d"] < places["state"]
    assert (manifest, folder) == (("fsync", MANIFEST), ("fsync", staging))
    assert renamed == ("rename", "7")
    assert parent == ("fsync", tmp_path.name)


@pytest.mark.threat(10)
def test_a_writer_that_is_the_owner_no_more_commits_nothing(tmp_path):
    folder = commits.staging(tmp_path, 3, "0123456789ab", 1)
    (folder / "state").mkdir(parents=True)

    def fence():
        raise RuntimeError("another owner")

    with pytest.raises(RuntimeError, match="another owner"):
        commits.commit(folder, commits.Manifest(3, None, "0123456789ab"), fence=fence)
    assert commits.steps(tmp_path) == []


def test_no_two_attempts_write_in_one_place(tmp_path):
    places = {commits.staging(tmp_path, *of) for of in ((1, "a", 1), (1, "a", 2), (1, "b", 1))}
    assert len(places) == 3


# What does not verify


@pytest.mark.threat(6, 7)
@pytest.mark.parametrize("kind", DAMAGES, ids=lambda kind: kind.__name__)
def test_every_damage_to_every_file_is_found_and_the_file_named(tmp_path, kind):
    folder = committed(tmp_path / "c", 4)
    for path in all_files(folder):
        data = path.read_bytes()
        kind(path, random.Random(1))
        reason = commits.verify(folder)
        assert path.name in reason
        path.write_bytes(data)
    assert commits.verify(folder) is None


@pytest.mark.threat(7)
def test_every_bit_of_a_manifest_is_looked_at(tmp_path):
    """Also of what names no file: the owner, metrics, a space that could as well be a tab."""
    folder = committed(tmp_path, 4, metrics={"loss": 0.25}, notes={"skip": [[1, 2]]})
    good = (folder / MANIFEST).read_bytes()
    for at in range(len(good)):
        for flip in (*(1 << bit for bit in range(8)), ord(" ") ^ ord("\t")):
            bad = bytearray(good)
            bad[at] ^= flip
            (folder / MANIFEST).write_bytes(bad)
            with pytest.raises(commits.Damage):
                commits.read_manifest(folder)
    (folder / MANIFEST).write_bytes(good)
    assert commits.read_manifest(folder).owner


def test_another_size_is_found_without_reading_a_byte(tmp_path, monkeypatch):
    folder = committed(tmp_path, 4)
    monkeypatch.setattr(commits, "_digest", None)
    assert commits.verify(folder, digests=False) is None
    os.truncate(folder / "state" / "d" / "a1", 3)
    assert "state/d/a1 has 3 bytes, 701 were written" in commits.verify(folder, digests=False)


def strange(folder, kind):
    """Something in the place of, or beside, the file state/d/a1."""
    path, outside = folder / "state" / "d" / "a1", folder.parent / "outside"
    if kind == "symlink":
        shutil.copy(path, outside)
        path.unlink()
        path.symlink_to(outside)
    elif kind == "FIFO":
        path.unlink()
        os.mkfifo(path)
    elif kind == "socket":
        path.unlink()
        here = os.getcwd()
        os.chdir(path.parent)  # its address has a bound length
        socket.socket(socket.AF_UNIX).bind("a1")
        os.chdir(here)
    elif kind == "hard link":
        os.link(path, outside)
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "linked folder":
        shutil.copytree(path.parent, outside)
        shutil.rmtree(path.parent)
        path.parent.symlink_to(outside)
    elif kind == "extra":
        (path.parent / "zz").write_bytes(b"")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.threat(36)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("symlink", ["state/d/a1", "a symlink"]),
        ("linked folder", ["state/d", "a symlink"]),
        ("FIFO", ["state/d/a1", "a FIFO"]),
        ("socket", ["state/d/a1", "a socket"]),
        ("hard link", ["state/d/a1", "hard link"]),
        ("folder", ["state/d/a1", "missing"]),
        ("extra", ["state/d/zz", "not in the manifest"]),
    ],
)
def test_only_plain_files_inside_the_folder_are_opened(tmp_path, monkeypatch, kind, words):
    folder = committed(tmp_path / "c", 4)
    strange(folder, kind)
    monkeypatch.setattr(commits, "_digest", None)  # refused before a byte is read
    for digests in (False, True):
        reason = commits.verify(folder, digests=digests)
        for word in words:
            assert word in reason


def rewritten(folder, change):
    path = folder / MANIFEST
    value = json.loads(path.read_text())
    del value["sha256"]
    change(value)
    path.write_text(commits._sealed(json.dumps(value)))


DEEP = "[" * 10_000 + "]" * 10_000
CHANGES = {
    "dot dot": (lambda v: v["files"].update({"../../x": [1, "0"]}), "no path inside"),
    "absolute": (lambda v: v["files"].update({"/etc/passwd": [1, "0"]}), "no path inside"),
    "NUL": (lambda v: v["files"].update({"a\0b": [1, "0"]}), "no path inside"),
    "empty part": (lambda v: v["files"].update({"a//b": [1, "0"]}), "no path inside"),
    "another format": (lambda v: v.update(format=1), "format 1"),
    "another step": (lambda v: v.update(step=5), "of step 5"),
    "a step of text": (lambda v: v.update(step="4"), "another type"),
    "true for a step": (lambda v: v.update(step=True), "another type"),
    "another run": (lambda v: v.update(run="other"), "of the run other"),
    "one field more": (lambda v: v.update(more=1), "not what lsdl writes"),
    "one field less": (lambda v: v.pop("owner"), "not what lsdl writes"),
    "files of text": (lambda v: v.update(files="abc"), "not what lsdl writes"),
    "a size of text": (lambda v: v["files"].update(notes=["4", "0"]), "another type"),
}
TEXTS = {
    "deep": (DEEP, "not what lsdl writes"),
    "deep inside": ('{"format": 2, "notes": ' + DEEP + "}", "not what lsdl writes"),
    "twice": ('{"format": 2, "format": 2}', "not what lsdl writes"),
    "NaN": ('{"format": NaN}', "not what lsdl writes"),
    "huge number": ('{"format": ' + "9" * 100_000 + "}", "not what lsdl writes"),
    "a list": ("[]", "not what lsdl writes"),
    "unsealed": ('{"format": 2, "step": 4, "run": null, "owner": "o"}', "other bytes"),
    "no text": ("\xff\xfe\x00", "not what lsdl writes"),
    "too long": (" " * (commits.MOST_BYTES + 1), "more than"),
}


@pytest.mark.threat(35, 37)
@pytest.mark.parametrize("case", CHANGES)
def test_a_manifest_that_says_something_else_is_refused(tmp_path, case):
    change, words = CHANGES[case]
    folder = committed(tmp_path, 4, run="r")
    rewritten(folder, change)
    assert words in commits.verify(folder, run="r")


@pytest.mark.threat(35)
@pytest.mark.parametrize("case", TEXTS)
def test_a_manifest_that_is_none_is_refused(tmp_path, case):
    text, words = TEXTS[case]
    folder = committed(tmp_path, 4)
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    assert words in commits.verify(folder)


@pytest.mark.threat(35)
def test_a_manifest_that_says_a_thing_twice_is_refused(tmp_path):
    """Parsers differ in which of the two they believe."""
    folder = committed(tmp_path, 4)
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"step": 4', '"step": 5, "step": 4'))
    assert "not what lsdl writes" in commits.verify(folder)


@pytest.mark.threat(36)
def test_a_manifest_that_is_a_fifo_keeps_nobody_waiting(tmp_path):
    folder = committed(tmp_path, 4)
    (folder / MANIFEST).unlink()
    os.mkfifo(folder / MANIFEST)
    assert commits.verify(folder) == "manifest.json is a FIFO"


def test_a_step_without_a_manifest_is_told_apart(tmp_path):
    (tmp_path / "4" / "state").mkdir(parents=True)
    assert "older lsdl" in commits.verify(tmp_path / "4")


@pytest.mark.threat(10)
def test_a_step_copied_in_from_another_run_is_refused(tmp_path):
    folder = committed(tmp_path / "a", 4, run="r1")
    shutil.copytree(folder, tmp_path / "b" / "4")
    assert commits.verify(tmp_path / "b" / "4", run="r1") is None
    assert "of the run r1: this is r2" in commits.verify(tmp_path / "b" / "4", run="r2")


def test_a_step_under_another_number_is_refused(tmp_path):
    os.rename(committed(tmp_path, 4), tmp_path / "6")
    assert "of step 4" in commits.verify(tmp_path / "6")


# Which is chosen

STATES = ("committed", "damaged", "gutted", "empty", "of another run", "a file", "a symlink")
OTHERS = (f"{SAVING}9-abc-1", TRASH, f"{REJECTED}8-abc", "007", "-3", "4.5", "x9", "٣")


def put(root, template, step, state):
    folder = root / str(step)
    if state in ("committed", "damaged", "gutted", "of another run"):
        committed(root, step, run="r2" if state == "of another run" else "r")
        if state == "damaged":
            damage(folder, random.Random(step))
        if state == "gutted":
            shutil.rmtree(folder / "state")
    elif state == "empty":
        folder.mkdir()
    elif state == "a file":
        folder.write_text("x")
    else:
        folder.symlink_to(template)


def chosen(root, draw, template):
    """Draw a folder; returns (what is chosen, what should be)."""
    root.mkdir()
    states = {step: draw.choice(STATES) for step in draw.sample(range(30), draw.randrange(6))}
    for step, state in states.items():
        put(root, template, step, state)
    for name in draw.sample(OTHERS, 3):
        (root / name).mkdir()
    for path in root.iterdir():
        time = draw.randrange(2**31)
        os.utime(path, (time, time), follow_symlinks=False)
    most = draw.choice([None, draw.randrange(30)])
    good = [s for s, state in states.items() if state == "committed" and s <= (most or 99)]
    if most == 0:
        good = [s for s in good if s == 0]
    step, rejected = commits.newest(root, run="r", at_most=most)
    larger = {s for s in states if s > max(good, default=-1) and (most is None or s <= most)}
    return (step, rejected.keys()), (max(good, default=None), larger)


@pytest.mark.threat(6, 11)
@pytest.mark.parametrize("seed", [0, *(pytest.param(s, marks=pytest.mark.faults) for s in (1, 2))])
def test_the_choice_is_the_largest_step_that_verifies(tmp_path, record_property, seed):
    """Whatever else lies there, and whatever the files' times are."""
    rounds = 1000 if seed else 60
    draw, template = random.Random(seed), committed(tmp_path / "template", 3, run="r")
    for i in range(rounds):
        found, expected = chosen(tmp_path / "c", draw, template)
        assert found == expected, (seed, i)
        shutil.rmtree(tmp_path / "c")
    record_property("choices", rounds)


# What is deleted


def kept(scores, *, latest, best=0, verified=None):
    verified = set(scores) if verified is None else verified
    return sorted(
        set(scores) - set(commits.superseded(scores, latest=latest, best=best, verified=verified))
    )


@pytest.mark.threat(3)
def test_the_newest_and_the_best_stay_and_two_that_verify_at_least():
    losses = {1: 0.5, 2: 0.2, 3: None, 4: 0.9}
    assert kept(losses, latest=2) == [3, 4]
    assert kept(losses, latest=1) == [3, 4]  # two, whatever is asked for
    assert kept(losses, latest=1, best=1) == [2, 4]
    assert kept(losses, latest=1, best=2) == [1, 2, 4]
    assert kept(losses, latest=9) == [1, 2, 3, 4]
    assert kept(losses, latest=2, verified={1, 4}) == [1, 3, 4]
    assert kept(losses, latest=1, best=1, verified={4}) == [2, 4]
    assert kept({4: None}, latest=1) == [4]


def test_a_deleted_step_is_gone_at_once_and_leaves_nothing(tmp_path):
    committed(tmp_path, 1)
    committed(tmp_path, 2)
    commits.discard(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


@pytest.mark.threat(3)
def test_what_a_killed_owner_left_is_purged_and_nothing_else(tmp_path):
    committed(tmp_path, 1)
    for name in (f"{SAVING}2-a-1", f"{TRASH}/1-x", f"{REJECTED}3-x", "2.orbax-checkpoint-tmp", "x"):
        (tmp_path / name / "state").mkdir(parents=True)
    outside = tmp_path / "x" / "kept"
    outside.write_text("x")
    (tmp_path / f"{SAVING}2-a-1" / "link").symlink_to(outside.parent)
    (tmp_path / f"{SAVING}4-a-1").symlink_to(outside.parent)
    commits.purge(tmp_path)
    left = {p.name for p in tmp_path.iterdir()} - {f"{SAVING}4-a-1"}  # a link is none of ours
    assert left == {"1", f"{REJECTED}3-x", "2.orbax-checkpoint-tmp", "x"}
    assert outside.read_text() == "x"


@pytest.mark.threat(6)
def test_what_does_not_verify_is_renamed_and_never_deleted(tmp_path):
    folder = committed(tmp_path, 3)
    damage(folder, random.Random(0))
    before = tree(folder)
    place = commits.reject(tmp_path, 3)
    assert commits.steps(tmp_path) == []
    assert commits.rejected(tmp_path) == [place.name]
    assert place.name.startswith(f"{REJECTED}3-")
    commits.purge(tmp_path)
    assert tree(place) == before


# python -m lsdl.verify


@pytest.fixture
def run(tmp_path):
    for step in (2, 4):
        committed(tmp_path / "checkpoints", step, run="r")
    (tmp_path / "config.json").write_text('{"id": "r", "config": {}, "history": []}')
    return tmp_path


@pytest.mark.threat(6, 7)
def test_verify_tells_each_step_and_whether_the_newest_is_good(run, capsys):
    root = run / "checkpoints"
    assert verify.main([str(run)]) == FINISHED
    assert capsys.readouterr().out == "step 4: verified\nstep 2: verified\n"
    (root / f"{SAVING}6-abc-1").mkdir()
    (root / f"{REJECTED}5-abc").mkdir()
    (root / "4" / "state" / "d" / "a1").unlink()
    before = tree(run)
    assert verify.main([str(run)]) == STORAGE
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step 4: state/d/a1 is missing", "step 2: verified"]
    assert [line.split(":")[0] for line in lines[2:]] == [f"{REJECTED}5-abc", f"{SAVING}6-abc-1"]
    assert verify.main([str(run), "--json"]) == STORAGE
    found = json.loads(capsys.readouterr().out)
    assert found == {
        "run": "r",
        "steps": [
            {"step": 4, "verified": False, "reason": "state/d/a1 is missing"},
            {"step": 2, "verified": True, "reason": None},
        ],
        "litter": [f"{SAVING}6-abc-1"],
        "rejected": [f"{REJECTED}5-abc"],
    }
    assert tree(run) == before


def test_verify_of_no_run_is_one_sentence(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
