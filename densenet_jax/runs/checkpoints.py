"""Checkpoints of training runs."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from densenet_jax.runs import damage, fingerprints
from densenet_jax.runs.config import upgrade
from densenet_jax.runs.damage import DamagedCheckpointError
from densenet_jax.runs.directory import read_image_shape
from densenet_jax.runs.manager import Manager
from densenet_jax.runs.saved_step import SavedStep
from densenet_jax.tasks.classification import CLASSIFICATION


class Checkpoints:
    """The checkpoints of one run, one directory a step.

    A checkpoint holds the training state, the config, where the step was
    evaluated its metrics, and the fingerprints of all these, which are checked
    when they are read. It is written in the background and appears whole or
    not at all. The step is the position in the training data too.

    Attributes:
      directory: of the checkpoints.
      damaged: what is wrong with the steps that could not even be ranked.
    """

    def __init__(
        self,
        directory: Path,
        rank: Callable[[Mapping[str, float]], Any],
        *,
        keep_newest: int = 1,
        keep_best: int = 1,
        read_only: bool = False,
    ):
        """Opens a directory of checkpoints.

        Args:
          directory: of the checkpoints alone; created if needed.
          rank: of metrics, greater for a better step; `task.rank`.
          keep_newest: how many of the last are kept.
          keep_best: how many are kept of those that rank highest.
          read_only: nothing is made, written or deleted.
        """
        self.directory = directory
        self._rank = rank
        self._saving = None
        self._manager = Manager(
            directory,
            rank,
            keep_newest=keep_newest,
            keep_best=keep_best,
            read_only=read_only,
        )
        self._examine()

    @property
    def steps(self) -> Sequence[int]:
        """All that there are checkpoints of, in order."""
        return self._manager.all_steps()

    @property
    def newest(self) -> int | None:
        """The last step there is a checkpoint of."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step that ranks highest."""
        return self._manager.best_step()

    def to_evaluate(self) -> int:
        """The best step, or else the newest.

        Raises:
          ValueError: there is none.
          DamagedCheckpointError: one may be the best, and cannot be ranked.
        """
        for error in self.damaged.values():
            raise error
        step = self.best or self.newest
        if step is None:
            raise ValueError(f"{self.directory} holds no finished checkpoint.")
        return step

    def evaluated(self, step: int) -> bool:
        """Whether a step was saved with its metrics."""
        return self._manager.metrics(step) is not None

    def improved_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether these are better than those of every step saved so far."""
        return self._best_rank is None or self._rank(metrics) > self._best_rank

    def save(
        self,
        step: int,
        state: Any,
        config: Mapping[str, Any],
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts to save; returns when `state` may be donated.

        A checkpoint of that step, saved before its evaluation, is replaced.

        Args:
          step: names the checkpoint.
          state: a tree of arrays.
          config: JSON values.
          metrics: of this step, if it was evaluated.
        """
        record = fingerprints.make_record(state, config, metrics)
        self.raise_if_failed(wait=True)
        if step in self.steps:
            self._manager.delete(step)
        self._manager.write(step, state, config, record, metrics)
        self._saving = step
        if metrics is not None and self.improved_by(metrics):
            self._best_rank = self._rank(metrics)

    def restore(self, step: int, abstract_state: Any) -> Any:
        """Reads the state of a step.

        Args:
          step: there is a checkpoint of.
          abstract_state: a tree of jax.ShapeDtypeStruct with shardings.

        Returns:
          The same tree of arrays, sharded as asked.

        Raises:
          ValueError: the checkpoint holds other arrays, with a list of them.
          DamagedCheckpointError: they are not those that were saved.
        """
        saved = self._saved(step)
        differences = damage.differences(
            fingerprints.describe_arrays(self._read(step, saved.described)),
            fingerprints.describe_arrays(abstract_state),
        )
        if differences:
            raise ValueError(
                f"The checkpoint of step {step} in {self.directory} is of "
                f"another architecture or optimizer. {differences}\nUse the "
                "config the run was started with (config.json beside it), or "
                "another --workdir."
            )
        return self._read(step, lambda: saved.arrays(abstract_state))

    def config(self, step: int) -> dict[str, Any]:
        """The config that a step was saved with, in today's keys.

        Raises:
          DamagedCheckpointError: it is not the config that was saved.
        """
        return self._read(step, lambda: upgrade(self._saved(step).config()))

    def remark(self, step: int) -> str | None:
        """What is to be said of a step that was read, and is as it was."""
        return self._saved(step).remark()

    def set_aside(self, step: int) -> str:
        """Renames the checkpoint of a step so that nothing reads it any more.

        Returns:
          Its new name.
        """
        name = self._manager.set_aside(step)
        self._examine()
        return name

    def abstract_state(self, step: int) -> Any:
        """The shapes of the state of a step, for the first device."""
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._read(step, self._saved(step).described),
        )

    def raise_if_failed(self, wait: bool = False) -> None:
        """Raises OSError if what was saved last could not be written.

        Args:
          wait: until it is on disk; otherwise returns at once.
        """
        if self._saving is None or (
            not wait and self._manager.is_saving_in_progress()
        ):
            return
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            reason = damage.describe(error, self.directory)
            raise OSError(
                f"The checkpoint of step {step:,} could not be written to "
                f"{self.directory}: {reason}."
            ) from error

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self.raise_if_failed(wait=True)

    def close(self) -> None:
        """Waits, then frees what the manager holds."""
        self._manager.close()

    def _examine(self):
        """Finds the steps whose rank is not known, and that of the best."""
        self.damaged = {}
        for step in self.steps:
            saved = self._saved(step)
            try:
                self._read(step, lambda saved=saved: self._rank_of(saved))
            except DamagedCheckpointError as error:
                # A run that goes on deletes old steps as we read.
                if saved.path.exists():
                    self.damaged[step] = error
        best = self.best
        metrics = self._manager.metrics(best) if best else None
        self._best_rank = self._rank(metrics) if metrics else None

    def _rank_of(self, saved):
        metrics = saved.metrics()
        return None if metrics is None else self._rank(metrics)

    def _read(self, step, read):
        """What `read` returns, on all hosts; or DamagedCheckpointError."""
        return damage.agreed_value(step, self._saved(step), read)

    def _saved(self, step):
        return SavedStep(self._manager, step)


def save_variables(
    directory: Path, variables: Mapping[str, Any], config: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of variables alone, as step 0 of a run.

    Raises:
      ValueError: there are checkpoints already.
    """
    checkpoints = Checkpoints(directory / "checkpoints", CLASSIFICATION.rank)
    with contextlib.closing(checkpoints):
        if checkpoints.newest is not None:
            raise ValueError(f"{directory} holds checkpoints: choose another.")
        checkpoints.save(0, variables, config, metrics=None)


def load_variables(
    directory: Path,
) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """What a run's best model, or else its newest, is evaluated with.

    Args:
      directory: of a run, that holds checkpoints/.

    Returns:
      The step, its variables {'params', 'batch_stats'}, moving averages where
      the run has them, on the first device; and the config.

    Raises:
      ValueError: there is no checkpoint, or it is damaged.
    """
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"{directory} is no run: it has no checkpoints/.")
    checkpoints = Checkpoints(
        directory / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    with (
        contextlib.closing(checkpoints),
        damage.naming_others(checkpoints.steps),
    ):
        step = checkpoints.to_evaluate()
        try:
            state = checkpoints.restore(step, checkpoints.abstract_state(step))
            config = checkpoints.config(step)
            variables = state.get("ema") or state
            variables = {
                "params": variables["params"],
                "batch_stats": variables.get("batch_stats", {}),
            }
        except (KeyError, AttributeError) as error:
            raise ValueError(
                f"The checkpoint of step {step} in {directory} is damaged, or "
                "none of this project's."
            ) from error
    shape = read_image_shape(directory)
    if shape and "image_shape" not in config:  # of an earlier version
        config["image_shape"] = shape
    return step, variables, config
