"""Configs: what a file and a command line may say, and that everything else is refused."""

import itertools
import json
import os
import re
import sys

import pytest

from lsdl import config as configs
from lsdl.config import (
    DURATIONS,
    UNITS,
    compare,
    duration_steps,
    flatten,
    from_json,
    template,
    to_json,
)
from lsdl.errors import UserError
from tests.conftest import CONFIGS

FILE = """
from lsdl.config import parse_arg, template

def get_config(arg=None):
    words = parse_arg(arg, "small", "wide")
    config = template()
    config.name = "example"
    config.batch_size = 8 if "small" in words else 16
    config.model.name = "mlp"
    config.model.width = 64 if "wide" in words else 32
    config.model.gated = False
    config.data.source = "digits"
    config.data.transforms = ("shift:1", "flip")
    config.optim.schedule.warmup_percent = 10.0
    config.total_epochs = 3.0
    config.eval.every_steps = 5
    config.checkpoint.every_examples = 500
    config.log.every_steps = 1
    EXTRA
    return config.lock()
"""
DIGITS = str(CONFIGS / "digits_vit.py")
FIELDS = flatten(configs.load(DIGITS)[0])
# what the file above sets
SET = {
    "total": "total_epochs",
    "optim.schedule.warmup": "optim.schedule.warmup_percent",
    "eval.every": "eval.every_steps",
    "checkpoint.every": "checkpoint.every_examples",
    "log.every": "log.every_steps",
}
SPELLINGS = [
    f"{name}_{u}" for name in DURATIONS for u in UNITS if (name, u) != ("total", "percent")
]


@pytest.fixture
def write(tmp_path):
    """`write("config.seed = 3")`: the path of the config file above with that line in it."""

    def write(extra="pass"):
        path = tmp_path / "example.py"
        path.write_text(FILE.replace("EXTRA", extra))
        return str(path)

    return write


@pytest.fixture
def resolve(write):
    """`resolve("seed=3", ...)`: the config file above under these overrides."""
    return lambda *overrides: configs.load(write(), [f"--config.{o}" for o in overrides])[0]


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    sentence = str(error.value)
    assert len(sentence.splitlines()) == 1
    assert sentence[-1] in ".?"
    return sentence


# Files


@pytest.mark.parametrize(
    ("arg", "batch_size", "width"),
    [
        ("", 16, 32),
        (":", 16, 32),
        (":small", 8, 32),
        (":wide", 16, 64),
        (":small,wide", 8, 64),
        (":wide,small", 8, 64),
    ],
)
def test_file_is_asked_for_its_variant(write, arg, batch_size, width):
    config, given = configs.load(write() + arg)
    assert (config.batch_size, config.model.width) == (batch_size, width)
    assert given == {}


@pytest.mark.parametrize("arg", ["smal", "small,wde", "SMALL", "small wide"])
def test_unknown_variant_is_refused(write, arg):
    sentence = refusal(configs.load, f"{write()}:{arg}")
    assert repr(arg.rpartition(",")[2]) in sentence
    assert "small" in sentence or "wide" in sentence


def test_variant_of_a_config_without_any_is_refused():
    assert "'smoke'" in refusal(configs.parse_arg, "smoke")
    assert configs.parse_arg(None) == configs.parse_arg("") == set()


@pytest.mark.parametrize(
    "name", ["absent.py", "absent.py:small", "folder", "folder.py", "absent", ""]
)
def test_missing_file_is_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.py").mkdir()
    path = str(tmp_path / name)
    assert repr(path.partition(":")[0].rstrip("/")) in refusal(configs.load, path.rstrip("/"))


def test_file_without_get_config_is_refused(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("config = 3\n")
    sentence = refusal(configs.load, str(path))
    assert "get_config" in sentence
    assert repr(str(path)) in sentence


def test_file_is_read_anew_each_time(write, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for seed in (1, 2):  # the same size, and for the cache the same second
        path = write(f"config.seed = {seed}")
        os.utime(path, (1e9, 1e9))
        assert configs.load(path)[0].seed == seed


# Overrides


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=7", 7),
        ("batch_size=32", 32),
        ("checkpoint.keep_best=0", 0),
        ("model.width=48", 48),
        ("optim.schedule.peak=3e-4", 3e-4),
        ("optim.schedule.peak=1", 1.0),
        ("optim.b1=0", 0.0),
        ("optim.schedule.decay_factor=-0.5", -0.5),
        ("optim.nesterov=true", True),
        ("optim.nesterov=True", True),
        ("log.tensorboard=false", False),
        ("log.tensorboard=False", False),
        ("model.gated=true", True),
        ("name=run", "run"),
        ("data.source=a=b", "a=b"),
        ("name=3", "3"),
        ("mesh=data=4,tensor=2", "data=4,tensor=2"),
        ("data.transforms=('flip', 'shift:2')", ("flip", "shift:2")),
        ("data.transforms=['flip']", ("flip",)),
        ("data.transforms='flip'", ("flip",)),
        ("data.transforms=()", ()),
        ("optim.decay_mask=(('.*', True),)", ((".*", True),)),
        ("optim.schedule.boundaries_percent=(30.0, 60.0)", (30.0, 60.0)),
        ("data.train_examples=500", 500),
        ("data.test_examples=1", 1),
    ],
)
def test_override_sets_its_field_alone(write, override, value):
    config, given = configs.load(write(), [f"--config.{override}"])
    field = override.partition("=")[0]
    before, after = flatten(configs.load(write())[0]), flatten(config)
    assert after == before | {field: value}
    assert type(after[field]) is type(value)
    assert given == {field: value}


@pytest.mark.threat(25)
@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("seed=1.5", "int"),
        ("seed=1e3", "int"),
        ("seed=", "int"),
        ("seed=true", "int"),
        ("batch_size=None", "int"),
        ("batch_size=x", "int"),
        ("model.width=wide", "int"),
        ("data.train_examples=1.0", "int"),
        ("total_steps=2.5", "int"),
        ("eval.every_steps=often", "int"),
        ("total_epochs=many", "float"),
        ("optim.schedule.peak=high", "float"),
        ("optim.schedule.peak=", "float"),
        ("optim.b1=0,9", "float"),
        ("optim.nesterov=1", "true or false"),
        ("optim.nesterov=yes", "true or false"),
        ("optim.nesterov=TRUE", "true or false"),
        ("log.tensorboard=", "true or false"),
        ("model.gated=0", "true or false"),
        ("data.transforms=shift:1", "('a', 'b')"),
        ("data.transforms=('flip'", "('a', 'b')"),
        ("data.transforms=", "('a', 'b')"),
        ("data.transforms=print(1)", "('a', 'b')"),
    ],
)
def test_wrong_type_names_the_field_and_its_type(resolve, override, kind):
    sentence = refusal(resolve, override)
    assert f"--config.{override}:" in sentence
    assert kind in sentence.rpartition(override)[2]


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("batchsize", "batch_size"),
        ("Seed", "seed"),
        ("partitoner", "partitioner"),
        ("total_stpes", "total_steps"),
        ("model.widht", "width"),
        ("optim.wait_decay", "weight_decay"),
        ("optim.schedule.peek", "peak"),
        ("optim.schedule.warmup_step", "warmup_steps"),
        ("optim.shedule.peak", "optim.schedule.peak"),
        ("modle.width", "model.width"),
        ("schedule.peak", "optim.schedule.peak"),
        ("model.width.x", "model.width"),
        ("checkpoints.keep_best", "checkpoint.keep_best"),
    ],
)
def test_unknown_field_hints_at_the_nearest(resolve, field, hint):
    sentence = refusal(resolve, f"{field}=1")
    assert repr(field) in sentence
    assert f"did you mean {hint!r}?" in sentence


@pytest.mark.parametrize("field", ["", ".", "model.", ".seed", "seed.", "model..width"])
def test_field_without_a_whole_name_is_refused(resolve, field):
    assert repr(field) in refusal(resolve, f"{field}=1")


def typos(word: str) -> set[str]:
    """One character dropped, doubled, replaced, or swapped with the next."""
    parts = [(word[:i], word[i], word[i + 1 :]) for i in range(len(word))]
    found = {head + tail for head, _, tail in parts}
    found |= {head + char + char + tail for head, char, tail in parts}
    found |= {head + "q" + tail for head, _, tail in parts}
    found |= {head + tail[0] + char + tail[1:] for head, char, tail in parts if tail}
    return found - {word}


@pytest.mark.threat(25)
@pytest.mark.parametrize("field", FIELDS)
def test_every_typo_is_refused_and_most_are_understood(field):
    hits = []
    for typo in sorted(typos(field)):
        sentence = refusal(configs.load, DIGITS, [f"--config.{typo}=1"])
        hint = re.search("did you mean '(.*)'", sentence)
        hits.append(bool(hint) and f".{field}".endswith(f".{hint[1]}"))
    assert sum(hits) >= 0.8 * len(hits)


@pytest.mark.parametrize("group", ["model", "data", "optim", "optim.schedule", "eval", "log"])
def test_group_is_no_field(resolve, group):
    sentence = refusal(resolve, f"{group}=1")
    assert repr(group) in sentence
    assert "is a group" in sentence


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--config.seed", "7"], {"seed": 7}),
        (["--config.seed", "7", "--config.name", "x"], {"seed": 7, "name": "x"}),
        (["--config.optim.schedule.decay_factor", "-0.5"], {"optim.schedule.decay_factor": -0.5}),
        (["--config.data.transforms", "('a', 'b')"], {"data.transforms": ("a", "b")}),
        (["--config.seed=7", "--config.seed=8"], {"seed": 8}),
        (["--config.total_steps=7", "--config.total_steps=8"], {"total_steps": 8}),
    ],
)
def test_value_may_follow_behind_a_space_and_the_last_one_counts(write, arguments, given):
    config, parsed = configs.load(write(), arguments)
    assert parsed == given
    assert given.items() <= flatten(config).items()


@pytest.mark.parametrize(
    "arguments",
    [["--config.seed"], ["--config.seed", "--config.name=x"], ["--config.name=x", "--config.seed"]],
)
def test_missing_value_is_refused(write, arguments):
    sentence = refusal(configs.load, write(), arguments)
    assert "--config.seed" in sentence
    assert "no value" in sentence


@pytest.mark.parametrize(
    "argument", ["seed=7", "--seed=7", "-config.seed=7", "--config", "--Config.seed=7", "7"]
)
def test_argument_that_is_no_field_is_refused(write, argument):
    assert repr(argument) in refusal(configs.load, write(), ["--config.name=x", argument])


def test_overrides_given_are_not_used_up(write):
    overrides = ["--config.seed", "7"]
    configs.load(write(), overrides)
    assert overrides == ["--config.seed", "7"]


# Durations


@pytest.mark.parametrize("name", DURATIONS)
def test_two_spellings_on_the_command_line_are_refused(resolve, name):
    spellings = [s for s in SPELLINGS if s.startswith(f"{name}_")]
    for one, two in itertools.permutations(spellings, 2):
        sentence = refusal(resolve, f"{one}=5", f"{two}=5")
        assert one in sentence
        assert two in sentence
        assert "the same duration: give one" in sentence


@pytest.mark.parametrize("field", SPELLINGS)
def test_spelling_on_the_command_line_clears_its_siblings(write, field):
    before = flatten(configs.load(write())[0])
    after = flatten(configs.load(write(), [f"--config.{field}=5"])[0])
    cleared = SET[field.rpartition("_")[0]]
    assert after == before | {cleared: None} | {field: 5}


def test_a_file_with_two_spellings_of_a_duration_is_told_those_that_there_are(write):
    file = write(extra="config.total_steps = 3")
    said = (
        r"one of total_\{steps,epochs,examples,tokens\} is needed, not total_steps and total_epochs"
    )
    with pytest.raises(UserError, match=said):
        configs.load(file)
    file = write(extra="config.eval.every_percent = 3.0")
    with pytest.raises(UserError, match=r"eval.every_\{steps,epochs,examples,tokens,percent\}"):
        configs.load(file)


def test_spellings_of_different_durations_are_independent(resolve):
    config = resolve("total_steps=50", "eval.every_percent=10", "log.every_epochs=2")
    assert (config.total_steps, config.eval.every_percent, config.log.every_epochs) == (50, 10, 2)
    assert (config.total_epochs, config.eval.every_steps, config.log.every_steps) == (None,) * 3
    assert config.checkpoint.every_examples == 500


def in_steps(unit, value, tokens_per_example=128):
    group = template().eval
    group[f"every_{unit}"] = value
    # 1,257 examples in batches of 96: 13 whole batches an epoch
    return duration_steps(
        group,
        "every",
        batch_size=96,
        steps_per_epoch=13,
        tokens_per_example=tokens_per_example,
        total_steps=780,
    )


@pytest.mark.parametrize(
    ("unit", "value", "steps"),
    [
        ("steps", 1, 1),
        ("steps", 7, 7),
        ("steps", 10_000, 10_000),
        ("epochs", 1.0, 13),
        ("epochs", 60.0, 780),
        ("epochs", 0.3, 4),  # 3.9
        ("epochs", 0.1, 1),  # 1.3
        ("epochs", 0.001, 1),  # never less than one step
        ("examples", 1, 1),
        ("examples", 96, 1),
        ("examples", 97, 2),
        ("examples", 960, 10),
        ("examples", 1_000_000, 10_417),
        ("tokens", 1, 1),
        ("tokens", 96 * 128, 1),
        ("tokens", 96 * 128 + 1, 2),
        ("tokens", 10**9, 81_381),
        ("percent", 100.0, 780),
        ("percent", 10.0, 78),
        ("percent", 33.3, 260),  # 259.74
        ("percent", 1.0, 8),  # 7.8
        ("percent", 0.001, 1),
    ],
)
def test_durations_become_steps(unit, value, steps):
    result = in_steps(unit, value)
    assert result == steps
    assert type(result) is int


@pytest.mark.parametrize("unit", UNITS)
def test_zero_is_zero_in_every_unit(unit):
    assert in_steps(unit, UNITS[unit](0)) == 0


@pytest.mark.parametrize("examples", range(1, 400, 7))
def test_examples_are_covered_with_less_than_a_batch_to_spare(examples):
    steps = in_steps("examples", examples)
    assert steps * 96 >= examples > (steps - 1) * 96


def test_tokens_need_a_language_task():
    assert "every_tokens=5" in refusal(in_steps, "tokens", 5, 0)


# Validation


@pytest.mark.parametrize("name", DURATIONS)
def test_file_without_a_duration_is_refused(write, name):
    sentence = refusal(configs.load, write(f"config.{SET[name]} = None"))
    assert f"{name}_" in sentence
    assert "none" in sentence


@pytest.mark.parametrize("field", [s for s in SPELLINGS if s not in SET.values()])
def test_file_with_two_spellings_is_refused(write, field):
    sentence = refusal(configs.load, write(f"config.{field} = 5"))
    assert field in sentence
    assert SET[field.rpartition("_")[0]] in sentence


@pytest.mark.parametrize("field", sorted(flatten(template())))
def test_config_without_a_field_of_the_template_is_refused(field):
    config = configs._read(DIGITS).unlock()
    group, _, leaf = field.rpartition(".")
    node = config
    for name in filter(None, group.split(".")):
        node = node[name]
    del node[leaf]
    assert repr(field) in refusal(configs.validate, config)


@pytest.mark.parametrize("field", ["colour", "optim.colour", "log.weight_decay", "batchsize"])
def test_field_that_the_template_lacks_is_refused(write, field):
    path = write(f"config.unlock(); config.{field} = 1")
    assert repr(field) in refusal(configs.load, path)


def test_model_has_fields_of_its_own(write):
    config, _ = configs.load(write("config.model.colour = 'red'; config.model.seed = 1.5"))
    assert (config.model.colour, config.model.seed) == ("red", 1.5)


@pytest.mark.parametrize(
    "override",
    [
        "batch_size=0",
        "batch_size=-8",
        "accum=0",
        "accum=-1",
        "checkpoint.keep_latest=0",
        "data.prefetch=0",
        "seed=-1",
        "seed=4294967296",
        "total_steps=0",
        "total_steps=-1",
        "total_epochs=0",
        "eval.every_percent=0.0",
        "eval.every_steps=-5",
        "checkpoint.every_examples=0",
        "log.every_steps=0",
        "optim.schedule.warmup_steps=-1",
        "optim.schedule.warmup_percent=-0.5",
    ],
)
def test_out_of_range_is_refused(resolve, override):
    field, _, value = override.partition("=")
    assert re.search(rf"{field}={value}(\.0)? ", refusal(resolve, override))


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("field", ["total_epochs", "eval.every_percent"])
def test_duration_that_is_no_number_is_refused(resolve, field, value):
    assert field in refusal(resolve, f"{field}={value}")


@pytest.mark.parametrize(
    "override",
    [
        "seed=0",
        "seed=4294967295",
        "batch_size=1",
        "accum=16",
        "total_epochs=0.01",
        "checkpoint.keep_best=0",
        *(f"optim.schedule.warmup_{unit}=0" for unit in UNITS),
    ],
)
def test_the_ends_of_a_range_belong_to_it(resolve, override):
    resolve(override)


@pytest.mark.parametrize("accum", [3, 5, 32])
def test_accum_that_does_not_divide_is_told_what_does(resolve, accum):
    sentence = refusal(resolve, f"accum={accum}")
    assert f"accum={accum}" in sentence
    assert "batch_size=16" in sentence
    assert "1, 2, 4, 8, 16." in sentence


# The loaded config


@pytest.mark.parametrize("field", FIELDS)
def test_loaded_config_is_frozen(field):
    config, _ = configs.load(DIGITS)
    group, _, leaf = field.rpartition(".")
    for name in filter(None, group.split(".")):
        config = config[name]
    with pytest.raises(AttributeError):
        setattr(config, leaf, getattr(config, leaf))


def test_frozen_config_takes_no_new_field(resolve):
    with pytest.raises(AttributeError):
        resolve().colour = "red"


def nested(flat: dict) -> dict:
    tree = {}
    for field, value in flat.items():
        *groups, leaf = field.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return tree


@pytest.mark.parametrize("arg", ["", ":smoke"])
def test_flatten_loses_nothing(arg):
    config, _ = configs.load(DIGITS + arg)
    flat = flatten(config)
    assert list(flat) == sorted(flat)
    assert nested(flat) == config.to_dict()
    assert flatten(nested(flat)) == flat


def test_flatten_joins_names_with_dots():
    flat = flatten({"b": {"d": (1, 2), "c": {"a": None}}, "a": 3})
    assert list(flat.items()) == [("a", 3), ("b.c.a", None), ("b.d", (1, 2))]


def test_json_form_survives_json(resolve):
    config = resolve("optim.schedule.peak=0.1", "seed=4294967295")
    stored = to_json(config)
    assert json.loads(json.dumps(stored)) == stored
    assert stored.keys() == flatten(config).keys()
    assert stored["optim.schedule.peak"] == 0.1
    assert stored["seed"] == 4294967295
    assert stored["total_steps"] is None
    assert stored["data.transforms"] == ["shift:1", "flip"]


def test_json_form_does_not_depend_on_the_reading(resolve):
    assert to_json(resolve("seed=3")) == to_json(resolve("seed=3"))
    assert to_json(resolve("seed=3")) != to_json(resolve("seed=4"))


# What a resumed run may change

ALONE = {"mesh", "dcn_mesh", "rules", "param_rules", "partitioner", "remat"}
ALONE |= {"sequence_attention", "pipeline_microbatches", "data.in_memory_mib", "data.prefetch"}
ALONE |= {"stuck_after_s", "guard.limit", "guard.audit_every_steps"}
MAY_CHANGE = ("total_", "log.", "eval.", "checkpoint.")


@pytest.mark.parametrize("field", FIELDS)
def test_resume_changes_what_it_may_and_nothing_else(field):
    stored = to_json(configs.load(DIGITS)[0])
    current = stored | {field: "changed"}
    if field in ALONE or field.startswith(MAY_CHANGE):
        assert compare(stored, current) == {field: (stored[field], "changed")}
    else:
        sentence = refusal(compare, stored, current)
        assert f"{field}={stored[field]}" in sentence
        assert f"{field}=changed" in sentence


@pytest.mark.parametrize(
    "field",
    [
        "mesh_shape",
        "ici_mesh",
        "own_rules",
        "model.mesh",
        "rules.x",
        "remat_policy",
        "model.remat",
        "subtotal_steps",
        "model.total_steps",
        "optim.log.x",
        "model.eval.x",
        "login",
        "data.prefetch_more",
    ],
)
def test_lookalikes_of_what_may_change_may_not(field):
    assert f"{field}=2" in refusal(compare, {field: 1}, {field: 2})


def test_nothing_changed_is_nothing():
    stored = to_json(configs.load(DIGITS)[0])
    assert compare(stored, dict(stored)) == {}


def test_all_allowed_changes_are_returned():
    stored = {"mesh": "data=8", "total_steps": 5, "total_epochs": None, "seed": 0}
    current = {"mesh": "data=2", "total_steps": None, "total_epochs": 2.0, "seed": 0}
    assert compare(stored, current) == {
        "mesh": ("data=8", "data=2"),
        "total_steps": (5, None),
        "total_epochs": (None, 2.0),
    }


def test_one_forbidden_change_among_allowed_ones_is_refused():
    stored = {"mesh": "data=8", "seed": 0, "total_steps": 5}
    assert "seed=0" in refusal(compare, stored, {"mesh": "data=2", "seed": 1, "total_steps": 6})


@pytest.mark.parametrize(("stored", "current"), [({}, {"seed": 1}), ({"seed": 1}, {})])
def test_field_on_one_side_alone_is_a_change(stored, current):
    assert "seed=" in refusal(compare, stored, current)
    as_log = [{k.replace("seed", "log.x"): v for k, v in d.items()} for d in (stored, current)]
    assert list(compare(*as_log)) == ["log.x"]


def test_a_field_that_an_older_run_lacks_stands_at_its_default():
    current = to_json(configs.load(DIGITS)[0])
    stored = {field: value for field, value in current.items() if field != "batch_ramp"}
    assert compare(stored, current) == {}
    ramped = current | {"batch_ramp": [[50.0, 4]]}
    assert "batch_ramp=[]" in refusal(compare, stored, ramped)


@pytest.mark.parametrize("name", ["digits_resnet", "digits_clip:sigmoid", "lm_gpt2:1.5b"])
def test_a_stored_config_comes_back_as_it_was(load, name):
    config = load(name)
    assert flatten(from_json(to_json(config))) == flatten(config)
