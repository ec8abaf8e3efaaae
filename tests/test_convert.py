"""Weights of Hugging Face's: their models' outputs, and both directions. No torch: see parity/."""

import json
import math
import re

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from lsdl import weights as files
from lsdl.checkpoint import load_weights
from lsdl.config import flatten
from lsdl.convert import main
from lsdl.errors import UserError
from lsdl.models import clip, convert, gpt, mlp, resnet, vit
from tests.conftest import CONFIGS
from tests.parity.cases import CASES, GOLDEN, LIMIT, abstract, difference, outputs, read_golden

SMALL = sorted(name for name, case in CASES.items() if case.golden)
STACKED = [name for name in SMALL if hasattr(CASES[name].module, "scan_layers")]
# Dropout, initial values, what is only written down, heads that lsdl has not, and tokens' names.
WITHOUT = re.compile(
    r"drop|momentum|initializer|_init_value|label|architectures|model_type|dtype|version|use_cache"
    r"|stage_names|out_features|out_indices|pretraining_tp|reorder_and|encoder_stride|add_cross"
    r"|summary_|pooler_|(bos|eos|pad)_token_id|_config.projection_dim"
)
FORMS = [(name, {}) for name in SMALL] + [(name, {"scan_layers": True}) for name in STACKED]
CONFIG = f"{CONFIGS / 'digits_vit.py'}:smoke"
FIELDS = "patch=2 stem=0 pool=class activation=gelu norm_eps=1e-6 "
FIELDS += "num_layers=1 width=16 num_heads=2 mlp_dim=24"
OVERRIDES = [f"--config.model.{field}" for field in FIELDS.split()]
MODEL = dict(patch=2, width=16, num_layers=1, num_heads=2, mlp_dim=24, num_classes=10)


def thin_resnet(**fields):
    return resnet.ResNet((1,), 4, 10, **fields)


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name, strict=True)


def known(name, **fields):
    """A golden case: its module, the shapes of the weights, and what was stored."""
    golden = read_golden(name)
    module = CASES[name].module.clone(**fields)
    return module, abstract(module, golden["inputs"]), golden


@pytest.fixture(scope="module")
def gpt2():
    return known("gpt2_small")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT for the digits as transformers would save it, and its tensors."""
    module = vit.Vit(**MODEL)
    image = np.zeros((1, 8, 8, 1), np.float32)
    shapes = abstract(module, {"image": image})
    draw = np.random.default_rng(0)
    normal = lambda leaf: draw.standard_normal(leaf.shape).astype(np.float32)  # noqa: E731
    tensors = convert.to_hf(jax.tree.map(normal, shapes), module)
    path = tmp_path_factory.mktemp("hf") / "model"
    files.write(path, tensors, convert.fields(module, shapes))
    return path, tensors


def test_every_small_case_has_a_golden_file_and_every_family_two():
    stored = {path.stem.removeprefix("parity_") for path in GOLDEN.glob("parity_*.npz")}
    assert stored == set(SMALL)
    sizes = [path.stat().st_size for path in GOLDEN.glob("parity_*.npz")]
    assert max(sizes) < 300_000
    assert sum(sizes) < 1_500_000
    families = [name.split("_")[0] for name in CASES]
    assert min(families.count(family) for family in families) >= 2


@pytest.mark.parametrize(("name", "fields"), FORMS)
def test_the_outputs_are_those_of_transformers(name, fields):
    module, shapes, golden = known(name, **fields)
    convert.check_fields(golden["config"], module, shapes)
    weights = convert.to_lsdl(golden["tensors"], module, shapes)
    shape = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)  # noqa: E731
    assert shape(weights) == shape(shapes)
    found = outputs(module, weights, golden["inputs"])
    assert difference(found, golden["outputs"]) < LIMIT
    same(convert.to_hf(weights, module), golden["tensors"])


@pytest.mark.parametrize("name", SMALL)
def test_our_config_json_is_what_transformers_wrote(name):
    """All that is compared when it is read is there when it is written, in the same words."""
    module, shapes, golden = known(name)
    written = convert.fields(module, shapes)
    convert.check_fields(json.loads(json.dumps(written)), module, shapes)
    their = golden["config"]
    assert written["architectures"] == their["architectures"]
    for field in convert.counterpart(module, shapes).fields:
        one, two = written, their
        for part in field.theirs.split("."):
            one, two = one.get(part), two.get(part, field.default)
            if part == "hidden_act":
                two = {"swish": "silu"}.get(two, two)
        if field.theirs not in ("num_labels", "n_inner", "text_config.eos_token_id"):
            assert one == two, field.theirs


@pytest.mark.parametrize("name", SMALL)
def test_nothing_in_their_config_json_goes_unread(name):
    """Every field is compared, or does not matter to what is converted."""
    module, shapes, golden = known(name)
    compared = {field.theirs for field in convert.counterpart(module, shapes).fields}
    unread = [f for f in flatten(golden["config"]) if f not in compared and not WITHOUT.search(f)]
    allowed = {
        "llama": {"max_position_embeddings"},  # of no array
        "efficientnet": {"image_size", "num_hidden_layers", "depthwise_padding"},
    }
    assert set(unread) == allowed.get(name.split("_")[0], set())


def test_padded_rows_of_the_vocabulary_are_zero(gpt2):
    module, shapes, golden = gpt2
    table = convert.to_lsdl(golden["tensors"], module, shapes)["params"]["embedding"]
    assert table.shape == (64, 24)
    assert np.any(table[52])
    assert not np.any(table[53:])


@pytest.mark.parametrize("extra", ["transformer.h.0.attn.bias", "lm_head.weight"])
def test_buffers_and_second_names_are_read_over(gpt2, extra):
    module, shapes, golden = gpt2
    tensors = dict(golden["tensors"])
    tensors[extra] = tensors["transformer.wte.weight"]
    found = convert.to_lsdl(tensors, module, shapes)
    same(convert.to_hf(found, module), golden["tensors"])


def test_older_names_are_read():
    module, shapes, golden = known("bert_small")
    older = {
        name.removeprefix("bert.")
        .replace("LayerNorm.weight", "LayerNorm.gamma")
        .replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in golden["tensors"].items()
    }
    older["bert.pooler.dense.weight"] = np.zeros((24, 24), np.float32)
    same(convert.to_hf(convert.to_lsdl(older, module, shapes), module), golden["tensors"])


def test_what_is_missing_and_what_is_unknown_is_listed(gpt2):
    module, shapes, golden = gpt2
    tensors = dict(golden["tensors"])
    for name in sorted(tensors)[:4]:
        del tensors[name]
    tensors["score.weight"] = np.zeros(3, np.float32)
    with pytest.raises(UserError) as error:
        convert.to_lsdl(tensors, module, shapes)
    text = str(error.value)
    assert text.startswith("The 25 tensors are not the 28 of the model: ")
    assert ": missing 4 (transformer.h.0.attn.c_attn.bias, transformer.h.0.attn.c_attn.w" in text
    assert ", ...); unknown 1 (score.weight): give the config" in text


def test_tensors_of_another_shape_are_refused(gpt2):
    module, shapes, golden = gpt2
    wide = dict(golden["tensors"])
    wide["transformer.wte.weight"] = np.zeros((64, 24), np.float32)
    with pytest.raises(
        UserError, match=r"^1 of 28 tensors .* transformer.wte.weight \(64, 24\) for "
    ):
        convert.to_lsdl(wide, module, shapes)
    tall = dict(golden["tensors"])
    tall["transformer.h.1.attn.c_attn.weight"] = np.zeros((24, 71), np.float32)
    tall["transformer.h.1.mlp.c_fc.weight"] = np.zeros((96, 24), np.float32)
    with pytest.raises(
        UserError, match=r"^2 of 28 tensors .*c_fc.weight \(96, 24\) for .*\(24, 96\)"
    ):
        convert.to_lsdl(tall, module, shapes)


def test_an_output_table_of_its_own_is_no_tied_one(gpt2):
    module, shapes, golden = gpt2
    tensors = golden["tensors"] | {
        "lm_head.weight": golden["tensors"]["transformer.wte.weight"] + 1
    }
    with pytest.raises(UserError, match=r"lm_head.weight and transformer.wte.weight differ"):
        convert.to_lsdl(tensors, module, shapes)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2_small", {"n_head": 4}, "n_head=4, and model.num_heads asks for 3"),
        (
            "gpt2_small",
            {"layer_norm_epsilon": 1e-6},
            "layer_norm_epsilon=1e-06, and model.norm_eps",
        ),
        ("gpt2_small", {"activation_function": "relu"}, "'relu', and model.activation asks for"),
        ("gpt2_small", {"model_type": "opt"}, "model_type='opt', and model.* describes a 'gpt2'"),
        ("llama_grouped", {"num_key_value_heads": 4}, "model.kv_heads asks for 2"),
        ("llama_grouped", {"tie_word_embeddings": True}, "model.tied asks for False"),
        ("llama_grouped", {"attention_bias": True}, "lsdl's LLaMA asks for False"),
        (
            "llama_grouped",
            {"rope_parameters": None, "rope_scaling": {"type": "llama3"}},
            "rope_parameters.rope_type='llama3', and lsdl's LLaMA asks for 'default'",
        ),
        ("clip_quick", {"text_config": {"num_attention_heads": 8}}, "text_config.vocab_size=49408"),
        (
            "clip_quick",
            {"text_config": CASES["clip_quick"].settings["text_config"] | {"eos_token_id": 7}},
            "text_config.eos_token_id=7, and lsdl's CLIP asks for 2",
        ),
        ("vit_class", {"image_size": 16}, "image_size=16, and the data's image size asks for 12"),
        ("resnet_basic", {"depths": [2, 2, 2]}, "model.depths asks for [2, 1, 2]"),
        ("efficientnet_thin", {"batch_norm_eps": 1e-5}, "lsdl's EfficientNet asks for 0.001"),
    ],
)
def test_a_config_json_of_another_model_is_refused(name, change, message):
    module, shapes, golden = known(name)
    settings = {k: v for k, v in (golden["config"] | change).items() if v is not None}
    with pytest.raises(UserError) as error:
        convert.check_fields(settings, module, shapes)
    assert message in str(error.value)


def test_an_older_config_json_is_understood():
    module, shapes, golden = known("llama_single")
    older = dict(golden["config"])
    del older["rope_parameters"]
    with pytest.raises(UserError, match=r"rope_theta=10000.0, and model.rope_theta asks for 500.0"):
        convert.check_fields(older, module, shapes)
    convert.check_fields(older | {"rope_theta": 500, "rope_scaling": None}, module, shapes)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (mlp.Mlp((8,), 10), "Mlp has no counterpart"),
        (vit.Vit(**MODEL, pool="mean"), "model.pool='mean' has no counterpart"),
        (vit.Vit(**MODEL, stem=1), "model.stem=1 has no counterpart"),
        (vit.Vit(**MODEL, activation="elu"), "model.activation='elu' has no counterpart"),
        (resnet.ResNet(**resnet.cifar(8), num_classes=10), "model.stem='cifar' has no"),
        (thin_resnet(block="preact"), "model.block='preact' has no counterpart"),
        (thin_resnet(widening=2), "model.widening=2 has no counterpart"),
    ],
)
def test_a_model_that_they_do_not_have_is_refused(module, message):
    image = np.zeros((1, 8, 8, 3), np.float32)
    with pytest.raises(UserError) as error:
        convert.fields(module, abstract(module, {"image": image}))
    assert message in str(error.value)


def test_parameters_that_they_do_not_have_are_refused():
    module, shapes, golden = known("clip_quick")
    weights = convert.to_lsdl(golden["tensors"], module, shapes)
    weights["params"]["bias"] = np.zeros((), np.float32)
    with pytest.raises(UserError, match=r"unknown 1 \(params/bias\)"):
        convert.to_hf(weights, module)
    with pytest.raises(UserError, match=r"model.bias_init=-10.0 has no counterpart"):
        convert.fields(module.clone(bias_init=-10.0), shapes)


def test_every_array_of_a_published_size_has_its_counterpart():
    """By shapes alone: the tables are complete for sizes that no test has the memory for."""
    llama = gpt.Gpt("llama", 32000, 32000, 2048, tied=False, **gpt.LLAMA_SIZES["7b"])
    gpt2 = gpt.Gpt("gpt2", 50257, 50257, 1024, **gpt.GPT2_SIZES["1.5b"])
    for module, number in ((llama, 6_738_415_616), (gpt2, 1_557_611_200)):
        module = module.clone(scan_layers=True)
        shapes = abstract(module, {"token": np.zeros((1, 4), np.int32)})
        rules = convert.counterpart(module, shapes).rules
        paths = {path for rule in rules for path in rule.ours}
        stacked = {re.sub(r"block_\d+", "blocks", path) for path in paths}
        assert len(stacked) == len(jax.tree.leaves(shapes))
        assert len(paths) == sum(len(rule.ours) for rule in rules)
        assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == number
    module = clip.Clip(**clip.SIZES["l14"], vocab_size=49408, vocab_padded=49408, max_length=77)
    inputs = {"image": np.zeros((1, 224, 224, 3)), "caption": np.zeros((1, 77), np.int32)}
    shapes = abstract(module, inputs)
    assert convert.fields(module, shapes)["vision_config"]["image_size"] == 224
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 427_616_513


def run(capfd, *arguments):
    code = main([*map(str, arguments)])
    return code, capfd.readouterr().err


def test_the_entry_reads_a_folder_and_gives_it_back(folder, tmp_path, capfd):
    path, tensors = folder
    out, back = tmp_path / "weights", tmp_path / "deep" / "hf"
    assert run(capfd, "--config", CONFIG, *OVERRIDES, "--from", path, "--out", out) == (0, "")
    assert {p.name for p in out.iterdir()} == {"checkpoints", "config.json"}
    assert run(capfd, "--run", out, "--out", back) == (0, "")
    again, settings = files.read(back)
    same(again, tensors)
    assert settings == files.read(path)[1]


def test_halves_and_several_files_are_read(folder, tmp_path, capfd):
    _, tensors = folder
    shards = tmp_path / "shards"
    shards.mkdir()
    rounded = {name: t.astype(ml_dtypes.bfloat16) for name, t in tensors.items()}
    names = sorted(rounded)
    halves = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, part in halves.items():
        save_file({name: rounded[name] for name in part}, shards / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    out, back = tmp_path / "weights", tmp_path / "hf"
    assert run(capfd, "--config", CONFIG, *OVERRIDES, "--from", shards, "--out", out) == (0, "")
    assert run(capfd, "--run", out, "--out", back) == (0, "")
    same(files.read(back)[0], {name: t.astype(np.float32) for name, t in rounded.items()})


def test_training_starts_from_converted_weights_and_a_run_is_converted(
    folder, tmp_path, capfd, train
):
    path, tensors = folder
    out, work, back = tmp_path / "weights", tmp_path / "run", tmp_path / "hf"
    assert run(capfd, "--config", CONFIG, *OVERRIDES, "--from", path, "--out", out) == (0, "")
    still = ["--config.total_steps=1", "--config.optim.schedule.peak=0.0"]
    start = [f"--config.init_from={out}", f"--workdir={work}"]
    code, _, err = train("digits_vit:smoke", *OVERRIDES, *still, *start)
    assert code == 0, err
    assert run(capfd, "--run", work, "--out", back) == (0, "")
    same(files.read(back)[0], tensors)
    code, _, err = train("digits_vit:smoke", *OVERRIDES, f"--workdir={out}")
    assert (code, "holds converted weights and no run" in err) == (2, True)
    module = vit.Vit(**MODEL)
    shapes = abstract(module, {"image": np.zeros((1, 8, 8, 1), np.float32)})
    same(convert.to_hf(load_weights(work / "checkpoints", shapes), module), tensors)


def test_the_entry_refuses_in_one_sentence(folder, tmp_path, capfd):
    path, _ = folder
    read = ["--config", CONFIG, *OVERRIDES, "--from", path]
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "model.safetensors").write_bytes(b"nothing")
    taken = tmp_path / "taken"
    taken.mkdir()
    file = tmp_path / "file"
    file.write_text("")
    out = tmp_path / "out"
    for arguments, message in (
        ([*read, "--out", taken], f"--out={taken} exists"),
        ([*read, "--out", file / "x"], "cannot be created"),
        ([*read, "--run", taken, "--out", out], "Give --config and --from"),
        (["--config", CONFIG, "--out", out], "Give --config and --from"),
        (["--run", taken, "--config.seed=1", "--out", out], "or --run alone"),
        (["--run", taken, "--out", out], "is no run folder"),
        (["--config", CONFIG, "--from", taken, "--out", out], "is neither a safetensors file nor"),
        (["--config", CONFIG, "--from", bad, "--out", out], "cannot be read as safetensors"),
        ([*read, "--config.model.pool=mean", "--out", out], "model.pool='mean' has no counterpart"),
        ([*read, "--config.model.num_heads=4", "--out", out], "num_attention_heads=2, and model."),
    ):
        code, err = run(capfd, *arguments)
        assert code == 2, arguments
        assert message in err
        assert err.count("\n") == 1
        assert not out.exists()
