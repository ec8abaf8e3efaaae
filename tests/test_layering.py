"""A module imports lsdl modules of lower levels only; each dependency has one door."""

import ast
import itertools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lsdl"

# Level by level; inside a package a file imports only files listed before it.
LEVELS = [
    [
        "secrecy",
        "errors",
        "files",
        "schema",
        "config",
        "state",
        "losses",
        "metrics",
        "progress",
        "compile_cache",
        "marks",
        "plots",
        "boxes",
        "page",
        "rundir",
        "commits",
        *("rendezvous", "rollcall", "launcher", "lines", "interruption", "peers", "watchdog"),
        "diagnosis",
        "exercise",
    ],
    [
        *(
            "data.folder",
            "data.shards",
            "data.readers",
            "data.digits",
            "data.tabular",
            "data.synthetic",
        ),
        *("data.captions", "data.stdlib", "data.text", "data.corpus", "data.sources"),
        *("data.part", "data.transforms", "data.dataset", "data.ramp", "data.skip"),
        *("data.permutation", "data.loader", "data.folds"),
        *("models.remat", "models.layers", "models.moe", "models.attention", "models.transformer"),
        *("models.mlp", "models.alexnet", "models.msra", "models.inception", "models.resnet"),
        *("models.efficientnet", "models.regnet"),
        *("models.vit", "models.gpt", "models.bert", "models.clip"),
        *("models.convert_rules", "models.convert_transformers", "models.convert_convnets"),
        "models.convert",
        *("optim.schedules", "optim.conditions", "optim.groups", "optim.links", "optim.wrappers"),
        *("optim.solvers", "optim.chain"),
        *("sharding.mesh", "sharding.rules", "sharding.placement", "sharding.inspect"),
        *("sharding.sequence", "sharding.splash", "sharding.pipeline"),
        *("sharding.manual", "sharding.partition"),
        *(
            "measures",
            "guard",
            "digests",
            "tasks",
            "evaluators",
            "sampling",
            "processes",
            "weights",
        ),
    ],
    ["saving", "step"],
    ["checkpoint"],
    [
        *("planner.count", "planner.chain", "planner.tree", "planner.totals", "planner.timetable"),
        *("planner.hlo", "planner.residuals"),
        *("planner.collectives", "planner.devices", "planner.hardware", "planner.present"),
        "planner.goodput",
        *("planner.toolchain", "planner.topology", "planner.largest", "planner.oom"),
        *("planner.compiled", "planner.fit"),
        *("planner.scaling", "planner.published"),
        *("planner.activations", "planner.architecture", "planner.memory", "planner.analytic"),
        "planner.lectures",
        *("analysis.noise", "analysis.curvature", "analysis.landscape", "analysis.sharpness"),
        *("analysis.parameter_server", "analysis.batch_statistics", "analysis.ngrams"),
        *("analysis.descent", "analysis.quadratic", "analysis.logistic", "analysis.backprop"),
        *("analysis.clock", "analysis.volume"),
        *("analysis.mixture", "analysis.evolution", "analysis.blocks"),
        "analysis.fit",
    ],
    ["checks", "components", "recipe", "evaluation", "notes", "experiment", "source"],
    [
        *("remat_choice", "search", "planning"),
        *(
            "capacity",
            "prediction",
            "auditing",
            "summary",
            "course",
            "loop",
            "replay",
            "checkup",
            "sweep",
            "entry",
            "rehearsal",
        ),
        *("runs", "dynamics", "foresight", "reporting", "verdict", "book"),
        *("specimen", "findings.found", "findings.curvature", "findings.surface"),
        *("findings.gradients", "findings.outliers", "findings.boundary", "findings.fit"),
        "findings.volume",
        "surveying",
    ],
    [
        *("studies.claim", "studies.digits"),
        *("studies.gradient_noise", "studies.stale_gradients", "studies.staleness"),
        *("studies.lars_norms", "studies.large_batch", "studies.batch_ramp"),
        *("studies.grokking", "studies.double_descent", "studies.skips", "studies.dropout_lines"),
        *("studies.normalisation", "studies.spurious", "studies.transfer"),
        *("studies.clip_zero_shot", "studies.byte_lm", "studies.fashion_mnist"),
        *("studies.conditioning", "studies.whitening", "studies.lr_regimes"),
        *("studies.sgd_conditions", "studies.adam_minimum", "studies.explr"),
        *("studies.backprop_variants", "studies.vectorisation"),
        *("studies.one_weird_trick", "studies.batch_choice", "studies.model_parallel"),
        *("studies.saddle_escape", "studies.mpo_icons", "studies.bias_variance"),
        *("studies.other_optimisers", "studies.initialisation", "studies.local_connectivity"),
        *("studies.minefield", "studies.flat_sharp", "studies.random_labels"),
        *("studies.sam", "studies.mixup"),
    ],
    ["laboratory"],
    [
        *("train", "plan", "convert", "generate", "doctor", "study", "report", "verify", "audit"),
        "analyze",
    ],
]
LEVEL = {module: level for level, modules in enumerate(LEVELS) for module in modules}
ORDER = {module: i for i, module in enumerate(itertools.chain.from_iterable(LEVELS))}

# Who may import what: a replacement is then one file.
DOORS = {
    "orbax": {"checkpoint"},
    "tensorflow_datasets": {"data.digits", "data.sources"},
    "grain": {"data.loader"},
    "sklearn": {"data.digits", "data.tabular", "evaluators"},
    "PIL": {"data.transforms"},
    "tokenizers": {"data.text"},
    "sentencepiece": {"data.text"},
    "tensorboardX": {"metrics"},
    "safetensors": {"weights"},
    "optax": {"step", "tasks", "recipe", "experiment"}
    | {"studies.normalisation", "studies.spurious", "studies.transfer", "studies.clip_zero_shot"}
    | {m for m in LEVEL if m.startswith("optim.")}
    | {"analysis.parameter_server", "analysis.descent", "analysis.logistic"}
    | {"studies.gradient_noise", "studies.stale_gradients", "studies.staleness"}
    | {"studies.grokking", "studies.double_descent", "studies.skips", "studies.dropout_lines"}
    | {"studies.conditioning", "studies.lr_regimes", "studies.sgd_conditions"}
    | {"studies.adam_minimum", "studies.explr", "studies.batch_choice"}
    | {"studies.mpo_icons", "studies.other_optimisers", "studies.initialisation"}
    | {"studies.local_connectivity"}
    | {"studies.minefield", "studies.flat_sharp", "studies.random_labels", "studies.sam"},
    "flax": {"state", "losses", "components", "evaluation", "experiment"}
    | {m for m in LEVEL if m.startswith(("models.", "sharding."))},
    "ml_collections": {"schema", "config", "source", "checks", "components", "recipe", "evaluation"}
    | {"notes", "experiment"},
    "matplotlib": {"marks", "plots"},
    "argparse": {"entry", *LEVELS[-1]},
}
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.name != "__init__.py"
)


def tree(module):
    return ast.parse((PACKAGE / (module.replace(".", "/") + ".py")).read_text())


def imports(module):
    """Every dotted name that `module` imports, wherever in the file."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def own_imports(module):
    for name in imports(module):
        if name.split(".")[0] == "lsdl":
            parts = name.split(".")[1:]
            candidates = [".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LEVEL]
            assert candidates, f"{module} imports {name}, which has no level"
            yield candidates[0]


def breaks(module, imported):
    """Whether `module` may not import `imported`."""
    if LEVEL[imported] != LEVEL[module]:
        return LEVEL[imported] > LEVEL[module]
    same_package = "." in module and module.split(".")[0] == imported.split(".")[0]
    listed = same_package or LEVELS[LEVEL[module]] in (LEVELS[0], LEVELS[5], LEVELS[6])
    return not (listed and ORDER[imported] < ORDER[module])


def test_every_module_has_a_level():
    assert sorted(LEVEL) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    assert [name for name in own_imports(module) if breaks(module, name)] == []


@pytest.mark.parametrize("module", MODULES)
def test_each_dependency_has_one_door(module):
    for name in imports(module):
        root = name.split(".")[0]
        assert module in DOORS.get(root, {module}), f"{module} imports {name}"


def test_the_rule_sees_a_wrong_import():
    assert breaks("state", "step")
    assert breaks("models.layers", "models.vit")
    assert breaks("models.vit", "sharding.rules")
    assert breaks("tasks", "checkpoint")
    assert not breaks("models.vit", "models.layers")


@pytest.mark.parametrize("module", MODULES)
def test_config_fields_are_read_only_where_allowed(module):
    if module in ("schema", "config", *LEVELS[5], *LEVELS[-1]):
        return
    for node in ast.walk(tree(module)):
        if LEVEL[module] == LEVEL["studies.claim"]:  # it names configs and reads no field of them
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node.value) != "config", f"{module}:{node.lineno}"
            continue
        name = getattr(node, "id", getattr(node, "arg", None))
        assert name not in ("config", "ConfigDict"), f"{module}:{node.lineno}"
        assert getattr(node, "attr", None) != "ConfigDict"


@pytest.mark.parametrize("module", MODULES)
def test_a_mesh_is_made_in_one_place(module):
    if module == "sharding.mesh":
        return
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert (
                called.split(".")[-1] not in ("Mesh", "make_mesh") or called == "meshes.make_mesh"
            )


@pytest.mark.parametrize("module", MODULES)
def test_no_default_hides_in_a_get(module):
    """`config.get(key, default)` answers a mistyped key with the default."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get"):
            root = ast.unparse(node.func).split(".")[0]
            fields = {"config", "group", "schedule", "optim", "model", "data"}
            assert root not in fields or len(node.args) == 1, f"{module}:{node.lineno}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_stay_short(module):
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.FunctionDef) and (module, node.name) != ("experiment", "build"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{module}.{node.name} has {lines} lines"


def test_entries_stay_thin():
    for entry in LEVELS[-1]:
        length = len((PACKAGE / f"{entry}.py").read_text().splitlines())
        assert length <= 110, f"{entry} has {length} lines"


def test_importing_lsdl_leaves_alone_what_few_runs_need():
    import subprocess
    import sys

    seldom = ("tensorflow", "torch", "matplotlib", "sklearn", "scipy.stats")
    code = (
        "import sys, lsdl.train, lsdl.experiment, lsdl.loop; "
        f"print([m for m in {seldom} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
