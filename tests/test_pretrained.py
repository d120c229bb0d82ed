"""Fine-tuning: config.pretrained and optimizer.backbone_lr_scale."""

import jax
import numpy as np
import pytest

from configs import digits
from densenet_jax import load_pretrained, save_torch
from densenet_jax.data.sources import open_source
from densenet_jax.runs.checkpoints import Checkpoints, save_variables
from densenet_jax.tasks.classification import CLASSIFICATION
from densenet_jax.tools import convert
from densenet_jax.training import loop, start
from densenet_jax.training.experiment import build
from tests.random_variables import random_variables


def _config(path, **changes):
    """Six steps of a tiny net from weights for 3 channels and 7 classes."""
    config = digits.get_config()
    config.pretrained = path and str(path)
    config.model.block_layers = (1, 1)
    config.model.growth_rate = 4
    config.batch_size = 240
    config.epochs = 1.0
    config.schedule.warmup_epochs = 0.0
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A file of weights and what it holds."""
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    model = build(_config("")).model.clone(num_classes=7)
    variables = random_variables(model, in_channels=3)
    save_torch(variables, path)
    return path, variables


def _trained(config, workdir):
    loop.train_and_evaluate(config, workdir)
    checkpoints = Checkpoints(
        workdir / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    state = checkpoints.restore(
        checkpoints.newest, build(config).abstract_state
    )
    checkpoints.close()
    return jax.device_get(state)


def _differences(state, variables):
    """The paths of parameters and statistics that are not the file's."""
    found = {"params": state.params, "batch_stats": state.batch_stats}
    paths = jax.tree_util.tree_leaves_with_path(found)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, a), b in zip(paths, jax.tree.leaves(variables))
        if a.shape != b.shape or not np.array_equal(a, b)
    }


def test_a_run_starts_from_the_file(pretrained, tmp_path, monkeypatch, capsys):
    path, variables = pretrained
    states = []
    monkeypatch.setattr(
        loop, "_loop", lambda *args: states.append(jax.device_get(args[5]))
    )
    for seed in (0, 1):
        config = _config(path, seed=seed, ema_decay=0.9)
        loop.train_and_evaluate(config, tmp_path / str(seed))
    state, other = states
    new = {f"params/classifier/{leaf}" for leaf in ("bias", "kernel")}
    assert _differences(state, variables) == new | {"params/conv0/kernel"}
    np.testing.assert_allclose(
        state.params["conv0"]["kernel"],
        variables["params"]["conv0"]["kernel"].sum(2, keepdims=True),
        rtol=1e-6,
    )
    head = state.params["classifier"]["kernel"]
    assert head.shape[1] == 10
    assert not np.array_equal(head, other.params["classifier"]["kernel"])
    jax.tree.map(
        np.testing.assert_array_equal, state.ema["params"], state.params
    )
    output = capsys.readouterr().out
    assert "The classifier is new, for 10 classes" in output
    assert "adapted from 3 to 1 input channels" in output


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_frozen_body_stays(pretrained, tmp_path, accumulate):
    path, variables = pretrained
    config = _config(
        path, **{"optimizer.backbone_lr_scale": 0.0, "accumulate": accumulate}
    )
    config.model.dropout_rate = 0.5
    config.optimizer.clip_norm = 1.0
    state = _trained(config, tmp_path)
    new = {f"params/classifier/{leaf}" for leaf in ("bias", "kernel")}
    assert _differences(state, variables) == new | {"params/conv0/kernel"}
    assert np.abs(state.params["classifier"]["bias"]).min() > 0


def test_a_frozen_body_has_running_statistics(pretrained, tmp_path):
    """A step is that of logistic regression on the net's features."""
    path, _ = pretrained
    config = _config(path, **{"optimizer.backbone_lr_scale": 0.0})
    config.optimizer.weight_decay = 0.0
    config.preprocessing.shift = 0
    built = build(config)
    state = start._start_from(path, config, built)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (240, 8, 8, 1), np.uint8),
        "label": rng.integers(0, 10, 240).astype(np.int32),
    }
    features = built.model.apply(
        state.variables,
        built.preprocessing.normalize(batch["image"]),
        method="features",
    )[-1]
    features = np.asarray(features).mean((1, 2))
    before = jax.device_get(state.params["classifier"])
    rate = float(built.schedule(0))

    state, _ = built.train_step(state, batch)
    logits = features @ before["kernel"] + before["bias"]
    residuals = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    residuals[np.arange(240), batch["label"]] -= 1
    # Nesterov's first step is 1.9 gradients with momentum 0.9.
    step = 1.9 * rate * features.T @ residuals / 240
    found = before["kernel"] - np.asarray(state.params["classifier"]["kernel"])
    np.testing.assert_allclose(found, step, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_does_not_load_again(pretrained, tmp_path):
    path, _ = pretrained
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    config = _config(copy, epochs=0.5, **{"optimizer.backbone_lr_scale": 0.1})
    assert _trained(config, tmp_path / "run").step == 3
    copy.unlink()
    config.epochs = 1.0
    assert _trained(config, tmp_path / "run").step == 6
    with pytest.raises(FileNotFoundError):
        loop.train_and_evaluate(config, tmp_path / "another")


def test_a_run_is_loaded_as_it_is_evaluated(pretrained, tmp_path):
    """The averages of the step with the highest accuracy."""
    path, _ = pretrained
    config = _config(path, ema_decay=0.9)
    config.model.norm_epsilon = 1e-4
    config.pretrained = None
    state = _trained(config, tmp_path)
    model, variables = load_pretrained(tmp_path)
    # What training recomputes is no part of what it made.
    assert model == build(config).model.copy(remat="none")
    jax.tree.map(np.testing.assert_array_equal, variables, state.ema)


def test_another_architecture(pretrained, tmp_path):
    path, _ = pretrained
    for changes in (
        {"model.growth_rate": 6},
        {"model.norm_epsilon": 1e-3},
    ):
        config = _config(path, **changes)
        with pytest.raises(ValueError, match="of another architecture"):
            loop.train_and_evaluate(config, tmp_path)


@pytest.fixture
def converted(pretrained, tmp_path):
    """A directory of tools.convert with the weights of a net of 10 classes."""
    config = _config(None)
    model = build(config).model
    path = tmp_path / "net.safetensors"
    variables = random_variables(model, in_channels=1)
    save_torch(variables, path)
    assert convert.main([str(path), str(tmp_path / "run")]) == 0
    return tmp_path / "run", config, variables


def test_a_converted_directory_is_started_from(converted, monkeypatch, capsys):
    workdir, config, variables = converted
    config.ema_decay = 0.9
    states = []
    with monkeypatch.context() as patch:
        patch.setattr(
            loop, "_loop", lambda *args: states.append(jax.device_get(args[5]))
        )
        loop.train_and_evaluate(config, workdir)
        config.pretrained = str(workdir)  # the same, said twice
        loop.train_and_evaluate(config, workdir)
    assert f"Starting from the weights of {workdir}" in capsys.readouterr().out
    for state in states:
        assert _differences(state, variables) == set()
    config.pretrained = "another.pth"
    with pytest.raises(ValueError, match="holds converted weights"):
        loop.train_and_evaluate(config, workdir)

    # Its weights stay, whatever is saved after.
    config.pretrained = None
    config.checkpoint.every_epochs = 0.1
    config.checkpoint.keep_newest = 1
    assert _trained(config, workdir).step == 6
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert {"0", "6"} <= steps
    assert len(steps) <= 3  # and the best


def test_a_converted_directory_is_evaluated(converted, capsys):
    workdir, config, variables = converted
    examples = open_source("digits", "test").examples
    model = build(config).model
    images = np.stack([example["image"] for example in examples])
    mean, std = config.preprocessing.mean[0], config.preprocessing.std[0]
    images = ((images - mean) / std).astype(np.float32)
    logits = jax.jit(model.apply)(variables, images)
    labels = np.array([example["label"] for example in examples])
    expected = (np.asarray(logits).argmax(1) == labels).mean()

    result = loop.evaluate_best(config, workdir)

    assert result["top1"] == pytest.approx(expected, abs=1e-6)
    assert "Step 0: test top-1" in capsys.readouterr().out
    config.model.num_classes = 12
    with pytest.raises(ValueError, match="of another architecture"):
        loop.evaluate_best(config, workdir)


def test_a_net_of_many_labels_is_not_evaluated(tmp_path):
    config = _config(None)
    model = build(config).model
    save_variables(
        tmp_path,
        random_variables(model, in_channels=1),
        {"model": config.model.to_dict(), "task": "multilabel"},
    )
    with pytest.raises(ValueError, match="many labels an image"):
        loop.evaluate_best(config, tmp_path)


def test_other_pixels_than_the_weights_were_trained_on_are_said(
    tmp_path, capsys, monkeypatch
):
    config = _config(tmp_path)
    model = build(config).model
    config.preprocessing.mean, config.preprocessing.std = (0.0,), (255.0,)
    save_variables(
        tmp_path,
        random_variables(model, in_channels=1),
        {
            "model": config.model.to_dict(),
            "preprocessing": {"mean": [0.4], "std": [100.0]},
        },
    )
    start._start_from(tmp_path, config, build(config))
    output = capsys.readouterr().out
    assert "trained with preprocessing.std (100.0,), now (255.0,)." in output


def test_random_weights_are_not_frozen():
    config = digits.get_config()
    config.optimizer.backbone_lr_scale = 0.0
    with pytest.raises(ValueError, match=r"set config\.pretrained too"):
        build(config)
