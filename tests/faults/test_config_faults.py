"""One wrong edit of a config: told in a sentence before a device is used, with what would do."""

import copy
import random
import string
import time

import pytest

from lsdl import config as configs
from lsdl.config import flatten, from_json, to_json
from lsdl.errors import UserError
from lsdl.experiment import build
from tests.conftest import CONFIGS

SHIPPED = sorted(path.stem for path in CONFIGS.glob("*.py"))
# Of each type, values of others. An int may stand for a float, and True too: ml_collections makes
# 1.0 of either, and nobody after it can tell.
WRONG = {
    int: ("8", "", 1.5, 1.0, None, True, (1,), {"a": 1}),
    float: ("0.1", "", None, (1.0,), {"a": 1}),
    bool: ("true", "True", "false", "False", "", 1, 0, None, 0.0, ()),
    str: (1, 1.5, True, None, ("a",), {"a": 1}),
    tuple: ("shift:1", 1, True, None, {"a": 1}),
    object: (3, 1.5, True, None, {"a": 1}),
}


@pytest.fixture(scope="module", params=SHIPPED)
def shipped(request):
    """A shipped config as its file makes it."""
    return configs._read(str(CONFIGS / f"{request.param}.py"))


@pytest.fixture
def refused(monkeypatch):
    """`refused(config)`: the sentence that refuses it as a file's, by load or by build."""

    def refused(config):
        monkeypatch.setattr(configs, "_read", lambda path: config)
        began = time.monotonic()
        with pytest.raises(UserError) as error:
            build(configs.load("mutated.py")[0], devices=8)
        assert time.monotonic() - began < 30  # 3 s, on a machine with nothing else to do
        sentence = str(error.value)
        assert len(sentence.splitlines()) == 1
        return sentence

    return refused


def edited(config, field, edit):
    """A copy of `config` in which `edit(group, leaf)` has changed `field`."""
    changed = copy.deepcopy(config)
    node = changed
    *groups, leaf = field.split(".")
    for group in groups:
        node = node[group]
    with changed.unlocked():
        edit(node, leaf)
    return changed


def setting(value):
    return lambda node, leaf: node.__setitem__(leaf, value)


def kind_of(config, field):
    node = config
    *groups, leaf = field.split(".")
    for group in groups:
        node = node[group]
    return node.get_type(leaf)


def misspelt(word, draw):
    """One character of `word` dropped, doubled, replaced or exchanged with the next."""
    while True:
        i = draw.randrange(len(word))
        head, char, tail = word[:i], word[i], word[i + 1 :]
        found = draw.choice(
            [head + tail, head + 2 * char + tail, head + draw.choice(string.ascii_lowercase) + tail]
            + ([head + tail[0] + char + tail[1:]] if tail else [])
        )
        if found and found != word and not found.startswith("_"):
            return found


def check_keys(refused, config, fields, draw):
    """Deleted: the key is named. Misspelt: the nearest key is, nearly always."""
    own = {f"model.{name}" for name in config.model}
    understood = total = 0
    for field in fields:
        if field == "model.name":
            continue  # without it nobody can say what the others are
        sentence = refused(edited(config, field, lambda node, leaf: node.__delitem__(leaf)))
        assert field.rpartition(".")[2] in sentence
        typo = misspelt(field.rpartition(".")[2], draw)
        if field.rpartition(".")[0] + "." * ("." in field) + typo in {*flatten(config), *own}:
            continue

        def rename(node, leaf, typo=typo):
            value = node[leaf]
            del node[leaf]
            node[typo] = value

        sentence = refused(edited(config, field, rename))
        assert typo in sentence
        total += 1
        understood += f"did you mean {field.rpartition('.')[2]!r}?" in sentence.replace(
            f"{field!r}", f"{field.rpartition('.')[2]!r}"
        )
    return understood, total


def check_types(refused, config, fields, values):
    tried = 0
    for field in fields:
        kind = kind_of(config, field)
        optional = configs.flatten(configs.template()).get(field, "") is None
        for value in values(WRONG[kind]):
            if value is None and optional:
                continue
            try:
                changed = edited(
                    config, field, lambda node, leaf, v=value: node.__setitem__(leaf, v)
                )
            except TypeError:
                changed = None  # ml_collections has refused it in the file: see below
            if changed is not None:
                assert field.rpartition(".")[2] in refused(changed), (field, value)
            tried += 1
    return tried


@pytest.mark.threat(25)
def test_some_edits_of_every_shipped_config_are_refused(refused, shipped):
    draw = random.Random(shipped.name)
    fields = draw.sample(sorted(flatten(shipped)), 6)
    check_keys(refused, shipped, fields, draw)
    assert check_types(refused, shipped, fields, lambda values: draw.sample(values, 3))


@pytest.mark.faults
@pytest.mark.threat(25)
def test_every_edit_of_every_shipped_config_is_refused(refused, shipped, record_property):
    fields = sorted(flatten(shipped))
    understood, total = check_keys(refused, shipped, fields, random.Random(0))
    assert understood >= 0.99 * total
    types = check_types(refused, shipped, fields, lambda values: values)
    record_property("config_edits", 2 * total + types)


EDITED = """import runpy

def get_config(arg=None):
    config = runpy.run_path({!r})["get_config"]().unlock()
    {}
    return config
"""


# What ml_collections, or Python, refuses while the file is read


@pytest.mark.threat(25)
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('config.batch_size = "8"', ["line 5", "TypeError", "batch_size"]),
        ('config.log.tensorboard = "true"', ["line 5", "TypeError", "tensorboard"]),
        ("config.sed = 3", ["'sed'", "did you mean 'seed'?"]),
        ("config.optim.scedule.peak = 1.0", ["line 5", "AttributeError", "scedule"]),
        ("config.seed = seed", ["line 5", "NameError"]),
        ("config.seed = (", ["line 5", "SyntaxError"]),
        ("return 3", ["returns 3, which is no config"]),
        ("del config.seed", ["lacks the field 'seed'"]),
    ],
)
def test_a_config_file_that_fails_is_one_sentence(tmp_path, line, words):
    path = tmp_path / "mine.py"
    path.write_text(EDITED.format(str(CONFIGS / "digits_mlp.py"), line))
    with pytest.raises(UserError) as error:
        configs.load(str(path))
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value).splitlines()) == 1


# Values out of range

# {field: values that are of the right type and out of the range}
OUT = {
    "batch_size": (0, -1),
    "accum": (0, -1, 7),
    "seed": (-1, 2**32),
    "name": ("", "../a", "a/b", ".a", "a b", "a" * 129, "a\n", "-a", "a\0"),
    "task": ("classificatio", "", "Language"),
    "precision": ("float16", ""),
    "mesh": (
        "",
        "data",
        "data=0",
        "data=3",
        "dta=8",
        "data=-1,fsdp=-1",
        "data=8,data=1",
        "data=-2",
    ),
    "dcn_mesh": ("data", "data=3", "x=2"),
    "rules": ("fsdp-tp", "", "dpp"),
    "partitioner": ("pjit", ""),
    "sequence_attention": ("rings", ""),
    "pipeline_microbatches": (-1,),
    "remat": ("ful", "", "every:0", "names:nothing"),
    "model.name": ("vits", "", "transformer"),
    "data.source": ("digit", "", "tfds:", "tfds:../a", "modular:7"),
    "data.sampling": ("epochs", ""),
    "data.label_noise": (-0.1, 1.5),
    "data.transforms": (("shft:1",), ("shift:-1",), ("shift",), (1,)),
    "data.seq_len": (-1,),
    "data.prefetch": (0, -1),
    "data.train_examples": (0, -5),
    "data.valid_examples": (0, -5),
    "data.train_split": ("trai", "", "train[:0%]"),
    "data.tokenizer": ("byte", "none.json"),
    "loss.label_smoothing": (-0.1, 1.1),
    "loss.mixup": (-1.0,),
    "loss.distill_weight": (-0.1, 1.1),
    "loss.distill_temperature": (-1.0,),
    "loss.z_loss": (-1.0,),
    "loss.balance": (-1.0,),
    "loss.chunk": (-1,),
    "init_from": ("nowhere",),
    "init_fresh": ("(", "head/.*"),
    "teacher": ("nowhere",),
    "optim.name": ("admw", "", "SGD"),
    "optim.momentum": (1.0, -0.1),
    "optim.b1": (1.0, -0.1),
    "optim.b2": (1.0, -0.1),
    "optim.ema_decay": (1.0, -0.1),
    "optim.eps": (-1e-8,),
    "optim.clip_norm": (-1.0,),
    "optim.clip_form": ("norm", ""),
    "optim.sam_rho": (-0.1,),
    "optim.factored_dim": (0,),
    "optim.lbfgs_memory": (0,),
    "optim.decay_mask": ((("(", True),), ((".*", 1),), (".*",), (("nothing", True),)),
    "optim.rate_rules": (((".*", -1.0),), (("(", 1.0),)),
    "optim.switch.name": ("sgdd",),
    "optim.schedule.name": ("cosin", ""),
    "optim.schedule.peak": (float("nan"), float("inf")),
    "optim.schedule.scaling": ("lin", ""),
    "optim.schedule.warmup_form": ("lin", ""),
    "optim.schedule.start_factor": (-0.1,),
    "optim.schedule.end_factor": (-0.1,),
    "optim.schedule.low_factor": (-0.1,),
    "optim.schedule.step_factor": (0.0, -0.1),
    "optim.schedule.growth_decay": (-0.1,),
    "eval.probes": (("svm",),),
    "eval.probe_shots": (-1,),
    "checkpoint.keep_latest": (0, -1),
    "checkpoint.keep_best": (-1,),
    "log.measure": (("norm",),),
    "model.num_layers": (0, -1),
    "model.num_heads": (0, -1),
    "model.width": (0, -1),
    "model.mlp_dim": (0, -1),
    "model.patch": (0, -1),
    "model.dropout": (1.0, -0.1),
    "model.drop_path": (1.0, -0.1),
    "model.hidden": ((0,), (-1, 2)),
    "model.depths": ((0,), (-1, 2)),
    "model.widths": ((0,),),
    "model.width_factor": (0.0, -1.0),
    "model.activation": ("gelutanh", ""),
    "model.norm": ("batchh", ""),
    "model.pool": ("max", ""),
    "model.form": ("gpt9", ""),
    "model.block": ("basik", ""),
    "model.stem": (-1, "x"),
    "model.shortcut": ("x", ""),
    "model.max_length": (0, 1),
    "model.vocab_size": (0, 5),
    "model.vocab_padded": (0, 5),
    "model.kv_heads": (-1, 7),
    "model.num_experts": (-1,),
    "model.embed_dim": (0,),
    "model.group_width": (0, 7),
}


# {field: how the sentence calls it}, where that is not by the end of its name
CALLED = {"data.transforms": "transform", "init_from": "'nowhere'", "optim.decay_mask": "rule"}


def out_of_range(config):
    """(field, value) of what `config` has in `OUT`, of the type that it has there."""
    actual = flatten(config)
    unread = {"data.tokenizer"} if not actual["data.seq_len"] else set()
    if actual["data.train_examples"]:  # what such a set holds is known once it is on disk
        unread.add("data.train_split")
    if not actual["data.tokenizer"]:  # it comes later
        unread.add("model.vocab_size")
    if not actual["optim.weight_decay"]:
        unread.add("optim.decay_mask")
    for field in sorted(OUT.keys() & actual.keys() - unread):
        for value in OUT[field]:
            if configs.is_of(value, type(value if actual[field] is None else actual[field])):
                yield field, value


def check_ranges(refused, config, cases):
    for field, value in cases:
        changed = edited(config, field, setting(value))
        called = CALLED.get(field, field.rpartition(".")[2].split("_")[-1])
        assert called in refused(changed), (field, value)


@pytest.mark.threat(25, 26)
def test_some_values_out_of_range_are_refused(refused, shipped):
    cases = list(out_of_range(shipped))
    check_ranges(refused, shipped, random.Random(shipped.name).sample(cases, 2))


@pytest.mark.faults
@pytest.mark.threat(25, 26)
def test_every_value_out_of_range_is_refused(refused, shipped, record_property):
    cases = list(out_of_range(shipped))
    check_ranges(refused, shipped, cases)
    record_property("config_values_out_of_range", len(cases))


# One config, however it is written


@pytest.mark.threat(25)
def test_a_config_that_is_stored_is_the_config(shipped):
    loaded = configs.load(f"{CONFIGS / shipped_file(shipped)}.py")[0]
    again = from_json(to_json(loaded))
    assert flatten(again) == flatten(loaded)
    assert {f: type(v) for f, v in flatten(again).items()} == {
        f: type(v) for f, v in flatten(loaded).items()
    }
    assert to_json(again) == to_json(loaded)


def shipped_file(config):
    """The file that the config of that name comes from."""
    return next(name for name in reversed(SHIPPED) if config.name.startswith(name))


def other_value(value, draw):
    """Another value of the same type; None: it has none that is certainly fit."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float) and value > 0:
        return value * 2
    return None


@pytest.mark.threat(25)
def test_the_command_line_says_what_the_file_says(shipped, monkeypatch):
    monkeypatch.setattr(configs, "_read", lambda path: copy.deepcopy(shipped).unlock())
    draw, tried = random.Random(shipped.name), 0
    for field, value in flatten(shipped).items():
        other = other_value(value, draw)
        if other is None:
            continue
        file = edited(shipped, field, setting(other))
        outcomes = []
        for make in (
            lambda field=field, v=other: configs.load("x.py", [f"--config.{field}={v}"])[0],
            lambda file=file: (configs.validate(file), file)[1],
        ):
            try:
                outcomes.append(flatten(make()))
            except UserError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]
        tried += 1
    assert tried > 20


@pytest.mark.threat(35, 38)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", "1"),
        ("seed", None),
        ("model.width.x", 1),
        ("nothing", 1),
        ("optim.nothing.x", 1),
        ("optim", 1),
        ("", 1),
        ("batch_size", {"a": 1}),
        ("name", "../a"),
        ("data.transforms", [[[[]]]]),
        ("optim.decay_mask", [["(", True]]),
        ("__class__", 1),
        ("seed.__class__", 1),
        ("batch_size", 0),
    ],
)
def test_a_stored_field_that_is_none_is_refused(field, value):
    fields = to_json(configs.load(f"{CONFIGS / 'digits_mlp.py'}")[0])
    with pytest.raises(UserError) as error:
        from_json(fields | {field: value})
    assert len(str(error.value).splitlines()) == 1
