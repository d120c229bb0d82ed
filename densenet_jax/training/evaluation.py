"""Metrics of a model over a whole data set."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from densenet_jax.data import pipeline
from densenet_jax.data.examples import Examples
from densenet_jax.tasks.classification import Classification
from densenet_jax.tasks.sums import merge


def evaluate(
    eval_step: Callable[..., Mapping[str, jax.Array]],
    variables: Mapping[str, Any],
    examples: Examples,
    transform: Callable[[np.ndarray], np.ndarray],
    *,
    task: Classification,
    batch_size: int,
    sharding: jax.sharding.Sharding,
    num_workers: int = 0,
    on_error: str = "raise",
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Counts every example once, with a progress bar on the first host.

    Args:
      eval_step: `steps.eval_step` for a model, jitted.
      variables: of the model, on the devices.
      examples: the test split.
      transform: decodes and crops one image.
      task: what was learned.
      batch_size: over all hosts.
      sharding: of a batch.
      num_workers: processes that load; 0 loads in threads of this process.
      on_error: 'raise', or 'skip' to leave out, and say so, what cannot be
        read.
      interrupted: asked before each batch; whether to leave off.

    Returns:
      The task's means, as 'loss'; None: it was interrupted.

    Raises:
      BadRecordError: an example cannot be read.
    """
    batches = pipeline.eval_batches(
        examples,
        transform,
        batch_size=batch_size,
        num_workers=num_workers,
        on_error=on_error,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    count = len(examples)
    total = {}
    with (
        contextlib.closing(batches),
        tqdm(
            desc="test",
            unit=" images",
            total=count,
            leave=False,
            disable=None if jax.process_index() == 0 else True,
        ) as progress,
    ):
        for batch in batches:
            if interrupted():
                return None
            batch = pipeline.to_devices(batch, sharding)
            total = merge(total, eval_step(variables, batch))
            progress.update(min(batch_size, count - progress.n))
    total = jax.device_get(total)
    if total["count"] != count:
        message = f"Evaluated {total['count']:,} of {count:,} examples."
        if on_error == "raise":
            raise AssertionError(message)
        tqdm.write(message, file=sys.stderr)
    return task.means(total)
