"""Signals that stop a run: at once, or after what it has done is saved."""

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

# EX_TEMPFAIL of sysexits.h: nothing is wrong; start the same command again.
EXIT_CODE = 75

GO_ON = "Start the same command to go on."

_CAUGHT = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# A closing terminal sends SIGHUP twice, by the kernel and by the shell, and
# launchers pass on what their group has been sent too.
_REPEAT_SECONDS = 1.0


class Stopped(Exception):  # noqa: N818 (no error)
    """A signal stopped the run, whose state is saved."""


class StopSignals:
    """Ends the process at a signal; once `defer` was called, notes it.

    Attributes:
      requested: the number of the first signal that was noted, or 0.
    """

    def __init__(self):
        self.requested = 0
        self._deferring = False
        self._since = 0.0
        self._before_exit = []

    def install(self) -> None:
        """Catches SIGTERM, SIGHUP and SIGINT; only from the main thread.

        What is ignored, as SIGHUP under nohup, stays so.
        """
        caught = [n for n in _CAUGHT if signal.getsignal(n) != signal.SIG_IGN]
        # Handlers in Python run when the main thread next interprets: after
        # minutes of compiling. A thread hears of signals through this pipe.
        readable, writable = os.pipe()
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for number in caught:
            signal.signal(number, lambda *_: None)
        threading.Thread(
            target=self._watch, args=(readable,), name="signals", daemon=True
        ).start()
        # Processes that load data inherit what this thread blocks: a signal to
        # the whole group must not end them before the run has saved.
        signal.pthread_sigmask(signal.SIG_BLOCK, caught)

    def defer(self) -> None:
        """From here on, the first signal is noted for the loop to obey."""
        self._deferring = True

    def before_exit(self, callback: Callable[[], None]) -> None:
        """Calls back where a signal ends the process at once."""
        self._before_exit.append(callback)

    def receive(self, number: int) -> None:
        """What a signal does."""
        name = signal.Signals(number).name
        if not self._deferring:
            self._exit(
                f"Stopped by {name}: there was nothing to save. Start the same "
                "command again."
            )
        elif not self.requested:
            self._since = time.monotonic()
            self.requested = number
            tell(f"{name}: stopping after this step; again to stop at once.")
        elif time.monotonic() - self._since > _REPEAT_SECONDS:
            self._exit(
                f"Stopped by a second signal, {name}, without saving. Start "
                "the same command to go on from the last checkpoint."
            )

    def _watch(self, readable):
        while True:
            for number in os.read(readable, 16):
                self.receive(number)

    def _exit(self, line):
        tell(line)
        for child in multiprocessing.active_children():
            child.kill()
        for callback in self._before_exit:
            with contextlib.suppress(Exception):
                callback()
        os._exit(EXIT_CODE)


def tell(line: str) -> None:
    """Writes a line to stderr, even where a terminal or a pipe has ended.

    Ctrl-C ends `tee` too, and a terminal may be closed: output to them is
    dropped from here on, so that nothing fails because of it.
    """
    start = "\n" if sys.stderr.isatty() else ""  # a progress bar's line
    for output in (1, 2):
        poll = select.poll()
        poll.register(output, 0)
        if any(e & (select.POLLERR | select.POLLHUP) for _, e in poll.poll(0)):
            _drop(output)
    try:
        os.write(2, f"{start}{line}\n".encode())
    except OSError:
        _drop(2)


def _drop(output):
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, output)
    os.close(null)
