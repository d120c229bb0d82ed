"""What is said of a checkpoint that cannot be read, or not as it was saved."""

import contextlib
import errno
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from densenet_jax.runs.saved_step import SavedStep

_Value = TypeVar("_Value")

# Reasons that say nothing about the checkpoint: the same may work later.
_PASSING_ERRNOS = (
    errno.EACCES,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOSPC,
    errno.EPERM,
    errno.EROFS,
    errno.ESTALE,
)
_PASSING_STATUS = re.compile(
    r"\b(UNAVAILABLE|RESOURCE_EXHAUSTED|DEADLINE_EXCEEDED|PERMISSION_DENIED"
    r"|UNAUTHENTICATED|CANCELLED|ABORTED)\b"
)


class DamagedCheckpointError(ValueError):
    """A step cannot be used; the message says which, and what of it.

    Attributes:
      step: of the checkpoint.
      empty: whether there is nothing in it that could be lost.
    """

    def __init__(
        self, step: int, path: epath.Path, what: str, *, empty: bool = False
    ):
        super().__init__(
            f"The checkpoint of step {step:,}, {path}, is damaged: {what}."
        )
        self.step = step
        self.empty = empty


def describe(error: BaseException, directory: epath.Path) -> str:
    """What an error of a library says, in one short line.

    Args:
      error: whatever was raised.
      directory: of the step; paths in it are named from there.
    """
    text = " ".join(str(error).split())
    if isinstance(error, FileNotFoundError) and error.filename:
        text = f"{error.filename} is missing"
    text = text.replace(f"{directory}/", "").rstrip(".")
    # TensorStore appends the whole of its specification.
    text = re.sub(r" \[?(source locations|tensorstore_spec)=.*", "", text)
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    return text or type(error).__name__


def differences(found: dict[str, str], expected: dict[str, str]) -> str:
    """Up to 20 lines of the arrays that differ; '' if none does."""
    lines = [
        f"  {name}: {found.get(name, 'missing')}, "
        f"expected {expected.get(name, 'nothing')}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    if not lines:
        return ""
    more = len(lines) - 20
    return "\n".join(
        [
            f"{len(lines)} arrays differ (found in the checkpoint, expected "
            "by the config):",
            *lines[:20],
            *([f"  and {more} more"] if more > 0 else []),
        ]
    )


def some(changes: Sequence[str]) -> str:
    """The first of what has changed, and how many more have."""
    more = len(changes) - 1
    return changes[0] + (f", and {more} other files" if more > 0 else "")


def agreed_value(
    step: int, saved: SavedStep, read: Callable[[], _Value]
) -> _Value:
    """What `read` returns, if it returns on every host.

    Raises:
      DamagedCheckpointError: it does not, on this or on another host.
    """
    value = problem = None
    try:
        value = read()
    except Exception as error:
        if _is_passing(error):
            raise
        changes = saved.changed_files()
        problem = some(changes) if changes else describe(error, saved.path)
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(
            np.array(problem is not None)
        )
        if problem is None and failed.any():
            problem = f"host {int(np.argmax(failed))} cannot read it"
    if problem is not None:
        path = saved.path
        empty = path.is_dir() and not any(path.iterdir())
        raise DamagedCheckpointError(step, path, problem, empty=empty)
    return value


@contextlib.contextmanager
def naming_others(steps: Sequence[int]) -> Iterator[None]:
    """Says in an error of damage which other steps there are."""
    try:
        yield
    except DamagedCheckpointError as error:
        others = ", ".join(f"{x:,}" for x in steps if x != error.step)
        raise ValueError(
            f"{error} "
            + (
                f"To take the best of the others ({others}), rename that "
                "directory."
                if others
                else "There are no others."
            )
        ) from error


def _is_passing(error: BaseException) -> bool:
    """Whether an error is about the machine or the network, not the files."""
    if isinstance(error, MemoryError | ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNOS:
        return True
    return bool(_PASSING_STATUS.search(str(error)))
