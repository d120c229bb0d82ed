"""Running the trials of a sweep: here, or as jobs of a cluster."""

import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from densenet_jax.files import in_bucket
from densenet_jax.sweeps import trials
from densenet_jax.sweeps.board import Board
from densenet_jax.sweeps.trials import Trial

# How long a trial may take to save and stop.
_GRACE_SECONDS = 30

# Of a job; submitit's own, five minutes, suits no training.
TIMEOUT_MINUTES = 24 * 60


def run_here(waiting: Sequence[Trial], parallel: int, board: Board) -> int:
    """Runs trials on this machine; returns how many failed.

    Raises:
      SystemExit: stopped by Ctrl-C or SIGTERM, after the trials have stopped.
    """
    waiting = list(waiting)
    # The process of each trial; None: not started here.
    active: dict[Trial, subprocess.Popen | None] = {}
    failed = 0
    # Noted, not raised: a trial that is just being started is stopped too.
    signals = []
    handlers = {
        number: signal.signal(number, lambda number, _: signals.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        while (waiting or active) and not signals:
            while waiting and len(active) < parallel:
                active[waiting.pop(0)] = None
            ended = {}
            for trial, process in active.items():
                if process is not None:
                    exit_code = process.poll()
                    if exit_code is not None:
                        ended[trial] = trials.finish(trial, exit_code)
                elif trial.problem is None:
                    ended[trial] = None
                else:
                    active[trial] = trials.start(trial)
                    board.running(trial, here=active[trial] is not None)
            for trial, reason in ended.items():
                del active[trial]
                failed += reason is not None
                board.ended(trial, reason)
            board.refresh()
            if not ended:
                time.sleep(0.5)
    finally:
        _stop([process for process in active.values() if process])
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if signals:
        raise SystemExit(
            "Stopped. The same command goes on from the last checkpoints."
        )
    return failed


def submit(
    waiting: Sequence[Trial],
    workdir: Path,
    *,
    parallel: int,
    options: Mapping[str, Any],
    cluster: str = "slurm",
) -> list:
    """Submits trials as a job array; returns the jobs, those of submitit.

    Args:
      waiting: the trials.
      workdir: its slurm/ gets the jobs' own logs.
      parallel: how many run at a time.
      options: for submitit's AutoExecutor.
      cluster: AutoExecutor's.
    """
    try:
        import submitit
    except ImportError:
        raise ValueError(
            "--launcher=slurm needs submitit: pip install submitit"
        ) from None
    if in_bucket(workdir):
        raise ValueError(
            f"--launcher=slurm keeps its jobs' files in --workdir, and "
            f"{workdir} is in a bucket: give a directory that the nodes share."
        )
    try:
        executor = submitit.AutoExecutor(workdir / "slurm", cluster=cluster)
        executor.update_parameters(
            name=workdir.name,
            slurm_array_parallelism=parallel,
            **{"timeout_min": TIMEOUT_MINUTES, **options},
        )
    except (RuntimeError, NameError, TypeError) as error:
        raise ValueError(f"submitit refuses: {error}") from None
    jobs = executor.map_array(trials.run, waiting)
    for job, trial in zip(jobs, waiting):
        print(f"{job.job_id}  {trial.name}")
    return jobs


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in processes:
        try:
            process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
