"""What the objects of a soak contain: a function of (path, version), so that nobody needs a copy to compare with.

One sequence of random bytes, as long as a prime, is laid end to end; an object begins somewhere in it. So a byte can be
told for any place of any object without making what is before it, two versions differ from their first byte on, and a
piece that lies at the wrong offset (by parts, shards, windows) is found, because no such distance is a multiple of the
prime.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import xxhash

_PERIOD = 4_194_301
#: Bytes that are compared in one go.
_STRIDE = 1 << 20

KIB, MIB = 1 << 10, 1 << 20
#: Of each dataset: around a part (8 MiB), around a shard (12 MiB), several shards, and small ones.
SIZES = (
    *(0, 1, 777, 4 * KIB, 100_003, MIB, 3 * MIB + 1),
    *(8 * MIB - 1, 8 * MIB, 8 * MIB + 1, 12 * MIB, 12 * MIB + 5, 20_000_003, 27 * MIB),
)
SHARD_SIZE = 12 * MIB
TABLES = 3
_TABLE_ROWS, _BATCH_ROWS = 500_000, 100_000


@functools.cache
def _sequence() -> memoryview:
    sequence = np.random.Generator(np.random.PCG64(20_240_101)).bytes(_PERIOD)
    return memoryview(sequence + sequence[: _STRIDE + 8])


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of one version of one object."""

    path: str
    version: int

    @property
    def _phase(self) -> int:
        return xxhash.xxh3_64_intdigest(f"{self.path}\0{self.version}".encode()) % _PERIOD

    def first_difference(self, data: memoryview, start: int) -> int | None:
        """Where `data`, which was read from byte `start` on, is wrong first; None where it is right."""
        sequence, place = _sequence(), self._phase + start
        for offset in range(0, len(data), _STRIDE):
            piece = data[offset : offset + _STRIDE]
            first = (place + offset) % _PERIOD
            if piece != sequence[first : first + len(piece)]:
                wrong = np.frombuffer(piece, np.uint8) != np.frombuffer(sequence, np.uint8)[first : first + len(piece)]
                return start + offset + int(np.argmax(wrong))
        return None

    def make(self, size_bytes: int) -> bytes:
        """The whole object."""
        sequence, data = bytes(_sequence()[:_PERIOD]), bytearray()
        phase = self._phase
        while len(data) < size_bytes:
            data += sequence[phase:]
            phase = 0
        return bytes(data[:size_bytes])

    def table(self) -> pa.Table:
        """What an object that is a table holds: one column of 64-bit numbers, in several batches."""
        numbers = np.frombuffer(self.make(8 * _TABLE_ROWS), np.int64)
        batches = [
            pa.record_batch({"x": numbers[first : first + _BATCH_ROWS]}) for first in range(0, _TABLE_ROWS, _BATCH_ROWS)
        ]
        return pa.Table.from_batches(batches)

    def is_table(self, table: pa.Table) -> bool:
        """Whether `table` is what `table` gives."""
        if table.num_rows != _TABLE_ROWS or table.column_names != ["x"]:
            return False
        position = 0
        for chunk in table.column("x").chunks:
            values = memoryview(chunk.to_numpy()).cast("B")
            if self.first_difference(values, position) is not None:
                return False
            position += len(values)
        return True

    def make_table(self) -> bytes:
        """The whole object, where it is a table."""
        table, sink = self.table(), pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())


def objects(name: str) -> dict[str, int | None]:
    """The objects of dataset `name` by path: their bytes, or None for a table."""
    return {
        **{f"{name}/{number:02}-{size}.bin": size for number, size in enumerate(SIZES)},
        **{f"{name}/table-{number}.arrow": None for number in range(TABLES)},
    }


def make(path: str, version: int, size_bytes: int | None) -> bytes:
    """What is written to the origin."""
    content = Content(path, version)
    return content.make_table() if size_bytes is None else content.make(size_bytes)
