"""Kills runs of the digits recipe, continues them, and compares their ends.

python benchmarks/kills.py --kills=20 --stops=10

SIGKILL comes at a random moment of a run's life or, every second time, while a
checkpoint is being written; SIGTERM at a random moment. A run is killed and
started again until it comes to its end, where parameters, statistics and
optimizer must equal those of a run that was left alone, to the bit. Steps lost
are those that were logged before the signal and had to be done again. Compiled
programs are kept between starts, in a directory of the benchmark's own.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # To run as a file.

from benchmarks import arguments, report
from densenet_jax.runs.checkpoints import Checkpoints
from densenet_jax.tasks.classification import CLASSIFICATION

_ROOT = Path(__file__).parents[1]
_FLAGS = (
    "--config=configs/digits.py",
    "--config.checkpoint.every_epochs=0.2",
    "--config.log_every_steps=1",
)
# Of sysexits.h, and of train.py: to be started again.
_STOPPED = 75


class Run:
    """A run in a directory of its own, started as often as needed."""

    def __init__(self, directory: Path, cache: Path, epochs: float):
        self.directory = directory
        self._command = [
            sys.executable,
            "train.py",
            *_FLAGS,
            f"--config.epochs={epochs}",
            f"--workdir={directory}",
        ]
        self._env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._log = directory.with_suffix(".txt")

    def start(self) -> subprocess.Popen:
        """Starts it, its output going to a file of this start alone."""
        with self._log.open("w") as log:
            return subprocess.Popen(
                self._command, cwd=_ROOT, env=self._env, stdout=log, stderr=log
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def last_logged(self) -> int:
        """The last step that was written down."""
        with contextlib.suppress(FileNotFoundError):
            text = (self.directory / "metrics.jsonl").read_text()
            lines = text.split("\n")[:-1]  # the last may be cut off
            return json.loads(lines[-1])["step"] if lines else 0
        return 0

    def saving(self) -> set[str]:
        """The checkpoints that are being written."""
        path = self.directory / "checkpoints"
        if not path.exists():
            return set()
        return {p.name for p in path.iterdir() if "checkpoint-tmp" in p.name}

    def state(self):
        """All arrays at the end."""
        checkpoints = Checkpoints(
            self.directory / "checkpoints", CLASSIFICATION.rank, read_only=True
        )
        with contextlib.closing(checkpoints):
            step = checkpoints.newest
            return jax.device_get(
                checkpoints.restore(step, checkpoints.abstract_state(step))
            )


class Tally:
    """What became of the runs under one kind of signal."""

    def __init__(self, number: signal.Signals, inside_saves: bool):
        self.number, self.inside_saves = number, inside_saves
        self.sent = self.runs = self.equal = self.torn = 0
        self.lost: list[int] = []
        self.wrong: list[str] = []

    def row(self) -> list[str]:
        where = "while saving" if self.inside_saves else "at any moment"
        return [
            f"{self.number.name} {where}",
            str(self.sent),
            str(self.torn) if self.inside_saves else "",
            f"{self.equal} of {self.runs}",
            f"{np.mean(self.lost):.1f}" if self.lost else "",
            str(max(self.lost)) if self.lost else "",
            str(len(self.wrong)),
        ]


def interrupt(run, tally, rng, seconds):
    """Starts and signals a run; whether it came to its end before that."""
    process = run.start()
    began = time.monotonic()
    moment = began + rng.uniform(0, seconds)
    # A random save of those to come, and a random moment of it.
    saves, pause = rng.randint(1, 5), rng.uniform(0, 0.03)
    seen = set(run.saving())  # what an earlier kill has left
    while process.poll() is None:
        time.sleep(0.001)
        if not tally.inside_saves:
            if time.monotonic() >= moment:
                break
        elif new := run.saving() - seen:
            seen |= new
            saves -= 1
            if not saves:
                time.sleep(pause)
                break
    if process.poll() is not None:
        if process.returncode:
            tally.wrong.append(run.output[-500:])
        return process.returncode == 0
    process.send_signal(tally.number)
    process.wait()
    return _check(run, tally, process.returncode)


def _check(run, tally, exit_code):
    """Counts a signal's effect; whether the run had ended before it."""
    output = run.output
    if exit_code == 0 or "Finished" in output:
        return True
    tally.sent += 1
    tally.torn += bool(tally.inside_saves and run.saving())
    # A signal while Python imports ends it as it ends any program.
    importing = exit_code == -signal.SIGTERM and not output.strip()
    if tally.number == signal.SIGTERM and not importing:
        last = output.strip().split("\n")[-1]
        if exit_code != _STOPPED or not last.startswith("Stopped by SIGTERM"):
            tally.wrong.append(f"exit {exit_code}: {output[-500:]}")
    return False


def measure(tally, count, reference, make_run, rng, seconds):
    """Interrupts runs `count` times, and lets each come to its end."""
    expected = jax.tree.leaves(reference)
    with tqdm(total=count, desc=tally.row()[0], disable=None) as bar:
        while tally.sent < count and not tally.wrong:
            run, ended, before = make_run(), False, tally.sent
            while not ended and tally.sent < count and not tally.wrong:
                ended = interrupt(run, tally, rng, seconds)
                bar.update(tally.sent - bar.n)
                # What the next start goes on from tells what was lost.
                tally.lost += [] if ended else [_lost(run)]
            if not ended and run.start().wait():
                tally.wrong.append(run.output[-500:])
                return
            if tally.sent == before:
                continue  # it was faster than its signal
            found = jax.tree.leaves(run.state())
            tally.runs += 1
            tally.equal += all(map(np.array_equal, found, expected))


def _lost(run):
    path = run.directory / "checkpoints"
    steps = [int(p.name) for p in path.glob("*") if p.name.isdecimal()]
    return max(0, run.last_logged - max(steps, default=0))


def benchmark(flags: argparse.Namespace) -> int:
    """Runs all; returns the exit status, 1 if anything was lost or differs."""
    rng = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        numbers = iter(range(10**6))

        def make_run():
            return Run(
                directory / f"run{next(numbers)}",
                directory / "cache",
                flags.epochs,
            )

        for _ in tqdm(range(2), desc="undisturbed", disable=None):
            run = make_run()
            began = time.monotonic()
            if run.start().wait():
                raise RuntimeError(run.output)
            seconds = time.monotonic() - began  # the second finds the cache
        reference = run.state()
        tallies = [
            (Tally(signal.SIGKILL, False), flags.kills - flags.kills // 2),
            (Tally(signal.SIGKILL, True), flags.kills // 2),
            (Tally(signal.SIGTERM, False), flags.stops),
        ]
        for tally, count in tallies:
            measure(tally, count, reference, make_run, rng, seconds)
    header = ["signal", "sent", "cut a save", "ends equal to the bit"]
    header += ["steps lost, mean", "most", "wrong"]
    print(report.describe(report.environment()))
    print(f"A run left alone takes {seconds:.1f} s.\n")
    print(report.markdown_table(header, [t.row() for t, _ in tallies]))
    for tally, _ in tallies:
        print(*tally.wrong, sep="\n", end="")
    bad = [
        t
        for t, _ in tallies
        if t.wrong
        or t.equal != t.runs
        or (t.number == signal.SIGTERM and any(t.lost))
    ]
    figures = [
        {"signal": t.row()[0], "sent": t.sent, "runs": t.runs, "lost": t.lost}
        for t, _ in tallies
    ]
    print(json.dumps({"kills": figures, **report.environment()}))
    return int(bool(bad))


def main() -> int:
    parser = arguments.parser(__doc__)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs")
    parser.add_argument("--stops", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--epochs", type=float, default=6.0, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    return benchmark(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
