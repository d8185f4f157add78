"""An open object as Python's and fsspec's readers want it: seekable, buffered where they read in crumbs.

The rule: a large read goes straight to the reader, and only small sequential ones are read ahead, so that scattered
small reads (a Parquet footer, a column chunk) never fetch what nobody asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa
from fsspec.spec import AbstractBufferedFile

from shoal import memory
from shoal.reader import ObjectReader

if TYPE_CHECKING:
    from shoal.filesystem import ShoalFileSystem

#: Read-ahead of a file whose reads follow each other: from the first to the last, doubling.
MIN_WINDOW = 64 << 10
MAX_WINDOW = 8 << 20


class ShoalFile(AbstractBufferedFile):  # type: ignore[misc] # fsspec has no type information
    """A read-only file over one object. Like every Python file object it is not for several threads at once.

    Args:
        fs: the file system it came from.
        path: with the dataset.
        reader: of the object.
    """

    def __init__(self, fs: ShoalFileSystem, path: str, reader: ObjectReader, **kwargs: Any) -> None:
        self._reader = reader
        self._window: pa.Buffer | None = None
        self._window_start = 0
        self._last_end = 0
        self._next_window = MIN_WINDOW
        self.loc: int  # fsspec's name for the position
        self.size: int
        kwargs.update(mode="rb", size=reader.size_bytes, cache_type="none")
        super().__init__(fs, path, **kwargs)

    def read(self, length: int | None = -1) -> bytes:
        """Up to `length` bytes from the current position; all that follow for -1 or None. One copy: a bytes object."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        start, end = self._span(length)
        if end - start >= MAX_WINDOW:  # as `_buffered` decides, received without a buffer between
            self._forget_window(end)
            data = self._reader.read_bytes(start, end)
        else:
            data = memory.to_bytes(self._buffered(start, end)) if end > start else b""
        self.loc = end  # not before: a read that failed may be tried again
        return data

    def read_buffer(self, length: int | None = -1) -> pa.Buffer:
        """As `read`, as an Arrow buffer; without a copy where the bytes are mapped. Valid as long as it is held."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        start, end = self._span(length)
        buffer = self._buffered(start, end) if end > start else pa.py_buffer(b"")
        self.loc = end
        return buffer

    def readinto(self, buffer: Any) -> int:
        """Fill a writable buffer from the current position; return the bytes that came."""
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        view = memoryview(buffer).cast("B")
        end = min(self.size, self.loc + len(view))
        length = max(0, end - self.loc)
        if length < MIN_WINDOW and length:
            view[:length] = memoryview(self._buffered(self.loc, end)).cast("B")
        elif length:
            self._reader.read_into(self.loc, end, view[:length])
        self.loc += length
        return length

    readinto1 = readinto

    def _span(self, length: int | None) -> tuple[int, int]:
        """Start and end of a read of `length` bytes from the current position."""
        start = self.loc
        end = self.size if length is None or length < 0 else min(self.size, start + length)
        return start, max(start, end)

    def _forget_window(self, end: int) -> None:
        self._window, self._next_window, self._last_end = None, MIN_WINDOW, end

    def _buffered(self, start: int, end: int) -> pa.Buffer:
        """Bytes [start, end), which lie inside the object, through the window."""
        follows, self._last_end = start == self._last_end, end
        offset = start - self._window_start
        if self._window is not None and offset >= 0 and end <= self._window_start + self._window.size:
            return self._window.slice(offset, end - start)
        if end - start >= MAX_WINDOW or not follows:
            # Large, or somewhere else: just what was asked for, kept by nobody but the caller.
            self._forget_window(end)
            return self._reader.read_buffer(start, end)
        ahead = max(end, min(self.size, start + self._next_window))
        self._next_window = min(MAX_WINDOW, self._next_window * 2)
        self._window, self._window_start = self._reader.read_buffer(start, ahead), start
        return self._window.slice(0, end - start)

    def _fetch_range(self, start: int, end: int) -> bytes:
        return self._reader.read_bytes(start, end)

    def close(self) -> None:
        """Let go of the window."""
        self._window = None
        super().close()
