"""A run that an earlier version began: read, restored, continued.

tests/data/golden_run.* were made by tests/make_golden_run.py with the code of
commit 74c2b26.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import digits
from densenet_jax import load_pretrained
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.config import upgrade
from densenet_jax.runs.curves import read_metrics
from densenet_jax.runs.directory import flatten
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.training import loop
from densenet_jax.training.experiment import build

DATA = Path(__file__).parent / "data"


@pytest.fixture
def workdir(tmp_path):
    shutil.unpack_archive(DATA / "golden_run.zip", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def golden():
    with np.load(DATA / "golden_run.npz") as file:
        return dict(file)


def read_config(workdir):
    """Today's digits recipe with the options that the run was begun with."""
    config = digits.get_config()
    saved = flatten(upgrade(json.loads((workdir / "config.json").read_text())))
    known = config.to_dict()
    for key, value in saved.items():
        section, _, name = key.rpartition(".")
        assert name in (known[section] if section else known), key
        value = tuple(value) if isinstance(value, list) else value
        config.update_from_flattened_dict({key: value})
    return config


def arrays_of(workdir, step, config):
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    state = checkpoints.restore(step, build(config).abstract_state)
    checkpoints.close()
    named = jax.tree_util.tree_leaves_with_path(state)
    return {
        f"at_{step}/{jax.tree_util.keystr(path, simple=True, separator='/')}": (
            np.asarray(leaf)
        )
        for path, leaf in named
    }


def test_it_restores_to_the_bit(workdir, golden):
    config = read_config(workdir)
    assert config.model.remat == "early"
    assert config.model.implementation == "matmul"
    assert config.optimizer.backbone_lr_scale == 0.5

    found = arrays_of(workdir, 12, config)

    expected = {k: v for k, v in golden.items() if k.startswith("at_12/")}
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_it_continues_as_it_would_have(workdir, golden, capsys):
    """On another machine and number of devices: as near as rounding allows."""
    config = read_config(workdir)

    loop.train_and_evaluate(config, workdir)

    out = capsys.readouterr().out
    assert "Continuing from step 12." in out
    assert "changed config" not in out
    found = arrays_of(workdir, 22, config)
    for path, array in golden.items():
        if path.startswith("at_22/"):
            np.testing.assert_allclose(
                found[path], array, rtol=1e-4, atol=1e-5, err_msg=path
            )
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert (last["step"], last["split"]) == (22, "test")


def test_its_weights_load(workdir, golden):
    model, variables = load_pretrained(workdir)

    assert model.block_layers == (1, 2)
    assert model.growth_rate == 2
    averages = "at_12/ema/params/conv0/kernel"
    np.testing.assert_array_equal(
        variables["params"]["conv0"]["kernel"], golden[averages]
    )
