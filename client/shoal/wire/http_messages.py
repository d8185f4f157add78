"""What a handler is asked and what it answers: values between the HTTP server and those who serve with it. Pure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Request:
    """A request. `path` is percent-decoded; header names are lower case; `is_local` means a Unix socket."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    is_local: bool
    body: bytes = b""


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
        also: more whole files whose descriptors are passed with it.
    """

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Buffer | FileSlice | AsyncIterator[Buffer | FileSlice] = b""
    length: int | None = None
    pass_descriptor: bool = False
    also: Sequence[FileSlice] = ()
