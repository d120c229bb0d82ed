"""Orbax's manager of checkpoints. The only importer of Orbax."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from densenet_jax.files import in_bucket
from densenet_jax.runs.file_list import write_file_list

_ENDINGS = [f"-{number}" for number in range(2, 1000)]


class Manager(ocp.CheckpointManager):
    """One that opens although metrics cannot be read, and closes quietly."""

    def __init__(
        self,
        directory: Path,
        rank: Callable[[Mapping[str, float]], Any],
        *,
        keep_newest: int,
        keep_best: int,
        read_only: bool,
    ):
        """Opens a directory; the arguments are those of `Checkpoints`."""
        kept = [
            policies.LatestN(keep_newest),
            # Weights to start from, of `save_variables`.
            policies.CustomSteps([0]),
            policies.BestN(
                get_metric_fn=rank,
                n=keep_best,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        super().__init__(
            directory if in_bucket(directory) else directory.absolute(),
            handler_registry=_handlers(),
            options=ocp.CheckpointManagerOptions(
                best_fn=rank,
                preservation_policy=policies.AnyPreservationPolicy(kept),
                # The loop decides when to save.
                save_decision_policy=policies.FixedIntervalPolicy(1),
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def write(self, step, state, config, record, metrics) -> None:
        """Starts to save; the arguments are those of `Checkpoints.save`."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            config=ocp.args.JsonSave(config),
            fingerprints=ocp.args.JsonSave(record),
        )
        self.save(step, args=args, metrics=metrics)

    def read_state(self, step: int, abstract_state: Any) -> Any:
        """The arrays of a step, sharded as asked."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract_state)
        )
        return self.restore(step, args=args).state

    def described(self, step: int) -> Any:
        """What is stated of the arrays of a step, with shapes and dtypes."""
        return self.item_metadata(step).state.tree

    def metrics(self, step: int) -> Any:
        try:
            return super().metrics(step)
        except Exception:
            return None

    def set_aside(self, step: int) -> str:
        """Renames the directory of a step; returns its new name."""
        names = (f"damaged-{step}{end}" for end in ("", *_ENDINGS))
        name = next(n for n in names if not (self.directory / n).exists())
        # All hosts have looked for a free name before it is taken.
        multihost_utils.sync_global_devices("name of a step set aside")
        if jax.process_index() == 0:
            (self.directory / str(step)).rename(self.directory / name)
        multihost_utils.sync_global_devices("step set aside")
        self.reload()
        return name

    def close(self) -> None:
        # Orbax clears unfinished checkpoints in a thread that it waits for
        # only when it saves: a process that ends before would end in its
        # traceback.
        wait = getattr(self, "_maybe_await_cleanup_tmp_directory", None)
        if wait:
            wait()
        super().close()

    def _finalize_checkpoint(self, step):
        # In the background, once the step has its final name. A run that is
        # killed before the list is there, or another Orbax, leaves none.
        super()._finalize_checkpoint(step)
        path = self.directory / str(step)
        local = "://" not in str(path)
        if jax.process_index() == 0 and local and path.exists():
            write_file_list(path)


def _handlers():
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    state = ocp.StandardCheckpointHandler()
    registry.add("state", ocp.args.StandardSave, state)
    registry.add("state", ocp.args.StandardRestore, state)
    config = ocp.JsonCheckpointHandler()
    registry.add("config", ocp.args.JsonSave, config)
    registry.add("config", ocp.args.JsonRestore, config)
    numbers = ocp.JsonCheckpointHandler()
    registry.add("fingerprints", ocp.args.JsonSave, numbers)
    registry.add("fingerprints", ocp.args.JsonRestore, numbers)
    return registry
