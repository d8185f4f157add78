"""HTTP to nodes and controller from ordinary threads: kept connections, bodies received into the caller's buffer.

Blocking sockets on purpose: a trainer's read is a blocking call, and threads that wait in ``recv_into`` hold no GIL.

Safe under fork: a child starts with an empty pool (the parent's sockets are closed in the child, unused), so no two
processes ever share a connection. Safe under threads: a connection belongs to one request at a time.

The rule: every failure to get an answer is `NodeUnavailable`, which says how many bytes had come, so that the next node
can be asked for the rest; every answer that says no is the error class the server named.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import httptools

from shoal import errors
from shoal.errors import NodeUnavailable, ShoalError
from shoal.wire import http_errors

CONNECT_TIMEOUT_S = 2.0
#: Longest silence of a node that is asked for bytes. A fill behind it may wait for a slow origin.
READ_TIMEOUT_S = 60.0
#: A kept connection idle for longer is not used again: the server closes its end after 120 s.
MAX_IDLE_S = 60.0
MAX_IDLE_PER_ADDRESS = 16
_HEAD_BUFFER = 16 << 10


class Interrupted(NodeUnavailable):
    """The connection failed after `received` bytes of the body."""

    def __init__(self, sentence: str, received: int) -> None:
        super().__init__(sentence)
        self.received = received


@dataclass(frozen=True, slots=True)
class Answer:
    """A response without its body, if that went into the caller's buffer.

    Attributes:
        headers: names in lower case.
        body: whole body; empty where it was received into a buffer or replaced by a descriptor.
        descriptor: file descriptor that the caller now owns, or None.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    descriptor: int | None = None

    @property
    def epoch(self) -> int:
        text = self.headers.get("shoal-epoch", "0")
        return int(text) if text.isdigit() else 0


class Transport:
    """A pool of connections to any number of addresses: ``host:port``, or ``unix:/path`` of a node's local socket."""

    def __init__(self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._forget()
        _transports.add(self)

    def _forget(self) -> None:
        self._lock = threading.Lock()  # guards _idle
        self._idle: dict[str, list[_Connection]] = defaultdict(list)

    def close(self) -> None:
        """Close idle connections; those in use close when they are done."""
        with self._lock:
            idle, self._idle = self._idle, defaultdict(list)
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def get(
        self, address: str, target: str, headers: Mapping[str, str] | None = None, *, method: str = "GET"
    ) -> Answer:
        """Fetch a whole resource.

        Raises:
            NodeUnavailable: nothing, or not all of it, came.
            ShoalError: the class the server named.
        """
        return self._request(address, method, target, headers or {}, None)

    def read_into(
        self,
        address: str,
        target: str,
        start: int,
        end: int,
        buffer: memoryview,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Receive bytes [start, end) of a resource into `buffer`, which has just that length.

        Raises:
            Interrupted: the connection failed in the middle; the first `received` bytes are in the buffer.
            NodeUnavailable: no answer.
            ShoalError: the class the server named.
        """
        ranged = {"Range": f"bytes={start}-{end - 1}", **(headers or {})}
        return self._request(address, "GET", target, ranged, buffer)

    def _request(
        self, address: str, method: str, target: str, headers: Mapping[str, str], buffer: memoryview | None
    ) -> Answer:
        head = _format_request(address, method, target, headers)
        while True:
            connection = self._take(address)
            try:
                answer = connection.exchange(head, method, buffer)
            except _StaleConnection:
                continue  # the server had closed a kept connection: nothing was asked yet, so ask again
            except Interrupted:
                connection.close()
                raise
            except OSError as error:
                connection.close()
                raise NodeUnavailable(f"{address} does not answer: {error or type(error).__name__}") from error
            except (httptools.HttpParserError, KeyError, ValueError) as error:  # KeyError: no Content-Length
                connection.close()
                raise NodeUnavailable(f"{address} does not speak HTTP as Shoal does: {error}") from error
            except BaseException:
                connection.close()
                raise
            if connection.reusable:
                self._give_back(address, connection)
            else:
                connection.close()
            if answer.status >= 400:
                name = answer.headers.get("shoal-error", "")
                raise http_errors.from_response(answer.status, name, answer.body.decode("utf-8", "replace"))
            return answer

    def _take(self, address: str) -> _Connection:
        now = time.monotonic()
        while True:
            with self._lock:
                idle = self._idle[address]
                connection = idle.pop() if idle else None
            if connection is None:
                return self._connect(address)
            if now - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.close()

    def _give_back(self, address: str, connection: _Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle[address]
            if len(idle) < MAX_IDLE_PER_ADDRESS:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, address: str) -> _Connection:
        try:
            if address.startswith("unix:"):
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(self._connect_timeout_s)
                try:
                    sock.connect(address[5:])
                except BaseException:
                    sock.close()
                    raise
            else:
                host, _, port = address.rpartition(":")
                sock = socket.create_connection((host.strip("[]"), int(port)), timeout=self._connect_timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError, OverflowError) as error:
            reason = "no answer within the time limit" if isinstance(error, TimeoutError) else error
            raise NodeUnavailable(f"cannot connect to {address}: {reason}") from error
        sock.settimeout(self._read_timeout_s)
        return _Connection(sock)


_transports: weakref.WeakSet[Transport] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    # The lock may have been held by a thread that does not exist here, and the sockets are the parent's.
    for transport in _transports:
        transport._forget()


os.register_at_fork(after_in_child=_after_fork_in_child)


def _format_request(address: str, method: str, target: str, headers: Mapping[str, str]) -> bytes:
    host = "localhost" if address.startswith("unix:") else address
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class _StaleConnection(Exception):
    """A kept connection turned out to be closed before any byte of an answer came."""


@dataclass(slots=True)
class _Head:
    """httptools' callbacks for one response head."""

    headers: dict[str, str] = field(default_factory=dict)
    is_complete: bool = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.is_complete = True


class _Connection:
    """One socket and its exchange of one request for one answer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_fresh = True
        self.idle_since = 0.0
        self.reusable = True

    def close(self) -> None:
        self._sock.close()

    def exchange(self, request: bytes, method: str, buffer: memoryview | None) -> Answer:
        try:
            self._sock.sendall(request)
            data, descriptor = self._first_bytes()
        except (BrokenPipeError, ConnectionResetError) as error:
            if self._is_fresh:
                raise
            self.close()
            raise _StaleConnection from error
        if not data:
            if self._is_fresh:
                raise ConnectionResetError("it closed the connection without an answer")
            self.close()
            raise _StaleConnection
        self._is_fresh = False
        try:
            return self._answer(data, method, buffer, descriptor)
        except BaseException:
            if descriptor is not None:
                os.close(descriptor)
            raise

    def _first_bytes(self) -> tuple[bytes, int | None]:
        if self._sock.family != socket.AF_UNIX:
            return self._sock.recv(_HEAD_BUFFER), None
        data, descriptors, _, _ = socket.recv_fds(self._sock, _HEAD_BUFFER, 1)
        return data, descriptors[0] if descriptors else None

    def _answer(self, data: bytes, method: str, buffer: memoryview | None, descriptor: int | None) -> Answer:
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = self._sock.recv(_HEAD_BUFFER)
            if not more or len(data) > 4 * _HEAD_BUFFER:
                raise ConnectionResetError("it closed the connection within the head of an answer")
            data += more
        head = _Head()
        parser = httptools.HttpResponseParser(head)
        parser.feed_data(data[: end + 4])
        status = parser.get_status_code()
        rest = memoryview(data)[end + 4 :]
        self.reusable = head.headers.get("connection", "").lower() != "close"
        length = 0 if method == "HEAD" else int(head.headers["content-length"])
        if buffer is not None and status < 400 and descriptor is None:
            if length != len(buffer):
                raise ConnectionResetError(f"it answered {length} bytes where {len(buffer)} were asked for")
            self._receive(rest, buffer)
            return Answer(status, head.headers)
        body = bytearray(length)
        self._receive(rest, memoryview(body))
        return Answer(status, head.headers, bytes(body), descriptor)

    def _receive(self, rest: memoryview, buffer: memoryview) -> None:
        """Fill `buffer` from `rest`, then from the socket. The one copy here is the kernel's, but for a head's tail."""
        received, length = len(rest), len(buffer)
        buffer[:received] = rest
        try:
            while received < length:
                count = self._sock.recv_into(buffer[received:])
                if count == 0:
                    raise ConnectionResetError("it closed the connection within the body")
                received += count
        except OSError as error:
            raise Interrupted(f"the connection failed after {received} of {length} bytes: {error}", received) from error


def is_worth_another_node(error: ShoalError) -> bool:
    """Whether the same request may succeed at another node (docs/wire.md, "Status codes")."""
    lasting = (errors.InvalidRequest, errors.DatasetNotFound, errors.OriginError)
    return not isinstance(error, lasting)
