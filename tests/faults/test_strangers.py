"""A stranger's run folder: opened without executing a byte of it, or reading anything beside it."""

import ast
import json
import os
import pickle
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import pytest

from lsdl import convert, generate, report, train, verify
from lsdl.data import sources
from lsdl.errors import BAD_INPUT, FINISHED, STORAGE, UserError
from lsdl.files import check_name, parse_json, read_json, write_json
from lsdl.metrics import read_rows
from lsdl.rundir import RunDir
from tests.conftest import CONFIGS, ROOT

PACKAGE = ROOT / "lsdl"

# What may execute what it reads. `np.load` has allow_pickle=False unless told otherwise.
BANNED_MODULES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve"}
BANNED_MODULES |= {"torch", "joblib", "code", "codeop", "imp", "runpy"}
BANNED_CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
BANNED_ENDS = ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.load", "pickle.load")
BANNED_ENDS += ("import_module", "spec_from_file_location", "exec_module", "os.system", "os.popen")
# {file: {banned: why it may}}
ALLOWED = {
    "config.py": {"runpy": "a config file runs where the user has typed its path"},
    "components.py": {"importlib.import_module": "of lsdl's own models, by the name table"},
    "laboratory.py": {"importlib.import_module": "of lsdl's own studies, by their list"},
}


def banned(text):
    """What a source file has that could execute data."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names if _is_banned(a.name))
        elif isinstance(node, ast.ImportFrom) and _is_banned(node.module or ""):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in BANNED_CALLS or name.endswith(BANNED_ENDS):
                yield name
            for keyword in node.keywords:
                if (
                    keyword.arg in ("allow_pickle", "shell")
                    and ast.unparse(keyword.value) != "False"
                ):
                    yield keyword.arg


def _is_banned(module):
    return module.split(".")[0] in BANNED_MODULES


@pytest.mark.threat(35, 38)
def test_nothing_in_lsdl_executes_what_it_reads():
    found = {
        (str(path.relative_to(PACKAGE)), word)
        for path in PACKAGE.rglob("*.py")
        for word in banned(path.read_text())
    }
    assert found == {(file, word) for file, words in ALLOWED.items() for word in words}


@pytest.mark.threat(35)
@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "import numpy.lib, dill as d",
        "eval(text)",
        "exec(text)",
        "np.load(f, allow_pickle=True)",
        "np.load(f, allow_pickle=flag)",
        "yaml.load(f)",
        "torch.load(f)",
        "importlib.import_module(name)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_gate_sees_what_it_looks_for(line):
    assert list(banned(line))


@pytest.mark.threat(35, 38)
def test_only_a_path_that_was_typed_reaches_the_config_reader():
    """`config.load` runs a file: it is called with the command line's, a study's, or nothing."""
    callers = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("load", "configs.load"):
                callers.setdefault(str(path.relative_to(PACKAGE)), []).append(
                    ast.unparse(node.args[0])
                )
    assert {word for words in callers.values() for word in words} <= {
        *("arguments.config", "self.file", "path", "file"),
        *("'tokens.npy'", "'starts.npy'"),  # another load, of numbers
    }, callers
    assert "stored" not in json.dumps(callers)


# Opened under a hook


class Watch:
    """Hears what Python opens, executes, imports and connects to, while it is on."""

    EVENTS = ("open", "exec", "compile", "import", "subprocess.Popen", "os.system", "os.exec")
    EVENTS += ("os.posix_spawn", "socket.connect", "socket.getaddrinfo", "pickle.find_class")

    def __init__(self):
        self.on, self.events = False, []
        sys.addaudithook(self._hear)

    def _hear(self, event, args):
        if self.on and event in self.EVENTS:
            self.events.append((event, args))

    def __enter__(self):
        self.events, self.on = [], True
        return self

    def __exit__(self, *_):
        self.on = False

    def check(self, folder, *written):
        """Nothing of `folder` was executed, nothing else opened but libraries and `written`."""
        assert [event for event in self.events if not self._may_be(event, folder, written)] == []

    def _may_be(self, heard, folder, written):
        event, args = heard
        inside = lambda place: str(place or "").startswith(str(folder))  # noqa: E731
        if event == "open":
            named = isinstance(args[0], str | bytes | os.PathLike)
            return not named or self._is_open(
                os.path.abspath(os.fsdecode(args[0])), folder, written
            )
        if event == "exec":
            return not inside(args[0].co_filename)
        if event == "compile":
            return MARK not in str(args[0]) and not inside(args[1])
        if event == "import":
            return not inside(args[1])
        if event == "subprocess.Popen":  # the commit of lsdl itself
            words = list(map(str, args[1][:3]))
            return os.path.basename(words[0]) == "git" and words[1:] == ["-C", str(ROOT)]
        return False

    @staticmethod
    def _is_open(path, folder, written):
        own = [folder, *written, ROOT, sys.prefix, sys.base_prefix, *sys.path[1:]]
        own += ["/proc", "/sys", "/dev", "/usr", "/lib", "/etc/ld.so", "/etc/localtime"]
        own.append(Path("~/.cache/matplotlib").expanduser())
        own += [os.path.realpath(place) for place in own]
        return path.startswith(tuple(map(os.path.abspath, own))) or "/site-packages/" in path


MARK = "a_stranger_was_here"
WATCH = Watch()


def booby_trapped(folder, outside):
    """Plants code and names of files outside in a run folder; returns what must not appear."""
    mark = outside / MARK
    code = f"open({str(mark)!r}, 'w').write('x')\n\ndef get_config(arg=None):\n    {MARK}\n"
    outside.mkdir()
    for place in (folder / "evil.py", outside / "evil.py"):
        place.write_text(code)
    for name in ("sitecustomize.py", "config.py", "lsdl.py", "jax.py", "conftest.py"):
        (folder / name).write_text(code)
    (outside / "tokenizer.json").write_text('{"secret": 1}')
    stored = json.loads((folder / "config.json").read_text())
    stored["source"] = str(folder / "evil.py")
    stored["config"] |= {
        "init_from": str(outside),
        "teacher": str(outside),
        "eval.transfer_class_names": str(outside / "evil.py"),
    }
    (folder / "config.json").write_text(json.dumps(stored))
    return mark


@pytest.fixture
def strange(tmp_path):
    """A run folder as text: no checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"name": "<script>alert(1)</script>", "seed": 0, "batch_size": 8}
    stored = {"source": "x", "overrides": {}, "config": config, "history": [], "id": "0" * 16}
    (folder / "config.json").write_text(json.dumps(stored))
    env = {"platform": "<b>x</b>", "command": ["<script>", "--x"], "resumed": []}
    (folder / "env.json").write_text(json.dumps(env))
    rows = [{"step": i, "split": "train", "loss": 1 / i, "<i>x</i>": 1} for i in range(1, 9)]
    rows += [{"step": 8, "split": "valid", "loss": 1.0, "<script>m</script>": 2.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.threat(35, 38)
def test_a_strangers_folder_is_reported_without_being_run(strange, tmp_path, monkeypatch):
    mark = booby_trapped(strange, tmp_path / "outside")
    monkeypatch.chdir(strange)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "page.html"
    assert report.main([str(strange), f"--out={out}"]) == FINISHED  # once, for the imports
    with WATCH:
        assert report.main([str(strange), f"--out={out}"]) == FINISHED
    WATCH.check(strange, out.parent)
    assert not mark.exists()
    page = out.read_text()
    for tag in ("<script", "<b>x", "<i>x"):
        assert tag not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


@pytest.mark.threat(35)
def test_the_hook_hears_what_it_is_for(tmp_path):
    inside, outside = tmp_path / "run", tmp_path / "outside"
    inside.mkdir()
    outside.write_text("x")
    (inside / "x.py").write_text("1")
    for act in (
        lambda: outside.read_text(),
        lambda: exec(compile("1", str(inside / "x.py"), "exec")),
        lambda: os.system("true"),
        lambda: pickle.loads(b"cos\nsystem\n."),
    ):
        with WATCH:
            act()
        with pytest.raises(AssertionError):
            WATCH.check(inside)


TINY = (
    *("--config.model.num_layers=1", "--config.total_steps=2", "--config.eval.every_steps=2"),
    *("--config.optim.schedule.warmup_steps=1", "--config.checkpoint.every_steps=1"),
    "--config.log.tensorboard=false",
)


@pytest.mark.faults
@pytest.mark.threat(35, 36, 38)
def test_a_strangers_run_is_opened_without_being_run(tmp_path, monkeypatch, capsys):
    """By report, verify, generate, convert, evaluation and a resume."""
    folder, out = tmp_path / "run", tmp_path / "out"
    config = f"{CONFIGS / 'stdlib_gpt.py'}:smoke"
    command = ["--config", config, f"--workdir={folder}", *TINY]
    assert train.main(command) == FINISHED
    typed = ["--config.total_steps=3"]  # what goes on is what the user has typed
    plain = json.loads((folder / "config.json").read_text())
    mark = booby_trapped(folder, tmp_path / "outside")
    monkeypatch.chdir(folder)
    out.mkdir()
    with WATCH:
        assert report.main([str(folder), f"--out={out / 'page.html'}"]) == FINISHED
        assert verify.main([str(folder)]) == FINISHED
        assert generate.main(["--run", str(folder), "--tokens=2"]) == FINISHED
        assert convert.main(["--run", str(folder), f"--out={out / 'hf'}"]) == FINISHED
    WATCH.check(folder, out, tempfile.gettempdir() + "/jax")
    assert not mark.exists()
    # A resume compares with what is stored, and refuses what differs in it.
    with WATCH:
        assert train.main([*command, *typed]) == BAD_INPUT
    WATCH.check(folder)
    assert "init_from" in capsys.readouterr().err
    stored = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", stored | {"config": plain["config"]})
    with WATCH:
        assert train.main([*command, "--eval-only"]) == FINISHED
        assert train.main([*command, *typed]) == FINISHED
    WATCH.check(folder)
    assert not mark.exists()


@pytest.mark.threat(38)
def test_a_tokenizer_is_read_from_the_run_alone(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_text("{}")
    folder = RunDir(tmp_path / "run")
    folder.create()
    for name in ("", "bytes"):
        folder.keep_tokenizer(name)
        assert folder.own_tokenizer(name) == name
    assert not folder.tokenizer.exists()
    with pytest.raises(UserError, match=r"no copy of its tokenizer 'tokenizer\.json'"):
        folder.own_tokenizer(str(file))
    folder.keep_tokenizer(str(file))
    file.unlink()
    assert folder.own_tokenizer(str(file)) == str(folder.tokenizer / "tokenizer.json")
    (folder.tokenizer / "tokenizer.json").unlink()
    (folder.tokenizer / "tokenizer.json").symlink_to("/etc/passwd")
    for name in (str(file), "..", "/etc/passwd", "../config.json"):
        with pytest.raises(UserError):
            folder.own_tokenizer(name)


# Files that are none

PARTS = ("config.json", "env.json", "plan.json", "metrics.jsonl", "tensorboard", "checkpoints")


def as_link(path, target):
    path.symlink_to(target)


def as_pipe(path, target):
    os.mkfifo(path)


@pytest.mark.threat(36)
@pytest.mark.parametrize("kind", [as_link, as_pipe])
@pytest.mark.parametrize("part", [*PARTS, ".lock", "tokenizer"])
def test_links_and_pipes_in_a_run_folder_are_refused_by_name(strange, tmp_path, part, kind, capsys):
    target = tmp_path / "outside"
    target.mkdir() if part in ("tensorboard", "checkpoints", "tokenizer") else target.write_text(
        "x"
    )
    (strange / part).unlink(missing_ok=True)
    kind(strange / part, target)
    began = time.monotonic()
    assert report.main([str(strange), f"--out={tmp_path / 'page.html'}"]) == BAD_INPUT
    assert verify.main([str(strange)]) in (BAD_INPUT, STORAGE)
    for claim in (RunDir(strange).create, RunDir(strange).acquire, RunDir(strange).read_config):
        with pytest.raises(UserError, match=f"{part} is no regular"):
            claim()
    assert time.monotonic() - began < 20
    assert f"{part} is no regular" in capsys.readouterr().err
    assert target.is_dir() or target.read_text() == "x"


@pytest.mark.threat(36)
@pytest.mark.parametrize("name", ["config.json", "env.json", "plan.json", "report.html"])
def test_what_is_written_replaces_a_link_and_does_not_follow_it(strange, tmp_path, name):
    outside = tmp_path / "mine"
    outside.write_text("mine")
    (strange / f".{name}.partial").symlink_to(outside)
    if name == "report.html":
        (strange / name).symlink_to(outside)
        assert report.main([str(strange)]) == FINISHED
    else:
        write_json(strange / name, {"a": 1})
        assert json.loads((strange / name).read_text()) == {"a": 1}
    assert outside.read_text() == "mine"
    assert not (strange / name).is_symlink()


# Hostile JSON

DEEP = '{"a":' * 10_000 + "1" + "}" * 10_000
HOSTILE = {
    "deep": DEEP,
    "deep list": "[" * 100_000,
    "twice": '{"config": {}, "config": {}, "history": []}',
    "NaN": '{"config": {"a": NaN}, "history": []}',
    "Infinity": '{"config": {"a": -Infinity}, "history": []}',
    "pickle": pickle.dumps({"config": {}, "history": []}),
    "evil pickle": b"cos\nsystem\n(S'touch a_stranger_was_here'\ntR.",
    "not text": b"\xff\xfe\x00{}",
    "empty": "",
    "number": "1" * 5000,
    "list": "[1]",
    "types": '{"config": [], "history": {}}',
    "shape": '{"config": 1, "history": [], "shape": [4611686018427387904]}',
}


def peak_bytes():
    """The most that this process has had, C++ included; tracemalloc.stop() races with threads."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.threat(35)
@pytest.mark.parametrize("file", ["config.json", "env.json", "plan.json", "metrics.jsonl"])
@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused_soon_and_without_much_memory(strange, capsys, case, file):
    content = HOSTILE[case]
    content = content if isinstance(content, bytes) else content.encode()
    content = content if file != "metrics.jsonl" else content + b"\n" + content + b"\n"
    (strange / file).write_bytes(content)
    before = peak_bytes()
    began = time.monotonic()
    code = report.main([str(strange)])
    seconds, peak = time.monotonic() - began, peak_bytes() - before
    err = capsys.readouterr().err
    if case in ("types", "shape") and file in ("env.json", "plan.json"):  # objects, and no more
        assert code == FINISHED
    else:
        assert code == BAD_INPUT
        assert file in err
        assert len(err.splitlines()) == 1
        assert seconds < 10  # 1 s, on a machine with nothing else to do
    assert peak < 200 * 2**20
    assert not list(strange.glob(MARK))


INSERTED = (b"[", b"null", b"{}", b'"', b"1e999", b"-1", b",")


@pytest.mark.faults
@pytest.mark.threat(35)
@pytest.mark.parametrize("seed", range(10))
def test_mutated_records_are_read_or_refused(strange, tmp_path, capsys, seed, record_property):
    """10,000 mutations of each seed: a page, or one sentence; never another exception."""
    draw = random.Random(seed)
    files = ("config.json", "env.json", "metrics.jsonl")
    whole = {name: (strange / name).read_bytes() for name in files}
    count, refused = 10_000, []
    for _ in range(count):
        name = draw.choice(files)
        content = bytearray(whole[name])
        for _ in range(draw.choice((1, 1, 2, 8))):
            place = draw.randrange(len(content))
            kind = draw.randrange(4)
            if kind == 0:
                content[place] = draw.randrange(256)
            elif kind == 1:
                del content[place : place + draw.randrange(1, 20)]
            elif kind == 2:
                content[place:place] = draw.choice(
                    (b"[", b"null", b"{}", b'"', b"1e999", b"-1", b",")
                )
            else:
                content[place] ^= 1 << draw.randrange(8)
            if not content:
                content = bytearray(b" ")
        (strange / name).write_bytes(content)
        try:
            folder = RunDir(strange)
            folder.read_config()
            folder.read_env()
            read_rows(folder.metrics)
        except UserError as error:
            refused.append(str(error))
        (strange / name).write_bytes(whole[name])
    assert len(refused) > count / 10
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)
    record_property("mutated_records", count)


@pytest.mark.threat(35)
@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "NaN", "[Infinity]", "-Infinity", DEEP])
def test_strict_json_is_strict(text):
    with pytest.raises(ValueError, match=r"twice|no JSON number|too deeply"):
        parse_json(text)


@pytest.mark.threat(35)
def test_a_file_that_is_too_large_is_not_read(tmp_path):
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="has more than"):
        read_json(path)


# Names


def draw_name(draw):
    """Names that try: parts of paths, encodings, controls, devices, right-to-left marks."""
    bits = ("..", ".", "/", "\\", "\0", "\n", "%2e%2e", "%2f", "\u202e", "~", "$HOME", "con", "aux")
    bits += (
        "nul",
        "a",
        "B9",
        "-",
        "_",
        " ",
        "é",
        "\u2025",
        "\uff0e\uff0e",
        "\uff0f",
        ":",
        "*",
        "a" * 60,
    )
    return "".join(draw.choice(bits) for _ in range(draw.randrange(1, 6)))


def check_names(count, root, seed):
    draw, accepted, refused = random.Random(seed), 0, []
    for _ in range(count):
        name = draw_name(draw)
        try:
            check_name(name, what="name")
        except UserError as error:
            refused.append(str(error))
            continue
        accepted += 1
        path = Path(os.path.normpath(root / name))
        assert path.parent == root
        assert path.name == name
        assert len(os.fsencode(name)) <= 128
    assert accepted > count / 100
    assert len(refused) == count - accepted
    assert all(len(sentence.splitlines()) == 1 for sentence in refused)


@pytest.mark.threat(37)
def test_no_name_leads_out_of_its_folder(tmp_path):
    check_names(10_000, tmp_path, seed=0)


@pytest.mark.faults
@pytest.mark.threat(37)
def test_no_name_of_many_leads_out_of_its_folder(tmp_path, record_property):
    for seed in range(1, 11):
        check_names(10_000, tmp_path, seed=seed)
    record_property("names", 100_000)


@pytest.mark.threat(37)
@pytest.mark.parametrize(
    "name", ["../x", "a/../../x", "/etc", "a//b", "x/..", "a:../b", "~/x", "a\0"]
)
def test_the_name_of_a_set_stays_below_the_data_folder(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(UserError):
        sources.card(f"tfds:{name}")
