"""Checkpoints of training runs. The only importer of Orbax."""

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from densenet_jax.files import in_bucket
from densenet_jax.runs.config import upgrade
from densenet_jax.runs.directory import read_image_shape
from densenet_jax.tasks.classification import CLASSIFICATION


class Checkpoints:
    """The checkpoints of one run, one directory a step.

    A checkpoint holds the training state, the config, and, where the step was
    evaluated, its metrics. It is written in the background and appears whole
    or not at all. The step is the position in the training data too.
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
        self._manager = ocp.CheckpointManager(
            directory if in_bucket(directory) else directory.absolute(),
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(keep_newest),
                        # Weights to start from, of `save_variables`.
                        policies.CustomSteps([0]),
                        policies.BestN(
                            get_metric_fn=rank,
                            n=keep_best,
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                # The loop decides when to save.
                save_decision_policy=policies.FixedIntervalPolicy(1),
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )
        best = self.best
        self._best_rank = rank(self._manager.metrics(best)) if best else None

    @property
    def newest(self) -> int | None:
        """The last step there is a checkpoint of."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step that ranks highest."""
        return self._manager.best_step()

    def preempted(self, step: int) -> bool:
        """Whether the machine will be taken away: save, and stop."""
        return self._manager.reached_preemption(step)

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

        Args:
          step: names the checkpoint.
          state: a tree of arrays.
          config: JSON values.
          metrics: of this step, if it was evaluated.
        """
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                config=ocp.args.JsonSave(config),
            ),
            metrics=metrics,
        )
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
        """
        self._check(step, abstract_state)
        return self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract_state)
            ),
        ).state

    def config(self, step: int) -> dict[str, Any]:
        """The config that a step was saved with, in today's keys."""
        args = ocp.args.Composite(config=ocp.args.JsonRestore())
        return upgrade(self._manager.restore(step, args=args).config)

    def abstract_state(self, step: int) -> Any:
        """The shapes of the state of a step, for the first device."""
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._manager.item_metadata(step).state.tree,
        )

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then frees what the manager holds."""
        # Orbax clears unfinished checkpoints in a thread that it waits for
        # only when it saves: a process that ends before would end in its
        # traceback.
        wait = getattr(
            self._manager, "_maybe_await_cleanup_tmp_directory", None
        )
        if wait:
            wait()
        self._manager.close()

    def _check(self, step, abstract_state):
        expected = _shapes(abstract_state)
        found = _shapes(self._manager.item_metadata(step).state.tree)
        differences = [
            f"  {name}: {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'nothing')}"
            for name in sorted(found.keys() | expected.keys())
            if found.get(name) != expected.get(name)
        ]
        if differences:
            shown = differences[:20]
            more = len(differences) - len(shown)
            raise ValueError(
                f"The checkpoint of step {step} in {self.directory} is of "
                f"another architecture or optimizer. {len(differences)} arrays "
                "differ (found in the checkpoint, expected by the config):\n"
                + "\n".join(shown)
                + (f"\n  and {more} more" if more else "")
                + "\nUse the config the run was started with (config.json "
                "beside it), or another --workdir."
            )


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
      ValueError: there is no checkpoint.
    """
    if not (directory / "checkpoints").is_dir():
        raise ValueError(f"{directory} is no run: it has no checkpoints/.")
    checkpoints = Checkpoints(
        directory / "checkpoints", CLASSIFICATION.rank, read_only=True
    )
    with contextlib.closing(checkpoints):
        step = checkpoints.newest
        if step is None:
            raise ValueError(f"{directory} holds no finished checkpoint.")
        step = checkpoints.best or step
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


def _handlers():
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state = ocp.StandardCheckpointHandler()
    registry.add("state", ocp.args.StandardSave, state)
    registry.add("state", ocp.args.StandardRestore, state)
    config = ocp.JsonCheckpointHandler()
    registry.add("config", ocp.args.JsonSave, config)
    registry.add("config", ocp.args.JsonRestore, config)
    return registry


def _shapes(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{tuple(leaf.shape)} {leaf.dtype}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
