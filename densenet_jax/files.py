"""Writing files so that a failure leaves what was there."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write a file or directory to, moved to `path` then.

    After an exception what was written is gone and `path` is as it was.
    """
    path = Path(path)
    # A directory of our own: nobody else's file or link is in the way.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as directory:
        temporary = Path(directory) / path.name
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
