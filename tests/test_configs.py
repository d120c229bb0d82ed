import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from densenet_jax.data.examples import Source
from densenet_jax.data.preprocessing import Preprocessing
from densenet_jax.sweeps.trials import expand
from densenet_jax.training import experiment

FOLDER = Path(__file__).parent.parent / "configs"
RECIPES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem != "__init__")
CIFAR_NETS = (
    "40_12",
    "100_12",
    "100_24",
    "bc_100_12",
    "bc_250_24",
    "bc_190_40",
)

# Image shape and number of classes of the data sets that the recipes name.
DATA_SETS = {
    "imagenet2012": ((None, None, 3), 1000),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "digits": ((8, 8, 1), 10),
}
# Parameters of what each recipe builds (Huang et al., tables 1 and 2, counted
# with torchvision's and the authors' layers).
PARAMETERS = {
    ("densenet121", ""): 7_978_856,
    ("densenet169", ""): 14_149_480,
    ("densenet201", ""): 20_013_928,
    ("densenet264", ""): 33_337_704,
    ("cifar10", "40_12"): 1_019_722,
    ("cifar10", "100_12"): 6_979_642,
    ("cifar10", "100_24"): 27_249_082,
    ("cifar10", "bc_100_12"): 769_162,
    ("cifar10", "bc_250_24"): 15_324_406,
    ("cifar10", "bc_190_40"): 25_624_430,
    ("cifar100", "40_12"): 1_060_132,
    ("cifar100", "bc_100_12"): 800_032,
    ("svhn", "100_24"): 27_249_082,
    ("svhn", "bc_100_12"): 769_162,
}

# Parameters of the trials of each sweep, as the docstrings have them.
TRIALS = {
    "ablation": {
        f"growth_rate={k},compression={compression},seed={seed}": count
        for (k, compression), count in {
            (6, 0.5): 26_584,
            (6, 1.0): 36_382,
            (12, 0.5): 102_298,
            (12, 1.0): 139_570,
        }.items()
        for seed in (0, 1)
    },
    "ablation_cifar10": {
        "bottleneck_width=0,compression=1.0,block_layers=5-5-5": 94_650,
        "bottleneck_width=4,compression=1.0,block_layers=5-5-5": 86_970,
        "bottleneck_width=0,compression=0.5,block_layers=7-7-7": 96_878,
        "bottleneck_width=4,compression=0.5,block_layers=7-7-7": 99_006,
    },
}


def _load(name, argument=""):
    module = importlib.import_module(f"configs.{name}")
    return module.get_config(argument) if argument else module.get_config()


def _build(config, monkeypatch):
    image_shape, num_classes = DATA_SETS[config.dataset.name]
    examples = range(50_000)  # read by nothing but len()
    source = Source(examples, num_classes, image_shape)
    monkeypatch.setattr(experiment, "open_source", lambda *_: source)
    return experiment.build(config)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_locked_and_say_how_they_run(name):
    config = _load(name)
    assert config.is_locked
    with pytest.raises(AttributeError, match=r"Did you mean.*learning_rate"):
        config.optimizer.learning_rte = 0.1
    doc = importlib.import_module(f"configs.{name}").__doc__
    if name in TRIALS:
        tool = f"densenet_jax.tools.sweep --config=configs/{name}.py"
        assert f"python -m {tool}" in doc
    elif name != "common":
        assert f"python train.py --config=configs/{name}.py" in doc


def test_every_recipe_is_built():
    named = {name for name, _ in PARAMETERS} | {"common", "digits"}
    assert named | set(TRIALS) == set(RECIPES)
    assert {a for n, a in PARAMETERS if n == "cifar10"} == set(CIFAR_NETS)


@pytest.mark.parametrize(("name", "argument"), PARAMETERS)
def test_recipes_build_the_papers_nets(name, argument, monkeypatch):
    built = _build(_load(name, argument), monkeypatch)
    count = sum(x.size for x in jax.tree.leaves(built.abstract_state.params))
    assert count == PARAMETERS[name, argument]


@pytest.mark.parametrize("name", TRIALS)
def test_sweeps_have_these_trials(name, monkeypatch):
    parameters = {}
    for trial, config in expand(f"configs/{name}.py", Path()).items():
        built = _build(config, monkeypatch)
        params = jax.tree.leaves(built.abstract_state.params)
        parameters[trial.name] = sum(x.size for x in params)
    assert parameters == TRIALS[name]


def test_imagenet_schedule(monkeypatch):
    built = _build(_load("densenet121"), monkeypatch)
    assert built.total_steps == 17_578  # 90 epochs of 50,000 / 256 steps
    rates = [built.schedule(built.total_steps * e // 90) for e in (29, 31, 61)]
    np.testing.assert_allclose(rates, [0.1, 0.01, 0.001], rtol=1e-5)


def test_cifar_schedule_and_preprocessing(monkeypatch):
    built = _build(_load("cifar10"), monkeypatch)
    assert built.total_steps == 234_375
    rates = [
        built.schedule(built.total_steps * e // 300) for e in (149, 151, 226)
    ]
    np.testing.assert_allclose(rates, [0.1, 0.01, 0.001], rtol=1e-5)
    assert built.preprocessing.flip
    assert built.preprocessing.shift == 4
    assert built.model.dropout_rate == 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_augmentation_drops_out(name):
    config = _load(name, "40_12,plain")
    assert config.model.name == "densenet_40_12"
    assert config.model.dropout_rate == 0.2
    assert not config.preprocessing.flip
    assert not config.preprocessing.shift


def test_svhn_is_divided_by_255_and_dropped_out(monkeypatch):
    built = _build(_load("svhn"), monkeypatch)
    assert built.total_steps == 31_250
    assert built.model.dropout_rate == 0.2
    assert built.preprocessing == Preprocessing(mean=(0.0,), std=(255.0,))


def test_imagenet_is_augmented_as_by_the_authors():
    config = _load("densenet121").preprocessing
    on = {"random_resized_crop", "flip", "color_jitter", "lighting"}
    every = set(_load("common").preprocessing) - {
        "mean",
        "std",
        "image_size",
        "resize_size",
    }
    assert on == {name for name in every if config[name]}
    assert (config.color_jitter, config.lighting) == (0.4, 0.1)


def test_unknown_arguments():
    with pytest.raises(ValueError, match="ends in 'plian'"):
        _load("cifar10", "40_12,plian")
