"""Contests: what is not the same is not played, what was disturbed is dropped, and all is told."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bracket, contest, jpegs, loader, record, run, table
from benchmarks.matches import GOALS, MATCHES

RESULTS = sorted(table.RESULTS.glob("*.json"))
ALONE = sorted(table.RESULTS.glob("alone/*.json"))
MATCH = MATCHES["gpt_4x128"]


class Player:
    """Stands for a worker's process: its losses, and the seconds that each burst takes."""

    def __init__(self, player, losses, wall_s):
        self.player, self._losses, self._wall_s = player, losses, wall_s
        self.bursts = 0

    def say(self, verb, number):
        assert verb == "compare"

    def hear(self):
        return {"losses": self._losses}

    def ask(self, verb, number):
        self.bursts += 1
        return {"wall_s": self._wall_s * number, "cpu_s": 0.0, "loss": 0.0, "peak": 7}

    def cpu_s(self):
        return 0.0


TOLD = {
    "ours": {
        **{"flops_per_step": 100, "causal_flops_per_step": 80, "peak_flops_per_s": None},
        **{"planned_bytes": 6, "ready_s": 1.0},
    },
    "nanogpt": {"version": "3adf61e", "ready_s": 1.0, "parameters": 5, "versions": {"torch": "2"}},
}


def played(*players, rounds=7):
    return contest._played("gpt_4x128", MATCH, players, TOLD, rounds, lambda *_: None)


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(contest, "busy_s", lambda: 0.0)


def test_a_ratio_is_our_time_over_theirs(quiet):
    (found,) = played(Player("ours", [5.0, 4.0], 2.0), Player("nanogpt", [5.0, 4.0005], 4.0))
    assert found["ratio"] == {"min": 0.5, "median": 0.5, "max": 0.5}
    assert found["n"] == 7
    assert found["losses_apart"] == pytest.approx(0.0005)
    assert found["lsdl"]["tokens_per_s"] == 12 * 64 / 2.0
    assert found["lsdl"]["model_flops_per_s"] == 50
    assert found["theirs"]["step_s"] == 4.0
    assert "mfu" not in found["lsdl"]  # of a CPU no peak is known


def test_mfu_is_a_share_of_the_peak_with_causal_attention_whole_or_half():
    known = TOLD["ours"] | {"peak_flops_per_s": 400}
    assert contest.mfu(known, 0.5) == {"mfu": 0.5, "mfu_causal": 0.4}
    assert table.mfu(contest.mfu(known, 0.5)) == "50.0 % (40.0 %)"


def test_a_goal_is_met_or_the_table_says_by_how_much_it_is_missed():
    told = {"ratio": {"median": 0.9}, "lsdl": {"mfu": 0.44, "mfu_causal": 0.6}}
    assert table.goal("ratio", 0.9, told) == "0.90: met"
    assert table.goal("ratio", 0.75, told) == "0.75: missed by 20 %"
    assert table.goal("mfu", 0.55, told) == "55 % MFU: missed by 20 %"
    assert table.goal("mfu_causal", 0.6, told) == "60 % MFU (causal): met"
    assert table.goal("ratio", 0.5) == "0.50"
    pairs = {(name, peer) for name, match in MATCHES.items() for peer in match.peers}
    assert GOALS.keys() == pairs


def test_what_computes_something_else_is_not_timed(quiet):
    other = Player("nanogpt", [5.0, 4.1], 4.0)
    with pytest.raises(contest.Unable, match=r"nanogpt computes something else: .* 0\.1 apart"):
        played(Player("ours", [5.0, 4.0], 2.0), other)
    assert other.bursts == 0
    with pytest.raises(contest.Unable, match="something else"):
        played(Player("ours", [5.0, 4.0], 2.0), Player("nanogpt", [5.0, float("nan")], 4.0))


def test_disturbed_rounds_are_dropped_and_told(monkeypatch):
    seen = iter(range(1000))
    # Others take a second of CPU during every fourth burst, which lasts 2 or 4 s a step.
    monkeypatch.setattr(contest, "busy_s", lambda: 500.0 * ((next(seen) + 1) // 8))
    players = Player("ours", [5.0], 2.0), Player("nanogpt", [5.0], 4.0)
    (found,) = played(*players, rounds=4)
    assert (found["n"], found["dropped"] > 0) == (4, True)
    monkeypatch.setattr(contest, "busy_s", lambda: 500.0 * next(seen))
    with pytest.raises(contest.Unable, match="only 0 of 4 rounds were quiet"):
        played(*players, rounds=4)


def test_the_table_is_that_of_the_results():
    text = table.DOCUMENT.read_text()
    assert text == table.document(text)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    for one in json.loads(path.read_text()):
        assert one["match"] == MATCHES[path.stem].title
        assert one["peer"] in MATCHES[path.stem].peers
        assert one["n"] >= 5
        assert one["losses_apart"] <= MATCHES[path.stem].close
        assert 0 < one["ratio"]["min"] <= one["ratio"]["median"] <= one["ratio"]["max"]
        for field in ("device", "peer_commit", "versions", "command", "commit", "date"):
            assert one[field], field
        if target := bracket.on(one["device"]):
            own, peak = one["lsdl"], target.flops_per_s("bfloat16")
            assert own["mfu"] * peak == pytest.approx(own["model_flops_per_s"])
            assert 0 < own["mfu_causal"] <= own["mfu"] < 1


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_results_of_lsdl_alone_say_where_they_come_from(path):
    for one in json.loads(path.read_text()):
        assert one["command"].startswith(f"python -m benchmarks.{path.stem}")
        assert one["n"] >= 5
        assert (
            0 < min(one["ratio"].values()) <= one["ratio"]["median"] <= max(one["ratio"].values())
        )
        for field in ("match", "device", "peer", "versions", "commit", "date"):
            assert one[field], field


def test_a_result_takes_the_place_of_one_of_the_same_match_device_and_peer(tmp_path, capsys):
    out = tmp_path / "alone" / "loop.json"
    told = (("a", "c", "x"), ("b", "c", "x"), ("a", "c", "x"), ("a", "c", "y"), ("a", "g", "x"))
    for ratio, (match, device, peer) in enumerate(told):
        one = {"match": match, "device": device, "peer": peer, "ratio": ratio}
        assert record.tell(one, out) == 0
    assert [one["ratio"] for one in json.loads(out.read_text())] == [1, 2, 3, 4]
    assert capsys.readouterr().out.count('"match"') == 5


def test_a_ratio_of_pairs_is_that_of_each_pair():
    pairs = [((2.0, 3.0), (1.0, 1.0)), ((9.0, 1.0), (3.0, 1.0)), ((4.0, 2.0), (1.0, 1.0))]
    found = record.ratios(pairs)
    assert found["ratio"] == {"min": 2.0, "median": 3.0, "max": 4.0}
    assert found["cpu_ratio"]["median"] == 2.0
    low, median, high = record.ratios(pairs * 50, of=record.bootstrapped)["ratio"].values()
    assert low <= median == 3.0 <= high


def test_a_match_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run", "gpt_4x129"])
    assert run.main() == 2
    assert "There is no match 'gpt_4x129': see --list." in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["run", "--list"])
    assert run.main() == 0
    assert all(name in capsys.readouterr().out for name in ["gpt_4x128"])


@pytest.mark.slow
def test_without_a_peer_lsdl_is_timed_alone(monkeypatch, tmp_path):
    """In processes of their own, for real."""
    monkeypatch.delenv("LSDL_PEERS_DIR", raising=False)
    monkeypatch.setattr(contest, "FOREIGN", 100)
    said = []
    (found,) = contest.play("gpt_4x128", rounds=1, log=Path(tmp_path), say=said.append)
    assert found["peer"] is None
    assert found["lsdl"]["step_s"] > 0
    assert any("no peer is there" in line for line in said)


# --- the loader -----------------------------------------------------------------------------------

SMALL = {  # batches of one whole epoch, and the leaf that no transform changes
    "digits": (3, {"batch_size": 419}, "label"),
    "jpeg": (2, {"batch_size": 4}, "label"),
    "text": (2, {"batch_size": 8, "data.train_split": "valid", "data.train_examples": 16}, "token"),
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(jpegs, "PICTURES", 8)
    monkeypatch.setenv("LSDL_DATA_DIR", str(tmp_path))
    for name, (batches, fields, _) in SMALL.items():
        case = loader.CASES[name]
        case = dataclasses.replace(case, batches=batches, fields=case.fields | fields)
        monkeypatch.setitem(loader.CASES, name, case)
    loader.feed.cache_clear()
    yield
    loader.feed.cache_clear()


def leaves(batch):
    return {name: (x.shape, x.dtype, x.devices()) for name, x in batch.items()}


@pytest.mark.parametrize("name", SMALL)
def test_a_peer_of_the_loader_gives_the_same_records(small, name):
    ours, theirs = (list(of(name)()) for of in (loader.of_lsdl, loader.of_grain))
    for own, other in zip(ours, theirs, strict=True):
        del own["weight"]
        assert leaves(own) == leaves(other)
    unchanged = SMALL[name][-1]
    seen = [np.concatenate([batch[unchanged] for batch in side]) for side in (ours, theirs)]
    assert sorted(seen[0].tolist()) == sorted(seen[1].tolist())


def test_the_ratio_of_loaders_is_that_of_batches(small, monkeypatch):
    monkeypatch.setattr(record, "origin", lambda: {"versions": {}})
    found = loader.measured("digits", "grain", 2)
    assert found["n"] == 2
    assert found["peer"] == "plain Grain"
    assert 0 < found["ratio"]["min"] <= found["ratio"]["median"] <= found["ratio"]["max"]
    for side in ("lsdl", "theirs"):
        assert found[side]["batch_s"] * found[side]["examples_per_s"] == pytest.approx(419)
