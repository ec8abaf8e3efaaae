"""README.md and docs/: every command is one that works, and everything they name is there."""

import importlib
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lsdl import config as configs
from lsdl.data.sources import CARDS, TABLES
from lsdl.experiment import build
from lsdl.metrics import read_rows
from lsdl.sharding import rules
from tests import documents
from tests.conftest import ROOT
from tests.documents import PAGES, page

each_page = pytest.mark.parametrize("name", PAGES)
# Programs beside Python's, and make's, that a reader may be told to start.
PROGRAMS = ("export", "cd", "git", "pip", "sed", "cp", "mv", "cat", "rsync", "tail", "test")
PROGRAMS += ("sbatch", "squeue", "srun", "scontrol", "kubectl", "gcloud", "hf", "launch/tpu_pod.sh")
PROGRAMS += (".", "run", "run()", "python3", "kill", "ls")
MADE_BEFORE = ("init_from", "teacher", "init_fresh")  # by an earlier command


@each_page
def test_every_link_leads_somewhere(name):
    for path, anchor in documents.links(name):
        assert os.path.exists(path), path
        assert not anchor or anchor in documents.anchors(documents.Path(path)), (path, anchor)


def test_the_figure_is_small_and_says_what_it_shows():
    text = (ROOT / "docs" / "layouts.svg").read_text()
    assert len(text) < 300_000
    for layout in ("data=8", "fsdp=8", "data=2 fsdp=2 tensor=2", "data=8 shard_map"):
        assert layout in text


@each_page
def test_every_file_and_module_that_is_named_is_there(name):
    pages = (*documents.TOGETHER.get(name, ()), name)
    files = {file: text for one in pages for file, text in page(one).files.items()}
    missing = {span for span in documents.named(name) if not documents.exists(span, files)}
    assert missing == set()


@each_page
def test_every_entry_and_flag_in_the_text_is_there(name):
    for entry, rest in re.findall(r"`python -m lsdl\.(\w+)([^`]*)`", page(name).text):
        flags = parser(entry)._option_string_actions
        told = {flag for flag in re.findall(r"(?<!\S)--[a-z-]+", rest) if flag != "--config."}
        assert told <= flags.keys(), entry
    for target in re.findall(r"`make ([a-z-]+)", page(name).text):
        assert target in targets(), target


def test_a_page_that_names_what_is_not_there_is_seen():
    for span in ("lsdl/none.py", "lsdl.none", "lsdl.config.nonesuch()", "tests/none.py::test_a"):
        assert not documents.exists(span, {})
    assert documents.exists("lsdl/none.py", {"lsdl/none.py": ""})
    assert documents.exists("lsdl.config.template()", {})


# Commands, without running them


def parser(entry):
    return importlib.import_module(f"lsdl.{entry}").parser()


def targets():
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def check_entry(entry, arguments, name, folder):
    """Raise unless an entry takes its arguments, and trains what their config says."""
    if "--help" in arguments:
        return
    own = parser(entry)
    take = own.parse_known_args if "--config" in own._option_string_actions else own.parse_args
    found = take(arguments)
    found, rest = found if isinstance(found, tuple) else (found, [])
    file = getattr(found, "config", None) or getattr(found, "data", None)
    if file:
        here = folder / file.partition(":")[0]
        path = str(here if here.exists() else ROOT / file.partition(":")[0])
        variant = file.partition(":")[1] + file.partition(":")[2]
        kept = [o for o in rest if o.split("=")[0].removeprefix("--config.") not in MADE_BEFORE]
        config, _ = configs.load(path + variant, kept)
        known = config.data.source in CARDS or config.data.source.partition(":")[0] in TABLES
        edited = any(command.startswith("sed -i") for command in page(name).commands)
        if entry == "train" and known and not edited and config.data.tokenizer in ("", "bytes"):
            sizes = [int(size) for size in re.findall(r"=(-?\d+)", config.mesh)]
            build(config, devices=math.prod(sizes) if min(sizes) > 0 else 8)
    else:
        assert not rest


def check(command, name, folder):
    """Raise unless a command of the page `name` is one that there is."""
    words = documents.words(command)
    if not words or words[0] == "run()":  # settings of the shell alone, or a function of it
        return
    program, *rest = words
    if program == "run":
        (line,) = [c for c in page(name).commands if c.startswith("run()")]
        inner = line.partition("{")[2].rpartition(";")[0].replace('"$@"', " ".join(rest))
        return check(inner.strip(), name, folder)
    if program == "make":
        assert set(rest[:1]) <= targets(), command
    elif program == "python" and rest[0] == "-m" and rest[1].startswith("lsdl."):
        check_entry(rest[1].removeprefix("lsdl."), rest[2:], name, folder)
    elif program == "python" and rest[0] == "-m":
        assert documents.exists(rest[1].replace(".", "/") + ".py", {}), command
    elif program == "python" and rest[0] == "-c":
        compile(rest[1], command, "exec")
    elif program == "python":
        assert (folder / rest[0]).exists() or (ROOT / rest[0]).exists(), command
        if rest[0] == "launch/local.py" and "--" in rest and "$FLAGS" not in rest:
            check_entry("train", rest[rest.index("--") + 1 :], name, folder)
    else:
        assert program in PROGRAMS, f"{command}: what is {program}?"
    for word in rest:
        if re.match(r"(launch|configs)/[\w/.]+$", word):
            assert (ROOT / word).exists() or (folder / word).exists(), word


@each_page
def test_every_command_could_be_run(name, tmp_path):
    for one in (*documents.TOGETHER.get(name, ()), name):
        for file, text in page(one).files.items():
            compile(text, file, "exec")
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(text)
    for command in page(name).commands:
        try:
            check(command, name, tmp_path)
        except SystemExit as left:
            raise AssertionError(f"{command}: an argument is wrong") from left


ENTRIES = sorted(
    path.stem for path in (ROOT / "lsdl").glob("*.py") if "\ndef parser()" in path.read_text()
)


@pytest.mark.parametrize("name", [n for n in PAGES if page(n).files])
def test_every_file_that_a_page_writes_passes_our_lint(name, tmp_path):
    for file, text in page(name).files.items():
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(text)
    ruff = [Path(sys.executable).with_name("ruff"), "--config", ROOT / "pyproject.toml"]
    for check in (["check"], ["format", "--check"]):
        done = subprocess.run([*ruff, *check, tmp_path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_no_two_pages_train_in_one_folder():
    """Or a reader of both would go on with, or be refused by, a run of another page."""
    owners = {}
    for name in PAGES:
        for command in page(name).commands:
            for folder in re.findall(r"--workdir (runs/\S+)", command):
                assert owners.setdefault(folder, name) == name, folder


def test_every_role_that_a_rule_table_names_is_explained():
    named = {role for table in rules.TABLES.values() for role, _ in table}
    text = page("docs/howto/model.md").text.split("## Roles")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`", text)) >= named | {rules.UNSPLIT}


@pytest.mark.parametrize("entry", ENTRIES)
def test_help_shows_three_worked_examples(entry, tmp_path):
    told = parser(entry).format_help().split("examples:\n")[1].split("\n\n")[0]
    examples = [line for line in documents.logical_lines(told) if "python -m lsdl." in line]
    assert len([line for line in examples if f"lsdl.{entry}" in line]) >= 3
    for line in examples:
        check(line.removeprefix("srun "), "README.md", tmp_path)


def test_every_entry_is_in_the_table_of_the_readme():
    table = (ROOT / "README.md").read_text().split("## Entries")[1].split("\n## ")[0]
    assert sorted(set(re.findall(r"^\| `python -m lsdl\.(\w+)", table, re.M))) == ENTRIES


def test_the_pages_that_errors_name_are_there():
    told = {}
    for path in (ROOT / "lsdl").rglob("*.py"):
        told |= dict.fromkeys(re.findall(r"docs/[\w/]+\.md", path.read_text()), path)
    assert {
        f"docs/howto/{name}.md" for name in ("data", "optimiser", "layout", "restart")
    } <= told.keys()
    assert [file for file in told if not (ROOT / file).exists()] == []


@pytest.mark.parametrize(
    "command",
    [
        "python -m lsdl.train --config configs/digits_vit.py --wrokdir a",
        "python -m lsdl.train --config configs/digits_vit.py --config.widht=3",
        "python -m lsdl.train --config configs/digits_vit.py --config.mesh=data=5",
        "python -m lsdl.train --config configs/none.py",
        "python -m lsdl.none",
        "python -m lsdl.study run --wide",
        "python launch/none.py",
        "make none",
        "frobnicate",
        "sbatch launch/none.sbatch",
    ],
)
def test_a_command_that_does_not_work_is_seen(command, tmp_path):
    with pytest.raises((AssertionError, ValueError, ModuleNotFoundError, SystemExit)):
        check(command, "README.md", tmp_path)


def test_no_command_is_left_out_without_a_reason_and_no_reason_without_a_command():
    commands = [command for name in PAGES for command in page(name).commands]
    used = {why for why in map(documents.reason, commands) if why}
    assert used == set(documents.NOT_RUN.values())
    assert not documents.reason("python -m lsdl.train --config configs/digits_vit.py")


# And running them


def copy(folder):
    """The repository as a clone has it after `make train`, and a `python` on the path."""
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for file in listed:
        if file.split("/")[0] not in ("tests", ".ci") and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, folder / file)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / ".bin").mkdir()
    python = folder / ".bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)


def run_page(name, folder):
    """Do what a page says, in its order, and in one shell; returns what was printed."""
    lines = ["set -e"]
    for file, command in page(name).steps:
        if file:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(page(name).files[file])
        elif not documents.reason(command):
            lines += [f"echo {documents.shlex.quote('+ ' + command)} >&2", documents.smoke(command)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("JAX_NUM")}
    env = inherited | {
        "PATH": f"{folder / '.bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "LSDL_DATA_DIR": str(folder / "data"),
    }
    done = subprocess.run(
        ["bash", "-c", "\n".join(lines)],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


ALONE = [name for name in PAGES if any(not documents.reason(c) for c in page(name).commands)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in ALONE if n not in documents.TOGETHER])
def test_a_page_can_be_typed_from_top_to_bottom(name, tmp_path):
    copy(tmp_path)
    run_page(name, tmp_path)


@pytest.mark.slow
def test_an_experiment_of_ones_own_takes_a_config_a_model_and_a_line_of_the_name_table(tmp_path):
    """A folder of PNGs in TFDS's format, a model, a mesh: what data.md and model.md tell."""
    copy(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run_page("docs/howto/data.md", tmp_path)
    run_page("docs/howto/model.md", tmp_path)
    own = [p for p in tmp_path.rglob("*.*") if p.is_file() and p.suffix in (".py", ".toml", ".md")]
    changed = {str(p.relative_to(tmp_path)) for p in own if before.get(p) != p.read_bytes()}
    of_data = {"pngs.py", "prepare_scans.py"}
    edited, model, config = "lsdl/components.py", "lsdl/models/mixer.py", "configs/scans_mixer.py"
    assert changed - of_data == {edited, model, config}
    old = (ROOT / edited).read_text().splitlines()
    new = (tmp_path / edited).read_text().splitlines()
    (line,) = [line for line in new if line not in old]
    assert [other for other in new if other != line] == old
    rows = [read_rows(tmp_path / "runs" / run / "metrics.jsonl") for run in ("mixer", "whole")]
    curves = [[row["loss"] for row in run if row["split"] == "train"] for run in rows]
    assert len(curves[0]) == 20
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert curves[0][-1] < curves[0][0]
