"""The ordered loop of training and evaluation."""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from densenet_jax.analysis import summary
from densenet_jax.data import pipeline
from densenet_jax.runs import directory
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.log import RunLog
from densenet_jax.training.console import is_first_process, say
from densenet_jax.training.evaluation import evaluate
from densenet_jax.training.experiment import Experiment, build
from densenet_jax.training.start import (
    config_to_save,
    restore_best,
    start_training,
)


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains to the end of the config, from the newest checkpoint there is.

    Writes to workdir: checkpoints/, config.json, network.json (the table of
    its stages), metrics.jsonl, tensorboard/ and curves.png.

    Returns:
      The task's test metrics after the last step, as 'loss'.

    Raises:
      ValueError: the config does not fit together, or not to the checkpoint.
      OSError: workdir cannot be written.
      FloatingPointError: the loss or the gradient is not finite.
      BadRecordError: an image or a label that cannot be read.
    """
    experiment = build(config)
    for source in experiment.train_source, experiment.test_source:
        for remark in source.remarks:
            say(remark)
    json_config = config_to_save(config, experiment)
    directory.prepare(workdir)
    image_shape = experiment.batch["image"].shape[1:]
    stages = summary.stages(summary.layers(experiment.model, image_shape))
    say(summary.format_table(stages) + "\n")
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        experiment.task.rank,
        keep_newest=config.checkpoint.keep_newest,
        keep_best=config.checkpoint.keep_best,
    )
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(checkpoints.close)
        start, state = start_training(
            config, experiment, checkpoints, json_config
        )
        log = RunLog(
            workdir,
            start,
            means=experiment.task.means,
            schedule=experiment.schedule,
            steps_per_epoch=experiment.steps_per_epoch,
            write=is_first_process(),
        )
        cleanup.callback(log.close)
        if is_first_process():
            network = json.loads(summary.format_table(stages, "json"))
            network["image_shape"] = image_shape
            directory.write_description(workdir, json_config, network)
        return _loop(
            config, experiment, checkpoints, log, json_config, state, start
        )


def evaluate_best(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Evaluates the best checkpoint; changes nothing.

    Returns and raises: as `train_and_evaluate`; ValueError too where there is
    no checkpoint.
    """
    experiment = build(config)
    path = workdir / "checkpoints"
    if not path.is_dir():
        raise ValueError(
            f"No checkpoints in {workdir}: train first, or point --workdir to "
            "the directory of a run."
        )
    checkpoints = Checkpoints(path, experiment.task.rank, read_only=True)
    with contextlib.closing(checkpoints):
        step, state = restore_best(experiment, checkpoints)
    result = _evaluate(experiment, config, state)
    say(f"Step {step:,}: {_describe(experiment, result)}.")
    return result


def _loop(config, experiment, checkpoints, log, json_config, state, start):
    total, sharding = experiment.total_steps, _sharding(experiment)
    with contextlib.ExitStack() as cleanup:
        train_step = _compile(experiment) if start < total else None
        batches = _train_batches(config, experiment, start)
        cleanup.callback(batches.close)
        progress = cleanup.enter_context(_progress(config, start, total))
        result, previous = None, ()
        log.restart_clock()
        # The order of a turn is a contract. A batch is taken after the save, so
        # the saved step is the position in the data, and a run that continues
        # is the run that was never stopped.
        for step in range(start, total + 1):
            # At `start` both have been done before the checkpoint was saved.
            last, new = step == total, step > start
            preempted = checkpoints.preempted(step)
            evaluating = last or (
                new and _due(step, config.eval_every_epochs, experiment)
            )
            saving = new and (
                last
                or preempted
                or _due(step, config.checkpoint.every_epochs, experiment)
            )
            if evaluating or saving:
                log.add(*previous)
                previous = ()
                log.flush(step, copy=not evaluating)
            # 1. Evaluate if due.
            if evaluating:
                result = _evaluate(experiment, config, state)
                if new:
                    log.evaluation(step, result)
                    _tell(experiment, step, result)
                    saving = saving or checkpoints.improved_by(result)
                progress.set_postfix(test=experiment.task.headline(result))
            # 2. Save if due.
            if saving:
                metrics = result if evaluating else None
                checkpoints.save(step, state, json_config, metrics)
            if last or preempted:
                break
            if evaluating or saving:
                log.restart_clock()
            # 3. Take a batch, while the step before is still being computed.
            with log.waiting(batches):
                batch = next(batches)
            batch = pipeline.to_devices(batch, sharding)
            # 4. Step.
            state, sums = train_step(state, batch)
            # 5. Look at the metrics of the step before.
            log.add(*previous)
            previous = step + 1, sums
            if step % config.log_every_steps == 0:
                log.flush(step)
            progress.update(config.batch_size)
    checkpoints.wait()
    if preempted and not last:
        raise SystemExit(f"Preempted: saved step {step}. Start again to go on.")
    _say_finished(experiment, checkpoints, result)
    return result


def _say_finished(experiment, checkpoints, result):
    best = checkpoints.best
    say(
        f"Finished {experiment.total_steps:,} steps: "
        + _describe(experiment, result)
        + (f"; best checkpoint: step {best:,}." if best else ".")
    )


def _train_batches(config, experiment, start):
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


def _progress(config, start, total):
    return tqdm(
        desc="train",
        unit=" images",
        unit_scale=True,
        initial=start * config.batch_size,
        total=total * config.batch_size,
        disable=None if is_first_process() else True,
    )


def _tell(experiment, step, result):
    if is_first_process():
        epoch = float(step / experiment.steps_per_epoch)
        tqdm.write(
            f"epoch {epoch:6.1f}  step {step:7,}  "
            f"{_describe(experiment, result)}",
            file=sys.stderr,
        )


def _compile(experiment: Experiment) -> Callable[..., Any]:
    """The training step for its shapes alone: others would be an error."""
    say("Compiling the training step ...")
    began = time.perf_counter()
    compiled = experiment.train_step.lower(
        experiment.abstract_state, experiment.batch
    ).compile()
    say(f"Compiled in {time.perf_counter() - began:.1f} s.")
    return compiled


def _evaluate(experiment, config, state):
    return evaluate(
        experiment.eval_step,
        state.eval_variables,
        experiment.test_source.examples,
        experiment.preprocessing.evaluate,
        task=experiment.task,
        batch_size=config.batch_size,
        sharding=_sharding(experiment),
        num_workers=config.dataset.num_workers,
        on_error=config.dataset.on_error,
    )


def _sharding(experiment):
    return experiment.batch["image"].sharding


def _due(step: int, every_epochs: float, experiment: Experiment) -> bool:
    """Whether `step` is the first at or after a multiple of every_epochs."""
    # Exact, so that intervals that are multiples of each other fall together.
    every = Fraction(str(every_epochs)) * experiment.steps_per_epoch
    return step // every > (step - 1) // every


def _describe(experiment: Experiment, result: Mapping[str, float]) -> str:
    count = len(experiment.test_source.examples)
    return f"test {experiment.task.describe(result)} ({count:,} images)"
