"""The studies of grokking and double descent: laws, claims on made-up tables, and slow cells."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lsdl import experiment, laboratory
from lsdl.studies import double_descent, grokking
from lsdl.studies.claim import Cell, Expected
from lsdl.studies.claim import judged as judge
from tests.judging import judged

# --- slow cells -----------------------------------------------------------------------------------


@pytest.fixture
def halves(monkeypatch):
    """A study with a slow cell."""
    study = SimpleNamespace(CLAIM="x is x", SOURCE="none", calls=[])
    study.EXPECTED = {"quick": Expected("x", "none", low=1, high=1)}
    study.SLOW = {"slow": Expected("x of the slow cell", "none", low=2, high=2)}
    own = {"small": Cell("a", {"x": 1}), "slow": Cell("b", {"x": 2})}
    study.cells = lambda scale, seeds: [own[scale]] if scale in own else []
    study.figure = lambda table: {}
    study.measure = lambda cell, folder: study.calls.append(cell.id) or {"y": cell.settings["x"]}

    def claims(table):
        values = {"quick": 1.0} | ({"slow": table[1]["y"]} if len(table) > 1 else {})
        return judge({id: {**study.EXPECTED, **study.SLOW}[id] for id in values}, values)

    study.claims = claims
    monkeypatch.setattr(laboratory, "find", lambda name: study)
    monkeypatch.setattr(laboratory, "_module", lambda name: study)
    return study


def test_slow_cells_are_measured_on_demand_and_then_stay(halves, tmp_path):
    def claims(**options):
        return [claim.id for claim in laboratory.run("halves", tmp_path, seeds=1, **options).claims]

    assert claims() == ["quick"]
    assert claims(slow=True) == ["quick", "slow"]
    assert claims() == ["quick", "slow"]
    assert halves.calls == ["a", "b"]


def test_the_slow_claims_are_held_to_their_bounds_too(halves, tmp_path):
    moved = halves.SLOW["slow"]
    halves.SLOW = {"slow": Expected("x of the slow cell", "none", low=1)}
    old = halves.claims
    halves.claims = lambda table: [*old(table)[:1], moved.judge("slow", 2.0)]
    with pytest.raises(ValueError, match="differ from EXPECTED"):
        laboratory.run("halves", tmp_path, seeds=1, slow=True)


def test_the_list_counts_slow_cells_apart(halves, monkeypatch):
    monkeypatch.setattr(laboratory, "names", lambda: ["halves"])
    assert "halves: 1 cells, 1 claims, 0 runs at full scale, 1 more with --slow" in (
        laboratory.inventory(1)
    )


# --- grokking -------------------------------------------------------------------------------------


def test_the_transformer_has_the_lectures_block_parameters():
    (cell,) = grokking.cells("slow", 3)
    found = experiment.opened(cell.config, cell.overrides)
    shapes = jax.tree_util.tree_leaves_with_path(found.abstract_state.params)
    blocks = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in shapes
        if "block" in jax.tree_util.keystr(path)
    }
    matrices = sum(leaf.size for leaf in blocks.values() if leaf.ndim > 1)
    assert matrices == 393_216 == 2 * 12 * 128**2


def test_pairs_are_split_without_a_rest_and_each_sum_is_right():
    net = grokking.Net(5, 40, 4, 0.1, 1, 1, False)
    train_N3, valid_V3 = grokking.pairs(net, 0)
    assert (len(train_N3), len(valid_V3)) == (10, 15)
    both = np.concatenate([train_N3, valid_V3])
    assert len({(a, b) for a, b, _ in both.tolist()}) == 25
    assert ((both[:, 0] + both[:, 1]) % 5 == both[:, 2]).all()
    assert (grokking.pairs(net, 1)[0] != train_N3).any()


@pytest.mark.parametrize("squared", [False, True])
def test_the_first_layer_is_a_sum_of_two_rows(squared):
    net = grokking.Net(5, 40, 4, 0.1, 1, 1, squared)
    params, _ = grokking.initial(net, jax.random.key(0))
    rows = np.asarray(params["in"])
    h = rows[3] + rows[5 + 2]
    h = h**2 if squared else np.maximum(h, 0)
    found = grokking.logits(net, params, np.array([[3, 2, 0]]))
    np.testing.assert_allclose(found[0], h @ params["out"], rtol=1e-5, atol=1e-6)


def grokked(net, decay, *, fit=40, jump=400, last=1.0):
    step = [0, 20, 40, 200, 400, 800, 3000]
    train = [2.0 if s < fit else 100.0 for s in step]
    valid = [last if s < jump else 99.0 for s in step]
    return {
        "net": net,
        "decay": decay,
        "step": step,
        "train": [train] * 2,
        "valid": [valid] * 2,
    }


def grokking_table(**jumps):
    table = [grokked(net, 0.0, jump=10_000) for net in grokking.NETS]
    table.append(grokked("relu", 1.0, jump=jumps.get("relu", 800)))
    delays = jumps.get("quadratic", (3000, 800, 400, 200))
    decays = grokking.DECAYS["quadratic"][1:]
    return table + [
        grokked("quadratic", decay, jump=jump) for decay, jump in zip(decays, delays, strict=True)
    ]


def test_claims_of_the_jump():
    found = judged(grokking, grokking_table())
    assert found.keys() == grokking.EXPECTED.keys()
    assert all(claim.holds and claim.n == 2 for claim in found.values())
    assert found["delay_relu"].measured == pytest.approx(20)
    assert found["delay_quadratic"].measured == pytest.approx(10)
    assert found["at_fit_relu"].measured == pytest.approx(1)
    assert found["decay"].measured == pytest.approx(360 / 760)
    never = judged(grokking, grokking_table(relu=10_000, quadratic=(10_000, 10_000, 400, 200)))
    assert np.isnan(never["delay_relu"].measured)
    assert not never["delay_relu"].holds
    assert never["decay"].measured == pytest.approx(1)
    assert not never["decay"].holds


def test_the_transformer_adds_its_claims_and_its_figure():
    table = grokking_table()
    assert "transformer" not in grokking.figure(table)
    table.append(grokked("transformer", 1.0, jump=400, last=5.0))
    found = judged(grokking, table, more=True)
    assert list(found) == [*grokking.EXPECTED, *grokking.SLOW]
    assert found["transformer_delay"].measured == pytest.approx(10)
    assert "transformer" in grokking.figure(table)


# --- double descent -------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [3, 5, 9])
def test_least_norm_is_the_pseudoinverse(features):
    draw = np.random.default_rng(features)
    z_NF, y_NC = draw.normal(size=(5, features)), draw.normal(size=(5, 2))
    found = double_descent.least_norm(z_NF, y_NC)
    np.testing.assert_allclose(found, np.linalg.pinv(z_NF) @ y_NC, atol=1e-9)


def test_a_fifth_of_the_labels_is_redrawn():
    ids, clean_NC, noisy_NC = double_descent.drawn(0)
    assert len(set(ids.tolist())) == 300
    assert (clean_NC.sum(1) == 1).all()
    assert (noisy_NC.sum(1) == 1).all()
    changed = (clean_NC != noisy_NC).any(1).mean()
    assert changed == pytest.approx(0.2 * 0.9, abs=0.06)  # a tenth is drawn as it was


def test_the_parameters_of_the_threshold_are_belkins():
    assert double_descent.parameters(40) == (64 + 1) * 40 + (40 + 1) * 10
    assert double_descent.parameters(39) < 300 * 10 < double_descent.parameters(40)


def test_the_turns_of_a_curve():
    assert double_descent.turns([5, 2, 1, 4, 3, 2]) == (1, 4, 2)
    assert double_descent.turns([5, 4, 6, 3, 2]) == (4, 6, 2)
    assert double_descent.turns([5, 2, 1]) == (5, 5, 1)  # no rise
    assert double_descent.turns([5, 1, 2, 4]) == (1, 4, 4)  # no second descent


def test_all_steps_at_once_are_gradient_descent(monkeypatch):
    monkeypatch.setattr(double_descent, "EPOCH_STEPS", np.arange(4))
    found = double_descent.epoch_risk(0)
    assert found[0] == pytest.approx(sum(double_descent.EPOCH_ENERGY))
    monkeypatch.setattr(double_descent, "EPOCH_STEPS", np.array([10**12]))
    monkeypatch.setattr(double_descent, "EPOCH_NOISE", 0.0)
    assert double_descent.epoch_risk(0)[0] == pytest.approx(0, abs=1e-9)  # no noise to fit
    assert (np.diff(found) < 0).all()


def descent_table(*, peak=50.0, wide=0.3, net_peak=2.0):
    error = np.interp(np.arange(len(double_descent.FEATURES)), [0, 5], [0.6, 0.4]).tolist()
    at = double_descent.FEATURES.index
    error[at(100)], error[at(300)], error[at(8_000)] = 0.4, peak, wide
    features = {"model": "features"}
    for kind in ("clean", "noise"):
        features |= {f"{n}_{kind}": [error] * 3 for n in ("error", "wrong", "norm")}
    nets = [
        {
            "model": "net",
            "size": width,
            "error": [[0.9, net_peak if width == 40 else 1.0 if width < 40 else 0.8]] * 3,
            "wrong": [[50.0, 20.0, 30.0, 25.0]] * 3,
            "train_loss": [[0.5, 0.1]] * 3,
        }
        for width in double_descent.WIDTHS
    ]
    count = len(double_descent.EPOCH_STEPS)
    risk = np.interp(np.arange(count), [0, 20, 40, count], [2, 1, 1.5, 0.5]).tolist()
    return [*nets, features, {"model": "epochs", "risk": [risk] * 3}]


def test_claims_of_the_descents():
    found = judged(double_descent, descent_table())
    assert all(claim.holds for claim in found.values())
    assert found["peak_clean"].measured == 300
    assert found["height_noise"].measured == pytest.approx(125)
    assert found["second_clean"].measured == pytest.approx(0.75)
    assert found["net_peak"].measured == pytest.approx(2)
    assert found["net_second"].measured == pytest.approx(0.4)
    assert found["epoch_rise"].measured == pytest.approx(1.5)
    assert found["net_epochs"].measured == pytest.approx(5)
    assert found["net_epochs"].n == 3
    found = judged(double_descent, descent_table(peak=0.2, wide=0.5, net_peak=0.9))
    lost = {id for id, claim in found.items() if not claim.holds}
    assert lost >= {"peak_clean", "height_noise", "second_clean", "net_peak"}
    assert set(double_descent.figure(descent_table())) == {"features", "nets", "epochs"}
