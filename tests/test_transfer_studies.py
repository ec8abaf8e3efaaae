"""The studies of norms, shortcuts, transfer and language: laws, and claims on made-up tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl.analysis import ngrams
from lsdl.errors import UserError
from lsdl.models.layers import batch_norm, feature_norm
from lsdl.models.mlp import Mlp
from lsdl.studies import (
    byte_lm,
    clip_zero_shot,
    fashion_mnist,
    model_parallel,
    normalisation,
    one_weird_trick,
    spurious,
    transfer,
)
from tests.judging import judged

# --- norms ----------------------------------------------------------------------------------------


def apply_norm(shape, *, train=True, axis_name=None):
    norm = batch_norm(train=train, axis_name=axis_name, dtype=jnp.float32, name="norm")
    variables = norm.init(jax.random.key(0), jnp.ones((2, shape[-1])))
    return norm.apply(variables, jnp.ones(shape), mutable=["batch_stats"])


def test_batch_norm_refuses_to_train_on_one_value_for_each_feature():
    for shape in ((1, 4), (1, 1, 1, 4)):
        with pytest.raises(UserError, match="at least 2 examples, or group or layer norm"):
            apply_norm(shape)
    apply_norm((2, 4))
    apply_norm((1, 2, 1, 4))  # two positions of one image
    apply_norm((1, 4), train=False)
    rows = jax.vmap(lambda x: apply_norm((1, 4), axis_name="i"), axis_name="i")
    rows(jnp.arange(2))  # the other rows are on other devices


def test_groups_of_a_dense_layer_have_features_to_average_over():
    """Of two, normalised, only the sign of their difference is left."""
    x_BD = jax.random.normal(jax.random.key(0), (3, 64))
    mode = dict(train=True, axis_name=None, dtype=jnp.float32, name="norm")
    for least, groups in ((16, 4), (2, 32)):
        norm = feature_norm("group", 64, least=least, **mode)
        y_BGD = norm.apply(norm.init(jax.random.key(0), x_BD), x_BD).reshape(3, groups, -1)
        np.testing.assert_allclose(y_BGD.mean(-1), 0, atol=1e-5)
    assert np.median(np.abs(y_BGD)) == pytest.approx(1, abs=1e-3)
    model = Mlp((64,), 0, norm="group")
    hidden_BF = model.apply(model.init(jax.random.key(0), x_BD, train=True), x_BD, train=True)
    assert np.unique(np.round(hidden_BF, 2)).size > 50


def norm_table(end):
    courses = {
        norm: [[[10.0, 11.0], [value, value - 1]] for value in values]
        for norm, values in end.items()
    }
    return [
        {"norm": norm, "batches": (32, 4, 2), "accuracy": course, "refused": int(norm == "batch")}
        for norm, course in courses.items()
    ]


def test_claims_of_the_norms():
    end = {"batch": (98, 97, 41), "group": (97, 97, 96), "layer": (97,) * 3, "none": (97,) * 3}
    found = judged(normalisation, norm_table(end))
    assert all(claim.holds for claim in found.values())
    assert (found["batch_2"].measured, found["batch_2"].n) == (57, 2)
    assert found["group_over_batch"].measured == 55
    found = judged(normalisation, norm_table(end | {"batch": (98, 98, 98)}))
    assert {id for id, claim in found.items() if not claim.holds} == {"batch_2", "group_over_batch"}


# --- shortcuts ------------------------------------------------------------------------------------


def test_a_shortcut_agrees_as_often_as_it_is_told():
    found = spurious.draw(jax.random.key(0), 4_000, 0.9)
    sign_N = 2.0 * found.label_N - 1
    assert (found.x_NF[:, -1] == sign_N).mean() == pytest.approx(0.9, abs=0.02)
    np.testing.assert_allclose((found.x_NF * sign_N[:, None]).mean(0)[:-1], 0.4, atol=0.08)
    empty = spurious.draw(jax.random.key(0), 4_000, 0.9, used=0.0)
    assert not empty.x_NF[:, -1].any()
    np.testing.assert_array_equal(found.x_NF[:, :-1], empty.x_NF[:, :-1])


def test_the_logistic_probe_is_where_the_gradient_is_zero():
    draw = np.random.default_rng(0)
    x_NF = jnp.array(draw.normal(size=(200, 3)), jnp.float32)
    label_N = np.array(draw.random(200) < 1 / (1 + np.exp(-2 * x_NF[:, 0])))
    w_F = np.array(spurious.probe(x_NF, label_N, decay=0.1))
    x_NF = np.append(x_NF, np.ones((200, 1)), 1)
    p_N = 1 / (1 + np.exp(-x_NF @ w_F))
    np.testing.assert_allclose(x_NF.T @ (p_N - label_N) / 200 + 0.1 * w_F, 0, atol=1e-6)
    assert w_F[0] > 3 * np.abs(w_F[1:]).max()


def test_claims_of_a_shortcut():
    places = len(spurious.AGREEMENTS) + 1
    weights = np.ones((2, places, 11))
    weights[:, -2] *= [1.0] * 9 + [-2.0, -5.0]
    row = {
        "train": np.full((2, places), 99.5),
        "kept": np.array([[98.0] * (places - 1) + [90.0]] * 2),
        "independent": np.array([[70.0] * (places - 2) + [56.0, 90.0]] * 2),
        "flipped": np.full((2, places), 12.0),
        "probe": weights,
        "response": weights,
    }
    found = judged(spurious, [row])
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert (found["future"].measured, found["weaker"].measured) == (34, 20)
    assert (found["unchanged"].measured, found["probe"].measured) == (8, 2.5)


# --- transfer -------------------------------------------------------------------------------------


def test_few_examples_are_of_each_class_as_many():
    label_N = np.array([0] * 50 + [1] * 20 + [2] * 5)
    draws = [transfer.few(label_N, 11, np.random.default_rng(seed)) for seed in range(2)]
    for id_B in draws:
        assert len(set(id_B)) == 11
        assert sorted(np.bincount(label_N[id_B])) == [3, 4, 4]
    assert set(draws[0]) != set(draws[1])
    assert len(transfer.few(label_N, 40, np.random.default_rng(0))) == 40  # one class runs out


def test_claims_of_transfer():
    labels = transfer.LABELS
    teacher = {"raw": [[53.0, 59.0, 65.0, 79.0]] * 2, "features": [[74.0, 91.0, 94.0, 95.0]] * 2}
    digits = {"raw": [[80.0, 85.0, 90.0, 95.0]] * 2, "features": [[80.0, 86.0, 91.0, 95.0]] * 2}
    rows = {"teacher": teacher, "digits": digits}
    found = judged(transfer, [row | {"data": d, "labels": labels} for d, row in rows.items()])
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert (found["teacher_16"].measured, found["digits_32"].measured) == (32, 1)
    assert found["few_as_many"].measured == 12


# --- pictures and captions ------------------------------------------------------------------------


def test_captions_name_what_the_pictures_show():
    caption_KW = clip_zero_shot.captions()
    assert len(np.unique(caption_KW, axis=0)) == 32
    assert (caption_KW.sum(1) == 3).all()
    sizes = [clip_zero_shot.mask(shape, 7).sum() for shape in clip_zero_shot.SHAPES]
    assert sizes == [49, 37, 13, 25]
    for k in (0, 31):
        colour, shape, size = clip_zero_shot.COMBINATIONS[k]
        image_HWC = clip_zero_shot.pictures([k] * 400, np.random.default_rng(k)).reshape(-1, 144, 3)
        ink = 0.8 * clip_zero_shot.mask(shape, clip_zero_shot.SIZES[size]).sum()
        wanted = ink * np.array(clip_zero_shot.COLOURS[colour])
        np.testing.assert_allclose(image_HWC.sum(1).mean(0), wanted, atol=1.2)


def test_claims_of_captions():
    row = {"unseen_8": [77.0, 75.0], "unseen_32": [29.0] * 2, "seen_32": [74.0] * 2}
    row |= {"untrained": [12.0] * 2, "probe": [[60.0, 65.0, 76.0, 80.0, 85.0]] * 2}
    row |= {"probe_pixels": [[25.0, 30.0, 40.0, 50.0, 55.0]] * 2}
    low = row | {"unseen_8": [60.0] * 2, "seen_32": [40.0] * 2}
    table = [low | {"images": clip_zero_shot.FEW}, row | {"images": clip_zero_shot.MORE}]
    found = judged(clip_zero_shot, table)
    assert {id for id, claim in found.items() if not claim.holds} == {"seen_32"}
    assert (found["one_shot"].measured, found["few_shot"].measured) == (0, 36)
    assert found["more_unseen_8"].measured == 76


# --- bytes ----------------------------------------------------------------------------------------


def counted_by_hand(train: bytes, text: bytes, order: int) -> list[float]:
    """The recursion of Witten and Bell, with dictionaries."""
    at = lambda data, i, k: (bytes(k) + data)[i : i + k]  # noqa: E731
    found = []
    for i, byte in enumerate(text):
        p = 1 / 256
        for k in range(order + 1):
            context = at(text, i, k)
            after = [train[j] for j in range(len(train)) if at(train, j, k) == context]
            if after:
                p = (after.count(byte) + len(set(after)) * p) / (len(after) + len(set(after)))
        found.append(-np.log2(p))
    return found


def test_ngrams_are_those_of_the_formula():
    train, text = b"abracadabra, said the abbot", b"a dab, a cab"
    arrays = [np.frombuffer(data, np.uint8) for data in (train, text)]
    bits_KM = ngrams.bits(*arrays, order=3)
    for order in range(4):
        np.testing.assert_allclose(bits_KM[order], counted_by_hand(train, text, order))


def test_ngrams_give_all_bytes_together_a_probability_of_one():
    train_N = np.frombuffer(b"to be or not to be", np.uint8)
    texts = [np.frombuffer(b"to b" + bytes([byte]), np.uint8) for byte in range(256)]
    bits_K = np.array([ngrams.bits(train_N, text, order=7)[:, -1] for text in texts])
    np.testing.assert_allclose((2**-bits_K).sum(0), 1)


def test_bytes_that_windows_ask_for():
    documents = [b"abc", b"", b"defgh"]  # | a b c | | d e f g h: 11 tokens
    assert byte_lm.predicted(documents, 4) == b"abc"
    assert byte_lm.predicted(documents, 7) == b"abcde"
    assert byte_lm.predicted(documents, 10) == b"abcdefgh"
    with pytest.raises(ValueError, match="have 11 tokens, and not 12"):
        byte_lm.predicted(documents, 11)


def test_claims_of_bytes():
    counts = {"kind": "ngrams", "bits": [4.7, 3.5, 2.66, 2.17, 2.04, 2.03], "zlib": 1.9, "xz": 1.6}
    gpt = {"kind": "gpt", "valid_bits": [4.0, 2.4]}
    found = judged(byte_lm, [counts, gpt])
    assert [id for id, claim in found.items() if not claim.holds] == ["order_5"]
    assert found["ladder"].measured == pytest.approx(2.03 / 2.04)
    assert found["absolute"].measured == 2.4


# --- a grid of devices ----------------------------------------------------------------------------


def test_the_layouts_of_a_grid():
    assert model_parallel.layout((4, 2))["mesh"] == "data=4,tensor=2"
    assert model_parallel.layout((8, 1)) == {"rules": "dp", "mesh": "data=8"}
    assert model_parallel.layout((1, 1)) == {"rules": "dp", "mesh": "data=1"}


def test_a_device_of_the_grid_holds_half_of_what_is_split():
    whole, half = (model_parallel.held_bytes(grid) for grid in ((8, 1), (4, 2)))
    split = 4 * (32 * 512 + 512 + 512 * 512)  # columns with their biases, then rows
    assert whole - half == split // 2


def test_two_batches_tell_where_the_traffic_of_a_grid_is_that_of_another():
    assert model_parallel.crossing({30: 20.0, 10: 10.0}, 15.0) == 20


def grid_row():
    sizes = one_weird_trick.Sizes(1_000, 4_000, 3_000, features=10, hidden=20)
    programs = [(grid, model_parallel.SMALL) for grid in model_parallel.GRIDS]
    programs.append((model_parallel.GRID, model_parallel.LARGE))
    sent = [
        {" ".join(k): v for k, v in sizes.sent(b, data=d, tensor=t, scattered=False).items()}
        for (d, t), b in programs
    ]
    return {
        "program": [f"{d} x {t}" for (d, t), _ in programs],
        "batch": [batch for _, batch in programs],
        "counted": sent,
        "predicted": sent,
        "held_bytes": [5_000, 2_600, 2_000, 1_500, 2_600],
        "sizes": dataclasses.asdict(sizes),
        "distance": 1e-7,
        "moved": 0.1,
    }


def test_claims_of_the_grid():
    row = grid_row()
    found = judged(model_parallel, [row])
    assert found["predicted"].measured == 1
    assert found["crossing"].measured == pytest.approx(1)
    assert found["memory"].measured == 0.52
    more = [{key: 1.1 * nbytes for key, nbytes in sent.items()} for sent in row["counted"]]
    more[0] = row["counted"][0]
    found = judged(model_parallel, [row | {"counted": more}])
    assert found["predicted"].measured == pytest.approx(1.1)
    assert found["crossing"].measured < 1


# --- four optimisers ------------------------------------------------------------------------------


def test_claims_of_the_optimisers():
    ends = {"sgd": 1.5, "sgd_10": 0.5, "momentum": 0.5, "adam": 0.2, "adamw": 0.2}
    table = [{"run": "net", "parameters": 79_510}]
    table += [
        {"run": run, "seed": seed, "end_loss": end, "accuracy": 97.0}
        for run, end in ends.items()
        for seed in (1, 0)
    ]
    found = judged(fashion_mnist, table)
    assert all(claim.holds for claim in found.values())
    assert found["momentum_over_sgd"].measured == pytest.approx(1 / 3)
    assert (found["adam"].n, found["parameters"].n) == (2, 1)


def test_the_runs_have_as_many_updates_as_ten_epochs_of_the_lectures_data():
    assert fashion_mnist.DIGITS["total_steps"] == 10 * (55_000 // 1_024)
