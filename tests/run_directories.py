"""Directories of runs as training leaves them, without the training."""

import functools
import json

from configs import digits
from densenet_jax.analysis import summary
from densenet_jax.models.variants import create_model

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
    records = []
    for epoch, error in enumerate(errors, 1):
        step = round(epoch * 1437 / 64)
        values = {"epoch": step / (1437 / 64), "loss": 1 / epoch}
        records.append({"step": step, "split": "train", **values})
        test = {"step": step, "split": "test", **values}
        records.append({**test, "top1": 1 - error / 100})
    lines = [json.dumps(record) + "\n" for record in records]
    (directory / "metrics.jsonl").write_text("".join(lines))
    return directory


def read_totals(directory):
    return json.loads((directory / "network.json").read_text())["totals"]


@functools.cache
def _network(model):
    options = {k: v for k, v in json.loads(model).items() if v is not None}
    del options["dtype"]
    model = create_model(options.pop("name"), **options)
    return summary.format_table(summary.layers(model, (8, 8, 1)), "json")
