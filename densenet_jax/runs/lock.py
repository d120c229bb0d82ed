"""One run a directory: a lock file that names its holder, and its heartbeat."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from densenet_jax.files import in_bucket, replacing

NAME = "run.lock"

_BEAT_SECONDS = 20.0
# Without a heartbeat until the holder is taken to be gone: several are late.
_PATIENCE_SECONDS = 90.0


class RunLock:
    """The right to write to a run's directory, until `release`.

    The holder rewrites the file at each heartbeat. It is gone where its process
    is: seen at once on this machine; elsewhere by its missing heartbeats, which
    are waited for, since the clocks of two machines may differ.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        say: Callable[[str], None] = print,
        beat_seconds: float = _BEAT_SECONDS,
        patience_seconds: float = _PATIENCE_SECONDS,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Takes the lock.

        Args:
          workdir: of the run; it exists.
          say: is told of a wait.
          beat_seconds: between heartbeats.
          patience_seconds: after which a file that does not change is taken to
            be of a run that is gone.
          sleep: waits for seconds.

        Raises:
          ValueError: another run holds it, and which.
          OSError: the file cannot be read or written.
        """
        self._path = workdir / NAME
        self._beat_seconds = beat_seconds
        self._holder = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": _now(),
            "machine": _machine(),
            "started": _start_time(os.getpid()),
            "token": uuid.uuid4().hex,
        }
        self._text = self._beat_text()
        self._lost = False
        self._acquire(say, patience_seconds, sleep)
        self._ended = threading.Event()
        self._thread = threading.Thread(
            target=self._beat, name="run lock", daemon=True
        )
        self._thread.start()

    def check(self) -> None:
        """Raises OSError if another run has taken the lock over.

        So it may where this machine stood still for longer than its patience.
        """
        if self._lost:
            raise OSError(
                f"Another run took over {self._path.parent}, while this one "
                f"gave no sign of life: {_describe(_read(self._path) or '')}. "
                "This one stops."
            )

    def release(self) -> None:
        """Gives the lock back."""
        self._ended.set()
        self._thread.join(timeout=5)
        with contextlib.suppress(OSError):
            if _read(self._path) == self._text:
                self._path.unlink()

    def _acquire(self, say, patience_seconds, sleep):
        found = self._claim(None)
        if found is None:
            return
        alive = _is_alive(found)
        if alive is None:
            say(
                f"Waiting {patience_seconds:.0f} s at most for a sign of life "
                f"of the run that holds {self._path}: {_describe(found)} ..."
            )
            alive = not self._stays(found, patience_seconds, sleep)
        if alive or self._claim(found) is not None:
            holder = _read(self._path) or found
            raise ValueError(
                f"{self._path.parent} is in use by {_describe(holder)}: wait "
                "for its end, stop it, or choose another --workdir."
            )

    def _claim(self, gone: str | None) -> str | None:
        """Takes the lock if it is free or as `gone`; else what it holds."""
        with _exclusively(self._path.parent):
            found = _read(self._path)
            if found is None:
                try:
                    with self._path.open("x") as file:
                        file.write(self._text)
                except FileExistsError:
                    return _read(self._path) or ""
                return None
            if found != gone:
                return found
            self._write()
            return None

    def _stays(self, found, seconds, sleep):
        """Whether the file is the same, or gone, after some seconds."""
        for _ in range(int(seconds)):
            sleep(1)
            if _read(self._path) != found:
                return False
        return True

    def _beat(self):
        while not self._ended.wait(self._beat_seconds):
            # A file system that is away for a while costs heartbeats only.
            with contextlib.suppress(OSError):
                found = _read(self._path)
                if found is not None and found != self._text:
                    self._lost = True
                    return
                self._text = self._beat_text()
                self._write()

    def _beat_text(self):
        return json.dumps({**self._holder, "heartbeat": _now()}, indent=2)

    def _write(self):
        with replacing(self._path) as temporary:
            temporary.write_text(self._text)


def hold(workdir: Path, say: Callable[[str], None]) -> RunLock | None:
    """Takes the lock on the first of all hosts, for the others.

    Returns:
      None on the others, and for a bucket, where nothing locks.

    Raises:
      ValueError, OSError: on every host, as `RunLock` on the first.
    """
    if in_bucket(workdir):
        return None
    if jax.process_count() == 1:
        return RunLock(workdir, say=say)
    lock = error = None
    if jax.process_index() == 0:
        try:
            lock = RunLock(workdir, say=say)
        except (ValueError, OSError) as failure:
            error = failure
    if multihost_utils.broadcast_one_to_all(np.bool_(error is not None)):
        raise error or ValueError(
            f"The first host cannot use {workdir}, and says why."
        )
    return lock


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def _parse(text: str) -> dict[str, Any]:
    """The fields, as far as there are any: the file may be cut off."""
    try:
        holder = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _describe(text: str) -> str:
    holder = _parse(text)
    return (
        f"process {holder.get('pid', '?')} on {holder.get('host', '?')} since "
        f"{holder.get('since', '?')}"
    )


def _is_alive(text: str) -> bool | None:
    """Whether the holder runs; None: it cannot be seen from here."""
    holder = _parse(text)
    pid = holder.get("pid")
    if holder.get("machine") != _machine() or type(pid) is not int or pid < 1:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    # Numbers of processes are used again.
    return _start_time(pid) == holder.get("started")


def _machine() -> list[str]:
    """Equal where a number means the same process: host, boot, container."""
    facts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux has these
        facts.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        facts.append(os.readlink("/proc/self/ns/pid"))
    return facts


def _start_time(pid: int) -> str | None:
    """When a process started, in ticks since boot; None: not on Linux."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # After the name, in parentheses, come the state and then 18 more fields.
    state, *fields = text.rpartition(")")[2].split()
    return "ended" if state in "ZX" else fields[18]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _exclusively(directory: Path) -> Iterator[None]:
    """One process at a time, where the file system can say so."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
