"""What the user should know about a run before it starts: the lines below its heading."""

import itertools
from collections.abc import Sequence

from ml_collections import ConfigDict

from lsdl import recipe
from lsdl import step as steps
from lsdl.data.ramp import Ramp
from lsdl.sharding.placement import Placement


def of_run(
    config: ConfigDict, ramp: Ramp, model_state: dict, placements: Sequence[Placement]
) -> tuple[str, ...]:
    """One sentence each: ramps, a scaled rate, statistics of microbatches, stacks, small arrays."""
    notes = _of_ramp(config, ramp)
    schedule = config.optim.schedule
    if schedule.scaling != "none":
        notes.append(
            f"The peak rate is {recipe.scaled_peak(config):.6g}: {schedule.peak:g} scaled "
            f"({schedule.scaling}) from a batch of {schedule.base_batch} to {config.batch_size}."
        )
    if model_state.keys() - {steps.TEACHER} and (config.accum > 1 or config.batch_ramp):
        what = f"accum={config.accum}" if config.accum > 1 else "a batch_ramp"
        notes.append(
            f"BatchNorm with {what} normalises over microbatches of "
            f"{config.batch_size // config.accum}: a different experiment from whole batches."
        )
    if "scan_layers" in config.model and config.model.scan_layers:
        notes += [
            f"With scan_layers the layers' parameters are stacked, and {what}: a different "
            "experiment from scan_layers=false."
            for what in _of_stacks(config.optim)
        ]
    missed = [p for p in placements if p.missed]
    missed = [p for p in missed if p.path.startswith("params/")] or missed
    if missed:
        notes.append(
            f"{len(missed)} small arrays are replicated where the rules would split them, "
            f"the first: {missed[0].path} {missed[0].shape}, {missed[0].missed}."
        )
    return tuple(notes)


def _of_ramp(config: ConfigDict, ramp: Ramp) -> list[str]:
    """One for each change of the batch size."""
    return [
        f"batch {before.batch_size:,} -> {after.batch_size:,} from step {after.first_step + 1:,} "
        f"of {ramp.total_steps:,} on (accum {config.accum * before.factor} -> "
        f"{config.accum * after.factor}), after {after.first_example:,} of "
        f"{ramp.total_examples:,} examples."
        for before, after in itertools.pairwise(ramp.phases)
    ]


def _of_stacks(optim: ConfigDict) -> list[str]:
    """What takes a stack of layers for one array."""
    shared = {
        "lars": "one trust ratio",
        "lamb": "one trust ratio",
        "adafactor": "one size and one clipping",
    }
    found = [
        f"{name} has {shared[name]} for each stack"
        for name in (optim.name, optim.switch.name)
        if name in shared
    ]
    if optim.clip_norm and optim.clip_form == "block_rms":
        found.append("clip_form=block_rms clips each stack as one")
    return found
