"""A run as one program is the run of `lsdl.train`; BatchNorm's statistics of a whole data set."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsdl import sweep
from lsdl.analysis.batch_statistics import recalibrated
from lsdl.errors import UserError
from lsdl.metrics import read_rows
from lsdl.models.mlp import Mlp
from tests.conftest import CONFIGS
from tests.tiny import close, images, values

PATH = f"{CONFIGS / 'digits_bn_mlp.py'}:smoke"
SMALL = {"model.hidden": (16, 16), "total_steps": 12, "batch_size": 96, "eval.every_steps": 12}


def test_a_run_is_that_of_train(train, tmp_path):
    fields = SMALL | {"optim.schedule.peak": 0.02, "seed": 3}
    run = sweep.train(PATH, fields)
    given = [f"--config.{name}={value}" for name, value in fields.items()]
    code, _, error = train("digits_bn_mlp:smoke", f"--workdir={tmp_path}", *given)
    assert code == 0, error
    rows = read_rows(tmp_path / "metrics.jsonl")
    steps = [row for row in rows if row["split"] == "train"]
    for name in ("loss", "accuracy", "grad_norm", "param_norm", "learning_rate"):
        found = run.metrics_T[name]
        np.testing.assert_allclose(found, [row[name] for row in steps], rtol=2e-4, atol=1e-7)
    (valid,) = [row for row in rows if row["split"] == "valid"]
    assert run.valid["loss"] == pytest.approx(valid["loss"], rel=1e-3)
    assert run.valid["examples"] == 270


def test_runs_that_differ_in_seed_and_schedule_share_a_program():
    sweep.train(PATH, SMALL)
    programs = dict(sweep._programs)
    other = sweep.train(PATH, SMALL | {"seed": 1, "optim.schedule.peak": 0.3})
    assert dict(sweep._programs) == programs
    assert other.metrics_T["learning_rate"][0] == pytest.approx(0.3)


def test_a_plateau_slows_a_run_down():
    plateau = {"name": "plateau", "plateau_patience_steps": 2, "plateau_threshold": 100.0}
    fields = {f"optim.schedule.{name}": value for name, value in plateau.items()}
    rates = sweep.train(PATH, SMALL | fields).metrics_T["learning_rate"]
    np.testing.assert_allclose(rates[:6], 0.1 * 0.1 ** np.array([0, 0, 0, 1, 1, 2]), rtol=1e-5)
    constant = fields | {"optim.schedule.plateau_patience_steps": 4}
    rates = sweep.train(PATH, SMALL | constant).metrics_T["learning_rate"]
    np.testing.assert_allclose(rates[[6, 7]], [0.1, 0.01], rtol=1e-5)


def test_a_run_takes_gauss_newton_steps():
    decay = {"optim.weight_decay": 0.0, "optim.name": "ggn_cg", "optim.damping": 1.0}
    decay |= {"optim.cg_steps": 3, "total_steps": 2, "eval.every_steps": 2}
    run = sweep.train(PATH, SMALL | decay)
    assert np.isfinite(run.metrics_T["loss"]).all()
    assert run.metrics_T["update_norm"].all()


def test_a_ramp_is_refused():
    fields = {name: value for name, value in SMALL.items() if name != "total_steps"}
    ramp = {"total_epochs": 1.0, "batch_ramp": ((50.0, 2),)}
    with pytest.raises(UserError, match="batch_ramp changes the batch size at step 8"):
        sweep.train(PATH, fields | ramp)


def test_whole_statistics_are_those_of_the_data_and_leave_no_trace_of_the_start():
    model = Mlp((6, 5), 3, norm="batch")
    x = images(40, (4,))
    variables = values(model, x, train=True)
    found = recalibrated(model.apply, variables, (x,))["batch_stats"]
    kernel = variables["params"]["hidden_0"]["dense"]["kernel"]
    hidden = x.astype(np.float64) @ kernel
    close(found["hidden_0"]["norm"]["mean"], hidden.mean(0), rtol=1e-4, atol=1e-5)
    close(found["hidden_0"]["norm"]["var"], hidden.var(0), rtol=1e-4)
    started = variables | {"batch_stats": jax.tree.map(lambda v: 5 + v, variables["batch_stats"])}
    again = recalibrated(model.apply, started, (x,))["batch_stats"]
    close(again, found, rtol=1e-5)


def test_evaluation_with_whole_statistics_is_the_training_forward_pass():
    model = Mlp((6, 5), 3, norm="batch")
    x = images(40, (4,))
    variables = values(model, x, train=True)
    told = recalibrated(model.apply, variables, (x,))
    trained = model.apply(variables, x, train=True, mutable=["batch_stats"])[0]
    close(model.apply(told, x, train=False), trained, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_a_normalised_mlp_ignores_the_scale_of_its_kernels(norm):
    model = Mlp((8, 6), 3, norm=norm)
    x = images(10, (4,))
    variables = values(model, x, train=True)
    mutable = {"mutable": ["batch_stats"]} if norm == "batch" else {}
    first = lambda out: out[0] if mutable else out  # noqa: E731
    params = jax.tree.map(jnp.asarray, variables["params"])
    kernel = params["hidden_0"]["dense"]["kernel"]

    def logits(factor):  # large enough for the norm's epsilon not to count
        params["hidden_0"]["dense"]["kernel"] = factor * kernel
        return first(model.apply(variables | {"params": params}, x, train=True, **mutable))

    close(logits(3e5), logits(1e4), rtol=1e-3, atol=1e-4)
    assert "bias" not in params["hidden_0"]["dense"]
