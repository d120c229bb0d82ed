"""The trials of a sweep: what they are called, and how one is run."""

import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from densenet_jax import recipes
from densenet_jax.choices import did_you_mean
from densenet_jax.files import in_bucket, replacing
from densenet_jax.runs import directory as runs
from densenet_jax.training import experiment
from densenet_jax.training.signals import EXIT_CODE

_TRAIN = Path(__file__).parents[2] / "train.py"


@dataclasses.dataclass(frozen=True)
class Trial:
    """One run of a sweep.

    Attributes:
      name: what it differs in from the recipe, 'growth_rate=6,seed=0'.
      directory: where it runs; may be in a bucket.
      command: the words of the command that trains it.
    """

    name: str
    directory: Path
    command: tuple[str, ...]

    @property
    def problem(self) -> str | None:
        """Why it has to run; None if it has come to its end."""
        try:
            runs.read_run(self.directory)
        except ValueError as error:
            return str(error)
        return None


def expand(config: str, workdir: Path) -> dict[Trial, ConfigDict]:
    """Reads the trials of a recipe, and each one's config.

    Args:
      config: PATH or PATH:ARGUMENT of a file with `get_config` and
        `sweep(add)`, whose `add` takes a dict of values by dotted key.
      workdir: the directory of the sweep; each trial gets one in it.

    Raises:
      ValueError: a key or value that the recipe does not take, or two trials
        of one name.
    """
    if not _TRAIN.exists():
        raise ValueError(
            f"There is no {_TRAIN}: sweeps run in a checkout of the project."
        )
    path, _, _ = config.partition(":")
    keys = _flat(recipes.parse_config([f"--config={config}"])).keys()
    trials, names = {}, set()
    for settings in _settings(path):
        _check_settings(path, settings, keys)
        words = [f"--config={config}"]
        words += [f"--config.{key}={value}" for key, value in settings.items()]
        parsed = recipes.parse_config(words)
        # A setting has one name, however the sweep writes it.
        values = {key: _flat(parsed)[key] for key in settings}
        name = runs.label(values, keys, ",").replace("/", "-") or "base"
        if name in names:
            raise ValueError(f"{path} adds {name} twice: its trials differ.")
        names.add(name)
        directory = workdir / name
        words.append(f"--workdir={directory}")
        train = (sys.executable, str(_TRAIN), *words)
        trials[Trial(name, directory, train)] = parsed
    return trials


def check(trial: Trial, config: ConfigDict) -> None:
    """Raises ValueError, before anything runs, for what a run would refuse.

    Also where the trial's directory holds a run of another config: its result
    would be taken for this one's.
    """
    try:
        experiment.build(config)
    except ValueError as error:
        raise ValueError(f"Trial {trial.name}: {error}") from None
    path = trial.directory / "config.json"
    if path.exists():
        changed = runs.differences(
            runs.flatten(runs.read_config(trial.directory)),
            runs.flatten(json.loads(config.to_json())),
        )
        if changed:
            raise ValueError(
                f"{trial.directory} holds a run of another config: "
                f"{'; '.join(changed.values())}. Restore these, or choose "
                "another --workdir."
            )


def start(trial: Trial) -> subprocess.Popen | None:
    """Starts or continues a trial; None while another process is at it.

    Its output goes to log.txt. The lock is the process's own: it lasts as
    long as the process, whatever becomes of the sweep.
    """
    here = _directory_here(trial)
    with (
        (here / "lock").open("w") as lock,
        (here / "log.txt").open("a") as log,
    ):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        (trial.directory / runs.FAILURE).unlink(missing_ok=True)
        print(f"$ {shlex.join(trial.command)}", file=log, flush=True)
        return subprocess.Popen(
            trial.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno()],
            # Ctrl-C is for the sweep, which stops its trials.
            start_new_session=True,
        )


def finish(trial: Trial, exit_code: int) -> str | None:
    """Records how a trial's process ended: why it failed, or None."""
    log = _directory_here(trial) / "log.txt"
    if in_bucket(trial.directory):
        with replacing(trial.directory / "log.txt") as temporary:
            shutil.copy(log, temporary)
    if exit_code == 0:
        problem = trial.problem
        if problem is None:
            return None
        reason = f"ended well, but is {problem}"
    else:
        lines = log.read_text().splitlines()
        said = [line for line in lines if line.strip()]
        how = f"signal {-exit_code}" if exit_code < 0 else f"exit {exit_code}"
        reason = f"{how}: {said[-1]}"
    if exit_code == EXIT_CODE:  # stopped, and to be started again: unfinished
        return reason
    with replacing(trial.directory / runs.FAILURE) as temporary:
        temporary.write_text(json.dumps({"reason": reason}, indent=2))
    return reason


def _directory_here(trial: Trial) -> Path:
    """Where a trial's lock and growing log are: on this machine."""
    directory = trial.directory
    if in_bucket(directory):
        # One for every sweep of this user here that runs the trial.
        name = hashlib.sha256(str(directory).encode()).hexdigest()[:16]
        caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        caches = Path(caches).expanduser()
        directory = caches / "densenet_jax" / "trials" / name
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run(trial: Trial) -> str:
    """Runs a trial to its end; what a job of a cluster does."""
    process = start(trial)
    if process is None:
        return f"{trial.name}: another process is at it"
    reason = finish(trial, process.wait())
    return f"{trial.name}: {f'failed, {reason}' if reason else 'finished'}"


def _flat(config: ConfigDict) -> dict[str, Any]:
    return runs.flatten(config.to_dict())


def _settings(path: str) -> list[dict[str, Any]]:
    specification = importlib.util.spec_from_file_location("sweep", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    if not hasattr(module, "sweep"):
        raise ValueError(
            f"{path} has no sweep(add); configs/ablation.py shows one."
        )
    settings = []
    module.sweep(settings.append)
    if not settings:
        raise ValueError(f"The sweep of {path} adds no trial.")
    return settings


def _check_settings(path: str, settings: Mapping[str, Any], keys) -> None:
    for key, value in settings.items():
        if key not in keys:
            raise ValueError(
                f"{path} sweeps {key!r}, which is no key of its config."
                f"{did_you_mean(key, keys)}"
            )
        if value is None:
            raise ValueError(
                f"{path} sets {key} to None: leave it out of that trial."
            )
