"""A file server of the tests' own, which hangs up, waits or answers wrongly as it is told."""

import contextlib
import hashlib
import random
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

BODY = random.Random(1).randbytes(300_000)
PREFIX = hashlib.sha256(BODY).hexdigest()[:8]


@dataclass
class Answer:
    """How the server treats one request.

    Attributes:
        status: sent instead of the file where it is not 200.
        cut: after so many bytes of the body the connection ends.
        hold: waited for in the middle of the body.
        ranges: whether `Range` is understood.
        off_by: how far from the start asked for a range begins.
        piece: the most bytes that are sent as a range.
    """

    status: int = 200
    cut: int | None = None
    hold: threading.Event | None = None
    ranges: bool = True
    off_by: int = 0
    piece: int = 10**9


@dataclass
class Server:
    """A file server on 127.0.0.1; `plan` says how it treats the first requests."""

    url: str = ""
    body: bytes = BODY
    tag: str | None = '"one"'
    if_range: bool = True
    plan: list[Answer] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        headers = dict(handler.headers)
        self.requests.append(headers)
        self.paths.append(handler.path)
        answer = self.plan.pop(0) if self.plan else Answer()
        if answer.status != 200:
            handler.send_error(answer.status)
            return
        begin, total = self._begin(headers, answer), len(self.body)
        if begin >= total:
            handler.send_error(416)
            return
        begin += answer.off_by
        end = min(begin + answer.piece, total) if begin else total
        handler.send_response(206 if begin else 200)
        if begin:
            handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{total}")
        handler.send_header("Content-Length", str(end - begin))
        if self.tag:
            handler.send_header("ETag", self.tag)
        handler.end_headers()
        self._send(handler, self.body[begin:end], answer)

    def _begin(self, headers: dict[str, str], answer: Answer) -> int:
        outdated = self.if_range and headers.get("If-Range", self.tag) != self.tag
        if "Range" not in headers or not answer.ranges or outdated:
            return 0
        return int(headers["Range"].removeprefix("bytes=").removesuffix("-"))

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes, answer: Answer) -> None:
        half = len(body) // 2 if answer.cut is None else answer.cut
        handler.wfile.write(body[:half])
        if answer.hold:
            handler.wfile.flush()
            answer.hold.wait(20)
        if answer.cut is None:
            handler.wfile.write(body[half:])


@contextlib.contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Runs a server, and takes away the proxies of the environment, which would stand between."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def do_CONNECT(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None:
            pass

    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up here
        state.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield state
        http.shutdown()
        thread.join()
