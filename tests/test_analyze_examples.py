"""`python -m lsdl.analyze` noise, norms, outliers, boundary, volume: against each example alone."""

import base64
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from PIL import Image

from lsdl import analyze, specimen, surveying
from lsdl.analysis.curvature import random_like
from lsdl.analysis.noise import jackknife
from lsdl.analysis.volume import volume
from lsdl.page import escape, picture
from tests.analyzing import analyzed, trained

# Shape letters: N examples, D parameters.
MESH = "--mesh=data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("runs") / "digits", "digits_mlp")


@pytest.fixture(scope="module")
def opened(run):
    """The run with its first 40 validation examples, all in one batch."""
    return specimen.opened(run, step=None, split="valid", examples=40)


@pytest.fixture(scope="module")
def gradients(opened):
    """Each example's gradient, computed alone: (N, D)."""
    (batch,) = opened.batches
    of = jax.jit(jax.grad(lambda params, batch: opened.loss(params, batch)[0]))
    rows = [jax.tree.map(lambda x, i=i: x[i : i + 1], batch) for i in range(40)]
    return np.array([ravel_pytree(of(opened.params, row))[0] for row in rows], np.float64)


def test_the_noise_is_that_of_gradients_computed_one_by_one(run, gradients, tmp_path, monkeypatch):
    in_memory = 16 * 4 * gradients.shape[1]  # of a batch's 96 rows 16 together
    monkeypatch.setattr("lsdl.findings.gradients.CHUNK_BYTES", in_memory)
    found, page = analyzed("noise", run, tmp_path, "--split=valid", "--examples=40")
    mean_D, trace = gradients.mean(0), gradients.var(0, ddof=1).sum()
    square = (mean_D**2).sum() - trace / 40
    np.testing.assert_allclose(found["norms"], np.linalg.norm(gradients, axis=1), rtol=1e-4)
    assert found["trace"] == pytest.approx(trace, rel=1e-4)
    assert found["gradient_square"] == pytest.approx(square, rel=1e-3)
    assert found["noise_scale"] == pytest.approx(trace / square, rel=1e-3)
    unit_ND = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    pairs = (unit_ND @ unit_ND.T)[~np.eye(40, dtype=bool)]
    assert found["cosine"] == pytest.approx(pairs.mean(), abs=1e-5)
    for n in (0, 7):
        others_D = np.delete(gradients, n, 0).mean(0)
        cosine = unit_ND[n] @ others_D / np.linalg.norm(others_D)
        assert np.cos(np.deg2rad(found["angles_deg"][n])) == pytest.approx(cosine, abs=1e-4)
    assert "right angle" in page
    split, _ = analyzed("noise", run, tmp_path, "--split=valid", "--examples=40", MESH)
    for name in ("trace", "gradient_square", "noise_scale", "noise_scale_error"):
        assert split[name] == pytest.approx(found[name], rel=1e-4), name
    np.testing.assert_allclose(split["angles_deg"], found["angles_deg"], rtol=1e-4)


def test_the_error_of_the_noise_is_that_of_leaving_out_examples(gradients):
    def scale(some_ND):
        trace = some_ND.var(0, ddof=1).sum()
        return trace / ((some_ND.mean(0) ** 2).sum() - trace / len(some_ND))

    left_out = np.array([scale(np.delete(gradients, n, 0)) for n in range(40)])
    error = np.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    mean_D = gradients.mean(0)
    found = jackknife((gradients**2).sum(1), gradients @ mean_D, (mean_D**2).sum())
    assert found == pytest.approx(error, rel=1e-6)


def test_all_examples_of_a_split_are_a_population(run, tmp_path):
    found, page = analyzed("noise", run, tmp_path, "--split=valid", "--examples=0")
    assert found["population"]
    assert found["noise_scale_error"] is None
    assert "no sampling error" in page


def test_norms_are_those_of_the_weights_and_of_their_mean_gradient(
    run, opened, gradients, tmp_path
):
    found, page = analyzed("norms", run, tmp_path, "--split=valid", "--examples=40", MESH)
    flat = ravel_pytree(opened.params)[1](jnp.asarray(gradients.mean(0), jnp.float32))
    weights, means = (
        {jax.tree_util.keystr(k, simple=True, separator="/"): np.linalg.norm(x) for k, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (opened.params, flat))
    )
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert tensors.keys() == weights.keys()
    for name, tensor in tensors.items():
        assert tensor["weight"] == pytest.approx(weights[name], rel=1e-4)
        assert tensor["gradient"] == pytest.approx(means[name], rel=1e-4)
        assert tensor["ratio"] == pytest.approx(weights[name] / means[name], rel=1e-4)
        assert name in page
    ratios = [tensor["ratio"] for tensor in found["tensors"]]
    assert found["spread"] == pytest.approx(max(ratios) / min(ratios))


def test_outliers_are_the_examples_sorted_by_their_loss(run, opened, tmp_path):
    found, page = analyzed("outliers", run, tmp_path, "--split=valid", "--examples=40", "--top=5")
    (batch,) = opened.batches
    logits = np.asarray(opened.outputs(opened.params, batch))[:40].astype(float)
    label = np.asarray(batch["label"])[:40]
    share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    loss = -np.log(share[np.arange(40), label])
    order = np.argsort(-loss)[:5]
    worst = found["worst"]
    assert [entry["example"] for entry in worst] == order.tolist()
    np.testing.assert_allclose([entry["loss"] for entry in worst], loss[order], rtol=1e-4)
    assert [entry["label"] for entry in worst] == label[order].tolist()
    assert [entry["found"] for entry in worst] == share.argmax(1)[order].tolist()
    pictures = re.findall(r"data:image/png;base64,([^\"]+)", page)
    assert len(pictures) == 5
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    np.testing.assert_array_equal(pixels, np.asarray(batch["image"])[order[0], :, :, 0])
    split, _ = analyzed(
        "outliers", run, tmp_path, "--split=valid", "--examples=40", "--top=5", MESH
    )
    assert [entry["example"] for entry in split["worst"]] == order.tolist()
    losses = [[entry["loss"] for entry in values["worst"]] for values in (found, split)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.slow
def test_a_language_models_examples_on_meshes_that_split_by_hand(tmp_path):
    own = ("--config.batch_size=8", "--config.model.scan_layers=True")
    run = trained(tmp_path / "gpt", "stdlib_gpt", *own)
    options = ("--examples=12", "--split=valid")
    found, _ = analyzed("noise", run, tmp_path, *options)
    worst, page = analyzed("outliers", run, tmp_path, *options, "--top=3")
    opened = specimen.opened(run, step=None, split="valid", examples=12)
    n = worst["worst"][0]["example"]
    token = np.asarray(opened.batches[n // 8]["token"][n % 8])
    text = bytes(int(t) for t in token if t < 256).decode(errors="replace")
    assert worst["worst"][0]["text"] == text
    assert escape(text) in page
    for mesh in ("--mesh=data=2,sequence=2,tensor=2", "--mesh=data=4,stage=2"):
        split, _ = analyzed("noise", run, tmp_path, *options, mesh)
        for name in ("loss", "trace", "gradient_square", "noise_scale"):
            assert split[name] == pytest.approx(found[name], rel=1e-4), (mesh, name)
        again, _ = analyzed("outliers", run, tmp_path, *options, "--top=3", mesh)
        for one, other in zip(worst["worst"], again["worst"], strict=True):
            assert other["example"] == one["example"]
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [0, 4])
def test_a_language_models_curvature_on_meshes_that_split_by_hand(experts, tmp_path):
    fields = dict(num_layers=2, width=16, mlp_dim=32, num_heads=2, scan_layers=True)
    if experts:
        fields |= dict(num_experts=4, experts_per_token=2, capacity_factor=1.0)
        fields["scan_layers"] = False
    own = [f"--config.model.{name}={value}" for name, value in fields.items()]
    own += ["--config.batch_size=16", "--config.optim.schedule.warmup_steps=0"]
    run = trained(tmp_path / "gpt", "modular_transformer", *own)
    options = ("--examples=24", "--split=valid", "--steps=4")
    meshes = ["data=2,sequence=2,tensor=2", "expert=4,data=2" if experts else "data=4,stage=2"]

    def curvature(*mesh):
        rows = [
            analyzed("hessian", run, tmp_path, *options, f"--of={matrix}", *mesh)[0]
            for matrix in ("hessian", "fisher")
        ]
        return [row[name] for row in rows for name in ("trace", "smallest", "edge")]

    whole = curvature()
    for mesh in meshes:
        np.testing.assert_allclose(curvature(f"--mesh={mesh}"), whole, rtol=1e-4, err_msg=mesh)
    if experts:
        return
    sharp, split = (
        analyzed("sharpness", run, tmp_path, *options, *mesh)[0]
        for mesh in ((), (f"--mesh={meshes[0]}",))
    )
    for name in ("loss", "sam_rise", "lambda_max"):
        assert split[name] == pytest.approx(sharp[name], rel=1e-4), name


def test_a_large_picture_is_made_smaller():
    image_HWC = np.arange(100 * 90 * 3).reshape(100, 90, 3).astype(np.uint8)
    data = re.search(r"base64,([^\"]+)", picture(image_HWC, '"'))[1]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_array_equal(pixels, image_HWC[::2, ::2])


def test_the_boundary_is_where_the_classifier_changes_its_mind(tmp_path):
    spirals = ("--config.data.source=spirals", "--config.batch_size=64")
    run = trained(tmp_path / "spirals", "digits_mlp", *spirals)
    found, page = analyzed("boundary", run, tmp_path, "--resolution=9")
    opened = specimen.opened(run, step=None, split="train", examples=0)
    point = np.array([[found["x"][2], found["y"][7]]], np.float32)
    logits = opened.outputs(opened.params, {"features": jnp.asarray(point)})
    assert found["class"][7][2] == int(logits.argmax())
    assert found["share"][7][2] == pytest.approx(float(jax.nn.softmax(logits).max()), rel=1e-5)
    assert sum(found["area"]) == pytest.approx(1)
    assert min(found["x"]) < -1
    assert "class 1" in page
    worst, page = analyzed("outliers", run, tmp_path, "--top=3")
    assert len(worst["worst"]) == 3
    assert "data:image" not in page
    split, _ = analyzed("boundary", run, tmp_path, "--resolution=9", MESH)
    np.testing.assert_allclose(split["share"], found["share"], rtol=1e-4)


def test_at_its_radius_the_loss_has_reached_the_cut(run, opened, tmp_path):
    options = ("--split=valid", "--examples=40", "--directions=2", "--direction=random")
    found, page = analyzed("volume", run, tmp_path, *options, "--cut=3")
    (batch,) = opened.batches
    drawn = random_like(opened.params, jax.random.fold_in(jax.random.key(0), 1))
    flat, unravel = ravel_pytree(opened.params)
    step = ravel_pytree(drawn)[0] / jnp.linalg.norm(ravel_pytree(drawn)[0])
    loss, weight = opened.loss(unravel(flat + found["radii"][1] * step), batch)
    assert float(loss / weight) == pytest.approx(3, rel=3e-3)
    assert found["dims"] == len(flat)
    assert found["log10_volume"] == volume(np.array(found["radii"]), len(flat)).typical
    assert "log10 of the volume" in page
    split, _ = analyzed("volume", run, tmp_path, *options, "--cut=3", MESH)
    np.testing.assert_allclose(split["radii"], found["radii"], rtol=2e-3)  # the search's own


def test_every_kind_is_known_to_the_command_line_and_told():
    (kinds,) = (a.choices for a in analyze.parser()._actions if a.dest == "kind")
    assert set(kinds) == set(surveying.KINDS)
    told = analyze.parser().format_help().split("kinds:")[1].split("examples:")[0]
    for kind in kinds:
        assert re.search(rf"^  (line, )?{kind}\b", told, re.M) or kind == "line"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["boundary"], "data.source=spirals"),
        (["volume", "--cut=0.1"], "must be above the loss at the parameters"),
        (["volume", "--direction=pca"], "random, tensor or filter"),
        (["volume", "--directions=0"], "--directions=0 must be at least 1"),
        (["noise", "--examples=2"], "3 examples or more"),
        (["outliers", "--top=0"], "--top=0 must be at least 1"),
        (["diagnose", "--target=0"], "--target=0 must be above 0"),
    ],
)
def test_bad_input_is_one_sentence(run, capfd, arguments, words):
    assert analyze.main([*arguments, "--run", str(run)]) == 2
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("lsdl: ")
    assert words in told
