"""Bad input: exit code 2, one line that teaches, no folder, and nothing compiled."""

import gc
import shutil
import subprocess
import sys
import zlib

import jax
import jax.numpy as jnp
import pytest

from lsdl import components
from lsdl.errors import BAD_INPUT, LOCKED, NO_DATA
from lsdl.rundir import RunDir
from lsdl.train import main
from tests.conftest import CONFIGS

SMOKE = "digits_vit:smoke"
SHORT = (
    "--config.model.num_layers=1",
    "--config.total_steps=2",
    "--config.eval.every_steps=2",
    "--config.checkpoint.every_steps=2",
)


def contents(folder):
    """{path: checksum} of all that lies in `folder`."""
    return {
        str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.fixture
def compiled():
    """The number of backend compilations so far."""
    events = []

    def listen(event, duration, **_):
        if "backend_compile" in event:
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture
def refused(train, tmp_path, monkeypatch, compiled):
    """`refused("--config.seed=x", ...)`: the sentence, once all the laws of a refusal hold."""
    monkeypatch.chdir(tmp_path)  # where the default workdir would be

    def refused(*arguments, config=SMOKE, code=BAD_INPUT, workdir=None):
        before = contents(tmp_path), contents(workdir) if workdir else None
        result, out, err = train(config, f"--workdir={workdir or tmp_path / 'run'}", *arguments)
        assert result == code
        assert err.startswith("lsdl: ")
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1
        assert out == ""
        assert compiled == []
        assert (contents(tmp_path), contents(workdir) if workdir else None) == before
        return err

    return refused


def test_compilations_are_counted(compiled):
    jax.jit(lambda x: x + 1)(jnp.zeros(3)).block_until_ready()
    assert compiled


# {case: (arguments, what the sentence has to say)}
CASES = {
    # fields
    "unknown field": (["--config.batchsize=8"], ["'batchsize'", "'batch_size'"]),
    "unknown nested field": (["--config.optim.schedule.peek=1"], ["optim.schedule", "'peak'"]),
    "unknown group": (["--config.optimizer.name=sgd"], ["'optimizer.name'", "'optim.name'"]),
    "group": (["--config.model=vit"], ["'model'", "group"]),
    "field of another model": (["--config.model.depth=20"], ["model.depth"]),
    "int": (["--config.batch_size=many"], ["--config.batch_size=many", "int"]),
    "float": (["--config.optim.schedule.peak=high"], ["peak=high", "float"]),
    "bool": (["--config.log.tensorboard=1"], ["log.tensorboard=1", "true or false"]),
    "tuple": (["--config.data.transforms=shift:1"], ["data.transforms=shift:1", "('a', 'b')"]),
    "no value": (["--config.seed"], ["--config.seed", "no value"]),
    "unknown flag": (["--work-dir=x"], ["'--work-dir=x'"]),
    "abbreviated flag": (["--eval"], ["'--eval'"]),
    "stray word": (["smoke"], ["'smoke'"]),
    # ranges
    "zero batch": (["--config.batch_size=0"], ["batch_size=0", "at least 1"]),
    "negative seed": (["--config.seed=-1"], ["seed=-1", "2^32"]),
    "no steps": (["--config.total_steps=0"], ["total_steps=0", "positive"]),
    # durations
    "two durations": (
        ["--config.total_steps=2", "--config.total_epochs=1"],
        ["total_steps", "total_epochs"],
    ),
    "two warm-ups": (
        ["--config.optim.schedule.warmup_steps=2", "--config.optim.schedule.warmup_percent=5"],
        ["optim.schedule.warmup_steps", "optim.schedule.warmup_percent"],
    ),
    "long warm-up": (["--config.optim.schedule.warmup_steps=21"], ["21 steps", "20", "warmup_"]),
    "total in tokens": (["--config.total_tokens=9"], ["total_tokens=9", "total_examples"]),
    "eval in tokens": (["--config.eval.every_tokens=9"], ["every_tokens=9", "every_examples"]),
    # mesh
    "mesh product": (["--config.mesh=data=3"], ["data=3", "8 devices", "make it 8"]),
    "mesh too large": (["--config.mesh=data=4,tensor=4"], ["product is 16", "make it 8"]),
    "mesh rest": (["--config.mesh=data=-1,tensor=3"], ["divides 8"]),
    "unknown axis": (["--config.mesh=dta=8"], ["'dta'", "'data'"]),
    "empty mesh": (["--config.mesh="], ["mesh is empty", "data=2,fsdp=-1,tensor=2"]),
    "idle axis": (["--config.rules=dp", "--config.mesh=tensor=8"], ["tensor=8 splits nothing"]),
    "idle axis of two": (
        ["--config.rules=fsdp", "--config.mesh=fsdp=2,tensor=4"],
        ["tensor=4 splits nothing"],
    ),
    "shard_map with tensor": (
        ["--config.partitioner=shard_map", "--config.mesh=data=4,tensor=2"],
        ["partitioner=shard_map", "tensor=2", "partitioner=jit"],
    ),
    "pmap with fsdp": (
        ["--config.partitioner=pmap", "--config.mesh=fsdp=8"],
        ["partitioner=pmap", "fsdp=8", "partitioner=jit"],
    ),
    # sizes that have to divide
    "heads over tensor": (
        ["--config.model.num_heads=6", "--config.model.width=96", "--config.mesh=tensor=4,data=2"],
        ["model.num_heads=6", "divisible by 4", "tensor", "4 and 8"],
    ),
    "mlp over tensor": (
        ["--config.model.mlp_dim=190", "--config.mesh=tensor=4,data=2"],
        ["model.mlp_dim=190", "divisible by 4", "188 and 192"],
    ),
    "width over heads": (
        ["--config.model.width=90"],
        ["model.width=90", "divisible by 8", "88 and 96"],
    ),
    "image over patch": (["--config.model.patch=3"], ["divisible by 3", "model.patch"]),
    "batch over shards": (
        ["--config.batch_size=100"],
        ["batch_size=100", "divisible by 8", "96 and 104"],
    ),
    "batch over fsdp": (
        ["--config.batch_size=6", "--config.mesh=data=2,fsdp=2,tensor=2"],
        ["batch_size=6", "divisible by 4", "4 and 8"],
    ),
    "accum": (["--config.accum=5"], ["accum=5", "batch_size=96", "1, 2, 3, 4, 6, 8"]),
    "accum over shards": (["--config.accum=24"], ["batch_size=96", "divisible by 192", "accum"]),
    # data
    "unknown source": (["--config.data.source=digit"], ["'digit'", "digits", "tfds:NAME"]),
    "unknown TFDS name": (["--config.data.source=tfds:no_such_set"], ["'no_such_set'"]),
    "unknown split": (["--config.data.valid_split=val"], ["'val'", "train, valid, test"]),
    "broken slice": (["--config.data.train_split=train[:"], ["'train[:'", "slices"]),
    "too few examples": (["--config.batch_size=1264"], ["batch_size=1264", "1257"]),
    "empty split": (["--config.data.train_split=train[:0%]"], ["no split", "train[:0%]"]),
    "other size": (["--config.data.test_examples=271"], ["test holds 270", "271"]),
    "transform": (["--config.data.transforms=('flop',)"], ["'flop'", "'flip'"]),
    "transform's number": (["--config.data.transforms=('shift:x',)"], ["'shift:x'"]),
    "sampling": (["--config.data.sampling=random"], ["data.sampling='random'", "epoch", "replace"]),
    # names
    "optimiser": (["--config.optim.name=admw"], ["optim.name='admw'", "'adamw'"]),
    "schedule": (["--config.optim.schedule.name=cosin"], ["'cosin'", "'cosine'"]),
    "rules": (["--config.rules=fdsp"], ["rules='fdsp'", "'fsdp'"]),
    "partitioner": (["--config.partitioner=pjit"], ["partitioner='pjit'", "'jit'"]),
    "remat": (["--config.remat=dot"], ["remat='dot'", "'dots'"]),
    "remat's number": (["--config.remat=every:0"], ["remat='every:0'", "every:4"]),
    "remat's names": (["--config.remat=names:mlp"], ["'names:mlp'", "mlp_hidden, mlp_out, mlp_up"]),
    "precision": (["--config.precision=float16"], ["precision='float16'", "'bfloat16'"]),
    "model": (["--config.model.name=vitt"], ["model.name='vitt'", "'vit'"]),
    "another model's fields": (["--config.model.name=mlp"], ["model mlp has no field"]),
    "task": (["--config.task=regresion"], ["task='regresion'", "'regression'"]),
    "task without targets": (["--config.task=regression"], ["task=regression", "'target'"]),
    # optimiser
    "adam with decay": (["--config.optim.name=adam"], ["weight_decay", "0.05", "adamw"]),
    "exponential to nothing": (
        ["--config.optim.schedule.name=exponential"],
        ["end_factor=0.0", "(0, 1]"],
    ),
    "boundary in the warm-up": (
        [
            "--config.optim.schedule.name=step",
            "--config.optim.schedule.boundaries_percent=(5.0, 50.0)",
        ],
        ["(5.0, 50.0)", "after the warm-up", "10 percent"],
    ),
    "mask without an end": (
        ["--config.optim.decay_mask=(('.*/bias', False),)"],
        ["No rule matches", "'.*'"],
    ),
    # processes
    "process without coordinator": (["--process-id=0"], ["--coordinator", "all three"]),
    "number without coordinator": (["--num-processes=2"], ["--coordinator", "all three"]),
    "coordinator alone": (["--coordinator=localhost:1"], ["--process-id", "all three"]),
    # checkpoints
    "nothing to evaluate": (["--eval-only"], ["holds no checkpoint"]),
    "process 1 without coordinator": (["--process-id=1"], ["--coordinator"]),
    "process out of range": (
        ["--process-id=3", "--num-processes=2", "--coordinator=localhost:1"],
        ["--process-id=3"],
    ),
    "endless run": (["--config.total_epochs=inf"], ["total_epochs=inf"]),
    "run of nan": (["--config.total_epochs=nan"], ["total_epochs=nan"]),
    "line break": (["--config.seed=1\n2"], ["--config.seed=1"]),
    "no heads": (["--config.model.num_heads=0"], ["num_heads=0"]),
    "no patch": (["--config.model.patch=0"], ["patch=0"]),
    "negative width": (["--config.model.width=-96"], ["width=-96"]),
    "no TFDS name": (["--config.data.source=tfds:"], ["data"]),
    "empty valid split": (["--config.data.valid_split=valid[:0%]"], ["valid[:0%]"]),
    "transform of a number": (["--config.data.transforms=(1,)"], ["transforms"]),
    "tuple that cannot be": (["--config.data.transforms={[]: 1}"], ["transforms"]),
    "set in a tuple": (["--config.optim.schedule.boundaries_percent={1}"], ["boundaries"]),
    "mask of a number": (["--config.optim.decay_mask=1"], ["decay_mask"]),
    "mask without values": (["--config.optim.decay_mask=('.*',)"], ["decay_mask"]),
    "mask that is no regex": (["--config.optim.decay_mask=(('(', True),)"], ["decay_mask"]),
    "boundary that is a word": (
        ["--config.optim.schedule.name=step", "--config.optim.schedule.boundaries_percent='half'"],
        ["boundaries_percent"],
    ),
    # --eval-only: were they accepted, nothing would be trained.
    "infinite peak": (["--config.optim.schedule.peak=inf", "--eval-only"], ["peak=inf"]),
    "rate that is no number": (["--config.optim.weight_decay=nan", "--eval-only"], ["decay=nan"]),
    "a form of clipping without a threshold": (
        ["--config.optim.clip_form=adaptive", "--config.optim.clip_norm=0"],
        ["optim.clip_form='adaptive' clips nothing", "give its threshold"],
    ),
    "a negative start of the warm-up": (
        ["--config.optim.schedule.start_factor=-1"],
        ["start_factor=-1.0 must not be negative"],
    ),
    "a rate that climbs": (
        ["--config.optim.schedule.peak=-1", "--eval-only"],
        ["peak=-1.0 must not be negative"],
    ),
    "a decay that grows": (["--config.optim.weight_decay=-1", "--eval-only"], ["decay=-1.0 must"]),
    "negative clipping": (["--config.optim.clip_norm=-1", "--eval-only"], ["clip_norm=-1"]),
    "negative keep": (["--config.checkpoint.keep_best=-1", "--eval-only"], ["keep_best=-1"]),
    "dropout of more than all": (["--config.model.dropout=7", "--eval-only"], ["dropout=7"]),
    "negative step factor": (
        ["--config.optim.schedule.name=step", "--config.optim.schedule.step_factor=-1"],
        ["step_factor=-1"],
    ),
    "moment beyond 1": (["--config.optim.b1=2.0", "--eval-only"], ["optim.b1=2.0", "[0, 1)"]),
    "negative stem": (["--config.model.stem=-1", "--eval-only"], ["model.stem=-1"]),
    "endless epochs": (["--config.total_epochs=1e300"], ["2^31"]),
    "too many steps": (["--config.total_steps=4294967296"], ["2^31"]),
    "no name": (["--config.name=", "--eval-only"], ["name="]),
}


# {case: (config, arguments, what the sentence has to say)}
GPT, CLIP, MLP = "stdlib_gpt:smoke", "digits_clip:smoke", "digits_mlp:smoke"
TASK_CASES = {
    # a task, its data and its model
    "language of images": (SMOKE, ["task=language"], ["task=language", "'token'", "image, label"]),
    "classes of text": (GPT, ["task=classification"], ["'label'", "token, segment"]),
    "classification by clip": (CLIP, ["task=classification"], ["model clip", "mlp, vit"]),
    "masks without a mask": (GPT, ["task=masked_language"], ["'loss_weight'", "transforms"]),
    "small vocabulary": (GPT, ["model.vocab_size=200"], ["vocab_size=200", "257", "'bytes'"]),
    "small vocabulary of captions": (CLIP, ["model.vocab_size=200"], ["vocab_size=200", "257"]),
    "small table": (GPT, ["model.vocab_padded=100"], ["vocab_padded=100", "vocab_size=257"]),
    "short positions": (GPT, ["model.max_length=64"], ["max_length=64", "128 tokens"]),
    "short captions": (CLIP, ["model.max_length=16"], ["max_length=16", "32 tokens"]),
    # losses
    "mixup of tokens": (GPT, ["loss.mixup=0.2"], ["loss.mixup=0.2", "task=language"]),
    "smooth pairs": (CLIP, ["loss.label_smoothing=0.1"], ["label_smoothing", "contrastive"]),
    "chunks of classes": (SMOKE, ["loss.chunk=8"], ["loss.chunk=8", "task=classification"]),
    "pairs in parts": (CLIP, ["accum=2"], ["accum=2", "must be 1", "contrastive"]),
    "form of pairs": (CLIP, ["loss.form=hinge"], ["loss.form='hinge'", "sigmoid, softmax"]),
    "uneven chunks": (CLIP, ["loss.chunk=5"], ["96", "divisible by 5", "loss.chunk"]),
    "negative mixup": (
        SMOKE,
        [
            "loss.mixup=-1",
        ],
        ["loss.mixup=-1.0", "not be negative"],
    ),
    "negative chunk": (GPT, ["loss.chunk=-1"], ["loss.chunk=-1", "not be negative"]),
    "too smooth": (SMOKE, ["loss.label_smoothing=1.5"], ["label_smoothing=1.5", "[0, 1]"]),
    "weight without teacher": (SMOKE, ["loss.distill_weight=0.5"], ["teacher=''", "together"]),
    # models
    "pool": (SMOKE, ["model.pool=max"], ["model.pool='max'", "class, distill, mean"]),
    "activation": (SMOKE, ["model.activation=gelutanh"], ["'gelutanh'", "'gelu_tanh'"]),
    "form": (GPT, ["model.form=gpt9"], ["model.form='gpt9'", "'gpt2'"]),
    "shared heads of gpt2": (GPT, ["model.kv_heads=2"], ["kv_heads=2", "must be 0", "llama"]),
    "llama without positions": (GPT, ["model.form=llama"], ["rope_theta=0.0", "positive"]),
    "shared heads": (
        GPT,
        ["model.form=llama", "model.rope_theta=100.0", "model.kv_heads=3", "model.num_heads=8"],
        ["model.num_heads=8", "divisible by 3", "model.kv_heads"],
    ),
    "odd heads": (
        GPT,
        ["model.form=llama", "model.rope_theta=100.0", "model.width=72", "model.num_heads=8"],
        ["model.width / model.num_heads=9", "divisible by 2"],
    ),
    "heads of a tower": (CLIP, ["model.text_num_heads=7"], ["text_width=64", "text_num_heads"]),
    "patch of a tower": (CLIP, ["model.vision_patch=3"], ["divisible by 3", "vision_patch"]),
    # evaluation and starts
    "probe": (MLP, ["eval.probes=('svm',)"], ["eval.probes='svm'", "knn, linear"]),
    "probe of text": (GPT, ["eval.probes=('knn',)"], ["eval.probes='knn'", "classification"]),
    "negative shots": (MLP, ["eval.probe_shots=-1"], ["probe_shots=-1", "not be negative"]),
    "start from nowhere": (MLP, ["init_from=nowhere"], ["'nowhere' is no run folder"]),
}


@pytest.mark.threat(25, 26)
@pytest.mark.parametrize("case", TASK_CASES)
def test_refusal_of_a_task_is_one_sentence(refused, case):
    config, overrides, words = TASK_CASES[case]
    sentence = refused(*(f"--config.{override}" for override in overrides), config=config)
    for word in words:
        assert word in sentence


@pytest.mark.threat(22)
def test_data_that_are_not_there_are_refused_with_their_own_code(refused):
    source = ["--config.data.source=tfds:cifar10", "--config.data.valid_split=test"]
    sentence = refused(*source, code=NO_DATA)
    assert "tfds:cifar10 is not on disk" in sentence
    assert "download_and_prepare" in sentence


@pytest.mark.threat(25, 26)
@pytest.mark.parametrize("case", CASES)
def test_refusal_is_one_sentence(refused, case):
    arguments, words = CASES[case]
    sentence = refused(*arguments)
    for word in words:
        assert word in sentence


@pytest.mark.parametrize(
    ("model", "override"),
    [
        ("mlp", "activation=relux"),
        ("mlp", "activation=Dense"),
        ("mlp", "hidden=(0,)"),
        ("mlp", "hidden=(-3,)"),
        ("mlp", "hidden=('wide',)"),
        ("resnet", "width=0"),
        ("resnet", "width=-8"),
    ],
)
def test_field_of_a_model_out_of_range_is_refused(refused, model, override):
    sentence = refused(f"--config.model.{override}", config=f"digits_{model}:smoke")
    assert f"model.{override.partition('=')[0]}" in sentence


# Config files


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("digits_vit:smok", ["'smok'", "'smoke'"]),
        ("digits_vitt", ["no config file", "digits_vitt.py", "did you mean '", "digits_vit.py'?"]),
        ("digits_vitt:smoke", ["no config file", "digits_vitt.py"]),
    ],
)
def test_config_that_is_not_there_is_refused(refused, config, words):
    sentence = refused(config=config)
    for word in words:
        assert word in sentence


def test_a_config_by_its_name_alone_is_found_in_its_folder(monkeypatch, capfd):
    monkeypatch.chdir(CONFIGS.parent)
    assert main(["--config", "digits_vit"]) == BAD_INPUT
    told = "lsdl: There is no config file 'digits_vit': did you mean 'configs/digits_vit.py'?\n"
    assert capfd.readouterr().err == told


def test_config_file_without_get_config_is_refused(refused, tmp_path):
    (tmp_path / "plain.py").write_text("config = 3\n")
    assert "get_config" in refused(config=str(tmp_path / "plain"))


# Workdirs


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b"])
def test_workdir_below_a_file_is_refused(refused, tmp_path, name):
    (tmp_path / "file").write_text("kept")
    sentence = refused(f"--workdir={tmp_path / name}")
    assert f"{tmp_path / name} cannot be created" in sentence


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a complete run of two steps."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    config = f"{CONFIGS / 'digits_vit.py'}:smoke"
    assert main(["--config", config, f"--workdir={workdir}", *SHORT]) == 0
    return workdir


OTHER = {
    "batch_size=48": "batch_size=96",
    "seed=1": "seed=0",
    "optim.schedule.peak=0.5": "optim.schedule.peak=0.002",
    "model.dropout=0.1": "model.dropout=0.0",
    "optim.schedule.warmup_steps=1": "optim.schedule.warmup_",
    "accum=2": "accum=1",
    "data.transforms=()": "data.transforms=['shift:1']",
}


@pytest.mark.parametrize("override", OTHER)
def test_workdir_of_another_config_is_refused(refused, finished, override):
    sentence = refused(*SHORT, f"--config.{override}", workdir=finished)
    assert OTHER[override] in sentence
    assert override.partition("=")[0].rpartition("_")[0] in sentence
    assert "--workdir" in sentence


def test_workdir_of_the_same_config_is_not_refused(train, finished, compiled):
    before = contents(finished)
    code, out, err = train(SMOKE, f"--workdir={finished}", *SHORT)
    assert (code, err) == (0, "")
    assert "complete" in out
    assert compiled == []
    changed = {name for name, content in contents(finished).items() if content != before[name]}
    assert changed <= {"env.json", ".lock"}  # that names its owner


def test_refused_workdir_is_not_left_locked(refused, finished):
    gc.disable()
    try:
        refused(*SHORT, "--config.seed=1", workdir=finished)
        folder = RunDir(finished)
        folder.acquire()
        folder.release()
    finally:
        gc.enable()


def test_run_shorter_than_what_is_done_is_refused(train, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    before = contents(workdir)
    code, _, err = train(SMOKE, f"--workdir={workdir}", *SHORT, "--config.total_steps=1")
    assert code == BAD_INPUT
    assert "2 steps already" in err
    assert contents(workdir) == before


@pytest.mark.parametrize("override", ["model.num_layers=2", "optim.name=sgd"])
def test_another_config_cannot_be_evaluated(refused, finished, override):
    sentence = refused(*SHORT, "--eval-only", f"--config.{override}", workdir=finished)
    assert override.partition("=")[0] in sentence


@pytest.mark.threat(10)
def test_workdir_in_use_is_refused_with_a_code_of_its_own(refused, finished):
    owner = RunDir(finished)
    owner.acquire()
    try:
        assert f"{finished} is in use by process" in refused(*SHORT, workdir=finished, code=LOCKED)
    finally:
        owner.release()


@pytest.mark.parametrize("content", ['{"config": ', '{"a": 1}', "[]", '{"config": {}}'])
def test_workdir_with_a_broken_config_is_refused(train, tmp_path, content):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(content)
    code, out, err = train(SMOKE, f"--workdir={workdir}")
    assert (code, out) == (BAD_INPUT, "")
    assert err.startswith(f"lsdl: {workdir / 'config.json'} is not what lsdl writes")
    assert len(err.splitlines()) == 1
    assert {name for name in contents(workdir) if not name.startswith(".")} == {"config.json"}


def test_folder_without_checkpoints_cannot_be_evaluated(refused, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "holds no checkpoint" in refused("--eval-only")


# The command itself


def test_help_shows_examples_and_exit_codes_without_jax():
    script = """
import sys
from lsdl.train import main
try:
    main(["--help"])
except SystemExit as leaving:
    print("left with", leaving.code, "jax" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert "examples:\n  python -m lsdl.train --config configs/" in run.stdout
    for code in (0, 2, 73, 75, 130):
        assert f" {code} " in run.stdout
    assert run.stdout.endswith("left with 0 False\n")


@pytest.mark.parametrize(
    ("place", "rule"),
    [
        ("vti.Vit", "needs a file lsdl/models/vti.py, which is not there"),
        ("vit.Vti", "needs a class 'Vti' in lsdl/models/vit.py: did you mean 'Vit'?"),
        ("vit", "needs a class '' in lsdl/models/vit.py: choose from "),
    ],
)
def test_a_typo_in_the_name_table_is_one_sentence(refused, monkeypatch, place, rule):
    monkeypatch.setitem(components.MODELS, "vit", place)
    line = f"The line 'vit': {place!r} of MODELS in lsdl/components.py"
    assert f"{line} {rule}" in refused()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--config"],
        ["--config", "x.py", "--num-processes=two"],
        ["--config", "x.py", "--process-id="],
        ["--config", "x.py", "--distributed=maybe"],
        ["--config", "x.py", "--eval-only=yes"],
    ],
)
def test_flags_that_cannot_be_parsed_leave_with_two(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: python -m lsdl.train ")


@pytest.mark.parametrize(
    ("arguments", "sentence", "code"),
    [
        (["--config.data.test_examples=271"], "lsdl: digits test holds 270 examples", BAD_INPUT),
        (
            ["--config.data.source=tfds:cifar10", "--config.data.valid_split=test"],
            "lsdl: tfds:cifar10 is not on disk.",
            NO_DATA,
        ),
    ],
)
def test_a_process_of_its_own_says_no_more(tmp_path, arguments, sentence, code):
    config = f"{CONFIGS / 'digits_vit.py'}:smoke"
    command = [sys.executable, "-m", "lsdl.train", "--config", config, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == code
    assert run.stdout == ""
    assert run.stderr.startswith(sentence)
    assert len(run.stderr.splitlines()) == 1
    assert contents(tmp_path) == {}
