"""The studies of layouts and batch sizes: their models by hand, and claims on small tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import experiment
from lsdl.models.alexnet import AlexNet
from lsdl.planner import collectives
from lsdl.studies import batch_choice, digits, one_weird_trick

# 1,000 of 64 bytes convolutions' and 4,000 dense, of which 3,000 can be split.
SIZES = one_weird_trick.Sizes(1_000, 4_000, 3_000, features=10, hidden=20)


def test_traffic_of_the_trick_by_hand():
    sent = SIZES.sent(8, data=2, tensor=4, scattered=True)
    assert sent == {
        ("all-reduce", "data+tensor"): 2 * 7 / 8 * 1_000,
        ("all-reduce", "data"): 2 * 1 / 2 * (3_000 / 4 + 1_000),
        ("all-gather", "tensor"): 3 / 4 * 4 * 4 * 10,
        ("all-reduce", "tensor"): 2 * 3 / 4 * 4 * 4 * 20,
        ("reduce-scatter", "tensor"): 3 / 4 * 4 * 4 * 10,
    }
    whole = SIZES.sent(8, data=2, tensor=4, scattered=False)
    assert whole.total() - sent.total() == 3 / 4 * 4 * 4 * 10
    assert SIZES.dense(sent, 8) == pytest.approx(sent.total() - 1_750)


def test_the_trick_sends_less_until_what_crosses_is_as_much_as_the_dense_parameters():
    """B (F + H) floats against the dense layers' bytes."""
    alone = 2 * 7 / 8 * 4_000
    for batch, times in ((16, 0.48), (64, 1.92)):
        sent = SIZES.sent(batch, data=1, tensor=8, scattered=True)
        assert 4 * batch * (10 + 20) / 4_000 == times
        assert SIZES.dense(sent, 8) / alone == pytest.approx(times)


def test_on_data_alone_the_traffic_is_that_of_data_parallelism():
    sent = SIZES.sent(8, data=8, tensor=1, scattered=True)
    assert sent == {("all-reduce", "data"): 2 * 7 / 8 * 5_000}


def test_the_bill_knows_who_sees_which_part_of_the_batch(load):
    """Convolutions' gradients are those of all devices, dense ones' of the devices along data."""
    layout = ("rules=one_weird_trick", "mesh=data=2,tensor=4")
    built = experiment.build(load("imagenet_alexnet", *layout), devices=8)
    sizes = one_weird_trick.sizes_of(built.abstract_state.params)
    sent = sizes.sent(512, data=2, tensor=4, scattered=True)
    whole = {key: sent[key] for key in (("all-reduce", "data"), ("all-reduce", "data+tensor"))}
    assert collectives.lower_bounds(built) == pytest.approx(whole)


def test_sizes_are_those_of_the_model():
    image = jnp.zeros((1, 67, 67, 3))
    model = AlexNet(10, widths=(8, 8, 8, 8, 4), hidden=(16, 24))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), image, train=False))["params"]
    sizes = one_weird_trick.sizes_of(params)
    assert (sizes.features, sizes.hidden) == (4, 24)
    assert sizes.split_bytes == 4 * (4 * 16 + 16 + 16 * 24)
    assert sizes.dense_bytes == sizes.split_bytes + 4 * (24 + 24 * 10 + 10)
    assert sizes.conv_bytes == 4 * (3 * 121 * 8 + 8 + 25 * 4 * 8 + 8 + 9 * 8 * 8 + 8) + 4 * (
        9 * 4 * 8 + 8 + 9 * 4 * 4 + 4
    )


def test_one_k20_takes_the_measured_hours():
    images_per_s = 128 / one_weird_trick.STEP_S
    assert 90 * 1_281_167 / images_per_s / 3600 == pytest.approx(98.05)
    assert one_weird_trick.speedup(SIZES, 1, trick=True, shared=True) == 1


def _table(**changed):
    sent = {"all-reduce tensor": 2_000.0, "all-gather tensor": 5_000.0}
    programs = {
        "program": ["grid", "small", "large", "data"],
        "counted": [sent] * 4,
        "predicted": [sent] * 4,
        "least_bytes": [7_000.0] * 4,
        "counted_dense_bytes": [1.0, 1.0, 4.0, 2.0],
        "distances": [1e-7, 1e-6],
        "batch": [256, 256, 1024, 256],
        "sent_width": [544] * 4,
        "dense_bytes": [1_138_728] * 4,
    }
    alexnet = {"side": 227, "conv_flops": 92, "dense_flops": 8}
    # AlexNet's own, so that the speed-ups are those of the study
    own = dict(conv_bytes=9_336_000, dense_bytes=234_524_000, split_bytes=218_120_000)
    alexnet |= own | {"features": 9_216, "hidden": 4_096}
    return [programs | changed, alexnet]


@pytest.mark.parametrize(
    ("changed", "lost"),
    [
        ({}, set()),
        ({"distances": [1e-7, 1e-4]}, {"same"}),
        ({"predicted": [{"all-reduce tensor": 2_000.0}] * 4}, {"bytes"}),
        ({"least_bytes": [7_000.0, 6_000.0, 7_000.0, 7_000.0]}, {"least"}),
        ({"counted_dense_bytes": [1.0, 2.0, 2.0, 2.0]}, {"less", "more"}),
    ],
)
def test_claims_on_a_small_table(changed, lost):
    found = {claim.id: claim for claim in one_weird_trick.claims(_table(**changed))}
    assert list(found) == list(one_weird_trick.EXPECTED)
    own = {"parameters", "shared"}  # of the table's AlexNet alone
    assert {id for id, claim in found.items() if not claim.holds} - own == lost
    assert np.isfinite(found["shared"].measured)
    assert set(one_weird_trick.figure(_table(**changed))) == {"traffic", "speedup"}


BATCHES = (4, 16, 64, 256, 1024)


def test_the_fit_finds_the_law_it_was_drawn_from():
    least, critical = batch_choice.fit(BATCHES, 30 * (1 + 50 / np.array(BATCHES)))
    assert (least, critical) == (pytest.approx(30, rel=2e-3), pytest.approx(50, rel=2e-3))


@pytest.mark.parametrize(("critical", "machine"), [(10, 40), (100, 40), (100, 4)])
def test_the_best_batch_is_between_the_critical_and_the_machines(critical, machine):
    found = batch_choice.best_batch(BATCHES, 5 * (1 + critical / np.array(BATCHES)), machine)
    assert found == pytest.approx((critical * machine) ** 0.5, rel=0.05)


def test_the_best_batch_may_be_the_first_or_the_last():
    assert batch_choice.best_batch(BATCHES, [1.0] * 5, 4) == 4
    assert batch_choice.best_batch(BATCHES, 1 / np.array(BATCHES), 1e9) == 1024


def test_the_first_look_below_the_target_counts_between_looks():
    crossing = batch_choice._crossing
    assert crossing(np.array([4.0, 2.0, 0.5]), 1.0) == pytest.approx(1.5)
    assert crossing(np.array([0.9, 2.0]), 1.0) == 0
    assert crossing(np.array([4.0, 2.0]), 1.0) == np.inf


def test_tokens_that_h100s_need_and_that_pay():
    """Austin et al. 2025: 2,200 in a node, 2,475 across; Kaplan et al. 2020: 2e8 / L^4.76."""
    assert batch_choice.busy_tokens(8) / 8 == pytest.approx(2_200 * 7 / 8, rel=2e-3)
    assert batch_choice.busy_tokens(4096) / 4096 == pytest.approx(2_475, rel=2e-3)
    assert batch_choice.critical_tokens(1.0) == 2e8
    assert batch_choice.critical_tokens(2.0) == pytest.approx(7.37e6, rel=1e-2)


def _steps_table(criticals=(40.0, 160.0), scale=1.0):
    """Runs that follow the law, the second rate the better one, the first without an end."""
    table = [
        {
            "batch_size": size,
            "steps_to": [[[None, 10 * (1 + c / size), 99_999.0]] * 2 for c in criticals],
        }
        for size in BATCHES
    ]
    return [*table, {"noise_scale": [[scale * c] * 2 for c in criticals]}]


@pytest.mark.parametrize(
    ("changed", "lost"),
    [
        ({}, set()),
        ({"scale": 20.0}, {"noise"}),
        ({"criticals": (40.0, 40.0)}, {"critical", "phase", "kept"}),
    ],
)
def test_claims_on_runs_that_follow_the_law(changed, lost):
    found = {claim.id: claim for claim in batch_choice.claims(_steps_table(**changed))}
    assert list(found) == list(batch_choice.EXPECTED)
    assert {id for id, claim in found.items() if not claim.holds} == lost
    assert found["law"].measured < 0.01
    assert found["law"].n == 2
    assert len(batch_choice.figure(_steps_table(**changed))) == 3


def test_a_curve_is_that_of_its_rate():
    net = digits.Classifier(batch_choice.HIDDEN)
    start_FS = jax.tree.map(lambda x: x[None], net.init(digits.keys(1)))
    id_STB = np.zeros((1, 4, 8), np.int32) + np.arange(8)
    (loss_RP,) = batch_choice._curves(start_FS, id_STB, np.float32([0.0, 0.05]), every=2)[0]
    assert loss_RP.shape == (2, 3)
    np.testing.assert_allclose(loss_RP[0], loss_RP[0, 0], rtol=1e-6)
    assert loss_RP[1, 0] == loss_RP[0, 0]
    assert loss_RP[1, 0] != loss_RP[1, 1] != loss_RP[1, 2]
