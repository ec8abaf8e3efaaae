"""docs/reference.md from the code and docs/reference.toml: python docs/reference.py.

Fields, types and defaults are those of the code; the meaning of a config's field is the comment
beside it in lsdl/schema.py. A test compares the document with what is made here.
"""

import ast
import inspect
import tomllib
from pathlib import Path

from lsdl import components, schema
from lsdl.config import RESUMABLE, flatten, template

HERE = Path(__file__).parent
TABLE = HERE / "reference.toml"
DOCUMENT = HERE / "reference.md"
GROUPS = {  # of the fields' names, in the order of the document
    "": "The run",
    "data": "Data",
    "loss": "Loss",
    "optim": "Optimiser",
    "optim.switch": "A second optimiser",
    "optim.schedule": "Schedule",
    "guard": "Guard",
    "eval": "Evaluation",
    "checkpoint": "Checkpoints",
    "log": "Logging",
}
# Which group each function of lsdl/schema.py fills.
FILLS = {
    **{"template": "", "_loss": "loss", "_guard": "guard", "_evaluation": "eval", "_data": "data"},
    **{"_optim": "optim", "_schedule": "optim.schedule"},
}


def read() -> dict:
    return tomllib.loads(TABLE.read_text())


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """A Markdown table, with a | inside a cell as Markdown wants it."""
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines]


def comments(source: str) -> dict[str, str]:
    """{field: what the comments above and behind its line say}, in the order of the schema."""
    lines, found = source.splitlines(), {}
    for function in ast.parse(source).body:
        group = FILLS.get(getattr(function, "name", None))
        if group is None:
            continue
        for node in function.body:
            if name := _field(node, group, lines[node.lineno - 1]):
                above = node.lineno - 2
                while lines[above].strip().startswith("#"):
                    above -= 1
                told = [line.strip(" #") for line in lines[above + 1 : node.lineno - 1]]
                # Within one line a # is in no string of the schema.
                told.append(lines[node.end_lineno - 1].partition("  # ")[2])
                found[name] = " ".join(filter(None, (found.get(name, ""), *told)))
    return found


def _field(node: ast.stmt, group: str, line: str) -> str:
    """The field, or the duration, that a statement of `group` makes; "": none."""
    if isinstance(node, ast.Expr) and line.strip().startswith("_durations("):
        owner, name = node.value.args
        return ".".join(filter(None, (_group(owner, group), name.value)))
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
        target = node.targets[0]
        return ".".join(filter(None, (_group(target.value, group), target.attr)))
    return ""


def _group(owner: ast.expr, group: str) -> str:
    """`optim.switch` of the expression `optim.switch` in the function that fills `optim`."""
    inner = ast.unparse(owner).partition(".")[2]
    return ".".join(filter(None, (group, inner)))


def fields() -> dict[str, tuple[str, str, str]]:
    """{field: (type, default, meaning)} of every field of the template, in the schema's order."""
    config, told = template(), comments(inspect.getsource(schema))
    values, found = flatten(config), {}
    order = [field for field in told if field in values]
    for field in (*order, *sorted(values.keys() - order)):
        value = values[field]
        group, _, leaf = field.rpartition(".")
        node = config
        for name in filter(None, group.split(".")):
            node = node[name]
        kind = node.get_type(leaf)
        default = "none" if value is None else f"`{value!r}`"
        name = "str or pairs" if kind is object else kind.__name__
        found[field] = name, default, told.get(field, "")
    return found


def durations() -> dict[str, tuple[str, ...]]:
    """{duration: its fields}, one for each unit."""
    have = flatten(template())
    names = (*schema.DURATIONS, *schema.OPTIONAL_DURATIONS)
    return {
        name: tuple(f"{name}_{unit}" for unit in schema.UNITS if f"{name}_{unit}" in have)
        for name in names
    }


def config_section(texts: dict) -> list[str]:
    """A table for each group of fields, each with its durations below."""
    spelled, told = durations(), comments(inspect.getsource(schema))
    single = {f for f in fields() if not any(f in names for names in spelled.values())}
    lines = []
    for group, title in GROUPS.items():
        rows = [
            (f"`{field}`", kind, default, meaning, "yes" if RESUMABLE.match(field) else "")
            for field, (kind, default, meaning) in fields().items()
            if field in single and _owner(field) == group
        ]
        for name, names in spelled.items():
            if _owner(name) == group:
                units = ", ".join(field.removeprefix(f"{name}_") for field in names)
                meaning = texts["durations"].get(name) or told[name]
                free = "yes" if RESUMABLE.match(names[0]) else ""
                rows.append((f"`{name}_*`", "duration", "none", f"{meaning} ({units})", free))
        lines += ["", f"### {title}", ""]
        lines += table(("field", "type", "default", "meaning", "may change"), rows)
    return lines


def _owner(field: str) -> str:
    group = field.rpartition(".")[0]
    return "" if group == "model" else group


def models_section(texts: dict) -> list[str]:
    """The fields of each model's class: all that its config has to give."""
    lines = []
    for name in components.MODELS:
        parameters = inspect.signature(components.model_class(name)).parameters
        own = {n: p for n, p in parameters.items() if n not in components.FILLED}
        rows = [
            (f"`model.{n}`", _kind(p.annotation), _default(p), _meaning(texts, name, n))
            for n, p in own.items()
        ]
        lines += ["", f"### {name}", "", texts["about"][name], ""]
        lines += table(("field", "type", "in the class", "meaning"), rows)
    return lines


def _kind(annotation) -> str:
    return annotation.__name__ if annotation in (bool, int, float, str) else str(annotation)


def _default(parameter: inspect.Parameter) -> str:
    given = parameter.default is not inspect.Parameter.empty
    return f"`{parameter.default!r}`" if given else "required"


def _meaning(texts: dict, model: str, field: str) -> str:
    return texts["own"].get(model, {}).get(field) or texts["fields"].get(field, "")


def tasks_section(texts: dict) -> list[str]:
    rows = [
        (f"`{task}`", f"`{leaf}`", texts[task]["models"], texts[task]["loss"], texts[task]["unit"])
        for task, (leaf, _) in components.TASKS.items()
    ]
    return table(("task", "the data have", "models", "loss", "a mean over"), rows)


def exit_codes(texts: dict) -> dict[int, tuple[str, str]]:
    return {int(code): (row["when"], row["do"]) for code, row in texts["exit_codes"].items()}


def document(texts: dict) -> str:
    codes = [(str(code), when, do) for code, (when, do) in exit_codes(texts).items()]
    metrics = [
        (f"`{name}`", row["unit"], row["rows"], row["meaning"])
        for name, row in texts["metrics"].items()
    ]
    files = [(f"`{name}`", meaning) for name, meaning in texts["run_folder"].items()]
    lines = [
        *texts["introduction"].strip().splitlines(),
        *("", "## What a step is", "", *texts["step"].strip().splitlines()),
        *("", "## Config fields", "", *texts["config"].strip().splitlines()),
        *config_section(texts),
        *("", "## Tasks", "", *tasks_section(texts["tasks"])),
        *("", "## Fields of models", "", *texts["models"]["introduction"].strip().splitlines()),
        *models_section(texts["models"]),
        *("", "## Metrics", "", *texts["metrics_introduction"].strip().splitlines(), ""),
        *table(("column", "unit", "rows", "what it is"), metrics),
        *("", "## Run folder", "", *table(("file", "what is in it"), files)),
        *("", *texts["run_folder_note"].strip().splitlines()),
        *("", "## Exit codes", "", *table(("code", "when", "what to do"), codes)),
        *("", *texts["exit_codes_note"].strip().splitlines()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(document(read()))
