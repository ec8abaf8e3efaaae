"""A run's analysis from the command line to the files that it leaves: what `lsdl.analyze` does."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lsdl import page
from lsdl.errors import UserError
from lsdl.files import check_regular, write_json, write_text
from lsdl.findings import boundary, curvature, fit, gradients, outliers, surface, volume
from lsdl.findings.found import Findings
from lsdl.findings.surface import DIRECTIONS
from lsdl.runs import Run, read_run
from lsdl.specimen import MATRICES, opened


class Kind(NamedTuple):
    """One kind of analysis."""

    measure: Callable[[Any, Any], Findings]  # (Specimen, arguments)
    # Unless it is told; 0: all that evaluation takes; None: no checkpoint is opened, and what is
    # measured is a `Run`.
    examples: int | None


# Products are dear, and points take all of a split.
KINDS = {
    "hessian": Kind(curvature.hessian, 512),
    "sharpness": Kind(curvature.sharp, 512),
    "line": Kind(surface.line, 0),
    "plane": Kind(surface.plane, 0),
    "interpolate": Kind(surface.interpolate, 0),
    "noise": Kind(gradients.noise, 512),
    "norms": Kind(gradients.norms, 512),
    "outliers": Kind(outliers.outliers, 0),
    "boundary": Kind(boundary.boundary, 0),
    "volume": Kind(volume.volume, 512),
    "diagnose": Kind(fit.diagnose, None),
}


def run(arguments: Any) -> str:
    """Measure what the command line asks for and write it; returns what to print."""
    _check(arguments)
    kind = KINDS[arguments.kind]
    if kind.examples is None:
        found_run = read_run(arguments.run)
        folder = _folder(arguments)
        found = kind.measure(found_run, arguments)
        record = {"step": found_run.last_step}
        return _written(
            found, found_run, f"{found_run.last_step:,} steps", record, arguments, folder
        )
    specimen = opened(
        arguments.run,
        step=arguments.step,
        split=arguments.split,
        examples=kind.examples if arguments.examples is None else arguments.examples,
        mesh=arguments.mesh,
    )
    if arguments.around_start:
        specimen = specimen.before_training()
    folder = _folder(arguments)
    found = kind.measure(specimen, arguments)
    about = f"step {specimen.step:,}, {specimen.examples:,} examples of {specimen.split}"
    record = {"step": specimen.step, "split": specimen.split, "examples": specimen.examples}
    return _written(found, specimen.run, about, record, arguments, folder)


def _folder(arguments: Any) -> Path:
    """Where to write, made before anything is measured."""
    folder = arguments.out or arguments.run / "analysis"
    if arguments.out is None:  # a stranger's run may hold a link to anywhere
        check_regular(folder, folder=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be made ({error.strerror}): give another --out."
        ) from error
    return folder


def _check(arguments: Any) -> None:
    for name, least in (
        ("resolution", 3),
        ("top", 1),
        ("steps", 2),
        ("starts", 1),
        ("directions", 1),
        ("seed", 0),
    ):
        given = getattr(arguments, name)
        if given is not None and given < least:
            raise UserError(f"--{name}={given} must be at least {least}.")
    if arguments.examples is not None and arguments.examples < 0:
        raise UserError(f"--examples={arguments.examples} must be at least 0, which means all.")
    if not arguments.radius > 0:
        raise UserError(f"--radius={arguments.radius:g} must be above 0.")
    if arguments.target is not None and not arguments.target > 0:
        raise UserError(f"--target={arguments.target:g} must be above 0.")
    for name, choices in (("of", MATRICES), ("direction", DIRECTIONS)):
        if getattr(arguments, name) not in choices:
            given = getattr(arguments, name)
            raise UserError(f"--{name}={given} is unknown: choose from {', '.join(choices)}.")
    if arguments.kind == "interpolate" and not (arguments.to or arguments.to_step):
        raise UserError("interpolate needs the other end: --to RUN, --to-step K, or both.")


def _written(
    found: Findings, run: Run, about: str, record: dict, arguments: Any, folder: Path
) -> str:
    """Write the JSON and the page; returns the table as text."""
    kind = arguments.kind
    try:
        record = {"kind": kind, "run": str(run.path), **record}
        write_json(folder / f"{kind}.json", record | found.values)
        drawn = [
            page.figure(figure.svg(prefix=f"g{i}", themed=True))
            for i, figure in enumerate(found.figures)
        ]
        text = page.document(
            f"{run.fields['name']}: {kind}",
            page.element("p", f"{found.lead}; {about}.", class_="lead"),
            *(page.element("p", note, class_="quiet") for note in found.notes),
            page.row(*drawn),
            page.table(found.head, found.rows),
            *found.more,
        )
        write_text(folder / f"{kind}.html", text)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --out."
        ) from error
    lines = [f"{run.fields['name']}: {found.lead}; {about}.", _table(found.head, found.rows)]
    lines += [f"note: {note}" for note in found.notes]
    return "\n".join([*lines, f"written: {folder / kind}.html and .json"])


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)
