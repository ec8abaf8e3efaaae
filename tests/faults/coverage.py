"""Which test proves which row of `threats.toml`: read from the marks, without running a test."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def threats() -> list[dict]:
    """The rows of `threats.toml`, in order."""
    return tomllib.loads((TESTS / "faults" / "threats.toml").read_text())["threat"]


def marked(folder: Path = TESTS) -> list[tuple[int, str, bool]]:
    """(number, test, whether it runs in `make faults`) of every mark below `folder`."""
    return [mark for path in sorted(folder.rglob("test_*.py")) for mark in _of_file(path, folder)]


def _of_file(path: Path, folder: Path) -> Iterator[tuple[int, str, bool]]:
    tree = ast.parse(path.read_text())
    common = [d for node in tree.body if _is_pytestmark(node) for d in _listed(node.value)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [*common, *node.decorator_list, *_of_cases(node.decorator_list)]
            long = any(_name(mark) == "faults" for mark in marks)
            for number in sorted({n for mark in marks for n in _numbers(mark, path)}):
                yield number, f"{path.relative_to(folder)}::{node.name}", long


def _is_pytestmark(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"


def _listed(node: ast.expr) -> list[ast.expr]:
    return node.elts if isinstance(node, ast.List | ast.Tuple) else [node]


def _of_cases(decorators: list[ast.expr]) -> Iterator[ast.expr]:
    """Marks of single cases: `pytest.param(..., marks=...)`."""
    for decorator in decorators:
        for node in ast.walk(decorator):
            if isinstance(node, ast.keyword) and node.arg == "marks":
                yield from _listed(node.value)


def _name(mark: ast.expr) -> str:
    """`faults` of `pytest.mark.faults`, called or not."""
    text = ast.unparse(mark.func if isinstance(mark, ast.Call) else mark)
    return text.removeprefix("pytest.mark.") if text.startswith("pytest.mark.") else ""


def _numbers(mark: ast.expr, path: Path) -> list[int]:
    if _name(mark) != "threat":
        return []
    if not isinstance(mark, ast.Call) or mark.keywords or not mark.args:
        raise ValueError(f"{path}:{mark.lineno}: write pytest.mark.threat(number, ...)")
    return [ast.literal_eval(argument) for argument in mark.args]
