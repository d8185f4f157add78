"""TCP proxies on 127.0.0.1: one that counts what an origin really sends, the measure for "the origin is read once"; and
those that harm what they forward, the fault kit.

They forward bytes and understand none of them, so they add nothing an origin or a client could notice but the harm: an
S3 request is signed for the proxy's own ``host:port``, and the server checks the signature against the Host header it
receives.
"""

from __future__ import annotations

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self
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

    def __enter__(self) -> Self:
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


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the bytes that come back over one connection. The default harms nothing.

    Attributes:
        delay_s: before each piece.
        stall_after: bytes after which nothing more comes, though the connection stays; 0: accepted, and then silent.
        cut_after: bytes after which the connection is closed.
        is_reset: the cut is a reset, as of a machine that lost its state.
        flip: positions of bytes of which a bit is flipped, counted from the connection's first.
        bytes_per_s: as fast as they come, in pieces of a hundredth of a second.
    """

    delay_s: float = 0.0
    stall_after: int | None = None
    cut_after: int | None = None
    is_reset: bool = False
    flip: tuple[int, ...] = ()
    bytes_per_s: int | None = None


HARMLESS = Fault()


class FaultProxy(CountingProxy):
    """Forwards every connection to `target_url`, each with the fault that `choose` gives for its number.

    Attributes:
        choose: from the number of a connection, 0 for the first since the last `reset`, to its fault. A new one counts
            for new connections.
    """

    def __init__(self, target_url: str, choose: Callable[[int], Fault] = lambda number: HARMLESS) -> None:
        self.choose = choose
        self._flows = threading.Event()
        self._flows.set()
        self._is_over = threading.Event()
        self._chosen: dict[socket.socket, Fault] = {}  # by client; each key belongs to its connection's thread
        super().__init__(target_url)

    @property
    def address(self) -> str:
        """``host:port`` of the proxy."""
        return self.endpoint_url.removeprefix("http://")

    def stop(self) -> None:
        """Be as a stopped process: connections are accepted, and nothing passes on any, old or new."""
        self._flows.clear()

    def go_on(self) -> None:
        """Let pass what was held back."""
        self._flows.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._flows.set()
        super().__exit__(kind, error, trace)

    def forward(self, client: socket.socket) -> None:
        with self._lock:
            number = self.connections
        self._chosen[client] = self.choose(number)
        try:
            super().forward(client)
        finally:
            del self._chosen[client]

    def _pump(self, source: socket.socket, sink: socket.socket, inward: bool) -> None:
        fault = self._chosen[sink] if inward else HARMLESS
        super()._pump(source, _HarmedSink(sink, fault, self._flows, self._is_over), inward)  # type: ignore[arg-type]


class PacedProxy(CountingProxy):
    """Forwards every connection to `target_url`; what comes back over all of them together keeps within a rate.

    Args:
        bytes_per_s: of all connections.
    """

    def __init__(self, target_url: str, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._pace = threading.Lock()  # guards _free_at
        self._free_at = 0.0
        self._is_over = threading.Event()
        super().__init__(target_url)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        super().__exit__(kind, error, trace)

    def take_turn(self, size_bytes: int) -> None:
        """Wait until the line has carried so many more bytes."""
        with self._pace:
            self._free_at = max(self._free_at, time.monotonic()) + size_bytes / self._bytes_per_s
            wait_s = self._free_at - time.monotonic()
        self._is_over.wait(wait_s)

    def _pump(self, source: socket.socket, sink: socket.socket, inward: bool) -> None:
        super()._pump(source, _PacedSink(sink, self) if inward else sink, inward)  # type: ignore[arg-type]


class _PacedSink:
    """A socket to which everything is sent in its turn."""

    def __init__(self, sock: socket.socket, proxy: PacedProxy) -> None:
        self._sock, self._proxy = sock, proxy
        self.shutdown = sock.shutdown

    def sendall(self, data: memoryview) -> None:
        self._proxy.take_turn(len(data))
        self._sock.sendall(data)


class _HarmedSink:
    """A socket to which everything is sent with a fault."""

    def __init__(self, sock: socket.socket, fault: Fault, flows: threading.Event, is_over: threading.Event) -> None:
        self._sock = sock
        self._fault = fault
        self._flows = flows
        self._is_over = is_over
        self._sent = 0
        self.shutdown = sock.shutdown

    def sendall(self, data: memoryview) -> None:
        fault = self._fault
        piece = bytearray(data)
        for place in fault.flip:
            if self._sent <= place < self._sent + len(piece):
                piece[place - self._sent] ^= 0x10
        stride = len(piece) if fault.bytes_per_s is None else max(1, fault.bytes_per_s // 100)
        for start in range(0, len(piece), stride):
            if fault.bytes_per_s is not None:
                self._is_over.wait(min(stride, len(piece) - start) / fault.bytes_per_s)
            self._send(piece[start : start + stride])

    def _send(self, piece: bytearray) -> None:
        fault = self._fault
        if fault.delay_s:
            self._is_over.wait(fault.delay_s)
        self._flows.wait()
        limits = [limit for limit in (fault.stall_after, fault.cut_after) if limit is not None]
        room = min(limits, default=self._sent + len(piece)) - self._sent
        if room >= len(piece):
            self._sock.sendall(piece)
            self._sent += len(piece)
            return
        self._sock.sendall(piece[: max(0, room)])
        self._sent += max(0, room)
        if fault.cut_after is not None and self._sent >= fault.cut_after:
            if fault.is_reset:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self._sock.close()
            raise ConnectionResetError("cut on purpose")
        self._is_over.wait()


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
