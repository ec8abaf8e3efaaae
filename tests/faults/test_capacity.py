"""A run that cannot fit is refused before anything is compiled, with the numbers and what to do."""

import re

import jax
import pytest

from lsdl import capacity
from lsdl.errors import BAD_INPUT, UserError
from lsdl.experiment import build
from lsdl.planner import present, tree

SMOKE = "digits_mlp:smoke"


def needed(experiment):
    parts = (experiment.abstract_state, experiment.abstract_gradients)
    return sum(tree.device_bytes(part) for part in parts)


@pytest.mark.threat(27)
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "data=2,tensor=4"])
def test_the_limit_is_exact(load, monkeypatch, mesh):
    experiment = build(load("digits_vit:smoke", f"mesh={mesh}"))
    monkeypatch.setattr(present, "capacity_bytes", lambda: needed(experiment))
    capacity.check(experiment)
    monkeypatch.setattr(present, "capacity_bytes", lambda: needed(experiment) - 1)
    with pytest.raises(UserError):
        capacity.check(experiment)


@pytest.mark.threat(27)
def test_what_is_counted_is_what_a_device_then_holds(load):
    experiment = build(load(SMOKE, "mesh=fsdp=8"))
    state = experiment.init()
    held = sum(
        s.data.nbytes for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards[:1]
    )
    assert tree.device_bytes(experiment.abstract_state) == held


@pytest.mark.threat(27)
def test_a_run_that_does_not_fit_is_refused_with_the_numbers(train, tmp_path, monkeypatch):
    monkeypatch.setattr(present, "host_bytes", lambda: 8 * 2**20)
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event)
    )
    code, out, err = train(
        SMOKE, f"--workdir={tmp_path / 'run'}", "--config.model.hidden=(512, 512)"
    )
    assert (code, out) == (BAD_INPUT, "")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "run").exists()
    assert not any("backend_compile" in event for event in events)
    assert re.search(r"on each device [\d.]+ MiB of state and [\d.]+ MiB of gradients", err)
    assert "has room for 1.00 MiB" in err
    assert re.search(r"at least \d+ of these", err)
    assert re.search(r"the largest on a device: (\S+ [\d.]+ \w+(, |\.)){5}", err)


@pytest.mark.threat(27)
def test_a_container_has_less_than_its_machine(monkeypatch, tmp_path):
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(present, "Path", lambda path: limit)
    whole = present.host_bytes()
    assert whole > 2**30
    limit.write_text("max\n")
    assert present.host_bytes() == whole
    limit.write_text(f"{2**29}\n")
    assert present.host_bytes() == 2**29
    assert present.capacity_bytes() == 2**29 // jax.local_device_count()
