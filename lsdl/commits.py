"""Commits: a step's folder appears whole, by one rename, or not at all; it is verified before use.

checkpoints/
  12/               committed: its manifest.json names every file, with size and digest, and its own
  .saving-12-...    being written, by the owner in its name
  .trash/           on its way out
  .rejected-12-...  did not verify: kept for whoever wants to know why
"""

import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from lsdl.files import sync_folder

FORMAT = 2
MANIFEST = "manifest.json"
MOST_BYTES = 4 << 20  # of a manifest: some 28,000 files; what a stranger's may cost to read
SAVING, REJECTED, TRASH = ".saving-", ".rejected-", ".trash"
FEWEST = 2  # verified steps that retention leaves, where there are so many
THREADS = 4  # hash side by side
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFLNK: "a symlink",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Damage(Exception):
    """Why a step's folder is not what was committed; names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a step's folder holds and where it comes from."""

    step: int
    run: str | None  # the id of the run folder; None: it has none
    owner: str  # the token of the trainer that wrote it
    config_digest: str | None = (
        None  # sha256 of the fields of the run's config, as the step was saved
    )
    metrics: Mapping[str, float] = field(default_factory=dict)
    notes: Mapping = field(default_factory=dict)
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)  # {path: (bytes, sha256)}


# Writing


def staging(root: Path, step: int, owner: str, attempt: int) -> Path:
    """Where an attempt to save `step` writes; no other owner and no other attempt does."""
    return root / f"{SAVING}{step}-{owner}-{attempt}"


def commit(folder: Path, manifest: Manifest, *, fence: Callable[[], None]) -> None:
    """Make what lies in the staging `folder` the committed step of `manifest`.

    Every byte and every name is on the disk before the rename. `fence`, called right before it,
    raises if the writer is not the owner any more. The manifest's `files` are filled in here.
    """
    root, final = folder.parent, folder.parent / str(manifest.step)
    files = _settled(folder)
    value = {"format": FORMAT, **asdict(replace(manifest, files=files))}
    text = _sealed(json.dumps(value, allow_nan=False))
    if len(text) > MOST_BYTES:
        raise OSError(errno.EFBIG, f"a manifest of {len(files):,} files is too long", str(folder))
    with open(folder / MANIFEST, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    fence()
    os.rename(folder, final)
    sync_folder(root)
    if (final / MANIFEST).read_text() != text:
        raise OSError(errno.EIO, "the manifest reads otherwise than it was written", str(final))


def _sealed(text: str) -> str:
    """The JSON object `text` with the sha256 of its own bytes as the last value."""
    return f'{text[:-1]}, "sha256": "{hashlib.sha256(text.encode()).hexdigest()}"}}'


def numbers(metrics: Mapping | None) -> dict[str, float]:
    """The metrics that a manifest can hold: JSON has no NaN."""
    return {name: float(x) for name, x in (metrics or {}).items() if math.isfinite(x)}


def _settled(folder: Path) -> dict[str, tuple[int, str]]:
    """{path: (bytes, sha256)} of all files in `folder`, which are on the disk from then on."""
    names = sorted(name for name, _ in _files(folder))
    digest = lambda name: _digest(folder / name, settle=True)  # noqa: E731
    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(zip(names, pool.map(digest, names), strict=True))
    for inner, _, _ in os.walk(folder, topdown=False):
        if Path(inner) != folder:  # that comes after the manifest
            sync_folder(Path(inner))
    return files


# Reading


def verify(folder: Path, *, run: str | None = None, digests: bool = True) -> str | None:
    """Why the step's `folder` is not what was committed; None: it is, and of the run `run`.

    Without `digests` the files' bytes are not read, only their names, kinds and sizes.
    """
    try:
        _check(folder, run=run, digests=digests)
    except Damage as damage:
        return str(damage)
    except OSError as error:
        return f"{_shown(_below(folder, error.filename))}: {error.strerror}"
    return None


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a step's folder; raises `Damage` or `OSError`."""
    if not os.path.lexists(folder / MANIFEST):
        raise Damage(f"no {MANIFEST}: an older lsdl wrote this, or something else did")
    _check_plain(MANIFEST, os.lstat(folder / MANIFEST))
    with open(_opened(folder / MANIFEST), "rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise Damage(f"{MANIFEST} has more than {MOST_BYTES:,} bytes")
    try:
        value = json.loads(data, object_pairs_hook=_once, parse_constant=_refused)
        if value["format"] != FORMAT:
            raise Damage(f"{MANIFEST} has format {value['format']!r}: this lsdl reads {FORMAT}")
        if data.decode() != _sealed(data[: 1 - len(_sealed("{}"))].decode() + "}"):
            raise Damage(f"{MANIFEST} has other bytes than were written (sha256)")
        del value["format"], value["sha256"]
        value["files"] = {name: (size, sha) for name, (size, sha) in value["files"].items()}
        manifest = Manifest(**value)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{MANIFEST} is not what lsdl writes ({type(error).__name__})") from error
    _check_types(manifest)
    return manifest


def steps(root: Path) -> list[int]:
    """The steps that have a folder, the newest first; they need not verify."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)[::-1]


def newest(
    root: Path, *, run: str | None, at_most: int | None = None, digests: bool = True
) -> tuple[int | None, dict[int, str]]:
    """The largest step that verifies, and {step: reason} of the larger ones that do not.

    Chosen by the numbers alone: no pointer file, no time of a file.
    """
    rejected = {}
    for step in steps(root):
        if at_most is not None and step > at_most:
            continue
        reason = verify(root / str(step), run=run, digests=digests)
        if reason is None:
            return step, rejected
        rejected[step] = reason
    return None, rejected


def _check(folder: Path, *, run: str | None, digests: bool) -> None:
    if not stat.S_ISDIR(os.lstat(folder).st_mode):
        raise Damage(f"{folder.name} is {_kind(os.lstat(folder))} and no folder")
    manifest = read_manifest(folder)
    if str(manifest.step) != folder.name:
        raise Damage(f"{MANIFEST} is of step {manifest.step}")
    if run is not None and manifest.run != run:
        raise Damage(f"{MANIFEST} is of the run {manifest.run}: this is {run}")
    found = set()
    for name, info in _files(folder):
        if name == MANIFEST:
            continue
        if name not in manifest.files:
            raise Damage(f"{_shown(name)} is not in the manifest")
        size = manifest.files[name][0]
        if info.st_size != size:
            raise Damage(f"{name} has {info.st_size:,} bytes, {size:,} were written")
        found.add(name)
    if missing := sorted(manifest.files.keys() - found):
        raise Damage(f"{_shown(missing[0])} is missing")
    if digests:
        names = sorted(found)
        with ThreadPoolExecutor(THREADS) as pool:
            read = pool.map(lambda name: _digest(folder / name), names)
            for name, digest in zip(names, read, strict=True):
                if digest != manifest.files[name]:
                    raise Damage(f"{name} has other bytes than were written (sha256)")


def _check_types(manifest: Manifest) -> None:
    texts = (manifest.owner, manifest.run or "", manifest.config_digest or "")
    files = manifest.files.items()
    good = (
        type(manifest.step) is int
        and all(isinstance(text, str) for text in texts)
        and isinstance(manifest.metrics, dict)
        and isinstance(manifest.notes, dict)
        and all(type(size) is int and isinstance(sha, str) for _, (size, sha) in files)
    )
    if not good:
        raise Damage(f"{MANIFEST} is not what lsdl writes (a value of another type)")
    for name, _ in files:
        if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise Damage(f"{MANIFEST} names {_shown(name)}, which is no path inside the folder")


def _files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(path below `folder`, its stat) of every file; `Damage` for what is neither file nor folder.

    A file with a second name is refused: written through that one it would change.
    """
    pending = [""]
    while pending:
        inner = pending.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                name = f"{inner}{entry.name}"
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    pending.append(f"{name}/")
                    continue
                _check_plain(name, info)
                yield name, info


def _check_plain(name: str, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise Damage(f"{_shown(name)} is {_kind(info)}")
    if info.st_nlink > 1:
        raise Damage(f"{_shown(name)} has another name elsewhere (a hard link)")


def _digest(path: Path, *, settle: bool = False) -> tuple[int, str]:
    """(bytes, sha256) of a file; `settle`: which is on the disk from then on."""
    with open(_opened(path), "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if settle:
            os.fsync(file.fileno())
        return file.tell(), digest


def _opened(path: Path) -> int:
    """A descriptor of the plain file `path`: opening waits for no FIFO and follows no symlink."""
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _once(pairs: list[tuple]) -> dict:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key comes twice")
    return value


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _kind(info: os.stat_result) -> str:
    return KINDS.get(stat.S_IFMT(info.st_mode), "a file")


def _below(folder: Path, path: object) -> str:
    return str(path).removeprefix(f"{folder}/")


def _shown(name: str) -> str:
    return name if name.isprintable() else ascii(name)


# Leaving


def superseded(
    scores: Mapping[int, float | None], *, latest: int, best: int, verified: Collection[int]
) -> list[int]:
    """The steps to delete, the oldest first, of those in {step: loss}; None: it has none.

    Kept are the newest `latest`, the `best` by the lowest loss, and `FEWEST` of the `verified`:
    a step that was never read may not be what the last good one is given up for.
    """
    ordered = sorted(scores, reverse=True)
    scored = sorted((s for s in ordered if scores[s] is not None), key=lambda s: scores[s])
    kept = {*ordered[:latest], *scored[:best]}
    for step in ordered:
        if len(kept & set(verified)) >= FEWEST:
            break
        if step in verified:
            kept.add(step)
    return sorted(set(scores) - kept)


def discard(root: Path, step: int) -> None:
    """Delete a step: its name is gone at once, and its files then."""
    trash = root / TRASH
    trash.mkdir(exist_ok=True)
    os.rename(root / str(step), trash / f"{step}-{secrets.token_hex(4)}")
    shutil.rmtree(trash, ignore_errors=True)


def reject(root: Path, step: int) -> Path:
    """Take a step that does not verify out of the way; returns where it lies now."""
    place = root / f"{REJECTED}{step}-{secrets.token_hex(4)}"
    os.rename(root / str(step), place)
    sync_folder(root)
    return place


def purge(root: Path, *, owner: str = "") -> None:
    """Delete what an owner who was killed left behind, or `owner` alone. For the owner alone."""
    for name in litter(root):
        if not owner or f"-{owner}-" in name:
            shutil.rmtree(root / name, ignore_errors=True)


def litter(root: Path) -> list[str]:
    """The names below `root` of what was never committed, or is on its way out."""
    return [n for n in _names(root) if n == TRASH or n.startswith(SAVING)]


def rejected(root: Path) -> list[str]:
    """The names below `root` of what did not verify."""
    return [name for name in _names(root) if name.startswith(REJECTED)]


def _names(root: Path) -> list[str]:
    return sorted(os.listdir(root)) if root.is_dir() else []
