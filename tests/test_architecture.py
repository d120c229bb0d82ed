"""Imports run downwards only, so that each part can be read on its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("densenet_jax", "configs", "train")

MODELS = "densenet_jax.models"
DATA = "densenet_jax.data"
CHECKPOINTS = "densenet_jax.checkpoints"
ANALYSIS = "densenet_jax.analysis"
TRAINING = "densenet_jax.training"
CHOICES = "densenet_jax.choices"
ATOMIC = "densenet_jax.files"

# What of this project a module may import; the rule of a package is the rule
# of its modules that have none of their own. A new package needs a rule.
ALLOWED = {
    "densenet_jax": [MODELS, CHECKPOINTS],
    CHOICES: [],
    ATOMIC: [],
    MODELS: [CHOICES, MODELS],
    DATA: [CHOICES, DATA],
    ANALYSIS: [CHOICES, ATOMIC, ANALYSIS, MODELS],
    CHECKPOINTS: [CHOICES, ATOMIC, CHECKPOINTS, MODELS],
    TRAINING: [CHOICES, ATOMIC, TRAINING, MODELS, DATA],
    f"{TRAINING}.loop": [ATOMIC, TRAINING, MODELS, DATA, CHECKPOINTS, ANALYSIS],
    "densenet_jax.tools": ["densenet_jax", "train"],
    "configs": ["configs"],
    "train": ["densenet_jax"],
}


def _module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = [
    ROOT / "train.py",
    *sorted((ROOT / "configs").rglob("*.py")),
    *sorted((ROOT / "densenet_jax").rglob("*.py")),
]
MODULES = {_module_name(path): path for path in FILES}


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
def test_only_the_checkpoint_manager_knows_orbax(module):
    imports = _imports(MODULES[module].read_text())

    if module != "densenet_jax.checkpoints.manager":
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
        ("densenet_jax.checkpoints.x", "from densenet_jax.training import x"),
        ("densenet_jax.training.steps", "from densenet_jax import analysis"),
        ("configs.digits", "from densenet_jax.models import densenet"),
    ],
)
def test_an_import_upwards_is_found(module, source):
    assert _forbidden(module, source)
