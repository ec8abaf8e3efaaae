"""What a run folder has to be after any kill, read without lsdl: its own walk, digests and parser.

A broken rule is an AssertionError that begins with the rule's number:

C1 every committed step is whole         C5 litter has a reserved name
C2 no committed step is lost             C6 the metrics are those of the uninterrupted run
C3 a start goes on from the newest step  C7 nobody lives on, and the lock is free
C4 no more steps than were asked for     C8 the state of a step is the uninterrupted run's
"""

import fcntl
import hashlib
import json
import os
from pathlib import Path

import tensorstore as ts

ROOT_NAMES = {"config.json", "env.json", "plan.json", "metrics.jsonl", "checkpoints", ".lock"}
TIMES = ("step_time_s", "examples_per_s")


def steps(run: Path) -> list[int]:
    """The steps whose folders have a number for a name."""
    root = run / "checkpoints"
    return sorted(int(name) for name in os.listdir(root) if name.isdigit()) if root.exists() else []


def damage(folder: Path) -> str:
    """What is not as the manifest says; "" if all is."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
    except (OSError, ValueError) as error:
        return f"manifest.json: {error!r}"
    if manifest["step"] != int(folder.name):
        return f"of step {manifest['step']}"
    there = {
        os.path.relpath(os.path.join(inner, name), folder)
        for inner, _, names in os.walk(folder)
        for name in names
    }
    if there != {*manifest["files"], "manifest.json"}:
        return f"other files: {sorted(there ^ {*manifest['files'], 'manifest.json'})}"
    for name, (size, sha) in manifest["files"].items():
        data = (folder / name).read_bytes()
        if (len(data), hashlib.sha256(data).hexdigest()) != (size, sha):
            return f"other bytes: {name}"
    return ""


def state_digest(run: Path, step: int) -> str:
    """Of all arrays of a step, by tensorstore: names and stored bytes."""
    base = f"file://{run / 'checkpoints' / str(step) / 'state'}/"
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    digest = hashlib.sha256()
    for key in sorted(store.list().result()):
        value = store.read(key).result().value
        digest.update(b"%d %s %d " % (len(key), key, len(value)) + value)
    return digest.hexdigest()


def lines(run: Path) -> list[bytes]:
    """The whole lines of the metrics."""
    path = run / "metrics.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def trained(some: list[bytes]) -> dict[int, bytes]:
    """{step: line} of the train split; its time is in it, so one that is done again differs."""
    whole = [json.loads(line) for line in some if line.endswith(b"\n")]
    return {r["step"]: line for r, line in zip(whole, some, strict=False) if r["split"] == "train"}


def rows(run: Path) -> dict[tuple[str, int], dict]:
    """{(split, step): metrics without times}; C6 if there is more than a torn last line amiss."""
    found = {}
    *whole, last = lines(run) or [b""]
    for line in [*whole, last] if last.endswith(b"\n") else whole:
        assert line.endswith(b"\n"), f"C6 a line has no end: {line}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise AssertionError(f"C6 a line is no JSON: {line}") from error
        key = (row["split"], row["step"])
        assert key not in found, f"C6 {key} is there twice"
        found[key] = {name: value for name, value in row.items() if name not in TIMES}
    return found


class Inspector:
    """Holds a run against the uninterrupted one, `reference`, which kept all of its steps."""

    def __init__(self, reference: Path, *, keep: int, took_s: float = 0.0):
        self.keep, self.took_s = keep, took_s
        self.rows = rows(reference)
        self.states = {step: state_digest(reference, step) for step in steps(reference)}

    def before(self, run: Path) -> dict:
        """What is there before a start."""
        there = steps(run)
        return {"newest": there[-1] if there else 0, "lines": lines(run)}

    def after(self, run: Path, before: dict) -> set[str]:
        """Check the rules after a kill; returns what the kill was in the middle of."""
        if not (run / "checkpoints").exists():
            return set()
        there = steps(run)
        newest = there[-1] if there else 0
        for step in there:
            problem = damage(run / "checkpoints" / str(step))
            assert not problem, f"C1 step {step}: {problem}"
        assert newest >= before["newest"], f"C2 {newest} after {before['newest']}"
        self._check_rows(run)
        self._check_start(run, before)
        assert len(there) <= self.keep + 1, f"C4 {there}"
        doing = self._check_names(run)
        self._check_free(run)
        if newest:
            state = state_digest(run, newest)
            assert state == self.states[newest], f"C8 step {newest} has another state"
        return doing

    def ended(self, run: Path) -> None:
        """Check a complete run: the same rows and the same final state."""
        last = max(self.states)
        assert steps(run)[-1] == last, f"C2 {steps(run)} at the end"
        assert rows(run) == self.rows, "C6 other rows at the end"
        assert state_digest(run, last) == self.states[last], "C8 another state at the end"
        names = {name for name in os.listdir(run / "checkpoints") if not name.isdigit()}
        assert not names, f"C5 {names} at the end"

    def _check_start(self, run: Path, before: dict) -> None:
        """Rows up to the step gone on from are as they were; if later ones are new, all are."""
        old, new = trained(before["lines"]), trained(lines(run))
        for step, line in old.items():
            if step <= before["newest"]:
                assert new.get(step) == line, f"C3 step {step} was done again"
        if any(new.get(step) != line for step, line in old.items()):
            for step, line in old.items():
                if step > before["newest"]:
                    assert new.get(step) != line, f"C3 step {step} was not done again"

    def _check_names(self, run: Path) -> set[str]:
        doing = set()
        for name in os.listdir(run):
            partial = name.startswith(".") and name.endswith(".partial")
            assert partial or name in ROOT_NAMES, f"C5 {name}"
        for name in os.listdir(run / "checkpoints"):
            if name.startswith(".saving-"):
                done = (run / "checkpoints" / name / "manifest.json").exists()
                doing |= {"save", *(["commit"] if done else [])}
            elif name == ".trash":
                doing.add("delete")
            else:
                assert name.isdigit(), f"C5 {name}"
        return doing

    def _check_rows(self, run: Path) -> None:
        found = rows(run)
        for key, row in found.items():
            assert row == self.rows[key], f"C6 {key} has other metrics"
        there = [step for split, step in found if split == "train"]
        assert there == list(range(1, len(there) + 1)), f"C6 rows of the steps {there}"

    def _check_free(self, run: Path) -> None:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                command = Path("/proc", pid, "cmdline").read_bytes()
                state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            assert f"={run}".encode() not in command or state == "Z", f"C7 process {pid} lives"
        with open(run / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
