"""What the directories of runs hold; nothing in them is trusted to be whole."""

import dataclasses
import json
import tempfile
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from densenet_jax.files import (
    as_path,
    in_bucket,
    one_kind_of_error,
    replacing,
    walk,
    write_object,
)
from densenet_jax.models.densenet import DenseNet
from densenet_jax.runs.config import make_model, upgrade
from densenet_jax.runs.curves import Record, read_metrics
from densenet_jax.runs.description import settings

# Written by sweeps: why a run failed, and the names of all trials.
FAILURE = "failed.json"
TRIALS = "trials.json"

# Any of these makes a directory that of a run.
_MARKS = ("config.json", "metrics.jsonl", FAILURE)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run that came to its end.

    Attributes:
      directory: where it is.
      config: its values by dotted key.
      model: its network; `num_classes` is not set.
      parameters: how many are trained.
      multiply_adds: for one image; see `analysis.summary.Row`.
      records: of its metrics.jsonl.
    """

    directory: Path
    config: Mapping[str, Any]
    model: DenseNet
    parameters: int
    multiply_adds: int
    records: Sequence[Record]

    def split(self, name: str) -> list[Record]:
        """The records of 'train' or 'test', in the order of steps."""
        return [r for r in self.records if r["split"] == name]


def prepare(workdir: Path) -> None:
    """Creates a run's directory.

    Raises:
      OSError: it cannot be created, or not be written.
      ValueError: the address of a bucket as a pathlib.Path.
    """
    if in_bucket(as_path(workdir)) and not in_bucket(workdir):
        raise ValueError(
            f"{workdir} is an address that became a pathlib.Path: make it by "
            "densenet_jax.files.as_path."
        )
    with one_kind_of_error(
        f"Cannot write to {workdir}", "choose another --workdir"
    ):
        if in_bucket(workdir):
            # Every host tries, each with an object of its own.
            probe = workdir / f".writable-{uuid.uuid4().hex}"
            write_object(probe, b"")
            probe.unlink()
        else:
            workdir.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=workdir).close()


def write_description(
    workdir: Path, config: Mapping[str, Any], network: Mapping[str, Any]
) -> None:
    """Writes config.json, and network.json.

    Args:
      workdir: of the run.
      config: JSON values: settings, and the facts of `description`.
      network: 'image_shape', and the 'rows' and 'totals' of its stages.
    """
    with replacing(workdir / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2))
    with replacing(workdir / "network.json") as temporary:
        temporary.write_text(json.dumps(network, indent=2))


def find_runs(directory: Path) -> list[Path]:
    """The directories of runs in a directory or below it, sorted."""
    found = []
    for path, directories, files in walk(directory):
        if not set(_MARKS).isdisjoint(files):
            found.append(path)
            directories.clear()  # checkpoints are no runs
    return sorted(found)


def read_config(directory: Path) -> dict[str, Any]:
    """The settings of a run, with today's keys.

    Raises:
      ValueError: there is none, or it is damaged.
    """
    return settings(upgrade(_read_json(directory / "config.json")))


def read_network(directory: Path) -> tuple[DenseNet, tuple[int, int, int]]:
    """The network of a run, and the shape (height, width, channels) it reads.

    Raises:
      ValueError: it is not described, or not by this version.
    """
    network = _read_json(directory / "network.json")
    if "image_shape" not in network:
        raise ValueError(
            f"{directory} was written by an earlier version, whose "
            "network.json has no image_shape: start its command again, which "
            "rewrites it."
        )
    model = make_model(
        read_config(directory)["model"],
        num_classes=network["rows"][-1]["shape"][-1],
    )
    return model, tuple(network["image_shape"])


def read_image_shape(directory: Path) -> list[int] | None:
    """(height, width, channels) that a run's net reads; None: not described."""
    try:
        return _read_json(directory / "network.json").get("image_shape")
    except ValueError:
        return None


def read_run(directory: Path) -> Run:
    """Reads a finished run.

    Raises:
      ValueError: it failed, is not finished or is damaged: which, and where.
    """
    failure = directory / FAILURE
    if failure.exists():
        raise ValueError(f"failed: {_read_json(failure)['reason']}")
    config = read_config(directory)
    totals = _read_json(directory / "network.json")["totals"]
    records = read_metrics(directory / "metrics.jsonl")
    _require_end(records, config["epochs"])
    return Run(
        directory=directory,
        config=flatten(config),
        model=make_model(config["model"]),
        records=records,
        **totals,
    )


def progress(directory: Path) -> Record | None:
    """The newest test record of a run that may be at work; None: none yet."""
    try:
        records = read_metrics(directory / "metrics.jsonl")
    except ValueError:
        return None
    tests = [r for r in records if r["split"] == "test"]
    return tests[-1] if tests else None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> values by dotted key; tuples become lists, as in JSON."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            listed = isinstance(value, tuple)
            flat[prefix + key] = list(value) if listed else value
    return flat


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> dict[str, str]:
    """'KEY was OLD, is NEW' by key, where flat configs differ."""
    return {
        key: f"{key} was {old.get(key)!r}, is {new.get(key)!r}"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }


def label(
    settings: Mapping[str, Any], keys: Iterable[str], separator: str = ", "
) -> str:
    """'growth_rate=12, block_layers=4-4-4' for what is set.

    Args:
      settings: by dotted key.
      keys: all of a config, dotted. A key of settings is shortened to its
        last part where no other ends in that.
      separator: between settings.
    """
    ends = [key.rpartition(".")[2] for key in keys]
    parts = []
    for key, value in settings.items():
        end = key.rpartition(".")[2]
        name = end if ends.count(end) == 1 else key
        if isinstance(value, (list, tuple)):
            value = "-".join(map(str, value))
        parts.append(f"{name}={value}")
    return separator.join(parts)


def _require_end(records: Sequence[Record], epochs: float) -> None:
    tests = [r for r in records if r["split"] == "test"]
    if not tests:
        raise ValueError("unfinished: no evaluation yet")
    step, epoch = tests[-1]["step"], tests[-1]["epoch"]
    # The last step is the rounded end of the last epoch.
    if step < epochs * step / epoch - 0.5 - 1e-6:
        raise ValueError(f"unfinished: epoch {epoch:.1f} of {epochs:g}")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"no {path.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
