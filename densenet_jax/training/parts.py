"""What the loop runs: the compiled step, and the batches it takes."""

import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from densenet_jax.data import pipeline
from densenet_jax.training.console import say
from densenet_jax.training.experiment import Experiment


def train_batches(
    config: ConfigDict, experiment: Experiment, start: int
) -> pipeline.Batches:
    """This host's share of each batch, from step `start` on."""
    return pipeline.train_batches(
        experiment.train_source.examples,
        experiment.preprocessing.train,
        batch_size=config.batch_size,
        seed=config.seed,
        position=start,
        num_workers=config.dataset.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        on_error=config.dataset.on_error,
    )


def compile_step(experiment: Experiment) -> Callable[..., Any]:
    """The training step for its shapes alone: others would be an error."""
    say("Compiling the training step ...")
    began = time.perf_counter()
    compiled = experiment.train_step.lower(
        experiment.abstract_state, experiment.batch
    ).compile()
    say(f"Compiled in {time.perf_counter() - began:.1f} s.")
    return compiled
