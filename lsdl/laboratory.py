"""The laboratory: finds the studies, measures their cells, and writes down how the claims stand.

A study's folder holds

    cells/ID.json   a cell that is done: its definition, its row, its seconds
    cells/ID/       what `measure` keeps there, such as runs
    table.csv       all rows
    verdict.json    the claims, and what they were measured with
    figures/*.svg
    report.html
"""

import csv
import dataclasses
import importlib
import io
import json
import math
import os
import pkgutil
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from tqdm import tqdm

from lsdl import book, rundir, verdict
from lsdl.errors import UserError, nearest
from lsdl.studies.claim import Cell, Claim, Expected

studies = importlib.import_module("lsdl.studies")  # the folder of all of them
SEEDS = 3
ID = re.compile(r"[A-Za-z0-9_=][A-Za-z0-9._=+-]*")


@dataclass(frozen=True)
class Outcome:
    """A study that was measured."""

    name: str
    claims: Sequence[Claim]
    measured: int  # cells, in this run
    cells: int
    seconds: float  # of all cells, whenever they were measured
    folder: Path


def names() -> list[str]:
    """The studies: the modules of the package that write down what they expect."""
    found = sorted(module.name for module in pkgutil.iter_modules(studies.__path__))
    return [name for name in found if hasattr(_module(name), "EXPECTED")]


def find(name: str) -> ModuleType:
    """The study's module; `UserError` if there is none, or nothing to measure in it."""
    known = names()
    if name not in known:
        raise UserError(f"There is no study {name!r}: {nearest(name, known)}")
    study = _module(name)
    if not hasattr(study, "cells"):
        raise UserError(f"The study {name!r} has its bounds alone: nothing measures it yet.")
    return study


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"{studies.__name__}.{name}")


def bounds(name: str) -> dict[str, Expected]:
    """What is expected of the study's claims, those of its slow cells last."""
    study = _module(name)
    return {**study.EXPECTED, **getattr(study, "SLOW", {})}


def complete() -> list[str]:
    """The studies that can be measured."""
    return [name for name in names() if hasattr(_module(name), "cells")]


def slow_cells(name: str, seeds: int) -> list[Cell]:
    """What takes minutes each, and is measured on demand; none for most studies."""
    study = find(name)
    return study.cells("slow", seeds) if hasattr(study, "SLOW") else []


def inventory(seeds: int) -> str:
    """Each study with its claim, its source and what it measures."""
    lines = []
    for name in names():
        study = _module(name)
        size = "bounds alone, nothing measures it yet"
        if hasattr(study, "cells"):
            cells, runs = (len(study.cells(scale, seeds)) for scale in ("small", "full"))
            size = f"{cells} cells, {len(study.EXPECTED)} claims, {runs} runs at full scale"
            late = len(slow_cells(name, seeds))
            size += f", {late} more with --slow" if late else ""
        lines += [f"{name}: {size}", f"  {study.CLAIM}", f"  {study.SOURCE}"]
    return "\n".join(lines)


def full_scale(name: str, seeds: int, root: Path) -> list[dict[str, str]]:
    """What to run on accelerators for each cell, and the published number."""
    entries = []
    for cell in find(name).cells("full", seeds):
        command = ""
        if cell.config:
            file, _, variant = cell.config.partition(":")
            file = file if file.endswith(".py") else f"configs/{file}.py"
            words = ["--config", file + (f":{variant}" if variant else "")]
            words += [f"--config.{field}={value}" for field, value in cell.overrides.items()]
            words += ["--workdir", str(root / name / "full" / cell.id)]
            command = f"python -m lsdl.train {shlex.join(words)}"
        settings = ", ".join(f"{k}={v}" for k, v in cell.settings.items())
        entry = {"id": cell.id, "settings": settings, "command": command}
        entries.append(entry | {"published": cell.published})
    return entries


def run(name: str, root: Path, *, seeds: int, slow: bool = False) -> Outcome:
    """Measure what is not measured yet; then write the table, the verdict and the report.

    The study's slow cells are left out unless `slow`, or if they were all measured before.
    """
    study = find(name)
    cells, late = study.cells("small", seeds), slow_cells(name, seeds)
    done = root / name / "cells"
    slow = slow or all(_stored(done / f"{cell.id}.json", _definition(cell)) for cell in late)
    cells = [*cells, *late] if slow else cells
    ids = [cell.id for cell in cells]
    wrong = [id for id in ids if not ID.fullmatch(id) or ids.count(id) > 1]
    if wrong or not ids:
        raise ValueError(f"{name}: cells without an id that is a file's name, their own: {wrong}")
    folder = rundir.RunDir(root / name)
    folder.create()
    folder.acquire()
    try:
        (folder.path / "cells").mkdir(exist_ok=True)
        records, measured = _measure(study, name, cells, folder.path / "cells")
        table = [
            {**cell.settings, **record["row"], "id": cell.id, "seconds": record["seconds"]}
            for cell, record in zip(cells, records, strict=True)
        ]
        claims = study.claims(table)
        _check(name, bounds(name) if slow else study.EXPECTED, claims)
        seconds = sum(record["seconds"] for record in records)
        outcome = Outcome(name, claims, measured, len(cells), seconds, folder.path)
        facts = {"seeds": seeds, "cells": len(cells), "measured_s": seconds}
        facts["commits"] = sorted({str(record["commit"]) for record in records})
        facts["full_scale"] = full_scale(name, seeds, root)
        _write(study, outcome, table, facts)
    finally:
        folder.release()
    return outcome


def _measure(study: ModuleType, name: str, cells: Sequence[Cell], folder: Path):
    """The record of each cell, and how many were measured now."""
    definitions = [_definition(cell) for cell in cells]
    records = [
        _stored(folder / f"{cell.id}.json", definition)
        for cell, definition in zip(cells, definitions, strict=True)
    ]
    missing = [i for i, record in enumerate(records) if record is None]
    commit = rundir.commit()
    with tqdm(
        total=len(cells),
        initial=len(cells) - len(missing),
        desc=name,
        unit="cell",
        mininterval=0.2 if sys.stderr.isatty() else 5.0,
        dynamic_ncols=True,
    ) as bar:
        for i in missing:
            cell = cells[i]
            bar.set_postfix_str(cell.id, refresh=sys.stderr.isatty())
            own = _own_folder(folder / cell.id, definitions[i])
            began = time.perf_counter()
            row = _plain(study.measure(cell, own))
            seconds = time.perf_counter() - began
            if twice := row.keys() & {*cell.settings, "id", "seconds"}:
                raise ValueError(f"{name}: {cell.id} measures what it is given: {twice}")
            record = {"definition": definitions[i], "row": row, "seconds": seconds}
            records[i] = {**record, "time": rundir.now(), "commit": commit}
            rundir.write_json(folder / f"{cell.id}.json", records[i])
            if [path.name for path in own.iterdir()] == ["cell.json"]:  # it kept nothing there
                shutil.rmtree(own)
            bar.update()
    return records, len(missing)


def _definition(cell: Cell) -> dict:
    return json.loads(json.dumps(_plain(dataclasses.asdict(cell))))


def _stored(file: Path, definition: dict) -> dict | None:
    """The record of a cell that is done; None if it is not, or was another."""
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        same = record["definition"] == definition
        record["row"], record["seconds"], record["commit"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is not what a study writes ({error!r}): remove it, or choose another "
            "--workdir."
        ) from error
    return record if same else None


def _own_folder(folder: Path, definition: dict) -> Path:
    """The cell's folder: as an interrupted run of this very cell left it, or new."""
    mark = folder / "cell.json"
    if folder.exists() and not (mark.exists() and json.loads(mark.read_text()) == definition):
        shutil.rmtree(folder)
    folder.mkdir(exist_ok=True)
    rundir.write_json(mark, definition)
    return folder


def _plain(value: Any) -> Any:
    """`value` without arrays and tuples, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    return value


def _check(name: str, expected: Mapping, claims: Sequence[Claim]) -> None:
    """The claims are the ones that were written down beforehand, bounds and all."""
    before = {id: (e.text, e.source, str(e)) for id, e in expected.items()}
    after = {claim.id: (claim.text, claim.source, claim.expected) for claim in claims}
    if before != after or len(claims) != len(expected):
        raise ValueError(f"{name}: the claims differ from EXPECTED")


def _write(study: ModuleType, outcome: Outcome, table: list[dict], facts: dict) -> None:
    folder = outcome.folder
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    for old in figures.glob("*.svg"):
        old.unlink()
    drawn = study.figure(table)
    for label, figure in drawn.items():
        figure.save(figures / f"{label}.svg")
    _write_text(folder / "table.csv", _csv(table))
    claims = [dataclasses.asdict(claim) for claim in outcome.claims]
    for claim in claims:  # JSON has no NaN
        claim |= {k: _finite(claim[k]) for k in ("measured", "spread")}
    found = {"study": outcome.name, "scale": "small", "claims": claims}
    found |= {"claim": study.CLAIM, "source": study.SOURCE, **facts, "figures": list(drawn)}
    found |= {"time": rundir.now(), "commit": rundir.commit(), "versions": rundir.versions()}
    found |= {"python": platform.python_version(), "platform": platform.platform()}
    rundir.write_json(folder / "verdict.json", found | {"cpu_count": os.cpu_count()})
    _write_text(folder / "report.html", verdict.study_page(folder))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _csv(table: Sequence[Mapping]) -> str:
    columns = list(dict.fromkeys(column for row in table for column in row))
    columns = [*(["id"] if table else []), *(c for c in columns if c != "id")]
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(columns)
    for row in table:
        cells = (row.get(column, "") for column in columns)
        rows.writerow(json.dumps(c) if isinstance(c, list | dict) else c for c in cells)
    return out.getvalue()


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def told(outcome: Outcome) -> str:
    """Every claim, measured beside expected, and whether it holds."""
    lines = []
    for claim in outcome.claims:
        word = "HOLDS" if claim.holds else "DOES NOT HOLD"
        spread = f" +- {claim.spread:.2g}" if claim.n > 1 else ""
        number = f"{claim.measured:.6g}{spread} (n={claim.n})"
        lines.append(f"{word:14} {claim.id}: {number}, expected {claim.expected}")
        lines.append(f"{'':14} {claim.text}")
    held = sum(claim.holds for claim in outcome.claims)
    lines.append(
        f"{outcome.name}: {held} of {len(outcome.claims)} claims hold; cells: {outcome.cells}, "
        f"{outcome.measured} of them measured now, {outcome.seconds:.1f} s in all"
    )
    return "\n".join([*lines, f"written: {outcome.folder / 'report.html'}"])


def summary(outcomes: Sequence[Outcome], failed: Mapping[str, Exception]) -> str:
    """One line for each study."""
    width = max((len(name) for name in [*(o.name for o in outcomes), *failed, "study"]), default=0)
    lines = [f"{'study':{width}}  claims  hold  {'seconds':>9}  which do not hold"]
    for o in outcomes:
        lost = ", ".join(claim.id for claim in o.claims if not claim.holds)
        held = sum(claim.holds for claim in o.claims)
        line = f"{o.name:{width}}  {len(o.claims):6}  {held:4}  {o.seconds:9.1f}  {lost}"
        lines.append(line.rstrip())
    lines += [f"{name:{width}}  failed: {error!r}" for name, error in failed.items()]
    return "\n".join(lines)


def run_all(chosen: Sequence[str], root: Path, *, seeds: int, slow: bool = False, say=print):
    """Run the studies one after another: ([Outcome], {name: Exception}); none stops the others."""
    import traceback

    outcomes, failed = [], {}
    for name in chosen:
        try:
            outcomes.append(run(name, root, seeds=seeds, slow=slow))
        except UserError:
            raise
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            failed[name] = error
        else:
            say(told(outcomes[-1]))
    return outcomes, failed


def told_full(name: str, seeds: int, root: Path) -> str:
    """The commands of a study at full scale, each below its published number."""
    lines = [f"{name}: {find(name).CLAIM}"]
    for entry in full_scale(name, seeds, root):
        head = f"{entry['id']} {entry['settings']}".strip()
        lines += [f"# {head}: published {entry['published'] or 'nowhere'}"]
        lines += [entry["command"]] if entry["command"] else []
    return "\n".join(lines if len(lines) > 1 else [*lines, "# nothing to run at full scale"])


def write_book(
    outcomes: Sequence[Outcome],
    failed: Mapping[str, Exception],
    root: Path,
    *,
    results: Path | None = None,
) -> list[Path]:
    """The page of all studies, and if asked for the same table in Markdown as `results`."""
    folders = [outcome.folder for outcome in outcomes]
    root.mkdir(parents=True, exist_ok=True)
    texts = {root / "report.html": book.book(folders, failed=failed)}
    if results is not None:
        command = f"python -m lsdl.study all --results {results}"
        texts[results] = book.results(folders, command=command)
    for file, text in texts.items():
        try:
            _write_text(file, text)
        except OSError as error:
            raise UserError(f"{file} cannot be written ({error.strerror}).") from error
    return list(texts)
