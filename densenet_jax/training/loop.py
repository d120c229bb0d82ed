"""The ordered loop of training and evaluation."""

import contextlib
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from densenet_jax.analysis import summary
from densenet_jax.data import pipeline
from densenet_jax.runs import directory
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.lock import hold
from densenet_jax.runs.log import RunLog
from densenet_jax.training.console import (
    describe,
    is_first_process,
    progress,
    say,
    say_evaluation,
    say_finished,
)
from densenet_jax.training.evaluation import evaluate
from densenet_jax.training.experiment import build
from densenet_jax.training.parts import compile_step, train_batches
from densenet_jax.training.polling import Requests, is_due
from densenet_jax.training.signals import StopSignals
from densenet_jax.training.start import (
    config_to_save,
    restore_best,
    start_training,
)


def train_and_evaluate(
    config: ConfigDict,
    workdir: Path,
    *,
    signals: StopSignals | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Trains to the end of the config, from the newest checkpoint there is.

    Writes to workdir: checkpoints/, config.json, network.json (the table of
    its stages), metrics.jsonl, tensorboard/, curves.png, and run.lock while it
    is at work.

    Args:
      config: the recipe.
      workdir: of the run.
      signals: that stop it; none by default, as a notebook has its own.
      clock: in seconds; tells when a checkpoint is due.

    Returns:
      The task's test metrics after the last step, as 'loss'.

    Raises:
      Stopped: by a signal, after the state was saved.
      ValueError: the config does not fit together, or not to the checkpoint;
        or another run is at work in workdir.
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
    signals = signals or StopSignals()
    image_shape = experiment.batch["image"].shape[1:]
    stages = summary.stages(summary.layers(experiment.model, image_shape))
    say(summary.format_table(stages) + "\n")
    with contextlib.ExitStack() as cleanup:
        lock = hold(workdir, say)
        if lock:
            signals.before_exit(lock.release)
            cleanup.callback(lock.release)
        checkpoints = Checkpoints(
            workdir / "checkpoints",
            experiment.task.rank,
            keep_newest=config.checkpoint.keep_newest,
            keep_best=config.checkpoint.keep_best,
        )
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
        requests = Requests(
            _sharding(experiment),
            signals,
            config.checkpoint.every_minutes,
            clock,
            lock.check if lock else lambda: None,
        )
        return _loop(
            config,
            experiment,
            checkpoints,
            log,
            json_config,
            state,
            start,
            requests,
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
    say(f"Step {step:,}: {describe(experiment, result)}.")
    return result


def _loop(
    config,
    experiment,
    checkpoints,
    log,
    json_config,
    state,
    start,
    requests,
):
    total, sharding = experiment.total_steps, _sharding(experiment)
    with contextlib.ExitStack() as cleanup:
        train_step = compile_step(experiment) if start < total else None
        batches = train_batches(config, experiment, start)
        cleanup.callback(batches.close)
        bar = cleanup.enter_context(progress(start, total, config.batch_size))
        previous = ()
        log.restart_clock()
        requests.begin()
        # The order of a turn is a contract. A batch is taken after the save, so
        # the saved step is the position in the data, and a run that continues
        # is the run that was never stopped.
        for step in range(start, total + 1):
            requests.poll()
            checkpoints.raise_if_failed()
            # At `start` both have been done, but for an evaluation cut short.
            last, new = step == total, step > start
            due = functools.partial(is_due, step, experiment.steps_per_epoch)
            owing = new or (step > 0 and not checkpoints.evaluated(step))
            evaluating = not requests.stop and (
                last or (owing and due(config.eval_every_epochs))
            )
            saving = new and (
                last or requests.save or due(config.checkpoint.every_epochs)
            )
            if evaluating or saving:
                log.add(*previous)
                previous = ()
                log.flush(step, copy=not evaluating)
            # 1. Evaluate if due.
            result = None
            if evaluating:
                result = _evaluate(experiment, config, state, requests.stopping)
            if result and owing:
                _tell(experiment, log, bar, step, result)
                saving = saving or checkpoints.improved_by(result) or not new
            # 2. Save if due.
            if saving or (new and requests.stop):
                checkpoints.save(step, state, json_config, result)
                requests.saved()
            if last or requests.stop:
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
            bar.update(config.batch_size)
    checkpoints.wait()
    requests.raise_stopped(step)
    say_finished(experiment, checkpoints.best, result)
    return result


def _tell(experiment, log, bar, step, result):
    log.evaluation(step, result)
    say_evaluation(experiment, step, result)
    bar.set_postfix(test=experiment.task.headline(result))


def _evaluate(experiment, config, state, interrupted=lambda: False):
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
        interrupted=interrupted,
    )


def _sharding(experiment):
    return experiment.batch["image"].sharding
