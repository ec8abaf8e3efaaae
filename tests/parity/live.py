"""Our models against Hugging Face's, with weights that are made here: `make parity`.

With `--rewrite-golden` it stores the small ones, for tests/test_convert.py, which needs no torch.
"""

import dataclasses
import importlib
import importlib.metadata
import math
import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import jax
import numpy as np
import pytest
import torch
import transformers

from benchmarks.matches import MATCHES
from benchmarks.players import ours
from lsdl import weights as files
from lsdl.checkpoint import load_weights
from lsdl.convert import main as convert_main
from lsdl.models import convert, gpt
from tests.conftest import CONFIGS
from tests.parity.cases import (
    CASES,
    LIMIT,
    Case,
    abstract,
    difference,
    make_inputs,
    outputs,
    write_golden,
)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def make(case, seed=0):
    """Their model, with no array at a value that would hide a mistake (zeros, ones, tiny)."""
    torch.manual_seed(seed)
    cls = getattr(transformers, case.cls)
    model = cls(cls.config_class(**case.settings)).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point() or name.endswith("logit_scale"):
                continue
            if name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight")):
                value.uniform_(0.5, 1.5)
            elif value.ndim < 2:
                value.normal_(0, 0.2)
            elif "embed" in name or "token" in name:
                value.normal_(0, 0.5)
            else:
                value.normal_(0, 1 / math.sqrt(value[0].numel()))
            if case.golden:  # few digits, which compress well
                value.copy_((value * 64).round() / 64)
        if "logit_scale" in model.state_dict():
            model.logit_scale.fill_(3.3)
    return model


def side(model):
    """Of the images that their model is made for, if it is made for one size."""
    settings = getattr(model.config, "vision_config", model.config)
    return getattr(settings, "image_size", 0)


@torch.no_grad()
def expected(model, inputs):
    """Their outputs by our names."""
    given = {}
    if "image" in inputs:
        given["pixel_values"] = torch.tensor(inputs["image"].transpose(0, 3, 1, 2))
    if "token" in inputs or "caption" in inputs:
        given["input_ids"] = torch.tensor(inputs.get("token", inputs.get("caption"))).long()
    if "segment" in inputs:
        given["attention_mask"] = torch.tensor(inputs["segment"]).long()
    found = model(**given, output_hidden_states="token" in inputs)
    if "caption" in inputs:
        scale = model.logit_scale.exp()
        found = {"image": found.image_embeds, "text": found.text_embeds, "scale": scale}
    elif hasattr(model, "bert"):
        found = {"logits": found.logits, "hidden": found.hidden_states[-1]}
    else:
        found = {"logits": found.logits}
    found = {name: value.numpy() for name, value in found.items()}
    if "segment" in inputs:
        found = {name: np.where(inputs["segment"][..., None], x, 0) for name, x in found.items()}
    return found


def saved(model):
    """The tensors and the config.json of the files that transformers makes of its model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return files.read(Path(folder))


def equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def loaded(tensors, settings):
    """What transformers makes of a folder that lsdl wrote."""
    with tempfile.TemporaryDirectory() as folder:
        files.write(Path(folder) / "model", tensors, settings)
        cls = getattr(transformers, settings["architectures"][0])
        model, report = cls.from_pretrained(Path(folder) / "model", output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_the_outputs_are_theirs_and_the_weights_go_back_unchanged(name, request):
    case = CASES[name]
    model = make(case)
    inputs = make_inputs(case, side(model))
    shapes = abstract(case.module, inputs)
    tensors, settings = saved(model)
    convert.check_fields(settings, case.module, shapes)
    weights = convert.to_lsdl(tensors, case.module, shapes)
    theirs = expected(model, inputs)
    error = difference(outputs(case.module, weights, inputs), theirs)
    print(f"{name}: max|a - b| / max|b| = {error:.1e}")
    assert error < LIMIT
    back = convert.to_hf(weights, case.module)
    equal(back, tensors)
    if case.parameters:
        assert model.num_parameters() == case.parameters
        padded = getattr(case.module, "vocab_padded", 0) - getattr(case.module, "vocab_size", 0)
        ours = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
        extra = padded * (case.module.width + ("bert" in name)) if padded else 0
        assert ours - extra == case.parameters
    if case.golden:
        again = loaded(back, convert.fields(case.module, shapes))
        equal(*({n: v.numpy() for n, v in m.state_dict().items()} for m in (again, model)))
        assert difference(expected(again, inputs), theirs) < 1e-6
    if case.golden and request.config.getoption("--rewrite-golden"):
        versions = {n: importlib.metadata.version(n) for n in ("torch", "transformers")}
        write_golden(
            name,
            versions=versions,
            settings=settings,
            tensors=tensors,
            inputs=inputs,
            outputs=theirs,
        )


def test_a_gpt2_is_read_trained_on_and_given_back(tmp_path, train, load):
    """Weights of Hugging Face's, three steps of training, and their model says what ours does."""
    fields = dict(load("stdlib_gpt:smoke").model)
    module = gpt.Gpt(**{name: value for name, value in fields.items() if name != "name"})
    settings = dict(vocab_size=module.vocab_size, n_positions=module.max_length)
    settings |= dict(n_embd=module.width, n_layer=module.num_layers)
    settings |= dict(n_head=module.num_heads, n_inner=module.mlp_dim)
    case = Case(module, "GPT2LMHeadModel", settings, length=module.max_length)
    start, inputs = make(case), make_inputs(case, 0)
    start.save_pretrained(tmp_path / "start")

    read = f"--config {CONFIGS / 'stdlib_gpt.py'}:smoke --from {tmp_path / 'start'}"
    assert convert_main(f"{read} --out {tmp_path / 'weights'}".split()) == 0
    init = f"--config.init_from={tmp_path / 'weights'}"
    run = tmp_path / "run"
    code, *_ = train("stdlib_gpt:smoke", init, "--config.total_steps=3", f"--workdir={run}")
    assert code == 0
    assert convert_main(f"--run {run} --out {tmp_path / 'end'}".split()) == 0

    end = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "end").eval()
    before, after = (
        outputs(module, load_weights(folder / "checkpoints", abstract(module, inputs)), inputs)
        for folder in (tmp_path / "weights", run)
    )
    assert difference(before, expected(start, inputs)) < LIMIT
    assert difference(after, expected(end, inputs)) < LIMIT
    assert difference(before, after) > 100 * LIMIT


SMALL = {  # of a match: overrides, and what its peers are told of them
    "vit_ti": (["batch_size=16", "model.num_layers=2"], {}),
    "gpt_4x128": (["batch_size=16", "model.num_layers=2"], {"layers": 2}),
    "resnet20": (["batch_size=16", "model.depths=(1,1,1)"], {"depth": 8}),
    "llama_1b": (
        [
            *("batch_size=8", "data.seq_len=32", "model.max_length=32", "precision=float32"),
            *("model.num_layers=2", "model.width=64", "model.num_heads=4", "model.kv_heads=2"),
            *("model.mlp_dim=160", "model.vocab_size=256", "model.vocab_padded=256"),
        ],
        {},
    ),
    "resnet50": (
        [
            *("batch_size=8", "model.depths=(1,2,1,1)", "precision=float32"),
            "data.transforms=('random_resized_crop:64','flip')",
            "data.eval_transforms=('center_crop:64',)",
        ],
        {"depths": (1, 2, 1, 1)},
    ),
}


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("vit_ti", "huggingface"),
        ("gpt_4x128", "huggingface"),
        ("resnet20", "torch_resnet"),
        ("llama_1b", "huggingface"),
        ("resnet50", "huggingface"),
        ("resnet50", "timm_resnet"),
    ],
)
def test_the_players_of_a_contest_take_the_same_steps(name, peer, tmp_path):
    """What the benchmarks time is the same computation, from the same parameters."""
    if peer.startswith("timm"):
        pytest.importorskip("timm")
    smaller, told = SMALL[name]
    match = dataclasses.replace(
        MATCHES[name],
        kind="cpu",
        overrides=(*MATCHES[name].overrides, *smaller),
        fixed=MATCHES[name].fixed | told | {"compile": False},
        close=1e-3,
    )
    peer = importlib.import_module(f"benchmarks.players.{peer}")
    losses = []
    for player in (ours.Player(match, tmp_path), peer.Player(match, tmp_path)):
        losses.append([])
        for _ in range(4):
            player.steps(1)
            losses[-1].append(player.loss())
    np.testing.assert_allclose(*losses, rtol=0, atol=match.close / 10)
    assert np.ptp(losses[0]) > match.close  # they have learnt something
