"""What a step tells of itself: formulas by numpy, and the same numbers on every layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import measures
from lsdl.errors import UserError
from lsdl.experiment import build
from tests.curves import curve

SMALL = ("model.hidden=(16,)", "batch_size=64")


def gradients(load, rows):
    """Mean gradients of the first step's microbatches, each by itself, and of the whole batch."""
    experiment = build(
        load("digits_mlp:smoke", *SMALL, "model.dropout=0.0"), devices=jax.devices()[:1]
    )
    state, batch = experiment.init(), experiment.train_loader().batch(0)

    def loss(params, part):
        outputs = experiment.module.apply(
            {"params": params}, *experiment.task.inputs(part), train=True
        )
        total, weight, _ = experiment.task.loss(outputs, part)
        return total / weight

    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])  # noqa: E731
    of = lambda part: np.float64(flat(jax.grad(loss)(state.params, part)))  # noqa: E731
    pick = lambda r: jax.tree.map(lambda x: x[np.array(r)], batch)  # noqa: E731
    return np.array([of(pick(r)) for r in rows]), of(batch)


def test_noise_and_angle_are_those_of_the_microbatches(load):
    fields = (*SMALL, "model.dropout=0.0", "accum=4", "log.measure=('noise','angle')")
    told, _ = curve(load("digits_mlp:smoke", *fields), devices=1, steps=1)
    small_AP, big_P = gradients(load, [range(i, 64, 4) for i in range(4)])
    small = (small_AP**2).sum(1).mean()
    big = (big_P**2).sum()
    expected = {
        "grad_square_micro": small,
        "grad_square": big,
        "signal": (64 * big - 16 * small) / 48,
        "noise": (small - big) / (1 / 16 - 1 / 64),
    }
    unit_AP = small_AP / np.linalg.norm(small_AP, axis=1, keepdims=True)
    cosine_AA = unit_AP @ unit_AP.T
    expected["micro_angle_deg"] = np.degrees(np.arccos((cosine_AA.sum() - 4) / 12))
    for name, value in expected.items():
        assert told[name][0] == pytest.approx(value, rel=1e-3), name


def test_norms_are_those_of_each_layer(load):
    fields = (*SMALL, "log.measure=('norms',)", "optim.name=sgd", "optim.momentum=0.0")
    fields += ("optim.schedule.name=constant", "optim.schedule.warmup_percent=0.0")
    fields += ("optim.schedule.peak=0.5", "optim.weight_decay=0.0")
    told, _ = curve(load("digits_mlp:smoke", *fields), devices=1, steps=2)
    for layer in ("hidden_0/dense/kernel", "head/kernel"):
        ratio = told[f"update_ratio/{layer}"] * told[f"trust_ratio/{layer}"]
        np.testing.assert_allclose(ratio, 0.5, rtol=1e-4)  # |dw| = rate |g|
    of = lambda kind: [told[n] for n in told if n.startswith(f"{kind}/")]  # noqa: E731
    np.testing.assert_allclose(np.square(of("grad_norm")).sum(0), told["grad_norm"] ** 2, rtol=1e-4)
    assert len(of("param_norm")) == 4


def test_stacked_layers_have_a_number_each(load):
    fields = ("log.measure=('norms',)", "model.num_layers=2", "model.scan_layers=true")
    told, _ = curve(load("digits_vit:smoke", *fields), devices=1, steps=1)
    names = [name for name in told if name.startswith("param_norm/") and name.endswith("[1]")]
    assert names
    assert {name[:-3] + "[0]" for name in names} <= told.keys()
    assert not any(name.endswith("[2]") for name in told)


def test_a_layout_changes_none_of_it(load):
    fields = (*SMALL, "accum=2", "log.measure=('norms','noise','angle')")
    one, _ = curve(load("digits_mlp:smoke", *fields), devices=1, steps=3)
    split, _ = curve(load("digits_mlp:smoke", *fields, "mesh=data=2,fsdp=2"), devices=4, steps=3)
    for name, values in one.items():
        np.testing.assert_allclose(split[name], values, rtol=2e-3, err_msg=name)


def test_nothing_is_measured_unless_asked(load):
    told, _ = curve(load("digits_mlp:smoke", *SMALL, "accum=2"), devices=1, steps=1)
    assert not any("/" in name or name in ("noise", "micro_angle_deg") for name in told)
    assert measures.make((), accum=2) is None


def test_the_angle_between_opposite_gradients_is_a_straight_one():
    parts = [{"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([-2.0, -4.0])}]
    sums = jax.tree.map(
        jnp.add, *(measures.of_microbatch(part, words=("angle",)) for part in parts)
    )
    told = measures.of_step(sums, parts[0], words=("angle",), accum=2, batch_size=8)
    assert float(told["micro_angle_deg"]) == pytest.approx(180, abs=0.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("log.measure=('norm',)",), "log.measure='norm' is unknown; did you mean 'norms'"),
        (("log.measure=('noise',)",), "accum=1 must be at least 2"),
        (
            ("log.measure=('angle',)", "accum=2", "partitioner=shard_map"),
            "partitioner=shard_map does not know a microbatch's gradient",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(load, fields, words):
    with pytest.raises(UserError, match=words):
        build(load("digits_mlp:smoke", *SMALL, *fields))
