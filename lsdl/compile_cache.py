"""What was compiled before: jax's persistent compile cache, on by default and kept safe.

Whoever can write into a compile cache runs code as its reader, so the folder is the user's alone or
not used. jax reads an entry as it is: if it was packed without a checksum, a flipped bit in it is a
flipped bit in the program. So each entry has its digest beside it, and one that does not match is
gone before jax can read it. The folder's name says for which jax and which processor it was
compiled. $JAX_COMPILATION_CACHE_DIR and $JAX_ENABLE_COMPILATION_CACHE=false have their say first.
"""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import stat
import warnings
from pathlib import Path

import jax

from lsdl.progress import tell

LEAST_S = 0.1  # that a program took to compile which is kept
MOST_BYTES = 1 << 30  # of all that is kept; the oldest goes first
ENTRY, DIGEST = "-cache", ".sha256"  # how the names end: jax's and ours

_folder: Path | None = None  # that jax uses, if we chose it


def root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lsdl", "compiled").expanduser()


def key() -> str:
    """The name of what may be read here: a program runs where it was compiled for."""
    library = importlib.metadata.distribution("jaxlib")
    built = sorted(library.locate_file("jaxlib").glob("*.so"))
    facts = [platform.machine(), *_features()]
    facts += [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in built]
    digest = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return f"jax-{jax.__version__}-{library.version}-{digest[:16]}"


def _features() -> list[str]:
    """What the processor can do."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return sorted(words.split())
    return [platform.processor()]


def use(*, quiet: bool = False) -> None:
    """Let jax keep what it compiles from now on, and read what was kept.

    Without a folder that is the user's alone this says so in a line, unless `quiet`, and nothing is
    kept.
    """
    global _folder
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    folder = root() / key()
    try:
        for place in (root(), folder):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.mkdir(mode=0o700, exist_ok=True)
            if wrong := _not_ours(place):
                quiet or tell(f"Nothing compiled is kept: {place} {wrong}.")
                return
        damaged = _verified(folder)
        _prune()
    except OSError as error:
        quiet or tell(f"Nothing compiled is kept: {folder}: {error.strerror}.")
        return
    if damaged and not quiet:
        tell(
            f"Of what was compiled before, {damaged} in {folder} had changed since it was written: "
            "removed, and compiled anew."
        )
    _folder = folder
    # Two that compile the same: the second reads what the first is writing, and compiles as well.
    half = "Error reading persistent compilation cache entry"
    warnings.filterwarnings("ignore", message=half, category=UserWarning)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_S)


def seal() -> None:
    """Write the digests of what jax has kept since: without them it would not be read again."""
    if _folder is None:
        return
    with contextlib.suppress(OSError):
        for entry in _entries(_folder):
            digest = entry.with_name(entry.name + DIGEST)
            if not digest.exists():
                part = digest.with_name(f"{digest.name}.{os.getpid()}")
                part.write_text(_digest(entry))
                part.replace(digest)


def _not_ours(place: Path) -> str | None:
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return "is no folder"
    if found.st_uid != os.geteuid():
        return "belongs to another user"
    if found.st_mode & 0o077:
        return f"may be entered by others (mode {stat.S_IMODE(found.st_mode):o}, 700 is asked for)"
    return None


def _verified(folder: Path) -> int:
    """How many entries were not what was written; they are gone, and those without a digest."""
    damaged = 0
    for entry in _entries(folder):
        digest = entry.with_name(entry.name + DIGEST)
        whole = entry.is_file() and not entry.is_symlink()
        told = digest.read_text(errors="replace") if digest.is_file() else None
        if not whole or told != _digest(entry):  # without a digest: killed before it was there
            damaged += told is not None
            _remove(entry)
    # A digest without its entry would be wrong for the next entry of that name.
    for digest in folder.glob(f"*{ENTRY}{DIGEST}"):
        if not digest.with_name(digest.name.removesuffix(DIGEST)).exists():
            digest.unlink(missing_ok=True)
    return damaged


def _prune() -> None:
    """Keep the newest, of all keys."""
    found = [(entry.lstat(), entry) for folder in root().iterdir() for entry in _entries(folder)]
    kept = 0
    for status, entry in sorted(found, key=lambda one: -one[0].st_mtime_ns):
        kept += status.st_size
        if kept > MOST_BYTES:
            _remove(entry)


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{ENTRY}"))


def _remove(entry: Path) -> None:
    entry.unlink(missing_ok=True)
    entry.with_name(entry.name + DIGEST).unlink(missing_ok=True)


def _digest(entry: Path) -> str:
    with entry.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
