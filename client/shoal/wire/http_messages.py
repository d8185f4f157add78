"""What a handler is asked and what it answers: values between the HTTP server and those who serve with it. Pure."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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


class Rescue(Protocol):
    """What a server does about a file that its drive may not give."""

    async def warm(self, offset: int, length: int) -> bool:
        """Bring bytes [offset, offset + length) of the file into the page cache; False where the drive fails to."""
        ...

    def rest(self, start: int, end: int) -> AsyncIterator[Buffer | FileSlice]:
        """The same bytes [start, end) from elsewhere."""
        ...


@dataclass(frozen=True, slots=True)
class FileSlice:
    """Bytes [offset, offset + length) of an open file. `release` is called once when the server is done with it.

    With a `rescue` the bytes come from elsewhere where the drive fails or hangs, in the middle of a body too.
    """

    fd: int
    offset: int
    length: int
    release: Callable[[], None] | None = None
    rescue: Rescue | None = None

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
