"""Replay of audited steps from a run's own checkpoint: the same bits, or the first step without."""

from lsdl import auditing
from lsdl.checkpoint import Checkpoints
from lsdl.course import SKIPS, initial
from lsdl.data import skip
from lsdl.errors import StuckError, UserError
from lsdl.experiment import Experiment
from lsdl.rundir import RunDir


def replay(experiment: Experiment, folder: RunDir, *, first: int, last: int) -> list[int]:
    """Train the steps up to `last` again and compare the audited ones from `first` on.

    From the newest checkpoint before them, or from the start if it is gone. Returns the steps that
    were compared. Raises `StuckError` for a broken chain, and for the first step that differs,
    naming what does; `UserError` if nothing can be compared.
    """
    rows = [row for row in auditing.read(folder.audit) if first <= row["step"] <= last]
    if not rows:
        raise UserError(
            f"{folder.audit} has no row of the steps {first} to {last}: a run with "
            "guard.audit_every_steps writes them."
        )
    for row in rows:
        if row["layout"] != experiment.layout:
            raise UserError(
                f"Step {row['step']:,} was trained on another mesh, with other processes, devices "
                "or versions than these (see config.json's history, env.json): its bits are not to "
                "be had here."
            )
    with Checkpoints(folder.checkpoints) as checkpoints:
        newest = checkpoints.latest_step()
        noted = checkpoints.notes(newest).get(SKIPS, ()) if newest else ()
        start = checkpoints.newest(at_most=rows[0]["step"] - 1) if rows[0]["step"] > 1 else None
        state = initial(experiment, checkpoints, start or 0)
    loader = experiment.train_loader(skip.joined(experiment.skip_batches, noted))
    record, wanted = auditing.recorder(experiment), {row["step"]: row for row in rows}
    batches = loader.batches(start or 0, rows[-1]["step"])
    for step, batch in enumerate(batches, start=(start or 0) + 1):
        program = next(p for p in reversed(experiment.phases) if p.first_step < step).train_step
        state, metrics = program(state, batch)
        if step in wanted:
            found = auditing.row(
                step, loader.identities(step - 1), metrics["loss"], record(state), experiment.layout
            )
            _compare(wanted[step], found)
    return sorted(wanted)


def _compare(row: dict, found: dict) -> None:
    wrong = [name for name in auditing.COMPARED if row[name] != found[name]]
    if wrong:
        raise StuckError(
            f"Step {row['step']:,} is not what it was: {', '.join(wrong)} differ "
            f"({wrong[0]} {row[wrong[0]][:16]} then, {found[wrong[0]][:16]} in the replay)."
        )
