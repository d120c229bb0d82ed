"""Paths on disks and in buckets, and writing so that a failure changes nothing.

A bucket is addressed gs://BUCKET/NAME. It has objects, not directories: an
object appears whole or not at all, and nothing can be appended to one.
"""

import contextlib
import importlib.util
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from etils import epath

# pathlib.Path makes one slash of two.
_ADDRESS = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/{1,2}(?P<rest>.*)")
LATER = "start again when the bucket can be reached"
_PACKAGES = ("gcsfs", "google.cloud.storage")


def as_path(name: str | Path | epath.Path) -> Path | epath.Path:
    """A path as a shell would read it, or the address of a bucket.

    Args:
      name: of a file or directory, where ~ is the home directory; or
        gs://BUCKET/NAME.

    Raises:
      ValueError: another kind of address, or what reads buckets is missing.
    """
    match = _ADDRESS.fullmatch(str(name))
    if match is None or Path(name).exists():
        return Path(name).expanduser()
    bucket = match["rest"].partition("/")[0]
    if match["scheme"] != "gs" or not bucket:
        raise ValueError(
            f"{name} is neither a path on this machine nor gs://BUCKET/NAME: "
            "give one of these, or mount the storage and give its path."
        )
    _prepare_buckets(name)
    return epath.Path(f"gs://{match['rest']}")


def in_bucket(path: Path | epath.Path) -> bool:
    """Whether a path of `as_path` is an address."""
    return not isinstance(path, Path)


def walk(
    directory: Path | epath.Path,
) -> Iterator[tuple[Path | epath.Path, list[str], list[str]]]:
    """As os.walk: each directory, and the names in it.

    Names that the caller removes from the second value are not entered.
    """
    if in_bucket(directory):
        import fsspec

        found = fsspec.filesystem("gs").walk(str(directory))
        for name, directories, files in found:
            yield epath.Path(f"gs://{name}"), directories, files
    else:
        for name, directories, files in os.walk(directory):
            yield Path(name), directories, files


@contextlib.contextmanager
def one_kind_of_error(what: str, remedy: str) -> Iterator[None]:
    """Makes OSErrors of a bucket's errors, which have no class in common.

    Args:
      what: failed, as "Cannot read gs://...".
      remedy: what to do, a clause.

    Raises:
      OSError: of one line; FileNotFoundError where it was that.
    """
    try:
        yield
    except Exception as error:
        absent = isinstance(error, FileNotFoundError)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        why = getattr(error, "strerror", None) or lines[0].rstrip(".")
        kind = FileNotFoundError if absent else OSError
        raise kind(f"{what} ({why}): {remedy}.") from error


def write_object(path: epath.Path, content: bytes) -> None:
    """Writes an object of a bucket, whole or not at all.

    Raises:
      OSError: the bucket cannot be written.
    """
    import fsspec

    with one_kind_of_error(f"Cannot write {path}", LATER):
        # One request, which can be repeated when its answer is lost. An open
        # file takes several, and appears cut off if an exception closes it.
        fsspec.filesystem("gs").pipe_file(str(path), content)


@contextlib.contextmanager
def replacing(path: str | Path | epath.Path) -> Iterator[Path]:
    """A temporary path to write a file or directory to, moved to `path` then.

    After an exception what was written is gone and `path` is as it was. To a
    bucket a file alone can be moved.
    """
    path = as_path(path)
    remote = in_bucket(path)
    # A directory of our own: nobody else's file or link is in the way.
    with tempfile.TemporaryDirectory(
        dir=None if remote else path.parent, prefix="."
    ) as directory:
        temporary = Path(directory) / path.name
        yield temporary
        if remote:
            write_object(path, temporary.read_bytes())
            return
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)


def _prepare_buckets(name: str | Path | epath.Path) -> None:
    missing = [p for p in _PACKAGES if not _installed(p)]
    if missing:
        raise ValueError(
            f"{name} is in a bucket, and {missing[0]} is not installed: "
            "pip install gcsfs"
        )
    import fsspec

    # TensorFlow takes seconds to import, and its errors are no OSErrors.
    os.environ.setdefault("EPATH_USE_TF", "false")
    # Kept listings hide what other hosts write.
    fsspec.config.conf.setdefault("gs", {})["use_listings_cache"] = False
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False
