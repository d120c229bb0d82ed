"""What a sweep shows while it runs."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from densenet_jax.runs import directory as runs
from densenet_jax.sweeps.trials import Trial

# In a terminal too low for all, the trials that matter come first.
_ORDER = ("running", "failed", "waiting", "finished")


class Board:
    """A live table of trials, or elsewhere than in a terminal lines of text.

    Used as a context, which leaves the last table standing.
    """

    def __init__(self, trials: Sequence[Trial], console: Console):
        self._console = console
        self._states = dict.fromkeys(trials, "waiting")
        self._remarks = dict.fromkeys(trials, "")
        self._results = {}
        self._began = {}
        self._seconds = {}
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self):
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_):
        if self._console.is_terminal:
            self.refresh()
            self._live.stop()

    def running(self, trial: Trial, *, here: bool) -> None:
        """Shows that a trial runs, in a process of this sweep or another."""
        self._began.setdefault(trial, time.monotonic())
        self._show(trial, "running", "" if here else "by another process")

    def ended(self, trial: Trial, reason: str | None) -> None:
        """Shows that a trial has finished, or the reason that it failed."""
        if trial in self._began:
            self._seconds[trial] = time.monotonic() - self._began.pop(trial)
        self._read(trial)
        self._show(trial, "failed" if reason else "finished", reason or "")

    def refresh(self) -> None:
        """Reads how far the trials are; does nothing outside a terminal."""
        if self._console.is_terminal:
            for trial, began in self._began.items():
                self._seconds[trial] = time.monotonic() - began
                self._read(trial)
            self._live.update(self.table(), refresh=True)

    def table(self) -> Table:
        """The table as it is now."""
        states = list(self._states.values())
        counts = [f"{states.count(s)} {s}" for s in _ORDER if s in states]
        table = Table(title=", ".join(counts))
        for column in ("trial", "state"):
            table.add_column(column, overflow="fold")
        for column in ("epoch", "test error", "minutes"):
            table.add_column(column, justify="right", no_wrap=True)
        for trial in sorted(
            self._states, key=lambda t: _ORDER.index(self._states[t])
        ):
            epoch, error = self._results.get(trial, ("", ""))
            seconds = self._seconds.get(trial)
            table.add_row(
                trial.name,
                f"{self._states[trial]} {self._remarks[trial]}".strip(),
                epoch,
                error,
                "" if seconds is None else f"{seconds / 60:.1f}",
            )
        return table

    def _show(self, trial: Trial, state: str, remark: str) -> None:
        if (state, remark) == (self._states[trial], self._remarks[trial]):
            return
        self._states[trial], self._remarks[trial] = state, remark
        if self._console.is_terminal:
            return
        ended = sum(s in ("failed", "finished") for s in self._states.values())
        parts = [f"[{ended}/{len(self._states)}] {trial.name}: {state}", remark]
        if state == "finished":
            parts.append(f"test error {self._results[trial][1]}")
        print(", ".join(filter(None, parts)), flush=True)

    def _read(self, trial: Trial) -> None:
        record = runs.progress(trial.directory)
        if record is not None:
            error = f"{100 * (1 - record['top1']):.2f}%"
            self._results[trial] = f"{record['epoch']:.1f}", error
