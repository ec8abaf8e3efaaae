"""A model of the user's own: its fields are its own, its mistakes are told in a sentence."""

import sys
from types import ModuleType

import jax
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from lsdl import checks, components, experiment
from lsdl.errors import UserError
from lsdl.models.layers import conv, dense


class Own(nn.Module):
    """A dense layer with fields that have another type and meaning in models of lsdl's."""

    hidden: int
    form: str
    width: str
    dropout: str
    max_length: int
    patch: int
    num_heads: str
    num_classes: int
    roles: tuple[str, ...] = ("embed", "mlp")
    flat: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        x = x.reshape(len(x), -1)
        x = nn.relu(dense(self.hidden, self.roles, dtype=x.dtype, name="in")(x))
        x = dense(self.num_classes, ("mlp", "classes"), dtype=x.dtype, name="out")(x)
        return x.reshape(-1) if self.flat else x


FIELDS = dict(hidden=12, form="bag", width="wide", dropout="no", max_length=3, patch=5)


@pytest.fixture
def build(load, monkeypatch):
    """The experiment of `Own` with these fields, on 8 devices."""
    module = ModuleType("lsdl.models.own")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "lsdl.models.own", module)
    monkeypatch.setitem(components.MODELS, "own", "own.Own")

    def build(**fields):
        config = ConfigDict(load("digits_mlp:smoke", "mesh=fsdp=4,tensor=2", "rules=fsdp_tp"))
        defaults = dict(roles=("embed", "mlp"), flat=False, num_heads="two")
        config.model = ConfigDict({"name": "own"} | FIELDS | defaults | fields)
        return experiment.build(config, devices=8)

    return build


def test_a_field_of_ones_own_model_means_what_it_means_there(build):
    built = build()
    built.train_step.eval_shape(built.abstract_state, built.abstract_batch)
    assert not any("unknown role" in line for line in built.lint)
    (kernel,) = (p for p in built.placements if p.path == "params/in/kernel")
    assert tuple(kernel.spec) == ("fsdp", "tensor")


def test_the_models_that_are_checked_by_their_fields_names_are_in_the_table():
    assert set(checks.KNOWN) <= set(components.MODELS)


def test_outputs_of_another_shape_are_refused_where_the_step_is_traced(build):
    built = build(flat=True)
    with pytest.raises(UserError, match=r"outputs have the shape \(\d+,\), and the task takes"):
        built.train_step.eval_shape(built.abstract_state, built.abstract_batch)


def test_a_misspelt_role_is_named_with_the_nearest(build):
    (line,) = [line for line in build(roles=("embd", "mlp")).lint if "unknown role" in line]
    assert "'embd' of params/in/kernel (64, 12)" in line
    assert "did you mean 'embed'?" in line


def test_a_role_too_few_is_refused(build):
    with pytest.raises(UserError, match=r"dense 'in' has axes=.*name two"):
        build(roles=("embed",))
    with pytest.raises(UserError, match=r"conv 'in' has axes=.*name two"):
        conv(8, 3, axes=("conv_in", "conv_out", "x"), dtype=float, name="in")


def test_a_rule_for_a_role_that_no_dim_has_is_told_the_nearest(load):
    config = ConfigDict(load("digits_mlp:smoke", "mesh=data=4,tensor=2"))
    config.rules = (("batch", "data"), ("mpl", "tensor"))
    with pytest.raises(UserError, match="No dim has the role 'mpl'; did you mean 'mlp'"):
        experiment.build(config, devices=8)


@pytest.mark.parametrize(("shape", "good"), [((4, 3), True), ((4, 1), False), ((4,), False)])
def test_regression_wants_a_number_for_each_target(load, shape, good):
    config = load("digits_mlp:smoke", "task=regression", "data.source=teacher:6:3:8")
    task = experiment.build(config).task
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, "float32")  # noqa: E731
    asked = leaf(*shape), {"target": leaf(4, 3), "weight": leaf(4)}
    if good:
        jax.eval_shape(task.loss, *asked)
        return
    with pytest.raises(UserError, match="a number for each target"):
        jax.eval_shape(task.loss, *asked)
