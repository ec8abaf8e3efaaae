"""Canaries: what is shaped like a secret is in no artifact, nor in what a refusal says."""

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from lsdl import report, secrecy
from lsdl.errors import BAD_INPUT, FINISHED, UserError, refuse
from lsdl.rundir import RunDir
from tests.conftest import CONFIGS, ROOT

SMOKE = "digits_mlp:smoke"
SHORT = (
    "--config.total_steps=2",
    "--config.eval.every_steps=2",
    "--config.checkpoint.every_steps=1",
)

# {where it would stand: the canary itself}. None is real; each is put together here, so that no
# scanner of repositories takes this file for a leak.
CORE = "c4n4ry" * 4
CANARIES = {
    "HF_TOKEN": "hf_" + CORE,
    "GITHUB_TOKEN": "ghp_" + CORE,
    "GH_PAT": "github" + "_pat_" + CORE,
    "GITLAB": "glpat" + "-" + CORE,
    "OPENAI_API_KEY": "sk" + "-proj-" + CORE,
    "STRIPE": "sk" + "_live_" + CORE,
    "AWS_ACCESS_KEY_ID": "AKIA" + "C4N4RY" * 2 + "ABCD",
    "AWS_SECRET_ACCESS_KEY": "c4n4ry/aws+" + CORE,
    "GOOGLE_API_KEY": "AIza" + CORE + "c4n4ry12345",
    "SLACK": "xoxb" + "-" + CORE,
    "NPM_TOKEN": "npm_" + CORE,
    "PYPI": "pypi" + "-" + CORE,
    "DOCKER": "dckr" + "_pat_" + CORE,
    "JWT": "eyJ" + CORE + "." + CORE + "." + CORE,
    "WANDB_API_KEY": "c4n4ry0123456789" * 2,
    "PASSWORD": "c4n4ry-plain-word",
    "DATABASE_URL": "postgres://user:c4n4rypass@host/db",
    "PEM": "-----BEGIN RSA " + "PRIVATE KEY-----\nc4n4rypem\n-----END RSA PRIVATE KEY-----",
    "MY_CREDENTIALS": "c4n4ry:credentials",
    "NETRC": "machine host login me password c4n4rynetrc",
}
SHAPED = [
    *("HF_TOKEN", "GITHUB_TOKEN", "GH_PAT", "GITLAB", "OPENAI_API_KEY", "STRIPE"),
    *("AWS_ACCESS_KEY_ID", "GOOGLE_API_KEY", "SLACK", "NPM_TOKEN", "PYPI", "DOCKER", "JWT", "PEM"),
    "DATABASE_URL",
]


def leaks(folder):
    """The files below `folder` that have a canary in them, or in their name."""
    found = []
    for path in folder.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        if b"c4n4ry" in content.lower() or "c4n4ry" in str(path.relative_to(folder)).lower():
            found.append(str(path))
    return found


def test_there_are_20_canaries():
    assert len(CANARIES) == 20
    assert all("c4n4ry" in value.lower() for value in CANARIES.values())


@pytest.mark.threat(39)
@pytest.mark.parametrize("name", SHAPED)
def test_a_value_of_a_config_that_is_shaped_like_a_secret_is_refused(train, tmp_path, name):
    value = CANARIES[name]
    for field in ("name", "init_from", "data.tokenizer"):
        flags = [f"--config.{field}={value}", f"--workdir={tmp_path / 'run'}"]
        code, out, err = train(SMOKE, *flags)
        assert (code, out) == (BAD_INPUT, "")
        assert "looks like a password or a key" in err or "names a file" in err
        assert "c4n4ry" not in err.lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.threat(39)
@pytest.mark.parametrize(
    "words",
    [
        ["--password=c4n4ry"],
        ["--hf-token", "c4n4ry"],
        ["--api_key", "c4n4ry", "--config", "x.py"],
        ["--config.wandb.api_key=c4n4ry"],
        ["WANDB_API_KEY=c4n4ry"],
        ["https://me:c4n4ry@host/path"],
        ["--from=s3://c4n4ry:c4n4ry@bucket"],
        ["Authorization: c4n4ry"],
        *([CANARIES[name]] for name in SHAPED),
    ],
    ids=range(8 + len(SHAPED)),
)
def test_a_recorded_command_line_has_no_secret(tmp_path, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["lsdl.train", *words, "--workdir=runs/a"])
    folder = RunDir(tmp_path / "run")
    folder.create()
    folder.write_env(devices={})
    assert leaks(tmp_path) == []
    command = json.loads(folder.env.read_text())["command"]
    assert command[-1] == "--workdir=runs/a"
    assert any(secrecy.HIDDEN in word for word in command)


@pytest.mark.threat(39)
@pytest.mark.parametrize(
    "plain",
    [
        *("--config.data.tokenizer=bytes", "--config.total_tokens=300", "every_tokens=3"),
        *("--config.optim.decay_mask=(('.*/(bias|scale)', False),)", "runs/hf_gpt2_small"),
        *("--config.name=token_study", "tfds:imagenet2012", "sha256:0123", "s3://bucket/key"),
        *("data=2,fsdp=-1", "names:attn_out,mlp_up", "sk_learn_digits", "a caption's token 256"),
    ],
)
def test_what_is_no_secret_is_recorded_as_it_is(plain):
    assert secrecy.hidden(plain) == plain
    assert secrecy.hidden_command(["x", plain]) == ["x", plain]


@pytest.mark.threat(39)
def test_a_refusal_does_not_repeat_a_secret(capsys):
    for value in CANARIES.values():
        refuse(UserError(f"Unknown argument '--my-token={value.split()[-1]}'."))
    assert "c4n4ry" not in capsys.readouterr().err


@pytest.mark.threat(39)
def test_the_environment_is_in_no_artifact(train, tmp_path, monkeypatch):
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", "--password=c4n4ry"])
    workdir = tmp_path / "run"
    assert train(SMOKE, f"--workdir={workdir}", *SHORT)[0] == FINISHED
    assert train(SMOKE, f"--workdir={workdir}", *SHORT, "--config.total_steps=3")[0] == FINISHED
    assert report.main([str(workdir)]) == FINISHED
    assert leaks(tmp_path) == []


@pytest.mark.faults
@pytest.mark.threat(39)
def test_a_run_that_crashes_and_goes_on_leaks_nothing(tmp_path):
    """20 canaries: in the environment, on the command line, in a netrc file at home."""
    home, workdir = tmp_path / "home", tmp_path / "run"
    home.mkdir()
    (home / ".netrc").write_text(CANARIES["NETRC"])
    env = os.environ | CANARIES | {"HOME": str(home), "PYTHONPATH": str(ROOT)}
    config = f"{CONFIGS / 'digits_mlp.py'}:smoke"
    command = [sys.executable, "-m", "lsdl.train", "--config", config, f"--workdir={workdir}"]
    long = [*command, "--config.total_steps=300", "--config.checkpoint.every_steps=2"]
    outputs = []
    with subprocess.Popen(long, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        deadline = time.monotonic() + 120
        while not list(workdir.glob("checkpoints/[0-9]*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        run.send_signal(signal.SIGKILL)
        outputs += run.communicate()
    more = ["--config.checkpoint.every_steps=150"]  # the last of two counts
    for arguments in (
        [*command, "--api-token", CANARIES["PASSWORD"]],  # refused
        [*command, f"--config.init_from={CANARIES['DATABASE_URL']}"],  # refused
        [*long, *more],
    ):
        done = subprocess.run(arguments, env=env, capture_output=True, cwd=tmp_path)
        outputs += [done.stdout, done.stderr]
    assert done.returncode == FINISHED
    assert [path for path in leaks(tmp_path) if ".netrc" not in path] == []
    assert not any(b"c4n4ry" in output.lower() for output in outputs)


@pytest.mark.threat(39)
def test_artifacts_follow_the_umask(train, tmp_path):
    before = os.umask(0o027)
    try:
        workdir = tmp_path / "run"
        assert train(SMOKE, f"--workdir={workdir}", *SHORT)[0] == FINISHED
        assert report.main([str(workdir)]) == FINISHED
    finally:
        os.umask(before)
    loose = {
        str(path.relative_to(tmp_path)): oct(path.lstat().st_mode)
        for path in [workdir, *workdir.rglob("*")]
        if stat.S_IMODE(path.lstat().st_mode) & 0o027
    }
    assert loose == {}
