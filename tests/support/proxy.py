"""A TCP proxy on 127.0.0.1 that counts what an origin really sends: the measure for "the origin is read once".

It forwards bytes and understands none of them, so it adds nothing an origin or a client could notice: an S3 request is
signed for the proxy's own ``host:port``, and the server checks the signature against the Host header it receives.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from types import TracebackType
from urllib.parse import urlsplit

_BUFFER_BYTES = 256 << 10


class CountingProxy:
    """Forwards every connection to `target_url`; use it as a context manager.

    Attributes:
        endpoint_url: ``http://127.0.0.1:{port}`` of the proxy.
        bytes_from_origin: bytes that came back, HTTP heads included, so an upper bound of the body bytes.
        bytes_to_origin: bytes that went out.
        connections: how many were accepted.
    """

    def __init__(self, target_url: str) -> None:
        target = urlsplit(target_url)
        assert target.hostname and target.port, f"{target_url} names no host and port"
        self._target = (target.hostname, target.port)
        self._lock = threading.Lock()  # guards the counters and `_open`
        self._open: set[socket.socket] = set()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.reset()

    def reset(self) -> None:
        """Set all counters to zero."""
        with self._lock:
            self.bytes_from_origin = self.bytes_to_origin = self.connections = 0

    def __enter__(self) -> CountingProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        with self._lock:
            for each in self._open:
                with contextlib.suppress(OSError):  # the other end may be gone already
                    each.shutdown(socket.SHUT_RDWR)

    def forward(self, client: socket.socket) -> None:
        """Carry one connection until both directions have ended."""
        try:
            origin = socket.create_connection(self._target)
        except OSError:
            return  # the client sees a closed connection, as it would see a refused one
        with origin:
            with self._lock:
                self.connections += 1
                self._open |= {client, origin}
            outward = threading.Thread(target=self._pump, args=(client, origin, False), daemon=True)
            outward.start()
            self._pump(origin, client, True)
            outward.join()
            with self._lock:
                self._open -= {client, origin}

    def _pump(self, source: socket.socket, sink: socket.socket, inward: bool) -> None:
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            while count := source.recv_into(buffer):
                with self._lock:
                    if inward:
                        self.bytes_from_origin += count
                    else:
                        self.bytes_to_origin += count
                sink.sendall(buffer[:count])
        except OSError:
            pass  # a reset on one side becomes an end on the other, below
        for each in (source, sink):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RD if each is source else socket.SHUT_WR)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, proxy: CountingProxy) -> None:
        self.proxy = proxy
        super().__init__(("127.0.0.1", 0), _Handler)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        self.server.proxy.forward(self.request)
