"""One object's bytes, as a format wants them: any range, as a buffer, and its length."""

from __future__ import annotations

import io
import os
from typing import Any, Protocol

import pyarrow as pa

from shoal import memory


class Source(Protocol):
    """An object. `shoal.reader.ObjectReader` is one.

    Attributes:
        size_bytes: of the object.
    """

    @property
    def size_bytes(self) -> int: ...

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), cut at the object's end. Raises ShoalError."""
        ...


class Extent:
    """One run of an object: `samples` of them in bytes [start, end).

    Attributes:
        number: of the run in the object: the record batch, the row group; 0 where the format has no such thing.
    """

    __slots__ = ("end", "number", "samples", "start")

    def __init__(self, number: int, samples: int, start: int, end: int) -> None:
        self.number, self.samples, self.start, self.end = number, samples, start, end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Extent) and all(getattr(self, name) == getattr(other, name) for name in self.__slots__)

    def __repr__(self) -> str:
        return f"Extent(number={self.number}, samples={self.samples}, start={self.start}, end={self.end})"


class SourceFile(io.RawIOBase):
    """A source as the file that Arrow's own readers want (``pyarrow.PythonFile``). For one thread."""

    def __init__(self, source: Source) -> None:
        self._source, self._position = source, 0

    def read_buffer(self, length: int = -1) -> pa.Buffer:
        size = self._source.size_bytes
        start = min(self._position, size)
        end = self._position = size if length < 0 else min(size, start + length)
        return self._source.read_buffer(start, end) if end > start else pa.py_buffer(b"")

    def read(self, length: int = -1) -> bytes:
        return memory.to_bytes(self.read_buffer(length))

    def readinto(self, buffer: Any) -> int:
        data = self.read_buffer(len(buffer))
        buffer[: data.size] = memory.view(data)
        return int(data.size)

    def size(self) -> int:
        return self._source.size_bytes

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._position, self._source.size_bytes)[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position
