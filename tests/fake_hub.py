"""A model hub on loopback: what huggingface_hub asks of one, and what can go wrong on the way."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import repeat
from pathlib import Path
from urllib.parse import unquote

import pytest
from huggingface_hub import constants

from stable_diffusion_tf.checkpoints.hub import announce

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Serves `repositories` while it is entered.

    Attributes:
        repositories: {name: {file name: content}}.
        license: of all of them.
        url: where it is.
        faults: what becomes of each download, one after the other; then all is well. See below.
        status: what every request is answered with, or 200.
        content_host: another host, which sends the contents; None: the hub does.
        requests: (method, path, authorization) of all so far.
        downloading: set when a download begins.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.license = "some-license"
        self.faults = iter(())
        self.status = 200
        self.content_host: FakeHub | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.downloading = threading.Event()
        self.stopping = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("H", (Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str]:
        """The names of the files that were downloaded, in order."""
        asked = [path for method, path, _ in self.requests if method == "GET"]
        return [re.sub(r".*/resolve/\w+/", "", path) for path in asked if "/resolve/" in path]


def connect(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub use this hub, a cache in `folder`, and wait for nothing."""
    for name, value in {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DOWNLOAD_TIMEOUT": 5,  # a busy machine is slow to answer too
        "HF_TOKEN_PATH": str(folder / "token"),
        "DOWNLOAD_CHUNK_SIZE": 64,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    announce.cache_clear()


class Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        self.hub.requests.append((self.command, self.path, self.headers["Authorization"]))
        path = unquote(self.path.partition("?")[0])
        info = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path)
        files = self.hub.repositories.get((info or file)[1]) if info or file else None
        if self.hub.status != 200:
            self.reply(self.hub.status)
        elif files is None:
            self.reply(404, {"X-Error-Code": "RepoNotFound"})
        elif info:
            siblings = [{"rfilename": name} for name in files]
            card = {"license": self.hub.license}
            model = {"id": info[1], "sha": COMMIT, "siblings": siblings, "cardData": card}
            self.reply(200, {"Content-Type": "application/json"}, json.dumps(model).encode())
        elif file[2] not in files:
            self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        elif self.command == "HEAD":
            self.describe(files[file[2]])
        else:
            self.hub.downloading.set()
            next(self.hub.faults, whole)(self, files[file[2]])

    def describe(self, content: bytes) -> None:
        """What is known of a file: weights are large files, whose SHA-256 the hub keeps."""
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_hash(content)}"'}
        if self.path.endswith((".json", ".md")):
            return self.reply(200, {**headers, "Content-Length": str(len(content))})
        headers |= {
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
        }
        if self.hub.content_host is None:
            return self.reply(200, {**headers, "Content-Length": str(len(content))})
        return self.reply(302, {**headers, "Location": self.hub.content_host.url + self.path})

    def reply(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


Fault = Callable[[Handler, bytes], None]


def whole(request: Handler, content: bytes) -> None:
    """As it should be, from where the asker wants to go on."""
    _send(request, content, len(content))


def cut(at: int) -> Fault:
    """The connection ends after `at` bytes of the file."""
    return lambda request, content: _send(request, content, at)


def stalled(at: int) -> Fault:
    """Nothing comes any more after `at` bytes of the file."""

    def send(request: Handler, content: bytes) -> None:
        _send(request, content, at)
        request.hub.stopping.wait()

    return send


def status(code: int) -> Fault:
    return lambda request, content: request.reply(code)


def altered(change: Callable[[bytes], bytes]) -> Fault:
    """Another content than the hub announced."""

    def send(request: Handler, content: bytes) -> None:
        whole(request, change(content))

    return send


def flip_a_bit(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


always = repeat


def _send(request: Handler, content: bytes, end: int) -> None:
    asked = re.fullmatch(r"bytes=(\d+)-", request.headers["Range"] or "bytes=0-")
    start = int(asked[1])
    request.send_response(206 if start else 200)
    request.send_header("Content-Length", str(len(content) - start))
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.end_headers()
    request.wfile.write(content[start:end])
    request.wfile.flush()
    request.close_connection = end < len(content)
