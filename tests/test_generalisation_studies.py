"""The studies of grokking: laws, claims on made-up tables, and cells that are slow."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lsdl import experiment, laboratory
from lsdl.studies import grokking
from lsdl.studies.claim import Cell, Expected
from lsdl.studies.claim import judged as judge

STUDIES = [grokking]
studies = pytest.mark.parametrize("study", STUDIES, ids=lambda s: s.__name__.split(".")[-1])


def judged(study, table):
    claims = {claim.id: claim for claim in study.claims(table)}
    assert claims.keys() >= study.EXPECTED.keys()
    return claims


@studies
@pytest.mark.parametrize("scale", ["small", "full"])
def test_cells_have_ids_of_their_own_and_json_settings(study, scale):
    cells = study.cells(scale, 2)
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert json.loads(json.dumps(cell.settings)) == cell.settings
        assert bool(cell.published) == (scale == "full")


@pytest.mark.slow
@studies
def test_a_study_runs_from_its_cells_to_its_figures(study, tmp_path):
    table = []
    for cell in study.cells("small", 1):
        row = json.loads(json.dumps(study.measure(cell, tmp_path), allow_nan=False))
        table.append(cell.settings | row | {"id": cell.id})
    judged(study, table)
    for name, figure in study.figure(table).items():
        figure.save(tmp_path / f"{name}.svg")


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
    found = judged(grokking, table)
    assert list(found) == [*grokking.EXPECTED, *grokking.SLOW]
    assert found["transformer_delay"].measured == pytest.approx(10)
    assert "transformer" in grokking.figure(table)
