"""What a run writes down as it goes: metrics.jsonl, TensorBoard, curves.png."""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX

from densenet_jax.files import replacing
from densenet_jax.runs import curves
from densenet_jax.runs.copied import Copied
from densenet_jax.tasks.sums import merge

# Of a step's sums, those that are not the task's: averaged over steps.
_NORMS = ("grad_norm", "param_norm")


class RunLog:
    """Gathers the sums of steps, and writes their means and evaluations.

    A run that continues from a checkpoint repeats what came after it, so
    later records are dropped first.
    """

    def __init__(
        self,
        workdir: Path,
        first_step: int,
        *,
        means: Callable[[Mapping[str, Any]], dict[str, float]],
        schedule: Callable[[int], Any],
        steps_per_epoch: Fraction,
        write: bool = True,
    ):
        """Opens the log to continue after first_step steps.

        Args:
          workdir: of the run.
          first_step: the steps done before.
          means: of the task.
          schedule: the learning rate of each step, from 0.
          steps_per_epoch: to tell epochs.
          write: otherwise sums are only checked to be finite.
        """
        self._workdir = workdir
        self._means = means
        self._schedule = schedule
        self._steps_per_epoch = steps_per_epoch
        self._file = self._events = None
        if write:
            self._copied = Copied(workdir, ["metrics.jsonl"])
            self._directory = self._copied.directory
            path = self._directory / "metrics.jsonl"
            _drop_later(path, first_step)
            self._file = path.open("a", buffering=1)
            self._events = tensorboardX.SummaryWriter(
                str(self._directory / "tensorboard"), purge_step=first_step + 1
            )
        self._sums = {}
        self._steps = 0
        self._bad_records = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leaves the time since the last flush out of images per second."""
        self._clock = time.perf_counter()
        self._waited = 0

    @contextlib.contextmanager
    def waiting(self, batches: Any) -> Iterator[None]:
        """Counts the time in it as waiting for data."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began
        self._bad_records = batches.bad_records

    def add(self, *step_and_sums: Any) -> None:
        """Takes a step and its sums, which may be on the devices; or nothing.

        Raises:
          FloatingPointError: the loss or a norm is not finite.
        """
        if not step_and_sums:
            return
        step, sums = jax.device_get(step_and_sums)
        _require_finite(
            f"Step {step:,}",
            loss=sums["loss"] / sums["count"],
            **{name: sums[name] for name in _NORMS},
        )
        self._sums = merge(self._sums, sums)
        self._steps += 1

    def flush(self, step: int, *, copy: bool = False) -> None:
        """Writes the means since the last time as those of `step`.

        Args:
          step: the last that was added.
          copy: to the bucket, if the run is in one; otherwise copied once in
            a while. What comes before a checkpoint has to be there before it:
            a run that continues does not write it again.

        Raises:
          OSError: the bucket cannot be written.
        """
        if self._steps:
            self._flush(step)
        if copy:
            self._copy()

    def _flush(self, step):
        seconds = time.perf_counter() - self._clock
        norms = {name: self._sums[name] / self._steps for name in _NORMS}
        self._write(
            step,
            "train",
            {
                **self._means(self._sums),
                **{name: float(norm) for name, norm in norms.items()},
                "learning_rate": float(self._schedule(step - 1)),
                "images_per_second": int(self._sums["count"]) / seconds,
                "data_wait": self._waited / seconds,
                "bad_records": self._bad_records,
            },
        )
        self._sums, self._steps = {}, 0
        self.restart_clock()

    def evaluation(self, step: int, result: Mapping[str, float]) -> None:
        """Writes test metrics, draws the curves so far, and copies all.

        Raises:
          FloatingPointError: the loss is not finite.
          OSError: the bucket cannot be written.
        """
        _require_finite(f"Evaluation at step {step:,}", loss=result["loss"])
        self._write(step, "test", result)
        if self._file is not None:
            self._draw()
            self._copy()

    def _draw(self):
        try:
            curves.plot_curves(
                curves.read_metrics(self._directory / "metrics.jsonl"),
                self._directory / "curves.png",
                self._workdir.name,
            )
        # A picture is no reason to stop, whatever is in its way.
        except Exception as error:
            print(f"curves.png was not drawn: {error}", file=sys.stderr)

    def _write(self, step, split, values):
        if self._file is None:
            return
        values = {"epoch": float(step / self._steps_per_epoch), **values}
        record = {"step": step, "split": split, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self._events.add_scalar(f"{split}/{name}", value, step)
        self._copied.copy_if_due()

    def _copy(self):
        if self._file is not None:
            self._events.flush()
            self._copied.copy()

    def close(self) -> None:
        """Writes what is left.

        Raises:
          OSError: the bucket cannot be written.
        """
        if self._file is not None:
            self._file.close()
            self._events.close()
            self._copied.close()


def _drop_later(path: Path, last_step: int) -> None:
    if path.exists():
        text = path.read_bytes().decode(errors="replace")
        lines = text.splitlines(keepends=True)
        kept = "".join(x for x in lines if _step_of(x) <= last_step)
        with replacing(path) as temporary:
            temporary.write_text(kept)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):  # cut off, or damaged
        return math.inf


def _require_finite(when: str, **values: float) -> None:
    if not all(np.isfinite(value) for value in values.values()):
        found = ", ".join(f"{k} is {float(v)}" for k, v in values.items())
        raise FloatingPointError(
            f"{when}: {found}. Training has stopped; the last good checkpoint "
            "is kept. Lower optimizer.learning_rate, lengthen "
            "schedule.warmup_epochs or set optimizer.clip_norm."
        )
