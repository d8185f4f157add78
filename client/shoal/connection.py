"""One connection: a request out, an answer in, its body received into the caller's buffer.

The kernel ends a wait for bytes after the patience that the address has earned (`shoal.health`); then the request's
watch is told, which returns to wait on, or raises. So an answer that comes in time costs neither a poll nor a timer.

The rule: an exchange ends with the whole answer or an exception; after an exception the connection is not used again.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Protocol

import httptools

from shoal import checksums
from shoal.checksums import PartCheck
from shoal.errors import DeadlineExceeded, NodeUnavailable
from shoal.health import Latency

_HEAD_BUFFER = 16 << 10
#: Descriptors taken with one answer; the kernel passes 253 at most.
MAX_DESCRIPTORS = 32
#: Seconds between two looks at how fast a body comes.
LOOK_EVERY_S = 1.0
#: Bytes received between two looks at their checksums: they are then still in the processor's cache.
_CHECK_STRIDE = 512 << 10

MakeView = Callable[[], memoryview]
"""Gives the buffer that a body is received into; called once, when it is known that a body comes."""
MakeCheck = Callable[[Mapping[str, str]], PartCheck | None]
"""From an answer's headers to the check of its body; None where there is nothing to compare."""


class Interrupted(NodeUnavailable):
    """The connection failed after `received` bytes of the body, which are good; `reached` bytes had come."""

    def __init__(self, sentence: str, received: int = 0, reached: int = 0) -> None:  # so that it can be unpickled
        super().__init__(sentence)
        self.received = received
        self.reached = max(received, reached)


class Watch(Protocol):
    """Decides how long one request is waited for.

    Attributes:
        until: `time.monotonic` at which the caller's time is over.
    """

    until: float

    def end(self) -> None:
        """The request is over."""
        ...

    def look(self, came: int, seconds: float, good: int) -> None:
        """So much of the body came in the last `seconds`, and `good` is as in `silent`. Return to go on, or raise."""
        ...

    def silent(self, connection: Connection, good: int) -> None:
        """Nothing came for a while; `good` bytes of the body need not come again. Return to wait on, or raise."""
        ...


class DescriptorsLost(NodeUnavailable):
    """The kernel dropped the descriptors of an answer, mostly because this process has too many files open."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A response without its body, if that went into the caller's buffer.

    Attributes:
        headers: names in lower case.
        body: whole body; empty where it was received into a buffer or replaced by a descriptor.
        descriptors: file descriptors that the caller now owns.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""
    descriptors: tuple[int, ...] = ()

    @property
    def epoch(self) -> int:
        text = self.headers.get("shoal-epoch", "0")
        return int(text) if text.isdigit() else 0


class StaleConnection(Exception):
    """A kept connection turned out to be closed before any byte of an answer came."""


def format_request(
    address: str, method: str, target: str, headers: Mapping[str, str], content: bytes | None = None
) -> bytes:
    """The bytes of a request; `content` is its body."""
    host = "localhost" if address.startswith("unix:") else address
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    if content is not None:
        lines.append(f"Content-Length: {len(content)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + (content or b"")


@dataclass(slots=True)
class _Head:
    """httptools' callbacks for one response head."""

    headers: dict[str, str] = field(default_factory=dict)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")


class Connection:
    """One socket; one request and its answer at a time.

    Args:
        latency: of the address; it is told of each answer and says the patience with the next.
    """

    def __init__(self, sock: socket.socket, latency: Latency) -> None:
        self._sock = sock
        self._is_unix = sock.family == socket.AF_UNIX
        self._latency = latency
        self._patience_s = 0.0
        self._asked_at = 0.0
        self.is_fresh = True
        self.idle_since = 0.0
        self.reusable = True

    def fileno(self) -> int:
        return self._sock.fileno()

    def peek(self, count: int) -> bytes:
        """The first bytes of what has come, which stay there; b"" where the other side closed. Raises OSError."""
        return self._sock.recv(count, socket.MSG_PEEK | socket.MSG_DONTWAIT)

    def close(self) -> None:
        self._sock.close()

    def send(self, request: bytes, watch: Watch) -> None:
        """Send `request`; `receive` gets the answer to it.

        Raises:
            StaleConnection: a kept connection that the other side had closed. Nothing was asked.
            OSError: it failed.
        """
        if self._patience_s != self._latency.patience_s:
            self._set_patience(self._latency.patience_s)
        self._asked_at = monotonic()
        sent = 0
        try:
            while True:
                try:
                    sent += self._sock.send(memoryview(request)[sent:] if sent else request)
                    if sent == len(request):
                        return
                except BlockingIOError:
                    watch.silent(self, 0)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._stale(error) from error

    def receive(
        self, method: str, watch: Watch, make_view: MakeView | None = None, make_check: MakeCheck | None = None
    ) -> Answer:
        """Receive the answer to what was sent.

        Args:
            method: of the request.
            make_view: where the body of a good answer goes; its length must be the body's. None: into `Answer.body`.
            make_check: see `MakeCheck`.

        Raises:
            StaleConnection: a kept connection that the other side had closed. Nothing was asked yet.
            Interrupted: it failed within the body.
            DescriptorsLost: the answer's descriptors could not be taken.
            DeadlineExceeded: the caller's time is over.
            ShardCorrupt: a part of the body does not match its checksum.
            OSError, httptools.HttpParserError, KeyError, ValueError: no answer, or not one of ours.
        """
        try:
            data, descriptors = self._first_bytes(watch)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise self._stale(error) from error
        if not data:
            raise self._stale(ConnectionResetError("it closed the connection without an answer"))
        self._latency.add(monotonic() - self._asked_at)
        self.is_fresh = False
        try:
            return self._answer(data, method, watch, make_view, make_check, descriptors)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _set_patience(self, seconds: float) -> None:
        limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            self._sock.setsockopt(socket.SOL_SOCKET, option, limit)
        self._patience_s = seconds

    def _stale(self, error: OSError) -> Exception:
        """What a failure before the first byte means: on a kept connection that nothing was asked."""
        if self.is_fresh:
            return error
        self.close()
        return StaleConnection(str(error))

    def _first_bytes(self, watch: Watch) -> tuple[bytes, tuple[int, ...]]:
        while True:
            try:
                if not self._is_unix:
                    return self._sock.recv(_HEAD_BUFFER), ()
                data, descriptors, _, _ = socket.recv_fds(
                    self._sock, _HEAD_BUFFER, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
                return data, tuple(descriptors)
            except BlockingIOError:
                watch.silent(self, 0)

    def _answer(
        self,
        data: bytes,
        method: str,
        watch: Watch,
        make_view: MakeView | None,
        make_check: MakeCheck | None,
        descriptors: tuple[int, ...],
    ) -> Answer:
        while (end := data.find(b"\r\n\r\n")) < 0:
            try:
                more = self._sock.recv(_HEAD_BUFFER)
            except BlockingIOError:
                watch.silent(self, 0)
                continue
            if not more or len(data) > 4 * _HEAD_BUFFER:
                raise ConnectionResetError("it closed the connection within the head of an answer")
            data += more
        head = _Head()
        parser = httptools.HttpResponseParser(head)
        parser.feed_data(data[: end + 4])
        status = parser.get_status_code()
        headers = head.headers
        rest = memoryview(data)[end + 4 :]
        self.reusable = headers.get("connection", "").lower() != "close"
        if "shoal-length" in headers and not descriptors:
            raise DescriptorsLost("no descriptor came with the answer: raise this process's limit of open files")
        length = 0 if method == "HEAD" else int(headers["content-length"])
        if make_view is not None and status < 300 and not descriptors:
            view = make_view()
            check = make_check(headers) if make_check is not None else None
            trailing = bytearray(0 if check is None else check.trailing_bytes)
            if length != len(view) + len(trailing):
                raise ConnectionResetError(f"it answered {length} bytes where {len(view)} were asked for")
            # A part that goes on at another node is compared by nobody, and an unknown border may lie anywhere.
            is_useless = make_check is not None and (check is None or bool(trailing))
            self._receive(rest[: len(view)], view, watch, check, half_is_useless=is_useless)
            if check is not None and trailing:
                self._receive(rest[len(view) :], memoryview(trailing), watch, None, half_is_useless=True)
                check.compare(checksums.unpack(trailing))
            return Answer(status, headers)
        body = bytearray(length)
        self._receive(rest, memoryview(body), watch, None, half_is_useless=True)
        return Answer(status, headers, bytes(body), descriptors)

    def _receive(
        self, rest: memoryview, view: memoryview, watch: Watch, check: PartCheck | None, *, half_is_useless: bool
    ) -> None:
        """Fill `view` from `rest`, then from the socket. The one copy here is the kernel's, but for a head's tail.

        Args:
            half_is_useless: where it fails all must come again, whatever `check` says.
        """
        received, length, checked = len(rest), len(view), 0
        view[:received] = rest
        receive_into = self._sock.recv_into
        looked_at, seen = self._asked_at, 0

        try:
            while received < length:
                stop = length if check is None else min(length, received + _CHECK_STRIDE)
                try:
                    count = receive_into(view[received:stop])
                except BlockingIOError:
                    watch.silent(self, _good(received, check, half_is_useless))
                    continue
                if count == 0:
                    raise ConnectionResetError("it closed the connection within the body")
                received += count
                if check is not None and received - checked >= _CHECK_STRIDE:
                    check.update(view[checked:received])
                    checked = received
                if received == length:
                    break
                now = monotonic()
                if now - looked_at > LOOK_EVERY_S or now > watch.until:  # a trickle is never silent
                    watch.look(received - seen, now - looked_at, _good(received, check, half_is_useless))
                    looked_at, seen = now, received
        except (Interrupted, DeadlineExceeded):
            raise  # the watch has spoken; both are OSErrors too
        except OSError as error:
            good = _good(received, check, half_is_useless)
            sentence = f"the connection failed after {received} of {length} bytes: {error}"
            raise Interrupted(sentence, good, received) from error
        if check is not None:
            check.update(view[checked:received])


def _good(received: int, check: PartCheck | None, half_is_useless: bool) -> int:
    """How many of the bytes that came need not come again if the rest fails."""
    if half_is_useless:
        return 0
    return received if check is None else check.trusted_bytes
