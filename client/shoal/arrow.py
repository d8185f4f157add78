"""Arrow tables straight from cached bytes.

An IPC file or stream that lies in one shard is read from one buffer; where that is a map, the table's columns are views
of it. One of several shards is read range by range, so that a record batch inside one shard is a view all the same and
only one that crosses a border is gathered.

The rule: no payload is copied without a word. Where the file itself forces a copy (its buffers are compressed), the
reader says so.
"""

from __future__ import annotations

import bisect
import io
import itertools
import os
import warnings
from collections.abc import Sequence

import pyarrow as pa

from shoal import memory
from shoal.errors import InvalidRequest

_FILE_MAGIC = b"ARROW1"


class ArrowCopyWarning(UserWarning):
    """A table could not be views of the cached bytes: see the message for the reason and what avoids it."""


class _Joined(io.RawIOBase):
    """Buffers one after the other, as a file whose `read_buffer` copies only what lies in several of them."""

    def __init__(self, buffers: Sequence[pa.Buffer]) -> None:
        self._buffers = buffers
        self.gathered: list[pa.Buffer] = []  # kept: an address may not be given out again while views are told by it
        self._starts = [0, *itertools.accumulate(buffer.size for buffer in buffers)]
        self._position = 0

    def read_buffer(self, length: int = -1) -> pa.Buffer:
        start = self._position
        end = self._position = self._starts[-1] if length < 0 else min(self._starts[-1], start + length)
        first = bisect.bisect_right(self._starts, start) - 1
        if start >= end:
            return pa.py_buffer(b"")
        if end <= self._starts[first + 1]:
            return self._buffers[first].slice(start - self._starts[first], end - start)
        gathered = memory.allocate(end - start)
        view = memory.view(gathered)
        for begin, buffer in zip(self._starts[first:], self._buffers[first:], strict=False):
            low, high = max(start, begin), min(end, begin + buffer.size)
            if low < high:
                memory.copy(buffer.slice(low - begin, high - low), view[low - start : high - start])
        self.gathered.append(gathered)
        return gathered

    def read(self, length: int = -1) -> bytes:
        return memory.to_bytes(self.read_buffer(length))

    def has(self, column: pa.Array | pa.ChunkedArray) -> bool:
        """Whether a column's first bytes, if it has any, lie in the buffers or in what was gathered from them."""
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        bodies = (body for chunk in chunks for body in chunk.buffers() if body is not None and body.size)
        first = next(bodies, None)
        return first is None or any(_is_inside(first, whole) for whole in (*self._buffers, *self.gathered))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self._position, self._starts[-1])[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position


def read_table(name: str, buffers: Sequence[pa.Buffer], columns: Sequence[str] | None) -> pa.Table:
    """The table of an IPC file or stream.

    Args:
        name: for messages.
        buffers: the object's bytes, one buffer a shard; the columns are views of them where that can be.
        columns: those to read; None: all.

    Returns:
        A table that keeps alive what it needs; it is valid as long as it is held.

    Raises:
        InvalidRequest: the object is no Arrow IPC data, or has no such column.
    """
    joined = _Joined(buffers)
    source = pa.BufferReader(buffers[0]) if len(buffers) == 1 else pa.PythonFile(joined, mode="r")
    try:
        magic = source.read(len(_FILE_MAGIC))
        source.seek(0)
        open_reader = pa.ipc.open_file if magic == _FILE_MAGIC else pa.ipc.open_stream
        opened = open_reader(source)
        if columns is not None:
            indexes = _indexes(name, opened.schema, columns)
            # Arrow's file reader copies what it reads of some columns, so it is not asked to where there are views.
            if magic != _FILE_MAGIC or not _has_views(opened, joined):
                source.seek(0)
                opened = open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=indexes))
        table = opened.read_all()
        found = table.columns  # here, because names that are no text are refused only when they are looked at
    # OSError: what Arrow raises for a message that is cut short.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{name} is no Arrow IPC file or stream ({error}): open it as what it is") from error
    if columns is not None:
        table = table.select(list(columns))
        found = table.columns
    if not all(map(joined.has, found)):
        warnings.warn(
            f"{name}: its record batches are compressed, so this table is a decompressed copy in memory; write "
            "the file without compression to have it mapped",
            ArrowCopyWarning,
            stacklevel=3,
        )
    return table


def _indexes(name: str, schema: pa.Schema, columns: Sequence[str]) -> list[int]:
    indexes = [schema.get_field_index(column) for column in columns]
    for column, index in zip(columns, indexes, strict=True):
        if index < 0:
            raise InvalidRequest(f"{name} has no column {column!r}: it has {', '.join(schema.names[:20])}")
    return indexes


def _has_views(opened: pa.RecordBatchFileReader, joined: _Joined) -> bool:
    """Whether batches of a file are views of its bytes: whether they are not compressed."""
    return opened.num_record_batches == 0 or all(map(joined.has, opened.get_batch(0).columns))


def _is_inside(part: pa.Buffer, whole: pa.Buffer) -> bool:
    return bool(whole.address <= part.address and part.address + part.size <= whole.address + whole.size)
