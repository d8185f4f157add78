"""One connection of the HTTP server: requests in, responses out, file bytes by ``sendfile``.

Memory a connection is bounded by `MAX_HEAD`, the largest body that is taken, and the response in flight; a slow reader
of a file holds a file position, not bytes. What all bodies on their way may hold together is `Bodies`.

The rule: a response's body is sent whole or the connection closes, so a reader that got all of Content-Length got the
right bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import errno
import fcntl
import os
import socket
import struct
import termios
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from urllib.parse import parse_qsl, unquote

import httptools

from shoal.errors import InvalidRequest, Overloaded, ShoalError
from shoal.wire.http_messages import Buffer, FileSlice, Request, Rescue, Response

MAX_HEAD = 16 << 10
#: Bytes handed to one sendfile call: enough to amortise the call, small enough to share the loop.
SENDFILE_STRIDE = 1 << 20
#: What Linux reads ahead by default, so what is in the page cache at both ends of it mostly is between them.
PROBE_EVERY = 128 << 10
#: A body of which so much is left is worth a thread of `Senders`, which sends so much of it at a time.
BULK_BYTES = 4 << 20
OFFLOAD_BYTES = 32 << 20
#: A connection that does not ask for so long is closed.
IDLE_TIMEOUT_S = 120.0
#: From the first byte of a request to its last: who sends slower is not served.
REQUEST_TIMEOUT_S = 20.0
#: A peer that takes no byte of its answer for so long is cut off; one that takes some is not.
SEND_STALL_TIMEOUT_S = 60.0
LINGER_S = 2.0


class BadRequest(Exception):
    """The bytes received are no HTTP request that this server takes: the connection closes after the answer."""

    def __init__(
        self, sentence: str, status: HTTPStatus = HTTPStatus.BAD_REQUEST, kind: type[ShoalError] = InvalidRequest
    ) -> None:
        super().__init__(sentence)
        self.status = status
        self.error = kind(sentence)


class Bodies:
    """Bytes of request bodies that are on their way in, of all connections of a server.

    Args:
        limit_bytes: what they may hold together.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0


class _Head:
    """Collects httptools' callbacks for one request."""

    def __init__(self, ready: deque[tuple[Request, bool]], is_local: bool, max_body: int, bodies: Bodies) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self._ready = ready
        self._is_local = is_local
        self._max_body = max_body
        self._bodies = bodies
        self.body_bytes = 0
        self.on_message_begin()
        self.is_under_way = False

    def on_message_begin(self) -> None:
        self._url = b""
        self._headers: dict[str, str] = {}
        self._body: list[bytes] = []
        self.is_complete = False  # the head
        self.is_under_way = True  # the request

    def release_body(self) -> None:
        """The body is somebody else's to account for, or will never be whole."""
        self._bodies.held_bytes -= self.body_bytes
        self.body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.is_complete:  # behind a chunked body come headers again, as many as anybody likes
            raise BadRequest("headers behind a request body are not served here")
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        self.is_complete = True

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        self._bodies.held_bytes += len(body)
        if self.body_bytes > self._max_body:
            if not self._max_body:
                raise BadRequest("a request body is not served here")
            raise BadRequest(
                f"a request body has at most {self._max_body} bytes here", HTTPStatus.REQUEST_ENTITY_TOO_LARGE
            )
        if self._bodies.held_bytes > self._bodies.limit_bytes:
            self.release_body()
            sentence = f"request bodies hold all of {self._bodies.limit_bytes} bytes here: ask again in a moment"
            raise BadRequest(sentence, HTTPStatus.SERVICE_UNAVAILABLE, Overloaded)
        self._body.append(body)

    def on_message_complete(self) -> None:
        self.is_under_way = False
        self.release_body()
        if self.parser.get_http_version() not in ("1.1", "1.0"):
            raise BadRequest("only HTTP/1.1 is served here", HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
        try:
            url = httptools.parse_url(self._url)
            path, query = url.path.decode("ascii"), (url.query or b"").decode("ascii")
            if "%" in path:
                path = unquote(path, errors="strict")
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=16) if query else ()
        except (httptools.HttpParserInvalidURLError, ValueError) as error:
            raise BadRequest("the request target is not a valid URL path") from error
        method = self.parser.get_method().decode("ascii")
        request = Request(method, path, dict(pairs), self._headers, self._is_local, b"".join(self._body))
        self._ready.append((request, self.parser.should_keep_alive()))


class Senders:
    """Threads that send large bodies beside the event loop, so that a node fills a wire that one core cannot.

    Sending is the kernel's work and holds no interpreter lock, so threads share it well. A job sends until its socket
    is full, never longer, so a slow reader holds no thread. Only the loop takes and gives back.

    Args:
        count: threads; 0: the loop sends everything by itself.
    """

    def __init__(self, count: int) -> None:
        self.threads = ThreadPoolExecutor(max(1, count), thread_name_prefix="send")
        self._free = count

    def take(self) -> bool:
        """Whether a thread is free; it is the caller's until `give_back`."""
        if self._free == 0:
            return False
        self._free -= 1
        return True

    def give_back(self) -> None:
        self._free += 1

    def close(self) -> None:
        self.threads.shutdown(wait=False)


class Connection:
    """One socket: requests in, responses out."""

    def __init__(self, sock: socket.socket, *, is_local: bool, max_body: int, bodies: Bodies, senders: Senders) -> None:
        self._sock = sock
        self._senders = senders
        self._loop = asyncio.get_running_loop()
        self._ready: deque[tuple[Request, bool]] = deque()
        self._head = _Head(self._ready, is_local, max_body, bodies)
        self._beside_body = 0  # bytes of the request that is under way: its head, and what frames its body
        self._began_s = 0.0  # the request that is under way
        self._is_late = False
        self.keep_alive = True

    @property
    def is_idle(self) -> bool:
        """Whether nothing was asked that is not answered, nor is being asked. Of use while `next_request` waits."""
        return not self._ready and not self._head.is_under_way

    def close(self) -> None:
        self._head.release_body()
        self._sock.close()

    def shut(self) -> None:
        """End the connection from outside: whoever waits for it sees its end."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the peer was faster

    async def next_request(self) -> Request | None:
        """The next request, or None where the peer closed the connection or asked nothing for long.

        Raises:
            BadRequest: what came is no request, or did not come in time.
        """
        while not self._ready:
            if self._head.is_under_way:
                left_s = self._began_s + REQUEST_TIMEOUT_S - self._loop.time()
                with self._limit(max(left_s, 0.0), self._stop_listening):
                    data = await self._loop.sock_recv(self._sock, MAX_HEAD)
                if self._is_late:
                    raise BadRequest(
                        f"the request was not here {REQUEST_TIMEOUT_S:.0f} s after its first byte",
                        HTTPStatus.REQUEST_TIMEOUT,
                    )
            else:
                with self._limit(IDLE_TIMEOUT_S, self.shut):
                    data = await self._loop.sock_recv(self._sock, MAX_HEAD)
                self._began_s = self._loop.time()
            if not data:
                return None
            body_bytes = self._head.body_bytes
            try:
                self._head.parser.feed_data(data)
            except httptools.HttpParserUpgrade as error:
                raise BadRequest("protocol upgrades are not served here") from error
            except httptools.HttpParserError as error:
                if isinstance(error.__context__, BadRequest):
                    raise error.__context__ from None
                raise BadRequest(f"not an HTTP/1.1 request: {error}") from error
            if self._ready:
                self._beside_body = 0
                break
            self._beside_body += len(data) - (self._head.body_bytes - body_bytes)
            if self._beside_body > MAX_HEAD:
                what = "head, chunk sizes and trailers are" if self._head.is_complete else "head is"
                raise BadRequest(
                    f"the request {what} longer than {MAX_HEAD} bytes", HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                )
        request, keep_alive = self._ready.popleft()
        self.keep_alive = keep_alive
        return request

    async def request_within(self, timeout_s: float) -> Request | None:
        """The first request; None where it does not come in time, or is none."""
        try:
            with self._limit(timeout_s, self._stop_listening):
                return await self.next_request()
        except (BadRequest, OSError):
            return None

    async def send(self, request: Request, response: Response, epoch: int) -> None:
        body = response.body
        try:
            await self._send(request.method, response, epoch)
        finally:
            for file in response.also:
                file.done()
            if isinstance(body, FileSlice):
                body.done()
            elif isinstance(body, AsyncIterator):
                await _close(body)

    async def try_send(self, response: Response, epoch: int, method: str = "GET") -> None:
        """Send a last word to a peer that may be gone."""
        try:
            await self._send(method, response, epoch)
        except (OSError, TimeoutError):
            pass

    async def linger(self) -> None:
        """After a last word: read on for a moment, because closing with bytes unread would take the word back."""
        try:
            self._sock.shutdown(socket.SHUT_WR)
            with self._limit(LINGER_S, self.shut):
                while await self._loop.sock_recv(self._sock, MAX_HEAD):
                    pass
        except OSError:
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
            await self._send_descriptors(head, [body.fd, *(file.fd for file in response.also)])
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

    async def _send_descriptors(self, head: bytes, fds: list[int]) -> None:
        while True:
            try:
                sent = socket.send_fds(self._sock, [head], fds)
                break
            except BlockingIOError:
                await self._writable()
        await self._send_buffer(head[sent:])

    async def _send_file(self, piece: FileSlice) -> None:
        offset, left = piece.offset, piece.length
        out = self._sock.fileno()
        has_warmed = False
        while left:
            stride = min(left, SENDFILE_STRIDE)
            is_ready = is_resident(piece.fd, offset, stride)
            try:
                if is_ready and left >= BULK_BYTES and self._senders.take():
                    try:
                        sent = await _finish(
                            self._loop.run_in_executor(self._senders.threads, _send, out, piece.fd, offset, left)
                        )
                    finally:
                        self._senders.give_back()
                elif is_ready or (piece.rescue is not None and await piece.rescue.warm(offset, stride)):
                    sent = os.sendfile(out, piece.fd, offset, stride)
                elif piece.rescue is not None:
                    await self._send_rest(piece.rescue, offset, left)
                    return
                else:
                    # Reading the disk would hold up everybody on the loop, so that read happens in a thread.
                    sent = await _finish(self._loop.run_in_executor(None, os.sendfile, out, piece.fd, offset, stride))
            except BlockingIOError:
                await self._writable()
                continue
            except OSError as error:
                if error.errno != errno.EIO:  # which is the drive's, not the socket's
                    raise
                sent = 0
            if sent == 0:
                if piece.rescue is None or has_warmed:
                    raise ShoalError(f"a file cannot be read or ended {left} bytes early")
                has_warmed = True
                if not await piece.rescue.warm(offset, stride):
                    await self._send_rest(piece.rescue, offset, left)
                    return
            offset += sent
            left -= sent
            if sent >= stride and left:
                await asyncio.sleep(0)  # a fast reader must not keep the loop from the others

    async def _send_rest(self, rescue: Rescue, start: int, length: int) -> None:
        pieces = rescue.rest(start, start + length)
        try:
            await self._send_stream(pieces, length)
        finally:
            await _close(pieces)

    async def _writable(self) -> None:
        future: asyncio.Future[None] = self._loop.create_future()
        fd = self._sock.fileno()
        self._loop.add_writer(fd, _set_done, future)
        stall = _Stall(self)
        try:
            await future
        finally:
            stall.cancel()
            self._loop.remove_writer(fd)

    def unsent_bytes(self) -> int:
        """Bytes in the socket's buffer that the peer has not taken (tcp(7), SIOCOUTQ)."""
        count: int = struct.unpack("i", fcntl.ioctl(self._sock, termios.TIOCOUTQ, bytes(4)))[0]
        return count

    def _stop_listening(self) -> None:
        self._is_late = True
        try:
            self._sock.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # the peer was faster

    @contextlib.contextmanager
    def _limit(self, timeout_s: float, then: Callable[[], None]) -> Iterator[None]:
        """Call `then` when this takes longer.

        Instead of `asyncio.timeout`, whose cost is a tenth of a small request's.
        """
        timer = self._loop.call_later(timeout_s, then)
        try:
            yield
        finally:
            timer.cancel()


class _Stall:
    """Shuts a connection whose peer takes nothing for `SEND_STALL_TIMEOUT_S`.

    A socket may be full for minutes while a slow peer takes bytes all the time, so it is the bytes that are looked at.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._unsent = connection.unsent_bytes()
        self._timer = self._loop.call_later(SEND_STALL_TIMEOUT_S, self._look)

    def _look(self) -> None:
        unsent = self._connection.unsent_bytes()
        if unsent >= self._unsent:
            self._connection.shut()
            return
        self._unsent = unsent
        self._timer = self._loop.call_later(SEND_STALL_TIMEOUT_S, self._look)

    def cancel(self) -> None:
        self._timer.cancel()


def _send(out: int, fd: int, offset: int, left: int) -> int:
    """In a thread: send until the socket is full, `OFFLOAD_BYTES` at most; returns the bytes sent.

    Raises BlockingIOError where it was full before the first.
    """
    sent = 0
    while sent < min(left, OFFLOAD_BYTES):
        try:
            count = os.sendfile(out, fd, offset + sent, min(left - sent, SENDFILE_STRIDE))
        except BlockingIOError:
            if sent:
                break
            raise
        if count == 0:
            break
        sent += count
    return sent


async def _finish(job: asyncio.Future[int]) -> int:
    """The result of a job in a thread; waits for its end also when cancelled, because it uses our descriptors."""
    try:
        return await asyncio.shield(job)
    except asyncio.CancelledError:
        await asyncio.wait([job])
        raise


def _set_done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _close(pieces: AsyncIterator[Buffer | FileSlice]) -> None:
    aclose = getattr(pieces, "aclose", None)
    if aclose is not None:
        await aclose()


def is_resident(fd: int, offset: int, length: int) -> bool:
    """Whether a file range seems to be in the page cache, so that reading will not wait for a disk.

    A hint: only the ends are looked at, and a byte in each `PROBE_EVERY` between. True where the file system cannot
    tell.
    """
    preadv, probe, last = os.preadv, [bytearray(1)], offset + length - 1
    try:
        preadv(fd, probe, offset, os.RWF_NOWAIT)
        if length > PROBE_EVERY:
            for at in range(offset + PROBE_EVERY, last, PROBE_EVERY):
                preadv(fd, probe, at, os.RWF_NOWAIT)
        preadv(fd, probe, last, os.RWF_NOWAIT)
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


_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}" for status in HTTPStatus}


def _format_head(response: Response, length: int, epoch: int, *, keep_alive: bool) -> bytes:
    lines = [
        _STATUS_LINES[response.status],
        f"Date: {_Date.now()}",
        f"Content-Length: {length}",
        f"Shoal-Epoch: {epoch}",
        *(f"{name}: {value}" for name, value in response.headers.items()),
    ]
    if not keep_alive:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1", "replace")
