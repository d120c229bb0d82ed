"""Where a run starts: its newest checkpoint, given weights, or random ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from densenet_jax.files import as_path
from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import unseen_differences
from densenet_jax.runs import description, directory
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.config import make_model
from densenet_jax.runs.damage import naming_others
from densenet_jax.training import resume
from densenet_jax.training.console import say
from densenet_jax.training.experiment import Experiment
from densenet_jax.training.state import TrainState
from densenet_jax.weights.load import Loaded, describe, load_weights


def config_to_save(
    config: ConfigDict, experiment: Experiment
) -> dict[str, Any]:
    """The config as JSON values, and what its net is used with beside it.

    `runs.description` reads the names of the classes, the task and the shape
    of the images.
    """
    names = experiment.train_source.class_names
    if names is not None:
        spare = range(len(names), experiment.model.num_classes)
        names = [*names, *(f"class {i}" for i in spare)]
    return {
        **json.loads(config.to_json()),
        "class_names": names,
        "task": "classification",
        "image_shape": list(experiment.batch["image"].shape[1:]),
    }


def start_training(
    config: ConfigDict,
    experiment: Experiment,
    checkpoints: Checkpoints,
    json_config: Mapping[str, Any],
) -> tuple[int, TrainState]:
    """The step to start from, and the state after it.

    What is damaged is set aside under another name, and said.

    Raises:
      ValueError: the config does not fit the checkpoint or the weights; or
        checkpoints are damaged, and none is whole or config.checkpoint
        .on_damage is 'stop'.
    """
    # 1. Restore the newest whole checkpoint;
    start, state = resume.restore_newest(
        config, experiment, checkpoints, json_config
    )
    if state is not None:
        return start, state
    # 2. else start from weights: those that `tools.convert` put there, or
    # pretrained ones;
    if start == 0:
        workdir = checkpoints.directory.parent
        if config.pretrained and not _same(config.pretrained, workdir):
            raise ValueError(
                f"{workdir} holds converted weights to start from, and "
                f"config.pretrained is {config.pretrained}: leave that out, or "
                "choose another --workdir."
            )
        return 0, _start_from(workdir, config, experiment)
    if config.pretrained:
        return 0, _start_from(config.pretrained, config, experiment)
    # 3. else from random ones.
    say("Initialising ...")
    return 0, experiment.init()


def restore_best(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[int, TrainState]:
    """The step to evaluate, the best or else the newest, and its state.

    Raises:
      ValueError: there is none, or of another network or other classes than
        the experiment's.
    """
    with naming_others(checkpoints.steps):
        step = checkpoints.to_evaluate()
        saved = checkpoints.config(step)
    _check_task(saved)
    difference = description.name_difference(
        saved.get("class_names"), experiment.test_source.class_names
    )
    if difference:
        raise ValueError(
            f"The run's classes are not those of the data: {difference}. "
            "Restore their names, or use densenet_jax.tools.evaluate, which "
            "finds each class by its name."
        )
    _say_other_preprocessing(saved, experiment)
    if step:
        check_network(saved, experiment.model)
        with naming_others(checkpoints.steps):
            return step, checkpoints.restore(step, experiment.abstract_state)
    workdir = checkpoints.directory.parent
    loaded = load_weights(workdir)
    _check_architecture(workdir, loaded, experiment)
    return 0, experiment.init(variables=jax.device_get(loaded.variables))


def _start_from(
    path: str | Path, config: ConfigDict, experiment: Experiment
) -> TrainState:
    """The first state with the weights of a file or of a directory."""
    loaded = load_weights(
        path,
        num_classes=experiment.model.num_classes,
        in_channels=experiment.batch["image"].shape[-1],
        seed=config.seed,
    )
    for line in [
        f"Starting from the weights of {path}.",
        *loaded.remarks,
        *loaded.changes,
        *_other_pixels(loaded, experiment),
    ]:
        say(line)
    _check_architecture(path, loaded, experiment)
    # Every host holds the whole of them.
    return experiment.init(variables=jax.device_get(loaded.variables))


def _check_architecture(
    path: str | Path, loaded: Loaded, experiment: Experiment
) -> None:
    model, found = experiment.model, loaded.model
    channels = experiment.batch["image"].shape[-1]
    read = loaded.variables["params"]["conv0"]["kernel"].shape[2]
    if tensor_shapes(found, read) != tensor_shapes(
        model, channels
    ) or unseen_differences(model, found):
        raise ValueError(
            f"{path} is of another architecture than config.model. It has "
            f"{describe(found)}; the config asks for {describe(model)}."
        )


def _other_pixels(loaded: Loaded, experiment: Experiment) -> list[str]:
    """One sentence where the weights were trained on pixels of other units."""
    trained = loaded.description.preprocessing or {}
    differing = [
        f"{name} {tuple(trained[name])}, now {given}"
        for name, given in (
            ("mean", experiment.preprocessing.mean),
            ("std", experiment.preprocessing.std),
        )
        if trained.get(name)
        # In units of 0 ... 255: files round what they state.
        and not np.allclose(np.mean(trained[name]), np.mean(given), atol=2)
    ]
    return [
        f"The weights were trained with preprocessing.{'; '.join(differing)}."
    ] * bool(differing)


def _say_other_preprocessing(
    saved: Mapping[str, Any], experiment: Experiment
) -> None:
    """Says what of the evaluation is not as the net was trained for."""
    trained = description.of_config(saved).preprocessing or {}
    given = {key: getattr(experiment.preprocessing, key) for key in trained}
    changed = directory.differences(
        directory.flatten({"preprocessing": trained}),
        directory.flatten({"preprocessing": given}),
    )
    if changed:
        say(f"Evaluating with a changed config: {'; '.join(changed.values())}")


def _check_task(saved: Mapping[str, Any]) -> None:
    if saved.get("task") == "multilabel":
        raise ValueError(
            "The net was trained for many labels an image, and the data set "
            "has one: their accuracy would say nothing."
        )


def _same(path: str, directory: Path) -> bool:
    return as_path(path).resolve() == directory.resolve()


def check_network(saved: Mapping[str, Any], model: DenseNet) -> None:
    """Raises ValueError unless a run's network computes what a model does.

    Args:
      saved: the config of the run.
      model: that is to be evaluated with the run's variables.
    """
    trained = make_model(saved["model"], num_classes=model.num_classes)
    differences = [
        f"model.{name} was {getattr(trained, name)!r}, is "
        f"{getattr(model, name)!r}"
        for name in unseen_differences(trained, model)
    ]
    if differences:
        raise ValueError(
            f"The run trained another network: {'; '.join(differences)}. Give "
            "the options of the command that trained it."
        )
