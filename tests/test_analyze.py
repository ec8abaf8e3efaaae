"""`python -m lsdl.analyze`: what it finds of a run is what is there."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lsdl import analyze, specimen, train
from lsdl.files import read_json
from lsdl.findings.found import progress
from lsdl.metrics import read_rows
from lsdl.models import attention
from tests.conftest import CONFIGS

SMALL = ("--config.model.hidden=(8,8)", "--config.total_steps=6", "--config.eval.every_steps=6")
KEPT = ("--config.checkpoint.every_steps=2", "--config.checkpoint.keep_latest=9")


def trained(folder, name, *overrides):
    options = (f"--workdir={folder}", *SMALL, *KEPT, *overrides)
    code = train.main(["--config", f"{CONFIGS / name}.py:smoke", *options])
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "a", "digits_mlp")


@pytest.fixture
def analyze_run(run, tmp_path, capfd):
    """`analyze_run("plane", "--resolution=5") -> (stored values, what was printed)`."""

    def analyze_run(kind, *options, of=run):
        out = ("--out", str(tmp_path / "out"))
        code = analyze.main([kind, "--run", str(of), *out, *map(str, options)])
        printed = capfd.readouterr()
        assert code == 0, printed.err
        page = (tmp_path / "out" / f"{kind}.html").read_text()
        assert "http" not in re.sub(r"http://www.w3.org/\S+", "", page)
        return read_json(tmp_path / "out" / f"{kind}.json"), printed.out

    return analyze_run


def exact(run, examples):
    """The eigenvalues of the whole Hessian."""
    found = specimen.opened(run, step=None, split="train", examples=examples)
    flat, unravel = ravel_pytree(found.params)
    batch = jax.tree.map(lambda *parts: jnp.concatenate(parts), *found.batches)

    def mean(v):
        loss, weight = found.loss(unravel(v), batch)
        return loss / weight

    return np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(mean))(flat), np.float64))


def test_the_hessians_eigenvalues_are_the_exact_ones_on_every_mesh(run, analyze_run):
    options = ("--examples=150", "--steps=40", "--starts=2", "--top=3")
    found, printed = analyze_run("hessian", *options)
    values = exact(run, 150)
    assert found["examples"] == 150
    np.testing.assert_allclose(found["eigenvalues"], values[:-4:-1], rtol=1e-3)
    assert found["smallest"] == pytest.approx(values[0], rel=1e-2)
    assert f"{found['eigenvalues'][0]:.3g}" in printed
    split, _ = analyze_run("hessian", *options, "--mesh=data=2,fsdp=2,tensor=2")
    np.testing.assert_allclose(split["eigenvalues"], found["eigenvalues"], rtol=1e-4)
    assert split["trace"] == pytest.approx(found["trace"], rel=1e-4)


def transformer(folder):
    """A run of a vision transformer of one layer."""
    fields = dict(width=16, num_layers=1, num_heads=2, mlp_dim=32)
    options = ["--config.total_steps=6", "--config.eval.every_steps=6", "--config.batch_size=32"]
    options += [f"--config.model.{name}={value}" for name, value in fields.items()]
    path = CONFIGS / "digits_vit.py"
    assert train.main(["--config", f"{path}:smoke", f"--workdir={folder}", *options]) == 0
    return folder


def test_a_transformers_curvature_is_the_same_where_its_length_is_split(tmp_path, analyze_run):
    run = transformer(tmp_path / "vit")
    options = ("--examples=40", "--steps=4", "--starts=1", "--top=2")
    for matrix in ("hessian", "ggn", "fisher"):
        whole, split = (
            analyze_run("hessian", f"--of={matrix}", *options, *mesh, of=run)[0]
            for mesh in ((), ("--mesh=data=2,sequence=4",))
        )
        np.testing.assert_allclose(split["eigenvalues"], whole["eigenvalues"], rtol=1e-4)
        assert split["trace"] == pytest.approx(whole["trace"], rel=1e-4), matrix
    opened = specimen.opened(run, step=None, split="train", examples=1)
    module = opened.experiment.module.clone(attention=attention.cudnn)  # as a GPU would have it
    on_gpu = dataclasses.replace(opened.experiment, module=module)
    smooth = dataclasses.replace(opened, experiment=on_gpu).smooth
    assert smooth.experiment.module.attention is None


def test_the_centre_of_a_plane_is_what_the_run_evaluated(run, analyze_run):
    found, _ = analyze_run("plane", "--split=valid", "--resolution=3", "--mesh=data=8")
    row = next(r for r in read_rows(run / "metrics.jsonl") if r["split"] == "valid")
    assert found["loss"][1][1] == row["loss"]
    assert found["accuracy"][1][1] == row["accuracy"]
    assert found["step"] == row["step"] == 6
    assert len({value for line in found["loss"] for value in line}) == 9


def test_the_path_of_a_run_ends_in_the_centre_of_its_plane(analyze_run):
    found, _ = analyze_run("plane", "--direction=pca", "--resolution=3", "--examples=96")
    assert len(found["path"]) == 3
    assert found["path"][-1] == pytest.approx([0, 0], abs=1e-4)
    assert sum(found["shares"]) == pytest.approx(1, abs=1e-4)  # two others span a plane
    assert abs(found["path"][0][0]) > abs(found["path"][1][0])


def test_a_line_between_two_steps_has_the_loss_of_both(run, analyze_run):
    options = ("--split=valid", "--resolution=5")
    found, printed = analyze_run("interpolate", "--to-step=2", *options)
    ends = [analyze_run("line", f"--step={k}", *options)[0]["loss"][2] for k in (6, 2)]
    assert found["x"] == [-0.5, 0, 0.5, 1, 1.5]
    assert found["loss"][1] == ends[0]
    assert found["loss"][3] == pytest.approx(ends[1], rel=1e-5)
    assert "barrier" in printed
    other, _ = analyze_run("interpolate", "--to", run, "--to-step=2", *options)
    assert other["loss"] == found["loss"]


def test_before_training_a_run_is_at_its_start(analyze_run):
    start, _ = analyze_run("line", "--around-start", "--resolution=3", "--examples=96")
    end, _ = analyze_run("line", "--resolution=3", "--examples=96")
    assert start["step"] == 0
    assert start["loss"][1] > end["loss"][1]


def test_sharpness_tells_all_of_its_measures(run, analyze_run):
    found, printed = analyze_run("sharpness", "--examples=96", "--steps=20")
    phis = {name: value["phi"] for name, value in found.items() if name.startswith("phi")}
    assert len(phis) == 3
    wide, narrow, few = phis.values()
    assert wide > narrow > 0
    assert wide > few > 0
    assert found["sam_rise"] > 0
    assert found["edge"] == pytest.approx(found["lambda_max"] * found["peak_rate"] / 2)
    rows = read_rows(run / "metrics.jsonl")
    rates = [row["learning_rate"] for row in rows if row["split"] == "train"]
    assert found["peak_rate"] == pytest.approx(max(rates))
    assert found["peak_rate"] > 2 * rates[-1]
    assert "at the peak rate" in printed
    assert "lambda_max" in printed


def test_a_bar_ends_full_when_there_is_less_to_do(capfd):
    with progress("hessian", 160) as bar:
        for _ in range(110):
            bar.advance()
    assert capfd.readouterr().err.splitlines()[-1].startswith("hessian: 100%")


def test_recalibration_asks_for_batch_norm_and_then_changes_the_surface(tmp_path, analyze_run):
    normed = trained(tmp_path / "bn", "digits_bn_mlp")
    options = ("--resolution=3", "--examples=96", "--radius=0.2")
    plain, _ = analyze_run("line", *options, of=normed)
    again, _ = analyze_run("line", *options, "--recalibrate", of=normed)
    assert plain["loss"] != again["loss"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hessian", "--step=5"], "Step 5 is not there"),
        (["hessian", "--of=fischer"], "hessian, ggn, fisher"),
        (["hessian", "--mesh=data=3"], "3"),
        (["line", "--resolution=1"], "--resolution=1 must be at least 3"),
        (["line", "--radius=0"], "--radius=0"),
        (["line", "--recalibrate"], "BatchNorm"),
        (["plane", "--direction=pca", "--step=4"], "keep_latest"),
        (["plane", "--direction=up"], "filter, tensor"),
        (["interpolate"], "--to-step"),
        (["interpolate", "--to-step=3"], "Step 3 is not there"),
    ],
)
def test_bad_input_is_one_sentence(run, capfd, arguments, words):
    assert analyze.main([*arguments, "--run", str(run)]) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("lsdl: ")
    assert words in told


def test_a_folder_without_a_run_is_told(tmp_path, capfd):
    assert analyze.main(["hessian", "--run", str(tmp_path)]) == 2
    assert "holds no run" in capfd.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        analyze.main(["--help"])
    told = capsys.readouterr().out
    for kind in ("hessian", "sharpness", "line", "plane", "interpolate"):
        assert f"lsdl.analyze {kind}" in told or kind in told
