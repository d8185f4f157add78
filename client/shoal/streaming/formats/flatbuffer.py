"""As much of FlatBuffers as it takes to find record batches: tables, their fields, and vectors of structs.

Arrow's Python package reads a whole batch to say how long it is; its metadata says it too, in a few hundred bytes. The
layout is that of https://flatbuffers.dev/internals/: a table begins with the distance back to its vtable, which has for
each field the distance forward from the table, 0 where the field has its default.

The rule: every position is checked against the buffer, so damage is a `ValueError`, never a wrong number from outside.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """A table at `position` of `data`."""

    data: memoryview
    position: int

    @classmethod
    def root(cls, data: memoryview) -> Table:
        return cls(data, _read("<I", data, 0))

    def _field(self, number: int) -> int:
        """Where field `number` lies; 0 where it has its default."""
        vtable = self.position - _read("<i", self.data, self.position)
        size = _read("<H", self.data, vtable)
        slot = 4 + 2 * number
        offset = _read("<H", self.data, vtable + slot) if slot + 2 <= size else 0
        return self.position + offset if offset else 0

    def scalar(self, number: int, layout: str) -> int:
        """A number field, `layout` as `struct` has it; 0 where it is not there."""
        position = self._field(number)
        return _read(layout, self.data, position) if position else 0

    def table(self, number: int) -> Table | None:
        position = self._field(number)
        return Table(self.data, position + _read("<I", self.data, position)) if position else None

    def structs(self, number: int, layout: str) -> Iterator[tuple[int, ...]]:
        """A vector of structs, each as `layout` has it."""
        position = self._field(number)
        if not position:
            return iter(())
        position += _read("<I", self.data, position)
        count, each = _read("<I", self.data, position), struct.Struct(layout)
        start, end = position + 4, position + 4 + count * each.size
        if not 0 <= start <= end <= len(self.data):
            raise ValueError("a vector reaches past its buffer")
        return each.iter_unpack(self.data[start:end])


def _read(layout: str, data: memoryview, position: int) -> int:
    size = struct.calcsize(layout)
    if not 0 <= position <= len(data) - size:
        raise ValueError("a position lies outside of its buffer")
    return int(struct.unpack_from(layout, data, position)[0])
