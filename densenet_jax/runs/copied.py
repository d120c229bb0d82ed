"""Files that grow, of runs whose directory is in a bucket."""

import contextlib
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from densenet_jax.files import (
    LATER,
    in_bucket,
    one_kind_of_error,
    write_object,
)

# Between copies that nobody asked for: seconds at least, and share of the time
# since the first. So what is copied in all grows with the logarithm of the
# number of records, not with that number.
_SECONDS = 60
_SHARE = 0.01


class Copied:
    """A directory to append to files in, copied whole to a bucket.

    On a disk it is the run's own directory, and nothing is copied.

    Attributes:
      directory: where to write.
    """

    def __init__(self, workdir: Path | epath.Path, names: Sequence[str]):
        """Opens the directory.

        Args:
          workdir: of the run.
          names: files of it that are written on.

        Raises:
          OSError: the bucket cannot be read.
        """
        self._workdir = workdir
        self.directory = workdir
        self._temporary = None
        self._copies: dict[Path, tuple[int, int]] = {}
        if not in_bucket(workdir):
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="densenet_jax-")
        self.directory = Path(self._temporary.name)
        self._began = self._last = time.monotonic()
        for name in names:
            path = workdir / name
            with (
                contextlib.suppress(FileNotFoundError),
                one_kind_of_error(f"Cannot read {path}", LATER),
            ):
                (self.directory / name).write_bytes(path.read_bytes())

    def copy(self) -> None:
        """Copies the files that have changed since the last copy.

        Raises:
          OSError: the bucket cannot be written.
        """
        if self._temporary is None:
            return
        for path in sorted(self.directory.rglob("*")):
            status = path.stat()
            state = status.st_mtime_ns, status.st_size
            if path.is_dir() or self._copies.get(path) == state:
                continue
            target = self._workdir / path.relative_to(self.directory).as_posix()
            write_object(target, path.read_bytes())
            self._copies[path] = state
        self._last = time.monotonic()

    def copy_if_due(self) -> None:
        """Copies where the last copy is long ago."""
        if self._temporary is None:
            return
        now = time.monotonic()
        if now - self._last >= max(_SECONDS, _SHARE * (now - self._began)):
            self.copy()

    def close(self) -> None:
        """Copies a last time.

        Raises:
          OSError: the bucket cannot be written.
        """
        if self._temporary is not None:
            with self._temporary:
                self.copy()
