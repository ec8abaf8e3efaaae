"""How a run moves its parameters, from the config: schedule, optimiser, batch ramp, guard."""

from typing import Any

import optax
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from lsdl import guard
from lsdl.checks import choice
from lsdl.components import CONVEX
from lsdl.config import duration_steps, template, to_steps
from lsdl.data import ramp, skip
from lsdl.data.ramp import Ramp
from lsdl.data.skip import Skips
from lsdl.errors import UserError
from lsdl.optim import chain, schedules, wrappers
from lsdl.optim.conditions import Conditions, conditions


def make_ramp(config: ConfigDict, *, examples: int, units: dict) -> Ramp:
    """`examples`: of the training split; `units`: as in `make_schedule`, without the ramp."""
    rule, size = config.batch_ramp, config.batch_size
    if not rule:
        return ramp.make_ramp((), batch_size=size, examples=0, total_steps=units["total_steps"])
    if config.total_steps is not None:
        raise UserError(
            f"batch_ramp={tuple(rule)} needs total_epochs, total_examples or total_tokens: "
            f"total_steps={config.total_steps} does not say how many examples the run takes."
        )
    total = {
        "epochs": (config.total_epochs or 0.0) * examples,
        "examples": config.total_examples or 0,
        "tokens": (config.total_tokens or 0) / max(units["tokens_per_example"], 1),
    }
    made = ramp.make_ramp(rule, batch_size=size, examples=max(total.values()), total_steps=0)
    largest = max(phase.batch_size for phase in made.phases)
    if largest > examples:
        raise UserError(
            f"batch_ramp={tuple(rule)} reaches batches of {largest}, larger than the {examples} "
            "training examples."
        )
    if config.task == "contrastive":
        raise UserError(
            f"batch_ramp={tuple(rule)} must be () for task=contrastive: the larger batches come in "
            "microbatches, and its loss is no sum over them."
        )
    return made


def make_skips(config: ConfigDict) -> Skips:
    """The batches that training leaves out."""
    skips = skip.check(config.data.skip_batches)
    if skips and config.batch_ramp:
        raise UserError(
            f"data.skip_batches={tuple(config.data.skip_batches)} must be () with a batch_ramp, "
            "whose steps take other examples if some are left out."
        )
    return skips


def check_rewind(config: ConfigDict, *, every_steps: int) -> None:
    """Whether the checkpoint that a rewind wants is still there."""
    reach = (config.checkpoint.keep_latest - 1) * every_steps
    if config.guard.spike == "rewind" and config.guard.rewind_steps > reach:
        raise UserError(
            f"guard.rewind_steps={config.guard.rewind_steps} is more than {reach}, how far the "
            f"checkpoints reach back: (checkpoint.keep_latest={config.checkpoint.keep_latest} - 1) "
            f"x {every_steps} steps; keep more of them."
        )


def make_guard(config: ConfigDict, mesh: Mesh | AbstractMesh) -> guard.Rule:
    """What a step has to keep to."""
    there = isinstance(mesh, Mesh)
    if config.guard.spike == "rewind" and config.batch_ramp:
        raise UserError(
            "guard.spike=rewind must be off or skip with a batch_ramp, whose steps take other "
            "examples if some are left out."
        )
    if config.guard.window < 2:
        raise UserError(f"guard.window={config.guard.window} must be at least 2.")
    if config.guard.sigmas <= 0:
        raise UserError(f"guard.sigmas={config.guard.sigmas} must be positive.")
    return guard.Rule(
        choice("guard.spike", config.guard.spike, guard.SPIKES),
        window=config.guard.window,
        sigmas=config.guard.sigmas,
        limit=config.guard.limit,
        rewind_steps=config.guard.rewind_steps,
        branches=there and mesh.devices.flat[0].platform == "cpu",
    )


def make_schedule(config: ConfigDict, *, units: dict) -> tuple[optax.Schedule, Conditions]:
    """And which of SGD's conditions it meets; `units`: what `config.to_steps` takes."""
    schedule = config.optim.schedule
    peak = scaled_peak(config)
    warmup_steps = duration_steps(schedule, "warmup", **units, place=True)
    shape = schedules.Shape(
        end_factor=schedule.end_factor,
        low_factor=schedule.low_factor,
        power=schedule.power,
        boundaries=_boundaries(schedule, warmup_steps, units),
        step_factor=schedule.step_factor,
        decay_factor=schedule.decay_factor,
        cycle_factor=schedule.cycle_factor,
        rise_percent=schedule.rise_percent,
        period_steps=duration_steps(schedule, "period", **units),
        growth=_growth(config, peak),
    )
    made = schedules.make_schedule(
        schedule.name,
        peak=peak,
        base=schedule.peak,
        total_steps=units["total_steps"],
        warmup_steps=warmup_steps,
        warmup_form=schedule.warmup_form,
        start_factor=schedule.start_factor,
        shape=shape,
    )
    return made, conditions(schedule.name, shape)


def _growth(config: ConfigDict, peak: float) -> float:
    optim = config.optim
    if optim.schedule.name != "exp_growth":
        return 1.0
    if optim.name != "sgd":
        raise UserError(
            f"optim.schedule.name=exp_growth needs optim.name=sgd, not {optim.name}: it stands "
            "for the weight decay of SGD with momentum."
        )
    decay = optim.schedule.growth_decay
    return schedules.growth_root(peak, weight_decay=decay, momentum=optim.momentum)


def _boundaries(schedule: ConfigDict, warmup_steps: int, units: dict) -> tuple[int, ...]:
    """In steps after the warm-up."""
    (unit,) = [u for u in ("steps", "epochs") if schedule[f"boundaries_{u}"]] or ["percent"]
    places = schedule[f"boundaries_{unit}"]
    steps = [to_steps(unit, place, what="boundaries", **units, place=True) for place in places]
    if schedule.name == "step" and min(steps, default=warmup_steps) < warmup_steps:
        raise UserError(
            f"optim.schedule.boundaries_{unit}={tuple(places)} must lie after the warm-up, which "
            f"ends at {100 * warmup_steps / units['total_steps']:.3g} percent of the run."
        )
    return tuple(step - warmup_steps for step in steps)


def scaled_peak(config: ConfigDict) -> float:
    schedule = config.optim.schedule
    return schedules.scaled(
        schedule.peak,
        scaling=schedule.scaling,
        batch_size=config.batch_size,
        base_batch=schedule.base_batch,
    )


def make_optimizer(
    config: ConfigDict,
    schedule: optax.Schedule,
    *,
    units: dict[str, int],
    mesh: Mesh | AbstractMesh,
) -> optax.GradientTransformationExtraArgs:
    """`units`: as of `duration_steps`."""
    optim = config.optim
    fields = chain.fields_of(optim)
    if optim.name in chain.SOLVERS and (mesh.size > 1 or config.partitioner != "jit"):
        raise UserError(
            f"optim.name={optim.name} runs on one device, and mesh={config.mesh!r} has {mesh.size} "
            f"under partitioner={config.partitioner}: give mesh=data=1 and partitioner=jit."
        )
    if optim.name == "ggn_cg" and (config.task not in CONVEX or config.teacher):
        raise UserError(
            f"optim.name=ggn_cg needs a loss that is convex in the model's outputs, without a "
            f"teacher: task={config.task} must be one of {', '.join(CONVEX)}; or use newton_cg."
        )
    detector = _make_plateau(config, units)
    switch = _make_switch(config, units, detector)
    names = (optim.name, switch.name) if switch else (optim.name,)
    plateau = detector if optim.schedule.name == "plateau" else None
    tx = chain.make_optimizer(fields, schedule, plateau=plateau, switch=switch)
    chain.check_meaning(fields, chain.fields_of(template().optim), names)
    return tx


def parameter_groups(config: ConfigDict, params: Any) -> list[dict[str, Any]]:
    """What the optimiser does to each parameter, by the first rule that matches its path."""
    return chain.parameter_table(chain.fields_of(config.optim), params)


def _make_plateau(config: ConfigDict, units: dict[str, int]) -> wrappers.Plateau | None:
    """Of means over an epoch, or over the patience if that is shorter; None: no patience given."""
    schedule = config.optim.schedule
    needed = "optim.schedule.name=plateau" if schedule.name == "plateau" else ""
    if config.optim.switch.name and not duration_steps(config.optim.switch, "at", **units):
        needed = needed or "optim.switch.name without optim.switch.at_*"
    steps = duration_steps(schedule, "plateau_patience", **units)
    if bool(steps) != bool(needed):
        raise UserError(
            f"{needed} needs optim.schedule.plateau_patience_*, as plateau_patience_epochs=5."
            if needed
            else "optim.schedule.plateau_patience_* is given, and nothing waits for a plateau: "
            "leave it out, or choose optim.schedule.name=plateau."
        )
    if not steps:
        return None
    if not 0 < schedule.plateau_factor < 1:
        raise UserError(
            f"optim.schedule.plateau_factor={schedule.plateau_factor} must be within (0, 1)."
        )
    if schedule.plateau_threshold <= 0:
        raise UserError(
            f"optim.schedule.plateau_threshold={schedule.plateau_threshold} must be positive."
        )
    window = min(steps, units["steps_per_epoch"])
    return wrappers.Plateau(
        schedule.plateau_factor, schedule.plateau_threshold, window, round(steps / window)
    )


def _make_switch(
    config: ConfigDict, units: dict[str, int], detector: wrappers.Plateau | None
) -> wrappers.Switch | None:
    switch = config.optim.switch
    at = duration_steps(switch, "at", **units, place=True)
    if not switch.name:
        if at or switch.rate_factor != 1:
            raise UserError(
                f"optim.switch.name='' is empty, and optim.switch.rate_factor={switch.rate_factor} "
                "or optim.switch.at_* is set: name the optimiser to switch to."
            )
        return None
    if switch.rate_factor <= 0:
        raise UserError(f"optim.switch.rate_factor={switch.rate_factor} must be positive.")
    return wrappers.Switch(switch.name, switch.rate_factor, at, detector)
