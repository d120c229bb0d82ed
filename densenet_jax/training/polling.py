"""What a run is asked for between its steps: to stop, to save."""

import signal
import time
from collections.abc import Callable
from fractions import Fraction

import jax
import numpy as np
from jax.sharding import NamedSharding

from densenet_jax.training.console import is_first_process
from densenet_jax.training.sharding import replicated
from densenet_jax.training.signals import GO_ON, Stopped, StopSignals


class Requests:
    """A signal to any host, and the first host's clock; all hosts alike.

    Attributes:
      stop: the name of the signal that all hosts stop for; else empty.
      save: whether a checkpoint is due, to stop or by the clock.
    """

    def __init__(
        self,
        sharding: NamedSharding,
        signals: StopSignals,
        every_minutes: float | None,
        clock: Callable[[], float] = time.monotonic,
        check: Callable[[], None] = lambda: None,
    ):
        """Asks nothing before `begin`.

        Args:
          sharding: of the first axis, over the devices of all hosts.
          signals: to this host.
          every_minutes: between checkpoints; None: the clock asks for none.
          clock: in seconds.
          check: is called at each poll; raises what the run must not survive.
        """
        self.stop, self.save = "", False
        self._agree = Agreement(sharding) if jax.process_count() > 1 else None
        self._signals = signals
        self._every_minutes = every_minutes
        self._clock = clock
        self._check = check
        self._saved_at = 0.0

    def begin(self) -> None:
        """Starts the clock; from here on the loop is what obeys signals."""
        self._signals.defer()
        self.saved()

    def poll(self) -> None:
        """Renews the attributes; every host calls this equally often."""
        self._check()
        due = (
            self._every_minutes is not None
            and self._clock() - self._saved_at >= 60 * self._every_minutes
        )
        asked = self._signals.requested, due and is_first_process()
        if self._agree:
            asked = self._agree(*asked)
        number, due = asked
        self.stop = signal.Signals(number).name if number else ""
        self.save = bool(due or number)

    def stopping(self) -> bool:
        """Polls; whether to stop."""
        self.poll()
        return bool(self.stop)

    def raise_stopped(self, step: int) -> None:
        """Raises Stopped if the run stopped for a signal, after `step`."""
        if self.stop:
            kept = (
                f": saved step {step:,}" if step else " before the first step"
            )
            raise Stopped(f"Stopped by {self.stop}{kept}. {GO_ON}")

    def saved(self) -> None:
        """Starts the clock anew."""
        self._saved_at = self._clock()


def is_due(step: int, steps_per_epoch: Fraction, every_epochs: float) -> bool:
    """Whether `step` is the first at or after a multiple of every_epochs."""
    # Exact, so that intervals that are multiples of each other fall together.
    every = Fraction(str(every_epochs)) * steps_per_epoch
    return step // every > (step - 1) // every


class Agreement:
    """The greatest of what the hosts say, one call late.

    The devices compute it between the steps, so that no host waits for a step
    that has just begun.
    """

    def __init__(self, sharding: NamedSharding):
        self._sharding = sharding
        self._greatest = jax.jit(
            lambda said: said.max(axis=0),
            out_shardings=replicated(sharding.mesh),
        )
        self._answer = None

    def __call__(self, *said: int) -> tuple[int, ...]:
        """Says this, and returns the answer to what was said before."""
        devices = len(self._sharding.addressable_devices)
        rows = np.tile(np.array(said, np.int32), (devices, 1))
        rows = jax.make_array_from_process_local_data(self._sharding, rows)
        answer, self._answer = self._answer, self._greatest(rows)
        if answer is None:
            return (0,) * len(said)
        return tuple(jax.device_get(answer).tolist())
