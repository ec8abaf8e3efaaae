"""Runs a notebook as Jupyter would: `python tests/notebook.py FILE`, its folder the working one.

Each exercise's check, a cell that calls `check(NAME, ...)`, runs as it stands and then with every
answer of `solutions.py`: it has to refuse each wrong one, and accept the right ones.
"""

import ast
import json
import linecache
import os
import runpy
import sys
from pathlib import Path


def show(value):
    """What Jupyter does with a cell's last value."""
    if value is not None:
        print(value._repr_html_() if hasattr(value, "_repr_html_") else repr(value))


def execute(source, name, namespace):
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    body = ast.parse(source, name).body
    last = [body.pop()] if body and isinstance(body[-1], ast.Expr) else []
    exec(compile(ast.Module(body, []), name, "exec"), namespace)
    exec(compile(ast.Interactive(last), name, "single"), namespace)


def exercises(source):
    """The variables whose values the cell checks."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check":
            yield node.args[0].id


def refusal(source, name, namespace):
    try:
        execute(source, name, namespace)
    except AssertionError as error:
        return str(error)
    return ""


def main(file):
    os.chdir(file.parent)
    sys.displayhook = show
    cells = json.loads(file.read_text())["cells"]
    solutions = runpy.run_path("solutions.py")["SOLUTIONS"].get(file.stem, {})
    namespace, checked = {"__name__": "__main__"}, []
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        source, name = "".join(cell["source"]), f"{file.name}, cell {cell['id']}"
        execute(source, name, namespace)
        for exercise in exercises(source):
            blank, (right, wrong) = namespace[exercise], solutions[exercise]
            assert set(blank.values()) == {None}, f"{exercise} is solved in the notebook"
            namespace[exercise] = wrong
            found = refusal(source, name, namespace)
            assert all(f"{part} = " in found for part in blank), f"{exercise} passes: {found}"
            namespace[exercise] = right
            execute(source, name, namespace)
            namespace[exercise] = blank
            checked.append(exercise)
    assert checked == list(solutions), f"{checked} were checked of {list(solutions)}"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
