"""Bytes to a server and what it answers, without a client that would keep either in order."""

from __future__ import annotations

import contextlib
import socket
from dataclasses import dataclass, field

import httptools

#: A server that says nothing for so long hangs.
TIMEOUT_S = 20.0


@dataclass
class RawAnswer:
    """One response as it came."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    is_whole: bool = False


class _Parsed:
    def __init__(self) -> None:
        self.answers: list[RawAnswer] = []
        self.parser = httptools.HttpResponseParser(self)

    def on_message_begin(self) -> None:
        self.answers.append(RawAnswer())

    def on_header(self, name: bytes, value: bytes) -> None:
        self.answers[-1].headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.answers[-1].status = self.parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.answers[-1].body += body

    def on_message_complete(self) -> None:
        self.answers[-1].is_whole = True


def exchange(port: int, data: bytes, *, close: bool = True) -> bytes:
    """Send `data`, say that no more comes, and return all that is answered until the server closes.

    Raises:
        TimeoutError: it does neither answer nor close.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT_S) as sock:
        found = bytearray()
        with contextlib.suppress(ConnectionError):  # it may refuse before it has read everything
            sock.sendall(data)
            if close:
                sock.shutdown(socket.SHUT_WR)
            while more := sock.recv(65536):
                found += more
        return bytes(found)


def parse(data: bytes) -> list[RawAnswer]:
    """The responses in `data`. Raises httptools.HttpParserError where it is something else."""
    parsed = _Parsed()
    parsed.parser.feed_data(data)
    return parsed.answers
