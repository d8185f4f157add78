"""Arrow IPC files and streams: a run is a record batch.

A file's footer says where its batches are, and each batch's metadata how many rows it has
(https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format). A stream has no footer: its messages are walked
from one to the next, over the bodies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from shoal import memory
from shoal.errors import InvalidRequest, ShoalError
from shoal.streaming.formats.flatbuffer import Table
from shoal.streaming.formats.source import Extent, Source

_MAGIC = b"ARROW1"
_TAIL = 10  # the footer's length, then the magic
_BLOCK = "<qi4xq"
_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3
#: Heads of batches that are read at once, and their bytes.
_TOGETHER, _TOGETHER_BYTES = 64, 1 << 20

Several = Callable[[Sequence[tuple[int, int]]], Sequence[pa.Buffer]]


def runs(name: str, source: Source) -> list[Extent]:
    """The record batches of an IPC file or stream. Raises as `examine`."""
    return list(examine(name, source)[1])


def examine(name: str, source: Source, several: Several | None = None) -> tuple[pa.Schema, Iterator[Extent]]:
    """The schema of an IPC file or stream, and its record batches, which are found while they are asked for.

    Args:
        name: for messages.
        several: reads several ranges [start, end) of the source at once; None: one after the other.

    Raises:
        InvalidRequest: it is neither, or damaged.
        ShoalError: as the source does.
    """
    with _naming(name):
        head = _bytes(source, 0, min(len(_MAGIC), source.size_bytes))
        schema, found = _of_file(source, several) if head == _MAGIC else _of_stream(source)
    return schema, _extents(name, found)


def _extents(name: str, found: Iterator[tuple[int, int, int]]) -> Iterator[Extent]:
    with _naming(name):
        for number, extent in enumerate(found):
            yield Extent(number, *extent)


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What is wrong with an object, as an error that names it."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{name} is no Arrow IPC file or stream ({error}): leave it out of the pattern") from error


_Found = tuple[pa.Schema, Iterator[tuple[int, int, int]]]


def _of_file(source: Source, several: Several | None) -> _Found:
    size = source.size_bytes
    tail = _bytes(source, max(0, size - _TAIL), size)
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] != _MAGIC or not 0 < length <= size - _TAIL - len(_MAGIC):
        raise ValueError("its footer is missing: it was not written to its end")
    footer = source.read_buffer(size - _TAIL - length, size - _TAIL)
    # Arrow looks for the footer at the end of a file, and for its schema nowhere else.
    short = pa.BufferReader(b"".join((_MAGIC, b"\0\0", footer, tail)))

    def one_by_one(spans: Sequence[tuple[int, int]]) -> Sequence[pa.Buffer]:
        return [source.read_buffer(*span) for span in spans]

    batches = _batches_of_file(several or one_by_one, Table.root(memory.view(footer)), size)
    return _schema(lambda: pa.ipc.open_file(short).schema), batches


def _batches_of_file(several: Several, footer: Table, size: int) -> Iterator[tuple[int, int, int]]:
    for blocks in _some(footer.structs(3, _BLOCK), size):
        heads = several([(start, start + metadata_bytes) for start, metadata_bytes, _ in blocks])
        for head, (start, metadata_bytes, body_bytes) in zip(heads, blocks, strict=True):
            kind, rows, _ = _message(memory.to_bytes(head))
            if kind != _RECORD_BATCH:
                raise ValueError("its footer names something else as a record batch")
            yield rows, start, start + metadata_bytes + body_bytes


def _some(blocks: Iterator[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    """Blocks of a file of `size` bytes, as many at a time as their heads may be read."""
    some: list[tuple[int, ...]] = []
    heads_bytes = 0
    for block in blocks:
        start, metadata_bytes, body_bytes = block
        if start < 0 or metadata_bytes <= 0 or body_bytes < 0 or start + metadata_bytes + body_bytes > size:
            raise ValueError("its footer names a batch outside of it")
        if some and (len(some) == _TOGETHER or heads_bytes + metadata_bytes > _TOGETHER_BYTES):
            yield some
            some, heads_bytes = [], 0
        some.append(block)
        heads_bytes += metadata_bytes
    if some:
        yield some


def _of_stream(source: Source) -> _Found:
    messages = _messages(source)
    head, _, _ = next(messages, (b"", 0, 0))
    if not head:
        raise ValueError("it has no schema")
    return _schema(lambda: pa.ipc.read_schema(pa.py_buffer(head))), _batches_of_stream(messages)


def _batches_of_stream(messages: Iterator[tuple[bytes, int, int]]) -> Iterator[tuple[int, int, int]]:
    for head, start, end in messages:
        kind, rows, _ = _message(head)
        if kind == _RECORD_BATCH:
            yield rows, start, end


def _messages(source: Source) -> Iterator[tuple[bytes, int, int]]:
    """The messages of a stream: each with its prefix and without its body, and the bytes of both."""
    start, size = 0, source.size_bytes
    while start < size:
        head = _bytes(source, start, min(start + 8, size))
        prefix = 8 if int.from_bytes(head[:4], "little") == _CONTINUATION else 4
        length = int.from_bytes(head[prefix - 4 : prefix], "little")
        if not length:
            return  # the end of the stream
        if start + prefix + length > size:
            raise ValueError("it ends within a message")
        head = _bytes(source, start, start + prefix + length)
        body_bytes = _message(head)[2]
        end = start + prefix + length + body_bytes
        if body_bytes < 0 or end > size:
            raise ValueError("it ends within a message")
        yield head, start, end
        start = end


def _schema(read: Callable[[], pa.Schema]) -> pa.Schema:
    """What Arrow reads from memory. Raises ValueError where it refuses."""
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(str(error)) from error


def _message(data: bytes) -> tuple[int, int, int]:
    """The kind of a message with its prefix, its rows if it is a record batch, and the bytes of its body."""
    prefix = 8 if int.from_bytes(data[:4], "little") == _CONTINUATION else 4
    message = Table.root(memoryview(data)[prefix:])
    kind, header = message.scalar(1, "<B"), message.table(2)
    rows = header.scalar(0, "<q") if kind == _RECORD_BATCH and header is not None else 0
    if rows < 0:
        raise ValueError("a batch has a negative length")
    return kind, rows, message.scalar(3, "<q")


def _bytes(source: Source, start: int, end: int) -> bytes:
    return memory.to_bytes(source.read_buffer(start, end)) if end > start else b""


class Reader:
    """The batches of one object. Not for several threads at once.

    Args:
        file: of the object; what it reads it asks for by `read_buffer`, so that batches are views where that can be.
    """

    def __init__(self, name: str, file: pa.NativeFile, columns: list[str] | None) -> None:
        self._name, self._columns = name, columns
        self._is_file = file.read(len(_MAGIC)) == _MAGIC
        file.seek(0)
        self._file = file
        try:
            self._opened = pa.ipc.open_file(file) if self._is_file else pa.ipc.open_stream(file)
        except (pa.ArrowException, OSError) as error:
            raise InvalidRequest(f"{name} is no Arrow IPC file or stream ({error})") from error

    def table(self, run: Extent) -> pa.Table:
        """The rows of a run. Raises InvalidRequest where it cannot be read."""
        try:
            if self._is_file:
                batch = self._opened.get_batch(run.number)
            else:
                self._file.seek(run.start)
                batch = pa.ipc.read_record_batch(pa.ipc.read_message(self._file), self._opened.schema)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, ShoalError):
                raise
            raise InvalidRequest(f"batch {run.number} of {self._name} cannot be read: {error}") from error
        table = pa.Table.from_batches([batch])
        return table if self._columns is None else table.select(self._columns)
