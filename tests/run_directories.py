"""Directories of runs as training leaves them, without the training."""

import functools
import json

from configs import digits
from densenet_jax.analysis import summary
from densenet_jax.models.variants import create_model
from densenet_jax.runs.log import RunLog

EPOCHS = 3


def write_run(directory, errors, **changes):
    """Writes a run of EPOCHS epochs, evaluated after each as far as it came.

    Args:
      errors: in percent, one an epoch; fewer than EPOCHS are unfinished.
      **changes: of configs/digits.py, by dotted key.
    """
    directory.mkdir(parents=True)
    config = digits.get_config()
    config.epochs = float(EPOCHS)
    config.update_from_flattened_dict(changes)
    (directory / "config.json").write_text(config.to_json())
    (directory / "network.json").write_text(_network(config.model.to_json()))
    log = RunLog(directory, 0)
    for epoch, error in enumerate(errors, 1):
        step = round(epoch * 1437 / 64)
        values = {"epoch": step / (1437 / 64), "loss": 1 / epoch}
        log.write(step, "train", values)
        log.write(step, "test", {**values, "top1": 1 - error / 100})
    log.close()
    return directory


def read_totals(directory):
    return json.loads((directory / "network.json").read_text())["totals"]


@functools.cache
def _network(model):
    options = {k: v for k, v in json.loads(model).items() if v is not None}
    del options["dtype"]
    model = create_model(options.pop("name"), **options)
    return summary.format_table(summary.layers(model, (8, 8, 1)), "json")
