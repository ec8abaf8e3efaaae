"""A config file with a command line's changes: varied without being written again."""

import pytest

from lsdl.errors import UserError
from lsdl.source import Source
from tests.conftest import CONFIGS

MLP = f"{CONFIGS / 'digits_mlp.py'}:smoke"


def test_a_varied_source_is_the_command_line_with_one_more_field():
    source = Source(MLP, ("--config.mesh=data=1", "--config.accum", "2"))
    other = source.varied(mesh="fsdp=4", optim__clip_norm=0.5)
    assert other.overrides == (
        "--config.accum=2",
        "--config.mesh=fsdp=4",
        "--config.optim.clip_norm=0.5",
    )
    config, _ = other.load()
    assert (config.mesh, config.accum, config.optim.clip_norm) == ("fsdp=4", 2, 0.5)
    assert source.field("mesh") == "data=1"


def test_varying_twice_is_varying_once():
    source = Source(MLP, ("--config.mesh=data=1",))
    assert source.varied(accum=2).varied(accum=4) == source.varied(accum=4)
    assert source.varied(mesh="data=1") == source


def test_what_is_no_field_is_refused_as_ever():
    with pytest.raises(UserError, match="has no field 'meshes'"):
        Source(MLP, ("--config.meshes=data=1",)).varied(accum=2).load()
    with pytest.raises(UserError, match="Unknown argument '--workdir=x'"):
        Source(MLP, ("--workdir=x",)).varied(accum=2).load()
    with pytest.raises(UserError, match=r"--config\.accum has no value"):
        Source(MLP, ("--config.accum",)).load()


def test_a_source_builds_for_devices_that_need_not_exist():
    built = Source(MLP, ("--config.mesh=data=1",)).varied(mesh="data=-1,fsdp=4").build(48)
    assert built.mesh.shape["data"] == 12
