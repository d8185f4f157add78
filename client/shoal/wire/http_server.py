"""The HTTP/1.1 server of nodes and controller: raw non-blocking sockets, ``httptools`` heads, ``sendfile`` bytes.

Why not a web framework: the bodies are files, and a framework would carry each byte through Python. Here a file's bytes
go from the page cache to the socket inside the kernel (`shoal.wire.http_connection`).

The rule: whatever a peer sends, and however many there are, the answer is a status and a sentence, or a closed
connection; others are served on.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import logging
import math
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from shoal.errors import InvalidRequest, Overloaded, ShoalError
from shoal.wire import http_errors
from shoal.wire.byte_range import RangeNotSatisfiable
from shoal.wire.http_connection import BadRequest, Bodies, Connection, Senders
from shoal.wire.http_messages import Request, Response

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

#: Connections at a time. Beyond them the one that was idle for longest makes room; where none is idle, a newcomer is
#: told that the server is overloaded.
MAX_CONNECTIONS = 8192
#: Of the descriptors that the process may have, the share for connections: the rest is for files.
DESCRIPTOR_SHARE = 0.5
#: Newcomers that are told so at a time; others find a closed connection.
MAX_REFUSALS = 64
#: A newcomer's request is waited for so long before it is refused: it may be one of `ALWAYS_ANSWERED`.
REFUSAL_S = 1.0
#: Newcomers beside those, if they ask for one of `ALWAYS_ANSWERED`.
MAX_ASKERS = 16
#: What is answered whatever the load: else a process that is busy would be taken for one that is ill, and killed.
ALWAYS_ANSWERED = frozenset({"/healthz", "/readyz", "/metrics"})
#: Bytes that all request bodies on their way in may hold.
BODIES_BYTES = 64 << 20
#: Idle connections that end when a descriptor is lacking, and how long to wait for theirs.
ENDED_FOR_DESCRIPTORS = 16
NO_DESCRIPTOR_WAIT_S = 0.1
#: What the system says when it is out of something that comes back.
_SHORT_OF = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class MethodNotAllowed(InvalidRequest):
    """The resource does not know the method; `allowed` is the Allow header."""

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not served here: use {allowed}")
        self.allowed = allowed


class HttpServer:
    """Serves one handler on any number of TCP and Unix sockets of the running event loop."""

    def __init__(
        self,
        handler: Handler,
        *,
        epoch: Callable[[], int],
        max_body: int = 0,
        congestion: str = "",
        senders: int = 0,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """Serve nothing yet.

        Args:
            epoch: of the cluster map, for every response.
            max_body: bytes of the largest request body; 0: only GET and HEAD are served.
            congestion: TCP congestion control of connections, as in tcp(7); "", or one the kernel lacks: the system's.
            senders: threads that send large bodies; 0: the loop sends them.
            max_connections: at a time; fewer where the process may have few descriptors.
        """
        self._senders = Senders(senders)
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_connections = max(1, min(max_connections, int(descriptors * DESCRIPTOR_SHARE)))
        self._bodies = Bodies(BODIES_BYTES)
        self._served: set[Connection] = set()  # but for those that were told to end
        self._idle: dict[Connection, None] = {}  # of them; the longest idle first
        self._refusals = 0
        self._warned_s = -math.inf
        #: Connections and requests that were told to come back later.
        self.overloaded = 0
        self._handler = handler
        self._max_body = max_body
        self._congestion = congestion
        self._epoch = epoch
        self._listeners: list[tuple[socket.socket, asyncio.Task[None]]] = []
        self._connections: set[asyncio.Task[None]] = set()
        self._paths: list[Path] = []

    @property
    def open_connections(self) -> int:
        return len(self._connections)

    async def listen_tcp(self, host: str, port: int) -> int:
        """Listen on `host`:`port` (0: any free one) and return the port. Raises OSError as bind does."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
        except OSError:
            listener.close()
            raise
        if self._congestion:
            try:  # accepted sockets inherit it
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, self._congestion.encode())
            except OSError as error:
                log.warning("no TCP congestion control %r here, using the system's: %s", self._congestion, error)
        self._start(listener, is_local=False)
        return int(listener.getsockname()[1])

    async def listen_unix(self, path: Path) -> None:
        """Listen on a Unix socket, replacing one left there by a process that died. Raises OSError as bind does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_socket():
            with socket.socket(socket.AF_UNIX) as probe:
                if probe.connect_ex(str(path)) == 0:
                    raise OSError(errno.EADDRINUSE, f"another process already listens on {path}")
            path.unlink()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(str(path))
            path.chmod(0o666)  # trainers run as other users; the socket gives read access to cached bytes only
        except OSError:
            listener.close()
            raise
        self._paths.append(path)
        self._start(listener, is_local=True)

    def _start(self, listener: socket.socket, *, is_local: bool) -> None:
        listener.setblocking(False)
        listener.listen(1024)
        self._listeners.append((listener, asyncio.create_task(self._accept(listener, is_local))))

    async def close(self) -> None:
        """Stop listening and cut every connection."""
        tasks = [task for _, task in self._listeners] + list(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener, _ in self._listeners:
            listener.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._senders.close()
        self._listeners.clear()
        self._paths.clear()

    async def _accept(self, listener: socket.socket, is_local: bool) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError as error:
                if error.errno in _SHORT_OF:
                    # Those in use come back: make some of them, and wait instead of dying. The newcomer waits too.
                    self._end_idle(ENDED_FOR_DESCRIPTORS)
                    if loop.time() > self._warned_s + 10:
                        self._warned_s = loop.time()
                        log.warning("no connection can be accepted (%s): raise the limit of open files", error)
                await asyncio.sleep(NO_DESCRIPTOR_WAIT_S)
                continue
            sock.setblocking(False)
            if not is_local:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(
                sock, is_local=is_local, max_body=self._max_body, bodies=self._bodies, senders=self._senders
            )
            if len(self._served) < self._max_connections or self._end_idle(1):
                self._served.add(connection)
                self._idle[connection] = None
                serving = self._serve(connection)
            else:
                # Bounded whatever they ask: each holds a descriptor beyond those that connections may have.
                room = MAX_REFUSALS - self._refusals
                if room <= -MAX_ASKERS or (room <= 0 and not _asks_how_it_fares(sock)):
                    self.overloaded += 1
                    connection.close()
                    continue
                self._refusals += 1
                serving = self._refuse(connection)
            task = asyncio.create_task(serving)
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)
            await asyncio.sleep(0)  # a flood of newcomers must not keep the loop from the others

    def _end_idle(self, count: int) -> int:
        """End the connections that were idle for longest, `count` at most; return how many."""
        ended = list(itertools.islice(self._idle, count))
        for connection in ended:
            del self._idle[connection]
            self._served.discard(connection)
            connection.shut()
        return len(ended)

    async def _serve(self, connection: Connection) -> None:
        try:
            while (request := await self._next_request(connection)) is not None:
                response = await self._answer(request)
                await connection.send(request, response, self._epoch())
                if not connection.keep_alive:
                    break
        except BadRequest as error:
            connection.keep_alive = False
            await connection.try_send(self._error(error.status, error.error), self._epoch())
            await connection.linger()
        except (OSError, TimeoutError, ShoalError) as error:
            # The reader went away or stalled, or a stream failed after its head: cutting the connection is the answer.
            log.debug("connection closed: %s", error)
        finally:
            self._served.discard(connection)
            self._idle.pop(connection, None)
            connection.close()

    async def _next_request(self, connection: Connection) -> Request | None:
        if connection.is_idle and connection in self._served:
            self._idle[connection] = None
        try:
            return await connection.next_request()
        finally:
            self._idle.pop(connection, None)

    async def _refuse(self, connection: Connection) -> None:
        """Say that there is no room; but tell how this process fares, however many others there are."""
        try:
            request = await connection.request_within(REFUSAL_S)
            if request is not None and request.path in ALWAYS_ANSWERED:
                response = await self._answer(request)
            else:
                full = f"this server has all of its {self._max_connections} connections in use: ask another one"
                response = self._error(HTTPStatus.SERVICE_UNAVAILABLE, Overloaded(full))
            connection.keep_alive = False
            await connection.try_send(response, self._epoch(), method="GET" if request is None else request.method)
            await connection.linger()
        finally:
            connection.close()
            self._refusals -= 1

    async def _answer(self, request: Request) -> Response:
        try:
            if request.method not in (("GET", "HEAD", "POST") if self._max_body else ("GET", "HEAD")):
                raise MethodNotAllowed(request.method, "GET, HEAD, POST" if self._max_body else "GET, HEAD")
            return await self._handler(request)
        except MethodNotAllowed as error:
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, error, {"Allow": error.allowed})
        except RangeNotSatisfiable as error:
            headers = {"Content-Range": f"bytes */{error.size_bytes}"}
            return _error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, InvalidRequest(str(error)), headers)
        except ShoalError as error:
            return self._error(http_errors.status_of(error), error)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _SHORT_OF:
                self._end_idle(ENDED_FOR_DESCRIPTORS)
                short = Overloaded(f"this server is out of {os.strerror(error.errno).lower()}: ask again in a moment")
                return self._error(HTTPStatus.SERVICE_UNAVAILABLE, short)
            log.exception("request failed: %s %s", request.method, request.path)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, ShoalError(f"internal error: {error!r}"))

    def _error(self, status: HTTPStatus, error: ShoalError) -> Response:
        if status is not HTTPStatus.SERVICE_UNAVAILABLE:
            return _error(status, error)
        self.overloaded += isinstance(error, Overloaded)
        return _error(status, error, {"Retry-After": "1"})


def _asks_how_it_fares(sock: socket.socket) -> bool:
    """Whether the request that came with a new connection, if one did, is one of `ALWAYS_ANSWERED`. Takes nothing."""
    try:
        words = sock.recv(32, socket.MSG_PEEK | socket.MSG_DONTWAIT).split(b" ")
    except OSError:
        return False
    return len(words) > 2 and words[1].decode("latin-1") in ALWAYS_ANSWERED


def _error(status: HTTPStatus, error: ShoalError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        status,
        {"Content-Type": "text/plain; charset=utf-8", "Shoal-Error": type(error).__name__, **(headers or {})},
        f"{error}\n".encode(),
    )
