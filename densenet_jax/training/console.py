"""What a run prints, on the first host alone."""

import sys
from collections.abc import Mapping

import jax
from tqdm import tqdm

from densenet_jax.training.experiment import Experiment


def is_first_process() -> bool:
    return jax.process_index() == 0


def say(message: str) -> None:
    if is_first_process():
        print(message, flush=True)


def progress(start: int, total: int, batch_size: int) -> tqdm:
    """A bar of training, in images, from one step to another."""
    return tqdm(
        desc="train",
        unit=" images",
        unit_scale=True,
        initial=start * batch_size,
        total=total * batch_size,
        disable=None if is_first_process() else True,
    )


def say_evaluation(
    experiment: Experiment, step: int, result: Mapping[str, float]
) -> None:
    """A line of the test metrics, above the bar."""
    if is_first_process():
        epoch = float(step / experiment.steps_per_epoch)
        tqdm.write(
            f"epoch {epoch:6.1f}  step {step:7,}  "
            f"{describe(experiment, result)}",
            file=sys.stderr,
        )


def describe(experiment: Experiment, result: Mapping[str, float]) -> str:
    """The test metrics in words."""
    count = len(experiment.test_source.examples)
    return f"test {experiment.task.describe(result)} ({count:,} images)"


def say_finished(
    experiment: Experiment, best: int | None, result: Mapping[str, float]
) -> None:
    """The end of a run, and the step of its best checkpoint."""
    say(
        f"Finished {experiment.total_steps:,} steps: "
        + describe(experiment, result)
        + (f"; best checkpoint: step {best:,}." if best else ".")
    )
