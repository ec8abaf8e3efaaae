"""What README.md and docs/ tell a reader to type, to write and to look at.

A block without a language is commands; one whose language is followed by a path is that file, which
the page's commands may use. `text` and `mermaid` are to be read.
"""

import functools
import importlib.util
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = (
    *("README.md", "CONTRIBUTING.md", "configs/README.md"),
    *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md")),
)
# Pages that go on where another one ended, in a copy of their own; every other page is alone.
TOGETHER = {"docs/howto/model.md": ("docs/howto/data.md",)}
LANGUAGES = ("", "text", "mermaid", "python", "diff")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.M | re.S)
TOP = ("lsdl", "docs", "configs", "tests", "notebooks", "launch", "benchmarks")

# What is not run in a test, by what the command begins with or has in it, and why.
NOT_RUN = {
    r"(sbatch|srun|scontrol|squeue) ": "needs a Slurm cluster",
    r"TPU=|gcloud ": "needs a Cloud TPU pod",
    r"kubectl ": "needs a Kubernetes cluster",
    r"(\S*/)?pip install|git clone|hf download|python3 -m venv": "needs the network",
    r"python -c .*download_and_prepare": "needs the network",
    r"make (train|plan-tools)": "needs the network: it installs packages",
    r"make (test|faults|parity|format|golden|lint)": "is a suite of its own, or rewrites its files",
    r"make notebooks": "runs every notebook, which its own tests do",
    r"python -m tests\.": "rewrites what the long fault tests counted",
    r"python -m lsdl\.study (all|run (large_batch|conditioning)(?!.*full))": "measures for minutes",
    r"python -m lsdl\.plan .*--target(?!.*--analytic)": "needs the compilers of make plan-tools",
    r"python -m lsdl\.(train|doctor|convert) .*configs/(cifar10|imagenet|lm_|gpt3|clip)": "needs "
    "data or weights that are downloaded",
}


@dataclass(frozen=True)
class Page:
    name: str
    files: dict[str, str]  # that it tells the reader to write
    steps: tuple[tuple[str, str], ...]  # (a file's name, "") or ("", a command), in order
    text: str  # without its blocks

    @property
    def commands(self) -> tuple[str, ...]:
        return tuple(command for _, command in self.steps if command)


@functools.cache
def page(name: str) -> Page:
    whole = (ROOT / name).read_text()
    files, steps = {}, []
    for info, body in FENCE.findall(whole):
        language, _, file = info.partition(" ")
        if language not in LANGUAGES:
            raise ValueError(f"{name} has a block of {language!r}: choose from {LANGUAGES}")
        if file:
            files[file] = body
            steps.append((file, ""))
        elif not language:
            steps += [("", command) for command in logical_lines(body)]
    return Page(name, files, tuple(steps), FENCE.sub("", whole))


def logical_lines(body: str) -> list[str]:
    """Commands, each on one line and without its comment."""
    joined = re.sub(r"\\\n\s*", "", body)
    return [line for line in (_bare(line) for line in joined.splitlines()) if line]


def _bare(line: str) -> str:
    """The line without what stands behind a # outside of quotes."""
    quote = ""
    for i, letter in enumerate(line):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter == "#" and (not i or line[i - 1].isspace()):
            return line[:i].strip()
    return line.strip()


def reason(command: str) -> str:
    """Why the command is not run in a test; "": it is."""
    return next((why for form, why in NOT_RUN.items() if re.match(form, command)), "")


def smoke(command: str) -> str:
    """The command as the tests run it: a training of its config's variant `smoke`."""
    if re.search(r"lsdl\.train |launch/local\.py ", command):
        config = re.search(r"--config[= ](\S+)", command)
        if config and "smoke" not in config[1] and (ROOT / config[1].partition(":")[0]).exists():
            found = config[1]
            command = command.replace(found, found + (",smoke" if ":" in found else ":smoke"), 1)
    return command


def words(command: str) -> list[str]:
    """The words of the command, without the settings of the environment before it."""
    found = shlex.split(command)
    while found and re.match(r"[A-Z_]+=", found[0]):
        found.pop(0)
    return found


def links(name: str) -> list[tuple[str, str]]:
    """(file, anchor) of each link to a file, relative to the repository."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name).text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            place = (ROOT / name).parent / path if path else ROOT / name
            found.append((str(place.resolve()), anchor))
    return found


def anchors(file: Path) -> set[str]:
    """The anchors that a Markdown file's headings have."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", file.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


def named(name: str) -> set[str]:
    """The spans of code in the text that are paths in the repository or modules of lsdl."""
    spans = set(re.findall(r"`([^`\n]+)`", page(name).text))
    paths = {s for s in spans if re.fullmatch(rf"({'|'.join(TOP)})/[\w./*-]*(::\S+)?", s)}
    modules = {s for s in spans if re.fullmatch(r"lsdl(\.\w+)+(\(\))?", s)}
    return paths | modules


def exists(span: str, files: dict[str, str]) -> bool:
    """Whether a path or module that a page names is there, or one of `files` that it writes."""
    if "/" in span:
        path = span.partition("::")[0]
        return path in files or (any(ROOT.glob(path)) if "*" in path else (ROOT / path).exists())
    parts = span.removesuffix("()").split(".")
    for n in range(len(parts), 1, -1):
        base = ROOT.joinpath(*parts[:n])
        file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
        if file.exists():
            return n == len(parts) or re.search(rf"\b{parts[n]}\b", file.read_text()) is not None
    return False


def generator(name):
    """The module docs/NAME.py, which makes docs/NAME.md."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
