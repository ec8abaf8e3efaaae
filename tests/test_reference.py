"""docs/reference.md: every field, metric, file of a run and exit code, as the code has them."""

import jax
import pytest

from lsdl import components, errors, evaluators, loop, prediction, step
from lsdl.config import flatten, template
from lsdl.experiment import build
from lsdl.guard import IN_A_ROW, SPIKED
from lsdl.rundir import RunDir
from lsdl.schema import DURATIONS, OPTIONAL_DURATIONS
from tests.documents import generator


@pytest.fixture(scope="module")
def reference():
    return generator("reference")


@pytest.fixture(scope="module")
def texts(reference):
    return reference.read()


def test_the_document_is_current(reference, texts):
    assert reference.DOCUMENT.read_text() == reference.document(texts), (
        "run python docs/reference.py"
    )


def test_every_field_has_a_type_and_a_meaning_and_stands_once(reference, texts):
    spelled = reference.durations()
    told = reference.fields()
    assert told.keys() == flatten(template()).keys()
    of_durations = {field for fields in spelled.values() for field in fields}
    assert {f for f, (_, _, meaning) in told.items() if not meaning} == of_durations
    assert spelled.keys() == {*DURATIONS, *OPTIONAL_DURATIONS}
    text = "\n".join(reference.config_section(texts))
    for row in (*(told.keys() - of_durations), *(f"{name}_*" for name in spelled)):
        assert text.count(f"| `{row}` |") == 1, row


def test_a_field_without_a_comment_is_seen(reference):
    source = "def _loss():\n    # above\n    loss.a = 1  # behind\n    loss.b = 2\n"
    assert reference.comments(source) == {"loss.a": "above behind", "loss.b": ""}


def test_every_field_of_a_model_has_a_meaning(reference, texts):
    lines = [line for line in reference.models_section(texts["models"]) if "`model." in line]
    assert [line for line in lines if line.endswith("|  |")] == []
    for name, own in texts["models"]["own"].items():
        fields = components.model_class(name).__dataclass_fields__
        assert own.keys() <= fields.keys() - set(components.FILLED), name


def test_every_task_lists_the_models_that_it_takes(texts):
    assert texts["tasks"].keys() == components.TASKS.keys()
    for task, (_, models) in components.TASKS.items():
        told = texts["tasks"][task]["models"]
        same = texts["tasks"]["classification"]["models"]
        assert (same if told == "the same" else told) == ", ".join(models)


# Metrics: the names that the very programs return.

MEASURED = ("accum=2", "log.measure=('norms','noise','angle')", "mesh=data=1")
EXPERTS = ("model.width=16", "model.num_layers=1", "model.num_heads=2", "model.mlp_dim=16")


def told_by(experiment):
    """Names of the metrics of a step's row and of an evaluation's."""
    state, batch = experiment.abstract_state, experiment.abstract_batch
    trained = set(jax.eval_shape(experiment.train_step, state, batch)[1])
    judged = set(jax.eval_shape(experiment.eval_step, state, batch)) - {"weight"}
    means = dict.fromkeys(judged, 1.0)
    derived = experiment.task.derive(means)
    pace = loop._pace(experiment.task, 1, 1.0, 1.0)
    return trained - {IN_A_ROW, SPIKED} | derived.keys() | pace.keys(), judged | derived.keys()


def test_every_metric_is_in_the_table(load, texts):
    known = {"peak_flops_per_s": 1.0, "model_flops_per_example": 1.0}
    known["analytic"] = {"model_flops_causal_per_example": 1.0}
    trained = {*prediction.measured(known, 1.0), "memory_peak_bytes"}
    judged = {"loss"}
    of_layers = {"param_norm", "grad_norm", "update_ratio", "trust_ratio"}
    for name, *more in (
        ("digits_mlp:smoke", *MEASURED),
        ("cifar10_vit:smoke", "data.source=tfds:cifar100", "loss.mixup=0", "mesh=data=1"),
        ("stdlib_gpt:smoke,experts", *EXPERTS, "mesh=data=1"),
        ("digits_clip:smoke", "mesh=data=1"),
    ):
        experiment = build(load(name, *more), devices=1)
        of_step, of_split = told_by(experiment)
        trained |= {f"{n.split('/')[0]}/LAYER" if "/" in n else n for n in of_step}
        judged |= of_split | {experiment.task.unit}
    judged |= {"zero_shot_accuracy", "transfer_NAME"}
    judged |= {f"{probe}_accuracy" for probe in evaluators.PROBES}
    assert {f"{name}/LAYER" for name in of_layers} <= trained
    table = texts["metrics"]
    assert trained | judged | {"step", "split"} == table.keys()
    assert {name for name, row in table.items() if row["rows"] == "train"} == trained - judged
    assert all(row["unit"] and row["meaning"] for row in table.values())
    assert step.TEACHER not in table


def test_every_path_of_a_run_folder_is_in_the_table(texts, tmp_path):
    folder = RunDir(tmp_path)
    paths = {p.name for n, p in vars(folder).items() if n != "path" and hasattr(p, "name")}
    assert paths <= {name.rstrip("/").partition("/")[0] for name in texts["run_folder"]}


def test_exit_codes_are_those_of_the_code(reference, texts):
    codes = {v for n, v in vars(errors).items() if n.isupper() and isinstance(v, int)}
    assert reference.exit_codes(texts).keys() == codes
