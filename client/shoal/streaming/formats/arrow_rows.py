"""Single rows out of a record batch, by their byte ranges, where a batch is large and few of its rows are wanted.

    1. layout     the batch's metadata says where each column's buffers lie
    2. small      validity bits and offsets, which say where a row of a column of variable length lies
    3. rows       the wanted rows' own bytes

(https://arrow.apache.org/docs/format/Columnar.html). Each step is a list of ranges, so that those of many batches are
one request.

The rule: this only works out positions and puts arrays together; whoever calls reads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from shoal.streaming.formats.flatbuffer import Table

Span = tuple[int, int]
"""Bytes [start, end) of the object."""

_CONTINUATION = 0xFFFFFFFF
#: Bytes at a batch's head in which its metadata mostly is.
HEAD_BYTES = 4 << 10


def is_supported(schema: pa.Schema) -> bool:
    """Whether rows of every column can be found."""
    return all(map(_is_supported, schema.types))


def _is_supported(kind: pa.DataType) -> bool:
    if _is_flat(kind) or _is_binary(kind) or pa.types.is_boolean(kind):
        return True
    nested = _is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_struct(kind)
    return nested and all(_is_supported(kind.field(number).type) for number in range(kind.num_fields))


def _is_flat(kind: pa.DataType) -> bool:
    if pa.types.is_fixed_size_binary(kind) or pa.types.is_decimal(kind):
        return True
    return bool(pa.types.is_primitive(kind) and not pa.types.is_boolean(kind))


def _is_binary(kind: pa.DataType) -> bool:
    return any(
        is_kind(kind)
        for is_kind in (pa.types.is_binary, pa.types.is_string, pa.types.is_large_binary, pa.types.is_large_string)
    )


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_large(kind: pa.DataType) -> bool:
    return any(f(kind) for f in (pa.types.is_large_binary, pa.types.is_large_string, pa.types.is_large_list))


def head_bytes(head: bytes) -> int:
    """Bytes of a batch's metadata with its prefix, of which `head` has at least the first 8."""
    prefix = 8 if int.from_bytes(head[:4], "little") == _CONTINUATION else 4
    return prefix + int.from_bytes(head[prefix - 4 : prefix], "little")


@dataclass(slots=True)
class Column:
    """One column, or one level of a nested one, of a batch.

    Attributes:
        validity, offsets, data: where its buffers lie; None where it has none, or none that is needed.
    """

    kind: pa.DataType
    validity: Span | None = None
    offsets: Span | None = None
    data: Span | None = None
    children: list[Column] = field(default_factory=list)
    valid_bits: npt.NDArray[np.uint8] | None = None
    offset_values: npt.NDArray[np.int64] | None = None
    data_bits: npt.NDArray[np.uint8] | None = None

    def walk(self) -> Iterator[Column]:
        yield self
        for child in self.children:
            yield from child.walk()


class Rows:
    """The rows of one batch.

    Args:
        schema: of the object; `is_supported` says yes to it.
        head: the batch's metadata with its prefix.
        end: where the batch ends in the object.

    Attributes:
        is_compressed: rows cannot be found.

    Raises:
        ValueError: damaged.
    """

    def __init__(self, schema: pa.Schema, head: bytes, end: int) -> None:
        prefix = 8 if int.from_bytes(head[:4], "little") == _CONTINUATION else 4
        message = Table.root(memoryview(head)[prefix:])
        batch = message.table(2)
        if batch is None:
            raise ValueError("this is no record batch")
        self.is_compressed = batch.table(3) is not None
        self.schema = schema
        body_bytes = message.scalar(3, "<q")
        self._begin, self._end = end - body_bytes, end
        nodes, buffers = iter(batch.structs(1, "<qq")), iter(batch.structs(2, "<qq"))
        try:
            self.columns = [self._column(kind, nodes, buffers) for kind in schema.types]
        except StopIteration:
            raise ValueError("a batch has fewer buffers than its schema") from None

    def _column(
        self, kind: pa.DataType, nodes: Iterator[tuple[int, ...]], buffers: Iterator[tuple[int, ...]]
    ) -> Column:
        _, nulls = next(nodes)
        column = Column(kind)
        validity = self._span(next(buffers))
        column.validity = validity if nulls else None
        if _is_binary(kind) or _is_list(kind):
            column.offsets = self._span(next(buffers))
        if not kind.num_fields:
            column.data = self._span(next(buffers))
        column.children = [self._column(kind.field(n).type, nodes, buffers) for n in range(kind.num_fields)]
        return column

    def _span(self, buffer: tuple[int, ...]) -> Span:
        start, length = buffer
        if start < 0 or length < 0 or self._begin + start + length > self._end:
            raise ValueError("a batch's buffer lies outside of it")
        return self._begin + start, self._begin + start + length

    def small(self) -> list[Span]:
        """What has to be known of the batch before its rows are found; may be empty."""
        found = []
        for column in self._all():
            found += [span for span in (column.validity, column.offsets) if span is not None]
            if pa.types.is_boolean(column.kind) and column.data is not None:
                found.append(column.data)
        return found

    def learn(self, small: Sequence[bytes]) -> None:
        """Take the bytes of `small`."""
        given = iter(small)
        for column in self._all():
            if column.validity is not None:
                column.valid_bits = _bits(next(given))
            if column.offsets is not None:
                width = "<i8" if _is_large(column.kind) else "<i4"
                data = next(given)
                values = np.frombuffer(data, width, len(data) // np.dtype(width).itemsize).astype(np.int64)
                if (np.diff(values) < 0).any() or (len(values) and values[0] < 0):
                    raise ValueError("offsets of a batch go backwards")
                # An array of no rows may come without its one offset.
                column.offset_values = values if len(values) else np.zeros(1, np.int64)
            if pa.types.is_boolean(column.kind):
                column.data_bits = _bits(next(given))

    def spans(self, first: int, last: int) -> list[Span]:
        """The bytes of rows [first, last)."""
        return [span for column in self.columns for span in _spans(column, first, last)]

    def table(self, intervals: Sequence[Span], data: Sequence[bytes]) -> pa.Table:
        """The rows of all `intervals`, whose `spans` have these bytes."""
        given = iter(data)
        batches = []
        for first, last in intervals:
            arrays = [_array(column, first, last, given) for column in self.columns]
            batches.append(pa.record_batch(arrays, schema=self.schema))
        return pa.Table.from_batches(batches, self.schema)

    def _all(self) -> Iterator[Column]:
        return itertools.chain.from_iterable(column.walk() for column in self.columns)


def _bits(data: bytes) -> npt.NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")


def _below(column: Column, first: int, last: int) -> Span:
    """The rows of a column's children, or the bytes of its values, that rows [first, last) have."""
    if column.offset_values is not None:
        if last >= len(column.offset_values):
            raise ValueError("a batch has fewer offsets than rows")
        return int(column.offset_values[first]), int(column.offset_values[last])
    if pa.types.is_fixed_size_list(column.kind):
        return first * column.kind.list_size, last * column.kind.list_size
    return first, last


def _spans(column: Column, first: int, last: int) -> Iterator[Span]:
    below = _below(column, first, last)
    for child in column.children:
        yield from _spans(child, *below)
    if column.data is None or column.data_bits is not None:
        return
    start, end = column.data
    width = 1 if column.offset_values is not None else column.kind.bit_width // 8
    found = start + below[0] * width, start + below[1] * width
    if found[1] > end:
        raise ValueError("a batch's values end before its rows")
    yield found


def _array(column: Column, first: int, last: int, data: Iterator[bytes]) -> pa.Array:
    below = _below(column, first, last)
    children = [_array(child, *below, data) for child in column.children]
    buffers: list[pa.Buffer | None] = [_packed(column.valid_bits, first, last)]
    if column.offset_values is not None:
        offsets = column.offset_values[first : last + 1] - below[0]
        buffers.append(pa.py_buffer(offsets.astype("<i8" if _is_large(column.kind) else "<i4")))
    if column.data_bits is not None:
        buffers.append(_packed(column.data_bits, first, last))
    elif column.data is not None:
        buffers.append(pa.py_buffer(next(data)))
    return pa.Array.from_buffers(column.kind, last - first, buffers, children=children or None)


def _packed(bits: npt.NDArray[np.uint8] | None, first: int, last: int) -> pa.Buffer | None:
    if bits is None:
        return None
    if last > len(bits):
        raise ValueError("a batch has fewer bits than rows")
    return pa.py_buffer(np.packbits(bits[first:last], bitorder="little"))
