"""The HTTP/1.1 server of nodes and controller: raw non-blocking sockets, ``httptools`` heads, ``sendfile`` bodies.

Why not a web framework: the bodies are files, and a framework would carry each byte through Python. Here a file's bytes
go from the page cache to the socket inside the kernel.

Only GET and HEAD without a body exist, so the server never reads more than a head: memory a connection is bounded by
`MAX_HEAD` plus the response in flight, and a slow reader holds a file position, not bytes.

The rule: a response's body is sent whole or the connection closes, so a reader that got all of Content-Length got the
right bytes.
"""

from __future__ import annotations

import asyncio
import email.utils
import errno
import logging
import os
import socket
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from urllib.parse import parse_qsl, unquote

import httptools

from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import http_errors
from shoal.wire.byte_range import RangeNotSatisfiable

log = logging.getLogger(__name__)

MAX_HEAD = 16 << 10
#: Bytes handed to one sendfile call: enough to amortise the call, small enough to share the loop.
SENDFILE_STRIDE = 1 << 20
#: A connection that neither asks nor takes bytes for so long is closed.
IDLE_TIMEOUT_S = 120.0
SEND_STALL_TIMEOUT_S = 60.0

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed head. `path` is percent-decoded; header names are lower case; `is_local` means a Unix socket."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    is_local: bool


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes [offset, offset + length) of an open file. `release` is called once when the server is done with it."""

    fd: int
    offset: int
    length: int
    release: Callable[[], None] | None = None

    def done(self) -> None:
        if self.release is not None:
            self.release()


@dataclass(frozen=True, slots=True)
class Response:
    """What a handler answers.

    Attributes:
        body: a buffer, a file slice, or pieces of either that add up to `length` bytes.
        length: Content-Length; None where `body` knows it.
        pass_descriptor: send `body`'s descriptor (a `FileSlice` over a whole file) instead of its bytes.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Buffer | FileSlice | AsyncIterator[Buffer | FileSlice] = b""
    length: int | None = None
    pass_descriptor: bool = False


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Serves one handler on any number of TCP and Unix sockets of the running event loop."""

    def __init__(self, handler: Handler, *, epoch: Callable[[], int]) -> None:
        self._handler = handler
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
        connection = _Connection(sock, is_local)
        try:
            while (request := await connection.next_request()) is not None:
                response = await self._answer(request)
                await connection.send(request, response, self._epoch())
                if not connection.keep_alive:
                    break
        except _BadHead as error:
            connection.keep_alive = False
            await connection.try_send(_error(error.status, InvalidRequest(str(error))), self._epoch())
        except (OSError, TimeoutError, ShoalError) as error:
            # The reader went away or stalled, or a stream failed after its head: cutting the connection is the answer.
            log.debug("connection closed: %s", error)
        finally:
            sock.close()

    async def _answer(self, request: Request) -> Response:
        if request.method not in ("GET", "HEAD"):
            error = InvalidRequest(f"{request.method} is not served here: only GET and HEAD are")
            return _error(HTTPStatus.METHOD_NOT_ALLOWED, error, {"Allow": "GET, HEAD"})
        try:
            return await self._handler(request)
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


class _BadHead(Exception):
    """The bytes received are no HTTP request that this server takes."""

    def __init__(self, sentence: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST) -> None:
        super().__init__(sentence)
        self.status = status


class _Head:
    """Collects httptools' callbacks for one request."""

    def __init__(self, ready: deque[tuple[Request, bool]], is_local: bool) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self._ready = ready
        self._is_local = is_local
        self.on_message_begin()

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        raise _BadHead("a request body is not served here")

    def on_message_complete(self) -> None:
        try:
            url = httptools.parse_url(self._url)
            path = unquote(url.path.decode("ascii"), errors="strict")
            query = dict(parse_qsl((url.query or b"").decode("ascii"), keep_blank_values=True, max_num_fields=16))
        except (httptools.HttpParserInvalidURLError, ValueError) as error:
            raise _BadHead("the request target is not a valid URL path") from error
        method = self.parser.get_method().decode("ascii")
        request = Request(method, path, query, self._headers, self._is_local)
        self._ready.append((request, self.parser.should_keep_alive()))


class _Connection:
    """One socket: heads in, responses out."""

    def __init__(self, sock: socket.socket, is_local: bool) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._ready: deque[tuple[Request, bool]] = deque()
        self._head = _Head(self._ready, is_local)
        self._unparsed = 0
        self.keep_alive = True

    async def next_request(self) -> Request | None:
        """The next request, or None where the peer closed the connection between two."""
        while not self._ready:
            async with asyncio.timeout(IDLE_TIMEOUT_S):
                data = await self._loop.sock_recv(self._sock, MAX_HEAD)
            if not data:
                return None
            self._unparsed += len(data)
            try:
                self._head.parser.feed_data(data)
            except httptools.HttpParserUpgrade as error:
                raise _BadHead("protocol upgrades are not served here") from error
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, _BadHead):
                    raise error.__context__ from None
                raise _BadHead(f"not an HTTP/1.1 request: {error}") from error
            if self._ready:
                self._unparsed = 0
            elif self._unparsed > MAX_HEAD:
                raise _BadHead(
                    f"the request head is longer than {MAX_HEAD} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                )
        request, keep_alive = self._ready.popleft()
        self.keep_alive = keep_alive
        return request

    async def send(self, request: Request, response: Response, epoch: int) -> None:
        body = response.body
        try:
            await self._send(request.method, response, epoch)
        finally:
            if isinstance(body, FileSlice):
                body.done()
            elif isinstance(body, AsyncIterator):
                await _close(body)

    async def try_send(self, response: Response, epoch: int) -> None:
        """Send a last word to a peer that may be gone."""
        try:
            await self._send("GET", response, epoch)
        except (OSError, TimeoutError):
            pass

    async def _send(self, method: str, response: Response, epoch: int) -> None:
        body = response.body
        length = response.length
        if length is None:
            assert not isinstance(body, AsyncIterator), "a stream needs its length"
            length = body.length if isinstance(body, FileSlice) else len(body)
        passes = response.pass_descriptor and isinstance(body, FileSlice)
        head = _format_head(response, 0 if passes else length, epoch, keep_alive=self.keep_alive)
        if passes:
            assert isinstance(body, FileSlice)
            head = head[:-2] + f"Shoal-Descriptor: 1\r\nShoal-Length: {length}\r\n\r\n".encode()
            await self._send_descriptor(head, body.fd)
            return
        if method == "HEAD" or length == 0:
            await self._send_buffer(head)
            return
        if isinstance(body, FileSlice):
            await self._send_buffer(head, more=True)
            await self._send_file(body)
        elif isinstance(body, AsyncIterator):
            await self._send_buffer(head, more=True)
            await self._send_stream(body, length)
        else:
            await self._send_buffer(head + body if length < 65536 else head, more=length >= 65536)
            if length >= 65536:
                await self._send_buffer(body)

    async def _send_stream(self, pieces: AsyncIterator[Buffer | FileSlice], length: int) -> None:
        sent = 0
        async for piece in pieces:
            if isinstance(piece, FileSlice):
                try:
                    await self._send_file(piece)
                finally:
                    piece.done()
                sent += piece.length
            else:
                await self._send_buffer(piece)
                sent += len(piece)
        if sent != length:
            raise ShoalError(f"a stream of {sent} bytes was announced as {length}")

    async def _send_buffer(self, data: Buffer, *, more: bool = False) -> None:
        view = memoryview(data)
        while view:
            try:
                sent = self._sock.send(view, socket.MSG_MORE if more else 0)
            except BlockingIOError:
                await self._writable()
                continue
            view = view[sent:]

    async def _send_descriptor(self, head: bytes, fd: int) -> None:
        while True:
            try:
                sent = socket.send_fds(self._sock, [head], [fd])
                break
            except BlockingIOError:
                await self._writable()
        await self._send_buffer(head[sent:])

    async def _send_file(self, piece: FileSlice) -> None:
        offset, left = piece.offset, piece.length
        out = self._sock.fileno()
        while left:
            stride = min(left, SENDFILE_STRIDE)
            try:
                if is_resident(piece.fd, offset, stride):
                    sent = os.sendfile(out, piece.fd, offset, stride)
                else:
                    # Reading the disk would hold up everybody on the loop, so that read happens in a thread.
                    sent = await self._loop.run_in_executor(None, os.sendfile, out, piece.fd, offset, stride)
            except BlockingIOError:
                await self._writable()
                continue
            if sent == 0:
                raise ShoalError(f"a file ended {left} bytes early")
            offset += sent
            left -= sent
            if sent == stride and left:
                await asyncio.sleep(0)  # a fast reader must not keep the loop from the others

    async def _writable(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        self._loop.add_writer(fd, _set_done, future)
        try:
            async with asyncio.timeout(SEND_STALL_TIMEOUT_S):
                await future
        finally:
            self._loop.remove_writer(fd)


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _close(pieces: AsyncIterator[Buffer | FileSlice]) -> None:
    aclose = getattr(pieces, "aclose", None)
    if aclose is not None:
        await aclose()


def is_resident(fd: int, offset: int, length: int) -> bool:
    """Whether the first and last byte of a file range are in the page cache, so that reading will not wait for a disk.

    A hint: the pages between may be absent, which readahead makes rare. True where the file system cannot tell.
    """
    probe = bytearray(1)
    try:
        os.preadv(fd, [probe], offset, os.RWF_NOWAIT)
        os.preadv(fd, [probe], offset + length - 1, os.RWF_NOWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


class _Date:
    """The Date header, formatted once a second."""

    second = -1
    text = ""

    @classmethod
    def now(cls) -> str:
        second = int(time.time())
        if second != cls.second:
            cls.second, cls.text = second, email.utils.formatdate(second, usegmt=True)
        return cls.text


def _format_head(response: Response, length: int, epoch: int, *, keep_alive: bool) -> bytes:
    status = HTTPStatus(response.status)
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Date: {_Date.now()}",
        f"Content-Length: {length}",
        f"Shoal-Epoch: {epoch}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    if not keep_alive:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
