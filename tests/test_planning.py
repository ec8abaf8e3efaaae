"""Plans for targets: refused, told or compiled; the remat table, the choice, the search."""

import json
from types import SimpleNamespace

import pytest

from lsdl import foresight, planning, remat_choice, search
from lsdl.errors import BAD_INPUT, DOES_NOT_FIT, FINISHED, NO_COMPILER, UserError
from lsdl.plan import main
from lsdl.planner import analytic, fit, hardware
from lsdl.runs import Run
from lsdl.sharding import mesh as meshes
from lsdl.sharding.rules import TABLES
from lsdl.source import Source
from tests.conftest import CONFIGS

MLP = f"{CONFIGS / 'digits_mlp.py'}:smoke"
GPT = f"{CONFIGS / 'stdlib_gpt.py'}:smoke"
H100 = "--target=gpu:h100:1x8"


def asked(*arguments, config=MLP):
    return main([f"--config={config}", "--config.mesh=data=-1", *arguments])


# What is refused


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target=gpu:h1000:1x8"], ["h1000", "h100"]),
        (["--target=h100"], ["target='h100'", "gpu:h100:4x8"]),
        ([H100, "--devices=4"], ["--devices=4", "has 8", "leave one out"]),
        (["--search"], ["--search", "--target"]),
        (["--devices=8..64"], ["--devices", "--target"]),
        ([H100, "--devices=64-8"], ["64-8", "8..65536"]),
        ([H100, "--memory-gib=0"], ["--memory-gib=0.0", "positive"]),
        ([H100, "--price-per-device-hour=-1"], ["--price-per-device-hour=-1.0", "positive"]),
        ([H100, "--mtbf-device-hours=inf"], ["--mtbf-device-hours=inf", "positive"]),
        (["--hardware=x.toml"], ["--hardware=x.toml", "--target"]),
        (["--config.remat=auto"], ["remat='auto'", "--target"]),
        (["--config.remat=auto:"], ["remat='auto:'"]),
    ],
)
def test_refusal_is_one_sentence(capsys, arguments, words):
    assert asked(*arguments) == BAD_INPUT
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    for word in words:
        assert word in err


def test_there_is_no_plan_without_a_config(capsys):
    assert main([H100]) == BAD_INPUT
    assert "--config" in capsys.readouterr().err


def test_a_target_without_its_compiler_has_an_exit_code_and_a_way_out(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("LSDL_PLAN_TOOLS", str(tmp_path))
    assert asked(H100) == NO_COMPILER
    assert "make plan-tools" in capsys.readouterr().err
    assert asked(H100, "--analytic") == FINISHED


def test_closed_forms_tell_what_does_not_fit(capsys):
    assert asked(H100, "--analytic", config=f"{CONFIGS / 'gpt3.py'}:175b") == DOES_NOT_FIT
    assert "does NOT fit in" in capsys.readouterr().out


# What is told


def test_closed_forms_need_no_compiler(capsys, tmp_path):
    file = tmp_path / "plan.json"
    price = "--price-per-device-hour=2.5"
    assert asked(H100, "--analytic", price, f"--json={file}", config=GPT) == FINISHED
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    closed = found["analytic"]
    assert closed["model_flops_per_example"] == pytest.approx(
        found["model_flops_per_example"], rel=0.01
    )
    assert closed["memory"]["state_bytes"] == found["state_bytes_per_device"]
    hours = closed["run"]["device_hours"]
    assert closed["run"]["money"] == [2.5 * one for one in hours]
    assert hours[0] < hours[1]
    for word in ("compute", "MFU at most", "device-hours", "2.5 a device-hour"):
        assert word in out


def test_a_run_scales_and_fails_on_paper(capsys, tmp_path):
    files = [f"--json={tmp_path / 'plan.json'}", f"--html={tmp_path / 'plan.html'}"]
    asks = ["--devices=8..64", "--mtbf-device-hours=50000"]
    assert asked(H100, *asks, *files, config=GPT) == FINISHED
    found, out = json.loads((tmp_path / "plan.json").read_text()), capsys.readouterr().out
    assert [row["devices"] for row in found["scaling"]["weak"]] == [8, 16, 32, 64]
    assert found["goodput"]["failures_per_day"] == pytest.approx(8 * 24 / 50_000)
    assert "419 unexpected interruptions" in out
    page = (tmp_path / "plan.html").read_text()
    assert "<svg " in page
    for word in ("Counted", "Closed forms", "MFU at most", "Scaling", "419 unexpected"):
        assert word in page


def test_hardware_and_the_lectures_numbers_need_no_config(capsys):
    assert main(["--devices-known"]) == FINISHED
    assert "NVIDIA H100" in capsys.readouterr().out
    assert main(["--lectures"]) == FINISHED
    assert "174.6" in capsys.readouterr().out


def test_a_step_is_compiled_in_a_process_of_its_own_and_may_not_fit(capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert asked("--target=cpu:2", "--memory-gib=0.0001", f"--json={file}") == DOES_NOT_FIT
    found, out = json.loads(file.read_text()), capsys.readouterr().out
    step = found["compiled"]
    assert step["argument_bytes"] >= found["state_bytes_per_device"]
    assert len(step["largest"]) == 5
    assert "does NOT fit in" in out
    for row in step["largest"]:
        assert row["name"] in out
    assert found["collectives"][-1]["kind"] == "all"


# Whether a step fits


def answer(needed, limit=100, **told):
    step = {"needed_bytes": needed, "limit_bytes": limit, "fits": needed <= limit}
    return {"compiled": step, "collectives": [], **told}


def test_the_limit_is_the_targets_unless_one_is_given():
    assert fit.verdict(answer(80)) is True
    assert fit.verdict(answer(80), 79) is False
    assert fit.verdict(answer(120), 120) is True
    refused = {"refused": "too many heads."}
    failed = {"compiled": {"error": "crashed (SIGSEGV)"}}
    for one, why in ((refused, "too many heads."), (failed, "crashed (SIGSEGV)")):
        assert fit.needed_bytes(one) is None
        assert fit.verdict(one) is False
        assert fit.why(one) == why
        assert why in fit.table(one)


# The remat table, and the choice


@pytest.fixture
def traces(monkeypatch):
    """Policies whose FLOPs and saved bytes are made up."""
    rows = [("none", 0, 900), ("dots", 0, 500), ("full", 30, 100), ("sqrt", 60, 40)]
    found = [
        {"policy": p, "recomputed_flops": f, "recomputed": f / 100, "saved_bytes": s}
        for p, f, s in rows
    ]
    monkeypatch.setattr(remat_choice, "_all_traced", lambda build: found)
    monkeypatch.setattr(remat_choice.tree, "device_bytes", lambda state: 10)
    return SimpleNamespace(abstract_state=None)


NEEDED = {"none": 1000, "dots": 600, "full": 200, "sqrt": 120}


@pytest.mark.parametrize(
    ("limit", "chosen", "compiled"),
    [
        (2000, "none", ["none"]),
        (700, "dots", ["dots"]),  # the state and what none saves are more than that already
        (550, "full", ["dots", "full"]),
        (130, "sqrt", ["full", "sqrt"]),
    ],
)
def test_auto_takes_the_first_that_fits_and_says_what_it_tried(
    traces, capsys, limit, chosen, compiled
):
    tried = []

    def step_bytes(policy):
        tried.append(policy)
        return NEEDED[policy]

    given = dict(devices=1, limit_bytes=limit)
    assert remat_choice.choose(lambda policy: traces, step_bytes, **given) == chosen
    assert tried == compiled
    told = capsys.readouterr().err
    assert f"remat={chosen}" in told
    assert told.count(": chosen") == 1
    for policy in compiled:
        assert f"remat={policy}:" in told


def test_auto_says_what_the_least_needs_where_nothing_fits(traces):
    given = dict(devices=1, limit_bytes=115)
    with pytest.raises(UserError, match="no policy that fits"):
        remat_choice.choose(lambda policy: traces, NEEDED.get, **given)
    with pytest.raises(UserError, match="how much memory"):
        remat_choice.choose(lambda policy: traces, NEEDED.get, devices=1, limit_bytes=None)


def test_the_limit_stands_behind_auto():
    assert remat_choice.is_auto("auto")
    assert remat_choice.is_auto("auto:1.5")
    assert not remat_choice.is_auto("full")
    assert remat_choice.limit_of("auto") is None
    assert remat_choice.limit_of("auto:1.5") == 1.5 * 2**30


@pytest.mark.slow
def test_auto_becomes_a_policy_that_fits():
    source = Source(MLP, ("--config.mesh=data=-1",))
    assert remat_choice.resolved(source.varied(remat="auto:1")).field("remat") == "none"


def test_a_run_without_auto_is_left_alone():
    plain = Source(MLP, ("--config.mesh=data=-1",))
    assert remat_choice.resolved(plain) is plain
    with pytest.raises(UserError, match="auto:16"):  # a CPU does not tell its memory
        remat_choice.resolved(plain.varied(remat="auto"))


def test_a_policy_is_dominated_by_one_that_needs_no_more_of_either():
    row = lambda needed, flops: {"needed_bytes": needed, "recomputed_flops": flops}  # noqa: E731
    assert remat_choice._dominates(row(1, 1), row(2, 1))
    assert remat_choice._dominates(row(1, 1), row(1, 2))
    assert not remat_choice._dominates(row(1, 1), row(1, 1))
    assert not remat_choice._dominates(row(1, 2), row(2, 1))
    assert not remat_choice._dominates(row(1, 1), row(None, 2))


@pytest.mark.slow
def test_the_remat_table_has_every_policy_and_a_figure(capsys, tmp_path):
    files = [f"--json={tmp_path / 'plan.json'}", f"--html={tmp_path / 'plan.html'}"]
    sizes = ("num_layers=4", "width=32", "num_heads=2", "mlp_dim=64", "scan_layers=true")
    fields = [f"--config.model.{size}" for size in sizes]
    assert asked("--devices=1", "--remat-table", *files, *fields, config=GPT) == FINISHED
    rows = {row["policy"]: row for row in json.loads((tmp_path / "plan.json").read_text())["remat"]}
    assert {"none", "full", "dots", "dots_no_batch", "sqrt", "every:2", "binomial"} <= rows.keys()
    assert rows["none"]["recomputed_flops"] == 0 < rows["full"]["recomputed_flops"]
    assert rows["full"]["saved_bytes"] < rows["dots"]["saved_bytes"] < rows["none"]["saved_bytes"]
    assert rows["full"]["temporary_bytes"] < rows["none"]["temporary_bytes"]
    assert rows["names:attn_out"]["names"] == ["attn_out"]
    out, page = capsys.readouterr().out, (tmp_path / "plan.html").read_text()
    for policy in rows:
        assert policy in out
        assert policy in page
    assert "<svg " in page


# The search


def test_a_search_by_closed_forms_needs_no_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LSDL_PLAN_TOOLS", str(tmp_path))
    asks = ("--target=gpu:h100:1x1", "--search", "--analytic")
    assert asked(*asks, config=GPT) == FINISHED
    out = capsys.readouterr().out.splitlines()
    assert out[1].endswith("estimated")
    assert asked(*asks, "--memory-gib=0.0001", config=GPT) == DOES_NOT_FIT
    assert "needs about" in capsys.readouterr().out.splitlines()[1]
    assert asked(*asks[:2], config=GPT) == NO_COMPILER


@pytest.mark.parametrize("devices", [1, 6, 8, 64])
def test_every_layout_is_for_all_devices_and_none_comes_twice(devices):
    found = [tuple(layout.items()) for layout in search.layouts(devices)]
    assert len(found) == len(set(found))
    for (_, mesh), (_, rules) in found:
        meshes.parse_mesh(mesh, devices)
        assert rules in TABLES
    assert ("mesh", f"fsdp={devices}" if devices > 1 else "data=1") in [one[0] for one in found]


def test_what_lies_between_none_and_full_is_estimated_by_what_it_keeps_and_computes_again():
    target = hardware.parse("gpu:h100:1x8")
    source = Source(GPT, ("--config.mesh=fsdp=8", "--config.model.num_layers=4"))
    limit = 10**12
    found = {row["remat"]: row for row in search._estimated(source, target, limit)
             if (row["mesh"], row["rules"]) == ("fsdp=8", "fsdp_tp")}  # fmt: skip
    names = source.build(8).activation_names
    everything = f"names:{','.join(names)}"
    assert set(found) == {"none", "dots", "dots_no_batch", "full", everything}
    for policy in ("none", "full"):
        known = analytic.estimate(source.varied(remat=policy).build(8), target)
        assert found[policy]["bytes"] == known["memory"]["total_bytes"]
        assert found[policy]["slowest_s"] == pytest.approx(known["step_s"][1])
    for policy in ("dots", "dots_no_batch", everything):
        for key in ("bytes", "fastest_s"):
            ends = sorted(found[end][key] for end in ("none", "full"))
            assert ends[0] <= found[policy][key] <= ends[1], (policy, key)
    assert found["dots_no_batch"]["bytes"] < found["dots"]["bytes"]  # attention's scores


def test_microbatches_are_as_few_as_fit():
    def estimate(total):
        times = dict(compute_s=1.0, memory_s=0.5, network_s=0.25, step_s=[1.0, 1.75])
        return {"memory": {"total_bytes": total}, **times}

    ends = [(accum, estimate(100 // accum), estimate(40 // accum)) for accum in (1, 2, 4)]
    half = search._Between(kept=0.5, again=0.5)
    least = lambda limit: search._least_accum(ends, half, limit)  # noqa: E731
    assert (least(70)["accum"], least(70)["bytes"]) == (1, 70)
    assert (least(69)["accum"], least(69)["bytes"]) == (2, 35)
    assert (least(1)["accum"], least(1)["bytes"]) == (4, 18)
    assert least(70)["slowest_s"] == 1.75


def row(name, fastest=None, slowest=None, fits=None, reason=""):
    times = dict(fastest_s=fastest, slowest_s=slowest, binds="compute" if fastest else None)
    fields = dict(mesh=name, rules="fsdp_tp", remat="none", accum=1, bytes=1)
    return fields | times | dict(fits=fits, reason=reason)


def test_compiled_layouts_come_first_then_estimates_then_what_cannot_be():
    rows = [
        row("cannot", reason="model.num_heads=4 is not divisible by 8"),
        row("estimated", 0.5, 0.7),
        row("slow", 2.0, 3.0, fits=True),
        row("fast", 1.0, 2.0, fits=True),
        row("large", 0.1, 0.2, fits=False, reason="needs 99 GiB as compiled"),
    ]
    ranked = [one["mesh"] for one in sorted(rows, key=search._order)]
    assert ranked == ["fast", "slow", "estimated", "large", "cannot"]
    assert search._worse(rows[2], rows[3]) == "+66.7% time"
    assert search._worse(rows[1], rows[3]) == "-60.0% time, estimated"


def test_no_mesh_is_compiled_more_than_twice_at_once():
    rows = [row("a", n, n) for n in (1, 2, 3)] + [row("b", 4, 4)]
    assert [one["fastest_s"] for one in search._different(rows, 3)] == [1, 2, 4]


def test_a_compiled_layout_is_judged_by_its_traffic_and_its_flops():
    target = hardware.parse("gpu:h100:1x8")
    source = Source(GPT, ("--config.mesh=fsdp=8", "--config.precision=bfloat16"))
    experiment = source.build(8)
    sent = [{"kind": "all-gather", "axis": "fsdp", "wire_bytes": 450_000_000_000}]
    sent += [{"kind": "all", "axis": "all", "wire_bytes": 450_000_000_000}]
    found = search.judged(answer(80) | {"collectives": sent}, experiment, target)
    assert found["fits"]
    assert found["binds"] == "network"
    assert found["fastest_s"] == pytest.approx(1.0)  # 450 GB/s of NVLink
    large = search.judged(answer(120), experiment, target)
    assert (large["fits"], large["reason"]) == (False, "needs 120 B as compiled")
    refused = search.judged({"refused": "no."}, experiment, target)
    assert refused["reason"] == "did not compile: no."


# Predicted and measured


def test_a_prediction_lies_beside_what_was_measured(tmp_path):
    plan = {
        "batch_size": 4,
        "step_flops_per_example": 1_000,
        "analytic": {"step_s": [1.0, 2.0], "mfu": [0.3, 0.6], "mfu_causal": None},
        "compiled": {"needed_bytes": 2**20},
    }
    rows = [
        dict(step=s, step_time_s=t, mfu=0.2, examples_per_s=4 / t, memory_peak_bytes=2**19)
        for s, t in ((1, 99.0), (2, 4.0), (3, 4.0))
    ]
    run = Run(tmp_path, {}, "", {}, plan, {"train": rows})
    found = {quantity: rest for quantity, *rest in foresight.compared(run)}
    assert found["step time"] == ["1 s .. 2 s", "4 s", "2.00 .. 4.00"]
    assert found["MFU"] == ["30.0% .. 60.0%", "20.0%", "0.33 .. 0.67"]
    assert found["memory of a device"] == ["1.00 MiB", "512.00 KiB", "0.50"]
    assert "MFU, half of causal attention" not in found
    assert "has a plan.json" in foresight.section([Run(tmp_path, {}, "", {}, {}, {})])


def test_the_sections_of_a_plan_are_those_that_are_asked_for():
    flags = ("search", "remat_table", "target", "analytic", "devices", "collectives")
    none = dict.fromkeys((*flags, "shardings", "groups", "mtbf_device_hours"))
    names = lambda **given: [  # noqa: E731
        section.__name__
        for wanted, section in planning.sections(SimpleNamespace(**none | given))
        if wanted
    ]
    assert names() == ["counted"]
    assert names(target="t") == ["counted", "closed_forms", "compiled_step"]
    assert names(target="t", analytic=True) == ["counted", "closed_forms"]
    assert names(target="t", search=True) == ["searched"]
    assert names(remat_table=True) == ["remat_table"]
    assert names(target="t", devices="8..64") == ["counted", "closed_forms", "scaled"]
    assert names(target="t", devices="8..64", search=True) == ["counted", "searched", "scaled"]


def test_auto_is_no_policy_of_a_model():
    with pytest.raises(UserError, match="name a policy"):
        Source(MLP, ("--config.mesh=data=1", "--config.remat=auto")).build(1)
