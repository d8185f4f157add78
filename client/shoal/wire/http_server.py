"""The HTTP/1.1 server of nodes and controller: raw non-blocking sockets, ``httptools`` heads, ``sendfile`` bytes.

Why not a web framework: the bodies are files, and a framework would carry each byte through Python. Here a file's bytes
go from the page cache to the socket inside the kernel (`shoal.wire.http_connection`).

The rule: whatever a peer sends, the answer is a status and a sentence, or a closed connection; others are served on.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import http_errors
from shoal.wire.byte_range import RangeNotSatisfiable
from shoal.wire.http_connection import BadRequest, Connection, Senders
from shoal.wire.http_messages import Request, Response

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]


class MethodNotAllowed(InvalidRequest):
    """The resource does not know the method; `allowed` is the Allow header."""

    def __init__(self, method: str, allowed: str) -> None:
        super().__init__(f"{method} is not served here: use {allowed}")
        self.allowed = allowed


class HttpServer:
    """Serves one handler on any number of TCP and Unix sockets of the running event loop."""

    def __init__(
        self, handler: Handler, *, epoch: Callable[[], int], max_body: int = 0, congestion: str = "", senders: int = 0
    ) -> None:
        """Serve nothing yet.

        Args:
            epoch: of the cluster map, for every response.
            max_body: bytes of the largest request body; 0: only GET and HEAD are served.
            congestion: TCP congestion control of connections, as in tcp(7); "", or one the kernel lacks: the system's.
            senders: threads that send large bodies; 0: the loop sends them.
        """
        self._senders = Senders(senders)
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
                # Out of descriptors, most likely: those in use come back, so wait instead of dying.
                log.warning("accept failed: %s", error)
                await asyncio.sleep(0.1)
                continue
            sock.setblocking(False)
            if not is_local:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            task = asyncio.create_task(self._serve(sock, is_local))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket, is_local: bool) -> None:
        connection = Connection(sock, is_local=is_local, max_body=self._max_body, senders=self._senders)
        try:
            while (request := await connection.next_request()) is not None:
                response = await self._answer(request)
                await connection.send(request, response, self._epoch())
                if not connection.keep_alive:
                    break
        except BadRequest as error:
            connection.keep_alive = False
            await connection.try_send(_error(error.status, InvalidRequest(str(error))), self._epoch())
            await connection.linger()
        except (OSError, TimeoutError, ShoalError) as error:
            # The reader went away or stalled, or a stream failed after its head: cutting the connection is the answer.
            log.debug("connection closed: %s", error)
        finally:
            sock.close()

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
            status = http_errors.status_of(error)
            headers = {"Retry-After": "1"} if status is HTTPStatus.SERVICE_UNAVAILABLE else {}
            return _error(status, error, headers)
        except Exception as error:
            log.exception("request failed: %s %s", request.method, request.path)
            return _error(HTTPStatus.INTERNAL_SERVER_ERROR, ShoalError(f"internal error: {error!r}"))


def _error(status: HTTPStatus, error: ShoalError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        status,
        {"Content-Type": "text/plain; charset=utf-8", "Shoal-Error": type(error).__name__, **(headers or {})},
        f"{error}\n".encode(),
    )
