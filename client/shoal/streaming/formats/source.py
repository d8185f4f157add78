"""One object's bytes, as a format wants them: any range, as a buffer, and its length."""

from __future__ import annotations

from typing import Protocol

import pyarrow as pa


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
