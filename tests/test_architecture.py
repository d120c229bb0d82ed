"""Imports run downwards only, so that each part can be read on its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("densenet_jax", "configs", "train")

CHOICES = "densenet_jax.choices"
FILES = "densenet_jax.files"
RECIPES = "densenet_jax.recipes"
MODELS = "densenet_jax.models"
DATA = "densenet_jax.data"
TASKS = "densenet_jax.tasks"
RUNS = "densenet_jax.runs"
WEIGHTS = "densenet_jax.weights"
TRAINING = "densenet_jax.training"
ANALYSIS = "densenet_jax.analysis"
PLANNING = "densenet_jax.planning"
SWEEPS = "densenet_jax.sweeps"
LEAVES = [CHOICES, FILES]

# What of this project a module may import; the rule of a package is the rule
# of its modules that have none of their own. A new package needs a rule.
ALLOWED = {
    "densenet_jax": [MODELS, WEIGHTS],
    CHOICES: [],
    FILES: [],
    RECIPES: [MODELS, f"{RUNS}.config"],
    MODELS: [CHOICES, MODELS],
    DATA: [*LEAVES, DATA],
    TASKS: [CHOICES, TASKS, MODELS],
    RUNS: [*LEAVES, RUNS, TASKS, MODELS],
    WEIGHTS: [*LEAVES, WEIGHTS, RUNS, TASKS, MODELS],
    TRAINING: [*LEAVES, TRAINING, TASKS, MODELS, DATA],
    f"{TRAINING}.resume": [*LEAVES, TRAINING, RUNS],
    f"{TRAINING}.start": [
        *LEAVES,
        TRAINING,
        MODELS,
        RUNS,
        WEIGHTS,
    ],
    f"{TRAINING}.loop": [
        *LEAVES,
        TRAINING,
        TASKS,
        MODELS,
        DATA,
        RUNS,
        ANALYSIS,
    ],
    ANALYSIS: [*LEAVES, ANALYSIS, MODELS, RUNS],
    PLANNING: [*LEAVES, RECIPES, PLANNING, ANALYSIS, TRAINING, MODELS, DATA],
    SWEEPS: [*LEAVES, RECIPES, SWEEPS, RUNS, TRAINING],
    "densenet_jax.tools": ["densenet_jax", "train"],
    "configs": ["configs"],
    "train": ["densenet_jax"],
}


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = [
    ROOT / "train.py",
    *sorted((ROOT / "configs").rglob("*.py")),
    *sorted((ROOT / "densenet_jax").rglob("*.py")),
]
MODULES = {_module_name(path): path for path in PATHS}


def _within(name, package):
    return name == package or name.startswith(f"{package}.")


def _imports(source):
    """The modules, or names in modules, that a file imports anywhere."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _forbidden(module, source):
    """What `module` imports of this project and may not."""
    rule = module
    while rule not in ALLOWED:
        rule, _, _ = rule.rpartition(".")
        assert rule not in ("", "densenet_jax"), f"no rule for {module}"
    return [
        name
        for name in _imports(source)
        if name.split(".")[0] in OURS
        and not any(_within(name, allowed) for allowed in ALLOWED[rule])
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_run_downwards(module):
    assert _forbidden(module, MODULES[module].read_text()) == []


@pytest.mark.parametrize("module", MODULES)
def test_only_the_manager_of_checkpoints_knows_orbax(module):
    imports = _imports(MODULES[module].read_text())

    if module != "densenet_jax.runs.manager":
        assert not [name for name in imports if _within(name, "orbax")]


@pytest.mark.parametrize(
    "module", [name for name in MODULES if _within(name, "configs")]
)
def test_configs_import_only_ml_collections(module):
    imports = _imports(MODULES[module].read_text())

    assert {name.split(".")[0] for name in imports} <= {
        "configs",
        "ml_collections",
    }


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("densenet_jax.models.layers", "import densenet_jax.training.loop"),
        ("densenet_jax.data.pipeline", "from densenet_jax import create_model"),
        ("densenet_jax.analysis.summary", "from densenet_jax.data import x"),
        ("densenet_jax.weights.x", "from densenet_jax.training import x"),
        ("densenet_jax.training.steps", "from densenet_jax import analysis"),
        ("configs.digits", "from densenet_jax.models import densenet"),
    ],
)
def test_an_import_upwards_is_found(module, source):
    assert _forbidden(module, source)


# The longest that a file and a function may be: a reader holds no more.
_FILE_LINES, _FUNCTION_LINES = 300, 60


def _long_functions(source):
    """The functions whose body, without its docstring, is too long."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        body = node.body[1:] if ast.get_docstring(node) else node.body
        if body:
            lines = body[-1].end_lineno - body[0].lineno + 1
            if lines > _FUNCTION_LINES:
                found.append(f"{node.name}: {lines} lines")
    return found


OURS_IN_PACKAGE = [name for name in MODULES if _within(name, "densenet_jax")]


@pytest.mark.parametrize("module", OURS_IN_PACKAGE)
def test_files_and_functions_are_short(module):
    source = MODULES[module].read_text()

    assert len(source.splitlines()) <= _FILE_LINES
    assert _long_functions(source) == []


def test_the_definition_of_the_net_and_the_loop_are_shorter_still():
    for module, most in [
        ("densenet_jax.models.densenet", 260),
        ("densenet_jax.training.loop", 250),
    ]:
        assert len(MODULES[module].read_text().splitlines()) <= most


def test_a_long_function_is_found():
    docstring = '    """Says.' + "\n" * 100 + '"""\n'
    body = "    x = 1\n" * (_FUNCTION_LINES + 1)

    assert _long_functions("def f():\n" + docstring + "    x = 1\n") == []
    assert _long_functions("def f():\n" + docstring + body) == [
        f"f: {_FUNCTION_LINES + 1} lines"
    ]
