"""One connection: a request out, an answer in, its body received into the caller's buffer.

The rule: an exchange ends with the whole answer or an exception; after an exception the connection is not used again.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import httptools

from shoal import checksums
from shoal.checksums import PartCheck
from shoal.errors import NodeUnavailable

_HEAD_BUFFER = 16 << 10
#: Descriptors taken with one answer; the kernel passes 253 at most.
MAX_DESCRIPTORS = 32
#: Bytes received between two looks at their checksums: they are then still in the processor's cache.
_CHECK_STRIDE = 512 << 10

MakeView = Callable[[], memoryview]
"""Gives the buffer that a body is received into; called once, when it is known that a body comes."""
MakeCheck = Callable[[Mapping[str, str]], PartCheck | None]
"""From an answer's headers to the check of its body; None where there is nothing to compare."""


class Interrupted(NodeUnavailable):
    """The connection failed after `received` bytes of the body, which are good."""

    def __init__(self, sentence: str, received: int = 0) -> None:  # a default, so that it can be unpickled
        super().__init__(sentence)
        self.received = received


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
    """One socket and its exchange of one request for one answer."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._is_unix = sock.family == socket.AF_UNIX
        self._is_fresh = True
        self.idle_since = 0.0
        self.reusable = True

    def close(self) -> None:
        self._sock.close()

    def exchange(
        self, request: bytes, method: str, make_view: MakeView | None = None, make_check: MakeCheck | None = None
    ) -> Answer:
        """Send `request` and receive the answer to it.

        Args:
            make_view: where the body of a good answer goes; its length must be the body's. None: into `Answer.body`.
            make_check: see `MakeCheck`.

        Raises:
            StaleConnection: a kept connection that the other side had closed. Nothing was asked yet.
            Interrupted: it failed within the body.
            DescriptorsLost: the answer's descriptors could not be taken.
            ShardCorrupt: a part of the body does not match its checksum.
            OSError, httptools.HttpParserError, KeyError, ValueError: no answer, or not one of ours.
        """
        try:
            self._sock.sendall(request)
            data, descriptors = self._first_bytes()
        except (BrokenPipeError, ConnectionResetError) as error:
            if self._is_fresh:
                raise
            self.close()
            raise StaleConnection from error
        if not data:
            if self._is_fresh:
                raise ConnectionResetError("it closed the connection without an answer")
            self.close()
            raise StaleConnection
        self._is_fresh = False
        try:
            return self._answer(data, method, make_view, make_check, descriptors)
        except BaseException:
            for descriptor in descriptors:
                os.close(descriptor)
            raise

    def _first_bytes(self) -> tuple[bytes, tuple[int, ...]]:
        if not self._is_unix:
            return self._sock.recv(_HEAD_BUFFER), ()
        data, descriptors, _, _ = socket.recv_fds(self._sock, _HEAD_BUFFER, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        return data, tuple(descriptors)

    def _answer(
        self,
        data: bytes,
        method: str,
        make_view: MakeView | None,
        make_check: MakeCheck | None,
        descriptors: tuple[int, ...],
    ) -> Answer:
        while (end := data.find(b"\r\n\r\n")) < 0:
            more = self._sock.recv(_HEAD_BUFFER)
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
        if make_view is not None and status < 400 and not descriptors:
            view = make_view()
            check = make_check(headers) if make_check is not None else None
            trailing = bytearray(0 if check is None else check.trailing_bytes)
            if length != len(view) + len(trailing):
                raise ConnectionResetError(f"it answered {length} bytes where {len(view)} were asked for")
            try:
                self._receive(rest[: len(view)], view, check)
                if check is not None and trailing:
                    self._receive(rest[len(view) :], memoryview(trailing), None)
                    check.compare(checksums.unpack(trailing))
            except Interrupted as error:
                # A part that goes on at another node is compared by nobody, and an unknown border may lie anywhere.
                if make_check is not None and (check is None or trailing):
                    error.received = 0
                raise
            return Answer(status, headers)
        body = bytearray(length)
        self._receive(rest, memoryview(body), None)
        return Answer(status, headers, bytes(body), descriptors)

    def _receive(self, rest: memoryview, view: memoryview, check: PartCheck | None) -> None:
        """Fill `view` from `rest`, then from the socket. The one copy here is the kernel's, but for a head's tail."""
        received, length, checked = len(rest), len(view), 0
        view[:received] = rest
        receive_into = self._sock.recv_into
        try:
            while received < length:
                stop = length if check is None else min(length, received + _CHECK_STRIDE)
                count = receive_into(view[received:stop])
                if count == 0:
                    raise ConnectionResetError("it closed the connection within the body")
                received += count
                if check is not None and received - checked >= _CHECK_STRIDE:
                    check.update(view[checked:received])
                    checked = received
        except OSError as error:
            good = received if check is None else check.trusted_bytes
            raise Interrupted(f"the connection failed after {received} of {length} bytes: {error}", good) from error
        if check is not None:
            check.update(view[checked:received])
