"""The ordered loop of training and evaluation."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from densenet_jax.analysis import summary
from densenet_jax.data import pipeline
from densenet_jax.files import replacing
from densenet_jax.models.geometry import tensor_shapes
from densenet_jax.runs import curves
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.runs.directory import differences, flatten
from densenet_jax.runs.log import RunLog
from densenet_jax.training import metrics
from densenet_jax.training.evaluation import evaluate
from densenet_jax.training.experiment import Experiment, build
from densenet_jax.training.state import TrainState
from densenet_jax.weights.load import describe, load_weights

# A run continues from its newest checkpoint only where these are as they were:
# they say which examples the steps before it have seen.
_POSITION_KEYS = ("seed", "batch_size", "dataset.name", "dataset.train_split")


def train_and_evaluate(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Trains to the end of the config, from the newest checkpoint there is.

    The order of one turn of the loop is a contract: evaluate if due, save if
    due, take a batch, step, look at the metrics of the step before. A batch is
    taken after the save, so the saved step is the position in the data, and a
    run that continues is the run that was never stopped.

    Writes to workdir: checkpoints/, config.json, network.json (the table of
    its stages), metrics.jsonl, tensorboard/ and curves.png.

    Returns:
      The test metrics after the last step: 'loss' in nats, 'top1' and 'top5'
      in [0, 1].

    Raises:
      ValueError: the config does not fit together, or not to the checkpoint.
      OSError: workdir cannot be written.
      FloatingPointError: the loss or the gradient is not finite.
      BadRecordError: an image or a label that cannot be read.
    """
    experiment = build(config)
    for remark in experiment.train_source.remarks:
        _say(remark)
    json_config = json.loads(config.to_json())
    _prepare(workdir)
    image_shape = experiment.batch["image"].shape[1:]
    stages = summary.stages(summary.layers(experiment.model, image_shape))
    _say(summary.format_table(stages) + "\n")
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        keep_newest=config.checkpoint.keep_newest,
        keep_best=config.checkpoint.keep_best,
    )
    with contextlib.ExitStack() as cleanup:
        cleanup.callback(checkpoints.close)
        start = checkpoints.newest or 0
        if start > experiment.total_steps:
            raise ValueError(
                f"{workdir} holds a checkpoint of step {start:,}, past the "
                f"config's last, {experiment.total_steps:,}: raise epochs, or "
                "choose another --workdir."
            )
        if start:
            _check_position(checkpoints.config(start), json_config, start)
            state = checkpoints.restore(start, experiment.state)
            _say(f"Continuing from step {start:,}.")
        elif config.pretrained:
            state = _start_from(config, experiment)
        else:
            _say("Initialising ...")
            state = experiment.init()
        log = _Log(experiment, workdir, start, is_writer=_is_first_process())
        cleanup.callback(log.close)
        if _is_first_process():
            with replacing(workdir / "config.json") as temporary:
                temporary.write_text(json.dumps(json_config, indent=2))
            with replacing(workdir / "network.json") as temporary:
                temporary.write_text(summary.format_table(stages, "json"))
        return _loop(
            config, experiment, checkpoints, log, json_config, state, start
        )


def evaluate_best(config: ConfigDict, workdir: Path) -> dict[str, float]:
    """Evaluates the checkpoint with the highest accuracy; changes nothing.

    Returns and raises: as `train_and_evaluate`; ValueError too where there is
    no checkpoint.
    """
    experiment = build(config)
    directory = workdir / "checkpoints"
    if not directory.is_dir():
        raise ValueError(
            f"No checkpoints in {workdir}: train first, or point --workdir to "
            "the directory of a run."
        )
    checkpoints = Checkpoints(directory, read_only=True)
    with contextlib.closing(checkpoints):
        step = checkpoints.best or checkpoints.newest
        if step is None:
            raise ValueError(f"{directory} holds no finished checkpoint.")
        state = checkpoints.restore(step, experiment.state)
    result = _evaluate(experiment, config, state)
    _say(f"Step {step:,}: {_accuracy(experiment, result)}.")
    return result


def _loop(config, experiment, checkpoints, log, json_config, state, start):
    with contextlib.ExitStack() as cleanup:
        total = experiment.total_steps
        train_step = _compile(experiment) if start < total else None
        batches = pipeline.train_batches(
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
        cleanup.callback(batches.close)
        progress = cleanup.enter_context(
            tqdm(
                desc="train",
                unit=" images",
                unit_scale=True,
                initial=start * config.batch_size,
                total=total * config.batch_size,
                disable=None if _is_first_process() else True,
            )
        )
        result = None
        previous = None  # the metrics of the step before, still on the devices
        log.restart_clock()
        for step in range(start, total + 1):
            last = step == total
            preempted = checkpoints.preempted(step)
            # At `start` both have been done before the checkpoint was saved.
            new = step > start
            evaluated = last or (
                new and _due(step, config.eval_every_epochs, experiment)
            )
            save = new and (
                last
                or preempted
                or _due(step, config.checkpoint.every_epochs, experiment)
            )
            if evaluated or save:
                log.add(previous)
                previous = None
                log.flush(step)
            if evaluated:
                result = _evaluate(experiment, config, state)
                if new:
                    log.evaluation(step, result)
                    save = save or checkpoints.improved_by(result)
                progress.set_postfix(test=f"{result['top1']:.2%}")
            if save:
                checkpoints.save(
                    step, state, json_config, result if evaluated else None
                )
            if last or preempted:
                break
            if evaluated or save:
                log.restart_clock()
            # The step before is still being computed: its successor's batch
            # is loaded and copied beside it.
            with log.waiting(batches):
                batch = next(batches)
            batch = pipeline.to_devices(
                batch, experiment.batch["image"].sharding
            )
            state, sums = train_step(state, batch)
            log.add(previous)
            previous = step + 1, sums
            if step % config.log_every_steps == 0:
                log.flush(step)
            progress.update(config.batch_size)
    checkpoints.wait()
    if preempted and not last:
        raise SystemExit(f"Preempted: saved step {step}. Start again to go on.")
    best = checkpoints.best
    _say(
        f"Finished {total:,} steps: {_accuracy(experiment, result)}"
        + (f"; best checkpoint: step {best:,}." if best else ".")
    )
    return result


def _compile(experiment: Experiment) -> Callable[..., Any]:
    """The training step for its shapes alone: others would be an error."""
    _say("Compiling the training step ...")
    began = time.perf_counter()
    compiled = experiment.train_step.lower(
        experiment.state, experiment.batch
    ).compile()
    _say(f"Compiled in {time.perf_counter() - began:.1f} s.")
    return compiled


class _Log:
    """Gathers the metrics of steps and writes their means."""

    def __init__(self, experiment, workdir, start, is_writer):
        self._experiment = experiment
        self._workdir = workdir
        self._writer = RunLog(workdir, start) if is_writer else None
        self._sums = {}
        self._steps = 0
        self._bad_records = 0
        self.restart_clock()

    def restart_clock(self):
        """Leaves the time since the last flush out of images per second."""
        self._clock = time.perf_counter()
        self._waited = 0

    @contextlib.contextmanager
    def waiting(self, batches):
        """Counts the time in it as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._bad_records = batches.bad_records

    def add(self, indexed_sums):
        """Takes (step, sums on the devices) or None."""
        if indexed_sums is None:
            return
        step, sums = indexed_sums
        sums = jax.device_get(sums)
        _require_finite(
            f"Step {step:,}",
            loss=sums["loss"] / sums["count"],
            grad_norm=sums["grad_norm"],
            param_norm=sums["param_norm"],
        )
        self._sums = metrics.add(self._sums, sums)
        self._steps += 1

    def flush(self, step):
        """Writes the means since the last time as those of `step`."""
        if not self._steps:
            return
        seconds = time.perf_counter() - self._clock
        self._write(
            step,
            "train",
            {
                **metrics.means(self._sums),
                "grad_norm": float(self._sums["grad_norm"]) / self._steps,
                "param_norm": float(self._sums["param_norm"]) / self._steps,
                "learning_rate": float(self._experiment.schedule(step - 1)),
                "images_per_second": int(self._sums["count"]) / seconds,
                "data_wait": self._waited / seconds,
                "bad_records": self._bad_records,
            },
        )
        self._sums, self._steps = {}, 0
        self.restart_clock()

    def evaluation(self, step, result):
        """Writes and prints test metrics, and draws the curves so far."""
        _require_finite(f"Evaluation at step {step:,}", loss=result["loss"])
        self._write(step, "test", result)
        if self._writer is None:
            return
        epoch = step / self._experiment.steps_per_epoch
        tqdm.write(
            f"epoch {float(epoch):6.1f}  step {step:7,}  "
            f"{_accuracy(self._experiment, result)}",
            file=sys.stderr,
        )
        records = curves.read_metrics(self._writer.path)
        path = self._workdir / "curves.png"
        curves.plot_curves(records, path, self._workdir.name)

    def _write(self, step, split, values):
        if self._writer is not None:
            epoch = float(step / self._experiment.steps_per_epoch)
            self._writer.write(step, split, {"epoch": epoch, **values})

    def close(self):
        if self._writer is not None:
            self._writer.close()


def _evaluate(experiment, config, state):
    return evaluate(
        experiment.eval_step,
        state.eval_variables,
        experiment.test_source.examples,
        experiment.preprocessing.evaluate,
        batch_size=config.batch_size,
        sharding=experiment.batch["image"].sharding,
        num_workers=config.dataset.num_workers,
        on_error=config.dataset.on_error,
    )


def _require_finite(when: str, **values: float) -> None:
    if not all(np.isfinite(value) for value in values.values()):
        found = ", ".join(f"{k} is {float(v)}" for k, v in values.items())
        raise FloatingPointError(
            f"{when}: {found}. Training has stopped; the last good checkpoint "
            "is kept. Lower optimizer.learning_rate, lengthen "
            "schedule.warmup_epochs or set optimizer.clip_norm."
        )


def _start_from(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The first state with the weights of config.pretrained."""
    model = experiment.model
    channels = experiment.batch["image"].shape[-1]
    found, variables, remarks, changes = load_weights(
        config.pretrained,
        num_classes=model.num_classes,
        in_channels=channels,
        seed=config.seed,
    )
    for line in [f"Starting from {config.pretrained}.", *remarks, *changes]:
        _say(line)
    if (
        tensor_shapes(found, channels) != tensor_shapes(model, channels)
        or found.norm_epsilon != model.norm_epsilon
    ):
        raise ValueError(
            f"{config.pretrained} is of another architecture than "
            f"config.model. It has {describe(found)}; the config asks for "
            f"{describe(model)}."
        )
    # Every host holds the whole of them.
    return experiment.init(variables=jax.device_get(variables))


def _due(step: int, every_epochs: float, experiment: Experiment) -> bool:
    """Whether `step` is the first at or after a multiple of every_epochs."""
    # Exact, so that intervals that are multiples of each other fall together.
    every = Fraction(str(every_epochs)) * experiment.steps_per_epoch
    return step // every > (step - 1) // every


def _prepare(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise OSError(
            f"Cannot write to {workdir} ({error.strerror}): choose another "
            "--workdir."
        ) from None


def _check_position(
    saved: Mapping[str, Any], config: Mapping[str, Any], step: int
) -> None:
    changed = differences(flatten(saved), flatten(config))
    refused = [changed[key] for key in _POSITION_KEYS if key in changed]
    if refused:
        raise ValueError(
            f"The run cannot go on from step {step:,}, whose place in the data "
            f"was another: {'; '.join(refused)}. Restore these, or choose "
            "another --workdir."
        )
    if changed:
        _say(f"Continuing with a changed config: {'; '.join(changed.values())}")


def _accuracy(experiment: Experiment, result: Mapping[str, float]) -> str:
    count = len(experiment.test_source.examples)
    return (
        f"test top-1 {result['top1']:.2%}, loss {result['loss']:.4f} "
        f"({count:,} images)"
    )


def _is_first_process() -> bool:
    return jax.process_index() == 0


def _say(message: str) -> None:
    if _is_first_process():
        print(message, flush=True)
