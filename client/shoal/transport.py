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
import struct
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping

import httptools

from shoal import errors
from shoal.connection import (
    Answer,
    Connection,
    DescriptorsLost,
    Interrupted,
    MakeCheck,
    MakeView,
    StaleConnection,
    format_request,
)
from shoal.errors import NodeUnavailable, ShoalError
from shoal.wire import http_errors

CONNECT_TIMEOUT_S = 2.0
#: Longest silence of a node that is asked for bytes. A fill behind it may wait for a slow origin.
READ_TIMEOUT_S = 60.0
#: A kept connection idle for longer is not used again: the server closes its end after 120 s.
MAX_IDLE_S = 60.0
MAX_IDLE_PER_ADDRESS = 16


class Transport:
    """A pool of connections to any number of addresses: ``host:port``, or ``unix:/path`` of a node's local socket."""

    def __init__(self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._forget()
        _transports.add(self)

    def _forget(self) -> None:
        self._lock = threading.Lock()  # guards _idle
        self._idle: dict[str, list[Connection]] = defaultdict(list)

    def close(self) -> None:
        """Close idle connections; those in use close when they are done."""
        with self._lock:
            idle, self._idle = self._idle, defaultdict(list)
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def get(
        self,
        address: str,
        target: str,
        headers: Mapping[str, str] | None = None,
        *,
        method: str = "GET",
        content: bytes | None = None,
        make_view: MakeView | None = None,
        make_check: MakeCheck | None = None,
    ) -> Answer:
        """Ask for a resource.

        Args:
            method, content: GET without a body, unless the resource wants it otherwise.
            make_view, make_check: where the body goes and how it is checked; see `Connection.exchange`.

        Raises:
            Interrupted: the connection failed in the middle; the first `received` bytes are in the view.
            DescriptorsLost: the answer's descriptors could not be taken; ask for bytes.
            NodeUnavailable: no answer.
            ShardCorrupt: the body does not match its checksums.
            ShoalError: the class the server named.
        """
        request = format_request(address, method, target, headers or {}, content)
        while True:
            connection = self._take(address)
            try:
                answer = connection.exchange(request, method, make_view, make_check)
            except StaleConnection:
                continue  # the server had closed a kept connection: nothing was asked yet, so ask again
            except (Interrupted, DescriptorsLost):
                connection.close()
                raise
            except OSError as error:
                connection.close()
                reason = "no answer within the time limit" if isinstance(error, BlockingIOError) else error
                raise NodeUnavailable(f"{address} does not answer: {reason or type(error).__name__}") from error
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

    def read_into(self, address: str, target: str, start: int, end: int, view: memoryview) -> Answer:
        """Receive bytes [start, end) of a resource into `view`, which has just that length. Raises as `get`."""
        return self.get(address, target, {"Range": f"bytes={start}-{end - 1}"}, make_view=lambda: view)

    def _take(self, address: str) -> Connection:
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

    def _give_back(self, address: str, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle[address]
            if len(idle) < MAX_IDLE_PER_ADDRESS:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, address: str) -> Connection:
        try:
            if address.startswith("unix:"):
                sock = _new_socket(socket.AF_UNIX)
                sock.settimeout(self._connect_timeout_s)
                try:
                    sock.connect(address[5:])
                except BaseException:
                    sock.close()
                    raise
            else:
                host, _, port = address.rpartition(":")
                sock = _connect_tcp(host.strip("[]"), int(port), self._connect_timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError, OverflowError) as error:
            reason = "no answer within the time limit" if isinstance(error, TimeoutError) else error
            raise NodeUnavailable(f"cannot connect to {address}: {reason}") from error
        # Blocking, with the kernel's own time limit: a Python timeout would poll before every call.
        sock.settimeout(None)
        limit = struct.pack("ll", int(self._read_timeout_s), int(self._read_timeout_s % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, limit)
        return Connection(sock)


_transports: weakref.WeakSet[Transport] = weakref.WeakSet()
_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
# Held from the making of a socket until `_sockets` has it, and by a fork: a child closes all sockets, also those that a
# thread of its parent is using, for else the node would not see that the parent closes them.
_making = threading.Lock()


def _new_socket(family: int) -> socket.socket:
    with _making:
        sock = socket.socket(family, socket.SOCK_STREAM)
        _sockets.add(sock)
        return sock


def _connect_tcp(host: str, port: int, timeout_s: float) -> socket.socket:
    failure: OSError | None = None
    for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        sock = _new_socket(family)
        sock.settimeout(timeout_s)
        try:
            sock.connect(address)
            return sock
        except OSError as error:
            sock.close()
            failure = error
    raise failure or OSError(f"{host} has no address")


def _after_fork_in_child() -> None:
    # The lock may have been held by a thread that does not exist here, and the sockets are the parent's.
    for sock in list(_sockets):
        sock.close()
    for transport in _transports:
        transport._forget()
    _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_after_fork_in_child)


def is_worth_another_node(error: ShoalError) -> bool:
    """Whether the same request may succeed at another node (docs/wire.md, "Status codes")."""
    lasting = (errors.InvalidRequest, errors.DatasetNotFound, errors.OriginError)
    return not isinstance(error, lasting)
