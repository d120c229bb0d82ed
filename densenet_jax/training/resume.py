"""How a run goes on from the newest of its checkpoints that is whole."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from densenet_jax.choices import check_choice
from densenet_jax.runs import description, directory
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.damage import DamagedCheckpointError
from densenet_jax.training.console import say
from densenet_jax.training.experiment import Experiment, learning_rates
from densenet_jax.training.state import TrainState

# A run continues from its newest checkpoint only where these are as they were:
# they say which examples the steps before it have seen.
_POSITION_KEYS = ("seed", "batch_size", "dataset.name", "dataset.train_split")

# What is done where a checkpoint is damaged.
ON_DAMAGE = ("fallback", "stop")


def restore_newest(
    config: ConfigDict,
    experiment: Experiment,
    checkpoints: Checkpoints,
    json_config: Mapping[str, Any],
) -> tuple[int | None, TrainState | None]:
    """The newest whole step and its state.

    What is damaged is set aside under another name.

    Returns:
      None and None where there is no checkpoint; 0 and None where it holds
      weights to start from.

    Raises:
      ValueError: the config does not fit the checkpoint; or checkpoints are
        damaged, and none is whole or config.checkpoint.on_damage is 'stop'.
    """
    check_choice("checkpoint.on_damage", config.checkpoint.on_damage, ON_DAMAGE)
    damaged, start, state = dict(checkpoints.damaged), None, None
    for step in reversed(checkpoints.steps):
        if step in damaged:
            continue
        try:
            if step:
                state = _continue(step, experiment, checkpoints, json_config)
            start = step
            break
        except DamagedCheckpointError as error:
            damaged[step] = error
    if damaged:
        newest = max(damaged)
        if config.checkpoint.on_damage == "stop":
            raise damaged[newest]
        # Whether to lose all is not for us to say.
        if start is None and not all(x.empty for x in damaged.values()):
            raise ValueError(
                f"{damaged[newest]} No whole one is left: restore one from a "
                "copy, or choose another --workdir to begin again."
            )
        for step, error in sorted(damaged.items()):
            say(f"{error} It is set aside as {checkpoints.set_aside(step)}.")
        lost = newest - (start or 0)
        if lost > 0:
            say(f"Going back to step {start or 0:,} costs {lost:,} steps.")
    if state is not None:
        say(f"Continuing from step {start:,}.")
    return start, state


def _continue(step, experiment, checkpoints, json_config):
    """The state of a step, if the run may go on from there."""
    saved, total = checkpoints.config(step), experiment.total_steps
    if step > total:
        raise ValueError(
            f"{checkpoints.directory} holds a checkpoint of step {step:,}, "
            f"past the config's last, {total:,}: raise epochs, or choose "
            "another --workdir."
        )
    check_position(saved, json_config, step)
    state = checkpoints.restore(step, experiment.abstract_state)
    remark = checkpoints.remark(step)
    if remark:
        say(remark)
    if step < total:
        _say_other_rate(saved, experiment, step)
    return state


def check_position(
    saved: Mapping[str, Any], config: Mapping[str, Any], step: int
) -> None:
    """Raises ValueError where a step has seen other examples; says changes."""
    changed = directory.differences(
        directory.flatten(description.settings(saved)),
        directory.flatten(description.settings(config)),
    )
    refused = [changed[key] for key in _POSITION_KEYS if key in changed]
    if refused:
        raise ValueError(
            f"The run cannot go on from step {step:,}, whose place in the data "
            f"was another: {'; '.join(refused)}. Restore these, or choose "
            "another --workdir."
        )
    difference = description.name_difference(
        saved.get("class_names"), config.get("class_names")
    )
    if difference:
        raise ValueError(
            f"The run cannot go on from step {step:,}, whose labels meant "
            f"other classes: {difference}. Restore their names, or choose "
            "another --workdir."
        )
    if changed:
        say(f"Continuing with a changed config: {'; '.join(changed.values())}")


def _say_other_rate(
    saved: Mapping[str, Any], experiment: Experiment, step: int
) -> None:
    """Says where the learning rate jumps as the run goes on."""
    try:
        schedule = learning_rates(saved, experiment.steps_per_epoch)
    except (KeyError, TypeError, ValueError):
        return  # A schedule of an earlier version, or of another data set.
    before, now = float(schedule(step)), float(experiment.schedule(step))
    if not np.isclose(before, now, rtol=1e-3, atol=0):
        say(
            f"The learning rate at step {step:,} was {before:.3g} by the saved "
            f"config and is {now:.3g} now: boundaries, and the cosine, are "
            "shares of the run, whose length, rate or schedule changed."
        )
