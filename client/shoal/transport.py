"""HTTP to nodes and controller from ordinary threads: kept connections, bodies received into the caller's buffer.

Blocking sockets on purpose: a trainer's read is a blocking call, and threads that wait in ``recv_into`` hold no GIL.

Safe under fork: a child starts with an empty pool (the parent's sockets are closed in the child, unused), so no two
processes ever share a connection. Safe under threads: a connection belongs to one request at a time.

The rule: every failure to get an answer is `NodeUnavailable`, which says how many bytes had come, so that the next node
can be asked for the rest; every answer that says no is the error class the server named. What an address that fails or
falls silent has coming is up to `shoal.watch` and `shoal.health`.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import httptools

from shoal import connection as connections
from shoal import errors
from shoal.connection import (
    Answer,
    Connection,
    Interrupted,
    MakeCheck,
    MakeView,
    StaleConnection,
    format_request,
)
from shoal.errors import NodeUnavailable, ShoalError
from shoal.health import Health
from shoal.liveness import PROBE_S, Prober
from shoal.watch import Watch
from shoal.wire import http_errors

log = logging.getLogger(__name__)

#: To connect to an address. Its kernel answers for it, however busy it is; one lost packet costs a second.
CONNECT_TIMEOUT_S = 2.0
#: The same where another node can be asked instead.
HASTY_CONNECT_TIMEOUT_S = 0.3
#: Longest silence of a node that answers probes. A fill behind it may wait for a slow origin.
READ_TIMEOUT_S = 60.0
#: A kept connection idle for longer is not used again: the server closes its end after 120 s.
MAX_IDLE_S = 60.0
MAX_IDLE_PER_ADDRESS = 16


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was sent, and whose answer is awaited: for `Transport.get`, or `close`."""

    connection: Connection

    def fileno(self) -> int:
        return self.connection.fileno()

    def peek(self, count: int) -> bytes:
        """The first bytes of the answer; b"" where there will be none."""
        try:
            return self.connection.peek(count)
        except OSError:
            return b""

    def close(self) -> None:
        self.connection.close()


class Transport:
    """A pool of connections to any number of addresses: ``host:port``, or ``unix:/path`` of a node's local socket.

    Args:
        read_timeout_s: the longest silence of an address that answers probes.

    Attributes:
        health: of all addresses asked.
        prober: asks those whose circuits are open.
        is_closed: nobody uses it any more.
    """

    def __init__(self, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, read_timeout_s: float = READ_TIMEOUT_S) -> None:
        self._connect_timeout_s = connect_timeout_s
        self.read_timeout_s = read_timeout_s
        self.health = Health()
        self.prober = Prober(self)
        self.is_closed = False
        self._forget()
        _transports.add(self)

    def _forget(self) -> None:
        self._lock = threading.Lock()  # guards _idle
        self._idle: dict[str, list[Connection]] = defaultdict(list)

    def close(self) -> None:
        """Close idle connections, and probe no more; connections in use close when they are done."""
        self.is_closed = True
        self.prober.end()
        self.drop_idle()

    def drop_idle(self) -> None:
        """Close idle connections."""
        with self._lock:
            idle, self._idle = self._idle, defaultdict(list)
        for kept in idle.values():
            for connection in kept:
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
        watch: connections.Watch | None = None,
        is_hasty: bool = False,
        begun: Pending | None = None,
    ) -> Answer:
        """Ask for a resource.

        Args:
            method, content: GET without a body, unless the resource wants it otherwise.
            make_view, make_check: where the body goes and how it is checked; see `Connection.receive`.
            watch: decides how long a silence is waited for; None: one that `is_hasty` or not.
            is_hasty: give up at the first sign of trouble, because another address will do as well.
            begun: the same request, where `begin` has sent it already.

        Raises:
            Interrupted: the connection failed in the middle; the first `received` bytes are in the view.
            Superseded, DeadlineExceeded: as `watch` says.
            DescriptorsLost: the answer's descriptors could not be taken; ask for bytes.
            NodeUnavailable: no answer.
            ShardCorrupt: the body does not match its checksums.
            ShoalError: the class the server named.
        """
        request = format_request(address, method, target, headers or {}, content)
        watch = watch or Watch(self, address, is_hasty=is_hasty)
        timeout_s = HASTY_CONNECT_TIMEOUT_S if is_hasty else self._connect_timeout_s
        try:
            while True:
                connection = self._take(address, timeout_s) if begun is None else begun.connection
                try:
                    if begun is None:
                        connection.send(request, watch)
                    answer = connection.receive(method, watch, make_view, make_check)
                except StaleConnection:
                    begun = None
                    continue  # the server had closed a kept connection: nothing was asked yet, so ask again
                except BaseException as error:
                    connection.close()
                    if isinstance(error, httptools.HttpParserError | KeyError | ValueError):  # no Content-Length
                        if not isinstance(error, ShoalError):
                            raise NodeUnavailable(f"{address} does not speak HTTP as Shoal does: {error}") from error
                    elif isinstance(error, OSError) and not isinstance(error, ShoalError):
                        self.suspect(address)
                        raise NodeUnavailable(f"{address} does not answer: {error or type(error).__name__}") from error
                    elif isinstance(error, Interrupted):
                        self.suspect(address)  # it may have died, or only what it was sending may have failed
                    raise
                break
        finally:
            watch.end()
        if self.health.circuits:
            self.health.answered(address)
        if connection.reusable:
            self._give_back(address, connection)
        else:
            connection.close()
        if answer.status >= 400:
            name = answer.headers.get("shoal-error", "")
            if not name:
                raise NodeUnavailable(f"{address} is no Shoal process: it answers HTTP {answer.status} as others do")
            raise http_errors.from_response(answer.status, name, answer.body.decode("utf-8", "replace"))
        return answer

    def begin(self, address: str, target: str, headers: Mapping[str, str]) -> Pending:
        """Send a GET, for `get`, in a hurry: another address will do as well. Raises NodeUnavailable."""
        return Pending(self._knock(address, target, headers, HASTY_CONNECT_TIMEOUT_S))

    def read_into(
        self, address: str, target: str, start: int, end: int, view: memoryview, *, is_hasty: bool = False
    ) -> Answer:
        """Receive bytes [start, end) of a resource into `view`, which has just that length. Raises as `get`."""
        headers = {"Range": f"bytes={start}-{end - 1}"}
        return self.get(address, target, headers, make_view=lambda: view, is_hasty=is_hasty)

    def knock(self, address: str, target: str, *, fresh: bool = False) -> Connection:
        """Send a GET and hand over the connection, whose answer the caller looks at and which it closes.

        Args:
            fresh: on a new connection, because kept ones may be closed at the other end.

        Raises:
            NodeUnavailable: it cannot be sent.
        """
        return self._knock(address, target, {}, PROBE_S, fresh=fresh)

    def _knock(
        self, address: str, target: str, headers: Mapping[str, str], timeout_s: float, *, fresh: bool = False
    ) -> Connection:
        request = format_request(address, "GET", target, headers)
        while True:
            connection = self._connect(address, timeout_s) if fresh else self._take(address, timeout_s, note=False)
            try:
                connection.send(request, Watch(self, address))
                return connection
            except StaleConnection:
                fresh = True
            except OSError as error:
                connection.close()
                raise NodeUnavailable(f"{address} takes no request: {error}") from error

    def failed(self, address: str, reason: str) -> None:
        """Open the circuit of `address`."""
        if self.health.failed(address, reason, time.monotonic()):
            log.warning("%s is not asked first any more: %s", address, reason)
            self.prober.wake()

    def suspect(self, address: str) -> None:
        """Find out whether `address` is alive, without waiting for the answer."""
        if not self.health.is_open(address):
            self.prober.ask(address)

    def _take(self, address: str, timeout_s: float, *, note: bool = True) -> Connection:
        now = time.monotonic()
        while True:
            with self._lock:
                idle = self._idle[address]
                connection = idle.pop() if idle else None
            if connection is None:
                break
            if now - connection.idle_since < MAX_IDLE_S:
                return connection
            connection.close()
        try:
            return self._connect(address, timeout_s)
        except NodeUnavailable as error:
            if note:
                self.failed(address, str(error))
            raise

    def _give_back(self, address: str, connection: Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle[address]
            if len(idle) < MAX_IDLE_PER_ADDRESS:
                idle.append(connection)
                return
        connection.close()

    def _connect(self, address: str, timeout_s: float) -> Connection:
        try:
            if address.startswith("unix:"):
                sock = _new_socket(socket.AF_UNIX)
                sock.settimeout(timeout_s)
                try:
                    sock.connect(address[5:])
                except BaseException:
                    sock.close()
                    raise
            else:
                host, _, port = address.rpartition(":")
                sock = _connect_tcp(host.strip("[]"), int(port), timeout_s)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, ValueError, OverflowError) as error:
            reason = "no answer within the time limit" if isinstance(error, TimeoutError) else error
            raise NodeUnavailable(f"cannot connect to {address}: {reason}") from error
        # Blocking, with the kernel's own time limit (`Connection`): a Python timeout would poll before every call.
        sock.settimeout(None)
        return Connection(sock, self.health.latency(address))


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
        transport.health.reset_lock()
    _making.release()


os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_after_fork_in_child)


def is_worth_another_node(error: ShoalError) -> bool:
    """Whether the same request may succeed at another node (docs/wire.md, "Status codes")."""
    lasting = (errors.InvalidRequest, errors.DatasetNotFound, errors.OriginError)
    return not isinstance(error, lasting)
