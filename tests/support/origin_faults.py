"""An HTTP proxy in front of an origin that answers some requests as an origin in trouble does.

It understands requests and answers, where the fault proxy for nodes (`tests.support.proxy`) carries bytes: the trouble
of an object store is an answer too, such as ``503 SlowDown``, or a body that ends early at the right status.
"""

from __future__ import annotations

import contextlib
import enum
import http.client
import http.server
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit


class Trouble(enum.Enum):
    """What becomes of one request for a range."""

    NONE = "answered"
    SLOW_DOWN = "503 SlowDown"
    TOO_MANY = "429, asks to wait a second"
    INTERNAL = "500 InternalError"
    RESET = "half of the body, then a reset"
    SHORT = "half of the body, then the end of the connection"
    WRONG_RANGE = "a Content-Range that was not asked for"
    STALL = "half of the body, then silence until the proxy is told to go on"
    REFUSED = "the connection ends without an answer"


@dataclass(frozen=True, slots=True)
class Asked:
    """One request for a range: which, and how many were being answered at the time, itself included."""

    path: str
    range: str
    at_once: int


Decide = Callable[[int], Trouble]
"""From the number of a request, counted from 0, to what becomes of it."""


class TroubledOrigin:
    """Forwards to `target_url`; requests for ranges meet what `decide` says. A context manager.

    Attributes:
        endpoint_url: ``http://127.0.0.1:{port}`` of the proxy.
        asked: every request for a range.
        go_on: ends every stall.
    """

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        assert target.hostname and target.port
        self._target = target.hostname, target.port
        self._lock = threading.Lock()  # guards what follows
        self._at_once = 0
        self.asked: list[Asked] = []
        self.decide: Decide = lambda number: Trouble.NONE
        self.go_on = threading.Event()
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                origin._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: Any) -> None: ...

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self, decide: Decide) -> None:
        """Forget what was asked; from now on `decide`."""
        with self._lock:
            self.asked, self.decide = [], decide

    def always(self, trouble: Trouble) -> None:
        self.reset(lambda number: trouble)

    def first(self, count: int, trouble: Trouble) -> None:
        """The next `count` requests meet `trouble`; those after them are answered."""
        self.reset(lambda number: trouble if number < count else Trouble.NONE)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.go_on.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "")
        trouble = Trouble.NONE
        if wanted:
            with self._lock:
                self._at_once += 1
                trouble = self.decide(len(self.asked))
                self.asked.append(Asked(handler.path, wanted, self._at_once))
        try:
            with contextlib.suppress(ConnectionError):  # whoever asked has gone
                self._meet(handler, trouble)
        finally:
            if wanted:
                with self._lock:
                    self._at_once -= 1

    def _meet(self, handler: http.server.BaseHTTPRequestHandler, trouble: Trouble) -> None:
        match trouble:
            case Trouble.SLOW_DOWN:
                return _say(handler, 503, "SlowDown")
            case Trouble.TOO_MANY:
                return _say(handler, 429, "TooManyRequests", {"Retry-After": "1"})
            case Trouble.INTERNAL:
                return _say(handler, 500, "InternalError")
            case Trouble.REFUSED:
                handler.close_connection = True
                return None
        # The Host header is the proxy's own, as it was signed; the server checks the signature against it.
        upstream = http.client.HTTPConnection(*self._target, timeout=30)
        try:
            upstream.putrequest(handler.command, handler.path, skip_host=True, skip_accept_encoding=True)
            for name, value in handler.headers.items():
                upstream.putheader(name, value)
            upstream.endheaders()
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        handler.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() == "content-range" and trouble is Trouble.WRONG_RANGE:
                value = "bytes 1-2/3"
            if name.lower() not in ("connection", "transfer-encoding", "content-length", "keep-alive"):
                handler.send_header(name, value)
        length = answer.getheader("Content-Length") if handler.command == "HEAD" else str(len(body))
        handler.send_header("Content-Length", length or "0")
        handler.end_headers()
        if handler.command == "HEAD":
            return None
        if trouble in (Trouble.NONE, Trouble.WRONG_RANGE):
            handler.wfile.write(body)
            return None
        handler.wfile.write(body[: len(body) // 2])
        handler.close_connection = True
        if trouble is Trouble.STALL:
            self.go_on.wait(60)
        if trouble is Trouble.RESET:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        return None


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _say(
    handler: http.server.BaseHTTPRequestHandler, status: int, code: str, headers: dict[str, str] | None = None
) -> None:
    body = f"<Error><Code>{code}</Code></Error>".encode()
    handler.send_response_only(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Type", "application/xml")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)
