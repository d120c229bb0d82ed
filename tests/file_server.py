"""A server on the loopback that misbehaves as it is told."""

import base64
import collections
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass
class FileServer:
    """Files by path, and what happened to them.

    Attributes:
      files: path -> content.
      cuts: path -> bytes after which the next answers end, one each.
      tagged: whether answers have an ETag.
      ranges: whether parts are sent.
      content_type: of every answer.
      repos: repository of a hub -> names and contents of its files.
      commits: of a repository's file -> the commit that is sent with it.
      uploads: what was committed to repositories: name -> content.
      requests: (method, path, Range) of each.
    """

    address: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    cuts: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    tagged: bool = True
    ranges: bool = True
    content_type: str = "application/octet-stream"
    repos: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    commits: dict[str, str] = dataclasses.field(default_factory=dict)
    uploads: dict[str, bytes] = dataclasses.field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = dataclasses.field(
        default_factory=list
    )

    def counts(self) -> dict[str, int]:
        """How often each path was asked for."""
        return collections.Counter(path for _, path, _ in self.requests)


@contextlib.contextmanager
def serving() -> Iterator[FileServer]:
    """Serves in a thread until the end of the block."""
    state = FileServer()

    class Handler(_Handler):
        server_state = state

    with _Server(("127.0.0.1", 0), Handler) as server:
        state.address = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *args):
        """Says nothing of clients that hang up."""


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: FileServer

    def do_GET(self):
        state = self.server_state
        self.path, _, _ = self.path.partition("?")
        asked = self.headers["Range"]
        state.requests.append((self.command, self.path, asked))
        if match := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", self.path
        ):
            files = state.repos.get(match[1])
            if files is None:
                return self._error(404, "RepoNotFound")
            siblings = [{"rfilename": name} for name in files]
            return self._send_json(
                {"id": match[1], "sha": "c" * 40, "siblings": siblings}
            )
        if match := re.fullmatch(r"/(.+?/.+?)/resolve/.+?/(.+)", self.path):
            if match[1] not in state.repos:
                return self._error(404, "RepoNotFound")
            content = state.repos[match[1]].get(match[2])
            if content is None:
                return self._error(404, "EntryNotFound")
            commit = state.commits.get(match[2], "c" * 40)
            return self._send(content, {"X-Repo-Commit": commit})
        if self.path not in state.files:
            return self._error(404, "")
        return self._send(state.files[self.path], {})

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        """What huggingface_hub asks for to upload small files."""
        state = self.server_state
        state.requests.append(("POST", self.path, None))
        length = int(self.headers["Content-Length"])
        lines = self.rfile.read(length).splitlines()
        if "/commit/" in self.path:
            for line in map(json.loads, lines):
                if line["key"] == "file":
                    value = line["value"]
                    content = base64.b64decode(value["content"])
                    state.uploads[value["path"]] = content
            page = f"{state.address}/org/net/commit/{'c' * 40}"
            return self._send_json({"commitUrl": page, "commitOid": "c" * 40})
        body = json.loads(b"".join(lines))
        if self.path == "/api/repos/create":
            page = f"{state.address}/{body['organization']}/{body['name']}"
            self._send_json({"url": page})
        elif "/preupload/" in self.path:
            files = [
                {
                    "path": f["path"],
                    "uploadMode": "regular",
                    "shouldIgnore": False,
                }
                for f in body["files"]
            ]
            self._send_json({"files": files})
        else:
            raise AssertionError(self.path)

    def log_message(self, *args):
        pass

    def _send(self, content: bytes, headers: dict[str, str]):
        state = self.server_state
        start, status = 0, 200
        tag = f'"{hashlib.md5(content).hexdigest()}"'
        asked = self.headers["Range"]
        same = self.headers["If-Range"] in (None, tag)
        if asked and state.ranges and same:
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])
            status = 206
            if start >= len(content):
                return self._error(416, "")
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            headers = {**headers, "Content-Range": span}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if state.tagged:
            self.send_header("ETag", tag)
        self.send_header("Content-Type", state.content_type)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        content = content[start:]
        if cuts := state.cuts.get(self.path):
            self.wfile.write(content[: cuts.pop(0)])
            self.wfile.flush()
        else:
            self.wfile.write(content)

    def _send_json(self, value: Any):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Content-Length", "0")
        self.end_headers()
