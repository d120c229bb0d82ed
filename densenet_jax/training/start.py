"""Where a run starts: its newest checkpoint, given weights, or random ones."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict

from densenet_jax.models.densenet import DenseNet
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.models.options import unseen_differences
from densenet_jax.runs import directory
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.config import make_model
from densenet_jax.training.console import say
from densenet_jax.training.experiment import Experiment
from densenet_jax.training.state import TrainState
from densenet_jax.weights.load import describe, load_weights

# A run continues from its newest checkpoint only where these are as they were:
# they say which examples the steps before it have seen.
_POSITION_KEYS = ("seed", "batch_size", "dataset.name", "dataset.train_split")


def start_training(
    config: ConfigDict,
    experiment: Experiment,
    checkpoints: Checkpoints,
    json_config: Mapping[str, Any],
) -> tuple[int, TrainState]:
    """The step to start from, and the state after it.

    Raises:
      ValueError: the config does not fit the checkpoint or the weights.
    """
    start = checkpoints.newest or 0
    if start > experiment.total_steps:
        raise ValueError(
            f"{checkpoints.directory} holds a checkpoint of step {start:,}, "
            f"past the config's last, {experiment.total_steps:,}: raise "
            "epochs, or choose another --workdir."
        )
    # 1. Restore the newest checkpoint;
    if start:
        _check_position(checkpoints.config(start), json_config, start)
        state = checkpoints.restore(start, experiment.abstract_state)
        say(f"Continuing from step {start:,}.")
        return start, state
    # 2. else start from pretrained weights;
    if config.pretrained:
        return 0, _start_from(config, experiment)
    # 3. else from random ones.
    say("Initialising ...")
    return 0, experiment.init()


def _start_from(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The first state with the weights of config.pretrained."""
    model = experiment.model
    channels = experiment.batch["image"].shape[-1]
    found, variables, remarks, changes, _ = load_weights(
        config.pretrained,
        num_classes=model.num_classes,
        in_channels=channels,
        seed=config.seed,
    )
    for line in [f"Starting from {config.pretrained}.", *remarks, *changes]:
        say(line)
    if tensor_shapes(found, channels) != tensor_shapes(
        model, channels
    ) or unseen_differences(model, found):
        raise ValueError(
            f"{config.pretrained} is of another architecture than "
            f"config.model. It has {describe(found)}; the config asks for "
            f"{describe(model)}."
        )
    # Every host holds the whole of them.
    return experiment.init(variables=jax.device_get(variables))


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


def _check_position(
    saved: Mapping[str, Any], config: Mapping[str, Any], step: int
) -> None:
    changed = directory.differences(
        directory.flatten(saved), directory.flatten(config)
    )
    refused = [changed[key] for key in _POSITION_KEYS if key in changed]
    if refused:
        raise ValueError(
            f"The run cannot go on from step {step:,}, whose place in the data "
            f"was another: {'; '.join(refused)}. Restore these, or choose "
            "another --workdir."
        )
    if changed:
        say(f"Continuing with a changed config: {'; '.join(changed.values())}")
