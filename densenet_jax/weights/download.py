"""Files of plain addresses, kept in a directory of this user."""

import contextlib
import dataclasses
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO
from urllib.parse import quote, unquote, urldefrag, urlsplit

from filelock import FileLock, Timeout
from tqdm import tqdm

_log = logging.getLogger(__name__)

# As torchvision and OpenMMLab name files: the first digits of their SHA-256
# before the suffix. Eight digits that are a date are none.
_NAMED_CHECKSUM = re.compile(
    r"-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})(?:\.[a-z]+)+$"
)

# What has a meaning in addresses; spaces and other letters are escaped.
_RESERVED = "!#$%&'()*+,/:;=?@[]~"

_CHUNK = 1 << 20  # bytes
_TIMEOUT = 30  # seconds without a byte


class _CutError(Exception):
    """The server or the network ended a download before its end."""


def cache_directory() -> Path:
    """DENSENET_JAX_HOME, or densenet_jax in XDG_CACHE_HOME or ~/.cache."""
    if home := os.environ.get("DENSENET_JAX_HOME"):
        return Path(home).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "densenet_jax"


def fetch(address: str) -> Path:
    """The file of an address, downloaded unless it was before.

    What was cut off goes on where it stopped. The file appears in the cache
    whole or not at all, and one process at a time downloads it.

    Args:
      address: http(s)://...; a fragment #sha256=DIGITS is the checksum, in the
        place of one in the file's name. Without either nothing is verified.

    Raises:
      OSError: no network, no such file there, or no cache to write to: the
        message says where to put the file by hand.
      ValueError: the file has another checksum.
    """
    address, checksum = _split_checksum(address)
    target = _place(address)
    if not target.exists():
        with _writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with _alone(target):
                if not target.exists():
                    _download(address, target, checksum)
                    return target
    _verify(target, checksum, f"Remove {target} and run this again")
    return target


def _split_checksum(address):
    address, fragment = urldefrag(address)
    if fragment:
        if not re.fullmatch(r"sha256=[0-9a-f]{8,64}", fragment):
            raise ValueError(
                f"The address ends in #{fragment}: expected #sha256= and 8 to "
                "64 digits in lower case, or nothing."
            )
        return address, fragment.removeprefix("sha256=")
    named = _NAMED_CHECKSUM.search(urlsplit(address).path)
    return address, named[1] if named else ""


def _place(address: str) -> Path:
    """Where the cache has an address; no two addresses share a place."""
    digest = hashlib.sha256(address.encode()).hexdigest()[:8]
    name = PurePosixPath(unquote(urlsplit(address).path)).name
    name = re.sub(r"[^\w.-]", "_", name)[-100:]
    return cache_directory() / f"{digest}-{name}"


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Says what to do where the cache cannot be written."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # Not of the file system: it says what it is.
            raise
        raise OSError(
            f"Cannot write to {target.parent} ({error.strerror}): set "
            "DENSENET_JAX_HOME to a directory that takes files."
        ) from error


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Waits until no other process downloads the same file."""
    lock = FileLock(target.with_name(f".{target.name}.lock"))
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"Another process downloads {target} ...", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _download(address: str, target: Path, checksum: str) -> None:
    part = target.with_name(f".{target.name}.part")
    part.touch()
    with part.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        # Without a checksum nothing shows that it begins the same file.
        transfer = _Transfer(address, file, resumes=bool(checksum))
        while True:
            before = file.tell()
            try:
                transfer.receive()
                break
            except _CutError as error:
                if file.tell() <= before:
                    raise OSError(
                        f"Cannot download {address} ({error}): put the file at "
                        f"{target} by hand, or give the path of a copy."
                    ) from error
                _log.info("%s: %s; going on.", address, error)
        file.flush()
        os.fsync(file.fileno())
    try:
        _verify(part, checksum, "Run this again to download it anew")
    except ValueError:
        part.unlink()
        raise
    os.replace(part, target)


@dataclasses.dataclass
class _Transfer:
    """Appends what is missing of a file.

    Attributes:
      file: what there is of it, at its end.
      resumes: whether to go on where no `validator` is known.
      validator: the ETag or date of the version that the file is part of.
    """

    address: str
    file: BinaryIO
    resumes: bool
    validator: str | None = None

    def receive(self) -> None:
        """Asks for the rest.

        Raises:
          _CutError: not all of it came.
          OSError: it cannot be written.
        """
        if not self.validator and not self.resumes:
            self._start_over()
        start = self.file.tell()
        headers = {"User-Agent": "densenet_jax"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if self.validator:
                headers["If-Range"] = self.validator
        address = quote(self.address, safe=_RESERVED)
        request = urllib.request.Request(address, headers=headers)
        with _network_errors():
            try:
                response = urllib.request.urlopen(request, timeout=_TIMEOUT)
            except urllib.error.HTTPError as error:
                error.close()
                if error.code == 416 and start:  # It is shorter than that.
                    self._start_over()
                    return self.receive()
                raise
        with response:
            self._append(response, start)

    def _append(self, response: http.client.HTTPResponse, start: int) -> None:
        headers = response.headers
        if headers.get_content_type() == "text/html":
            raise _CutError("the server sends a web page")
        if response.status != 206:
            start = 0
            self._start_over()
        elif not headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            raise _CutError("the server sends another part than asked for")
        tag = headers.get("ETag", "W/")
        # A weak tag does not promise the same bytes.
        weak = tag.startswith("W/")
        self.validator = headers["Last-Modified"] if weak else tag
        length = headers["Content-Length"]
        total = start + int(length) if length else None
        with tqdm(
            desc=PurePosixPath(urlsplit(self.address).path).name,
            initial=start,
            total=total,
            unit="B",
            unit_scale=True,
            delay=1,
        ) as bar:
            while True:
                with _network_errors():
                    chunk = response.read(_CHUNK)
                if not chunk:
                    break
                self.file.write(chunk)
                bar.update(len(chunk))
        if total is not None and self.file.tell() != total:
            raise _CutError(
                f"the connection ended after {self.file.tell():,} of "
                f"{total:,} bytes"
            )

    def _start_over(self) -> None:
        self.file.seek(0)
        self.file.truncate()


@contextlib.contextmanager
def _network_errors() -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        raise _CutError(
            f"the server answers {error.code} {error.reason}"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        said = str(getattr(error, "reason", error)) or type(error).__name__
        raise _CutError(said) from error


def _verify(path: Path, checksum: str, remedy: str) -> None:
    """Raises ValueError unless the file's SHA-256 begins with the checksum."""
    if not checksum:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(checksum):
        raise ValueError(
            f"{path.name} has the SHA-256 {digest[: len(checksum)]}, expected "
            f"{checksum}: it was changed or damaged. {remedy}."
        )
