"""What `python -m lsdl.plan` does: the sections of a plan, each printed and kept as JSON values."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lsdl import page, remat_choice, search
from lsdl.errors import DOES_NOT_FIT, FINISHED, UserError
from lsdl.experiment import Experiment
from lsdl.files import write_json
from lsdl.optim import groups
from lsdl.planner import (
    analytic,
    collectives,
    compiled,
    fit,
    goodput,
    hardware,
    lectures,
    published,
    scaling,
    timetable,
    totals,
    tree,
)
from lsdl.rundir import versions
from lsdl.sharding import inspect, mesh
from lsdl.source import Source


@dataclass
class Plan:
    """What is asked, what is planned for, and what came out."""

    asked: Any
    source: Source
    target: hardware.Target | None
    limit_bytes: int | None  # of a device's memory
    experiment: Experiment
    numbers: dict[str, Any] = field(default_factory=dict)
    parts: list[page.Markup] = field(default_factory=list)  # of the page
    code: int = FINISHED

    def say(self, title: str, *texts: str) -> None:
        """Print the texts, and put them under `title` on the page."""
        print(*texts, sep="\n")
        self.parts.append(page.section(title, page.element("pre", "\n".join(texts))))


def run(asked: Any, overrides: Sequence[str]) -> int:
    """Print the plan that the command line asks for; returns the exit code."""
    if asked.worker:
        compiled.work(asked.worker, lambda file, flags, there: Source(file, flags).build(there))
        return FINISHED
    check(asked)
    if asked.lectures or asked.devices_known:
        print(lectures.table() if asked.lectures else hardware.table(asked.hardware))
        return FINISHED
    if not asked.config:
        raise UserError("There is no --config: give an experiment's file, configs/NAME.py.")
    plan = _made(asked, Source(asked.config, tuple(overrides)))
    if asked.schedule:
        timetable.show(plan.experiment, html_file=asked.html, json_file=asked.json)
        _tell_written(asked)
        return FINISHED
    for wanted, section in sections(asked):
        if wanted:
            section(plan)
    for note in plan.experiment.notes:
        print(f"note: {note}")
    _write(plan)
    return plan.code


def sections(asked: Any) -> list[tuple[Any, Callable[[Plan], None]]]:
    """(whether, what) of a plan, in their order."""
    alone = asked.search or asked.remat_table
    compiles = asked.target and not alone and not asked.analytic and not _span(asked)
    return [
        (not alone or _span(asked), counted),
        (asked.target and not alone, closed_forms),
        (compiles, compiled_step),
        (asked.collectives and not asked.target, exchanged),
        (asked.shardings, shardings),
        (asked.groups, lambda plan: print(groups.table(plan.experiment.parameter_groups))),
        (asked.remat_table, remat_table),
        (asked.search, searched),
        (_span(asked), scaled),
        (asked.mtbf_device_hours, failures),
    ]


def check(asked: Any) -> None:
    """Raises `UserError` for flags that cannot be meant."""
    for flag in ("json", "html"):
        file = getattr(asked, flag)
        if file and (file.is_dir() or not os.access(file.parent, os.W_OK)):
            raise UserError(f"--{flag}={file} cannot be written: name a file in a folder there is.")
    if asked.depth < 0:
        raise UserError(f"--depth={asked.depth} must be at least 0.")
    if asked.devices and not int(asked.devices if asked.devices.isdecimal() else 1):
        raise UserError(f"--devices={asked.devices} must be at least 1.")
    if _span(asked):
        scaling.counts(asked.devices)
    for flag in ("memory_gib", "price_per_device_hour", "mtbf_device_hours"):
        value = getattr(asked, flag)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{flag.replace('_', '-')}={value} must be a positive number.")
    if asked.hardware and not asked.target and not asked.devices_known:
        raise UserError(f"--hardware={asked.hardware} needs a --target that names one of its rows.")
    if (_span(asked) or asked.search) and not asked.target:
        raise UserError("--search and --devices N..M need a --target, such as gpu:h100:8x8.")
    if asked.analytic and not asked.target:
        raise UserError("--analytic needs a --target, such as gpu:h100:8x8: times are of a device.")


def _span(asked: Any) -> bool:
    """Whether --devices has several numbers, `8..65536`."""
    return not (asked.devices or "0").isdecimal()


def _made(asked: Any, source: Source) -> Plan:
    target = hardware.parse(asked.target, asked.hardware) if asked.target else None
    limit = round(asked.memory_gib * 2**30) if asked.memory_gib else None
    devices = int(asked.devices) if asked.devices and not _span(asked) else None
    if target and devices not in (None, target.count):
        raise UserError(
            f"--devices={devices} and --target={asked.target}, which has {target.count}, differ: "
            "leave one out."
        )
    devices = devices or (target and target.count)
    if asked.collectives and not target:
        devices = collectives.devices(devices or mesh.num_devices(source.field("mesh")))
    elif source.field("partitioner") != "pmap":  # which there is on real devices alone
        devices = devices or mesh.num_devices(source.field("mesh"))
    if asked.search:  # which has meshes of its own
        source = source.varied(mesh="data=-1", dcn_mesh="")
    if remat_choice.is_auto(source.field("remat")):
        source = source.varied(remat=_chosen(asked, source, target, limit))
    return Plan(asked, source, target, limit, source.build(devices))


def _chosen(asked: Any, source: Source, target: hardware.Target | None, limit: int | None) -> str:
    """The policy that `remat='auto'` stands for on the target."""
    if target is None:
        raise UserError("remat='auto' is chosen for a device: give a --target, or a policy.")

    def needed(policy: str) -> int | None:
        one = source.varied(remat=policy)
        text, file = target.text, asked.hardware
        return fit.needed_bytes(compiled.ask(one.file, one.overrides, text, file=file))

    return remat_choice.choose(
        lambda policy: source.varied(remat=policy).build(target.count),
        needed,
        devices=target.count,
        limit_bytes=remat_choice.limit_of(source.field("remat")) or limit or target.memory_bytes,
    )


# The sections


def counted(plan: Plan) -> None:
    """Parameters, FLOPs and bytes, module by module."""
    experiment = plan.experiment
    padding = tree.vocabulary_padding(experiment.placements, experiment.module)
    state, batch = experiment.abstract_state, experiment.abstract_batch
    given = dict(root=type(experiment.module).__name__, batch_size=experiment.batch_size)
    forward = experiment.eval_step.trace(state, batch)
    model = totals.make_model(experiment.name, state.params, forward, padding=padding, **given)
    step = experiment.train_step.trace(state, batch)
    plan.numbers |= totals.make_plan(model, step, experiment)
    table = tree.table(model, depth=plan.asked.depth)
    plan.say("Counted", table, totals.summary(plan.numbers))


def closed_forms(plan: Plan) -> None:
    """Memory, traffic, time and cost by closed forms."""
    price = plan.asked.price_per_device_hour
    found = analytic.estimate(plan.experiment, plan.target, price_per_device_hour=price)
    plan.numbers["analytic"] = found
    plan.say("Closed forms", analytic.table(found))
    if found["memory"]["fits"] is False:
        plan.code = DOES_NOT_FIT


def compiled_step(plan: Plan) -> None:
    """What the target's compiler makes of the step, and whether it fits."""
    source, file = plan.source, plan.asked.hardware
    answer = compiled.ask(source.file, source.overrides, plan.target.text, file=file)
    plan.numbers |= answer
    plan.say("Compiled", fit.table(answer, plan.limit_bytes))
    fits = fit.verdict(answer, plan.limit_bytes)
    if fits is not None:  # it knows better than the closed forms
        plan.code = FINISHED if fits else DOES_NOT_FIT


def exchanged(plan: Plan) -> None:
    """The bill of the step compiled for CPU devices."""
    plan.numbers["collectives"] = collectives.of_experiment(plan.experiment)
    print(collectives.table(plan.numbers["collectives"]))


def shardings(plan: Plan) -> None:
    experiment = plan.experiment
    print(inspect.table(experiment.placements, experiment.mesh), *experiment.lint, sep="\n")


def remat_table(plan: Plan) -> None:
    """Every remat policy's memory and FLOPs."""
    target = plan.target or hardware.parse(f"cpu:{plan.experiment.mesh.size}")
    rows = remat_choice.rows(
        plan.source, target, limit_bytes=plan.limit_bytes, file=plan.asked.hardware
    )
    plan.numbers["remat"] = rows
    print(remat_choice.table(rows))
    plan.parts.append(remat_choice.section(rows))


def searched(plan: Plan) -> None:
    """The layouts for the target, ranked."""
    asked = plan.asked
    fields = dict(limit_bytes=plan.limit_bytes, file=asked.hardware)
    if asked.analytic:
        fields["most"] = 0
    found = search.run(plan.source, plan.target, **fields)
    plan.numbers["search"] = found
    print(search.table(found))
    best = found[0]
    if not (best["fits"] or (asked.analytic and not best["reason"])):
        plan.code = DOES_NOT_FIT
    plan.parts.append(search.section(found))


def scaled(plan: Plan) -> None:
    """How throughput and MFU change with the number of devices."""
    experiment, target = plan.experiment, plan.target
    units = experiment.batch_size * experiment.task.units_per_example
    found = scaling.make(
        scaling.work_of(plan.numbers, experiment),
        target.device,
        devices=scaling.counts(plan.asked.devices),
        units_per_device=units / target.count,
        units_per_step=units,
    )
    plan.numbers["scaling"] = found
    curves = (published.compare(curve) for curve in published.of(target.device))
    plan.say("Scaling", scaling.table(found), *map(published.table, curves))
    picture = scaling.figure(found, published.overlay(target.device))
    svg = picture.svg(prefix="scaling", themed=True)
    plan.parts.append(page.row(page.figure(svg, many=True)))


def failures(plan: Plan) -> None:
    """What failures of devices cost, and how often to save."""
    experiment = plan.experiment
    step_s = (plan.numbers.get("analytic") or {}).get("step_s")
    found = goodput.make(
        devices=experiment.mesh.size,
        mtbf_device_hours=plan.asked.mtbf_device_hours,
        state_bytes=tree.whole_bytes(experiment.abstract_state),
        step_s=step_s and step_s[1],
    )
    plan.numbers["goodput"] = found
    plan.say("Failures", goodput.table(found), goodput.llama3_table())


def _write(plan: Plan) -> None:
    asked, experiment = plan.asked, plan.experiment
    if asked.html:
        asked.html.write_text(_page(plan))
    if asked.json:
        head = {"name": experiment.name, "mesh": dict(experiment.mesh.shape)}
        write_json(asked.json, {**head, **plan.numbers, "versions": versions()})
    _tell_written(asked)


def _tell_written(asked: Any) -> None:
    for file in filter(None, (asked.html, asked.json)):
        print(f"written: {file}")


def _page(plan: Plan) -> str:
    if not plan.asked.shardings and (plan.target or plan.asked.remat_table):
        return page.document(f"{plan.experiment.name}: plan", *plan.parts)
    return inspect.page(plan.experiment)
