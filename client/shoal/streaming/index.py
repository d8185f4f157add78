"""The index of a selection: how many samples each object has, and in which runs they lie. An Arrow file of its own.

Built once per selection in the cluster (docs/streaming.md) from footers and heads, and shared as the snapshot is. That
of single objects needs no reading at all: the snapshot lists them.

The rule: equal selections have equal indexes, byte for byte, whoever built them; so the order that follows from one is
the same for every rank and for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from shoal.errors import InvalidRequest, ShardCorrupt
from shoal.shards import PART_SIZE
from shoal.snapshot import Snapshot
from shoal.streaming.formats.source import Extent
from shoal.streaming.selection import Selection

FORMAT = "1"
Numbers = npt.NDArray[np.int64]

_FIELDS = ("row", "number", "samples", "start", "end")
_SCHEMA = pa.schema([(name, pa.int64()) for name in _FIELDS])


class Index:
    """The runs of a selection, in the order of their objects. The arrays are read-only and share their length.

    Attributes:
        rows: of the object that a run lies in, ascending.
        numbers: of the run in its object (record batch, row group).
        samples: in the run, at least 1.
        starts, ends: the bytes of the object that hold the run.
        schema: the Arrow schema of every object, serialised; b"" where the format has none.
        digest: of all of it, 32 hex digits.
    """

    def __init__(self, columns: Sequence[Numbers], schema: bytes) -> None:
        for column in columns:
            column.setflags(write=False)
        self.rows, self.numbers, self.samples, self.starts, self.ends = columns
        self.schema = schema
        hasher = xxhash.xxh3_128(FORMAT.encode() + schema)
        for column in columns:
            hasher.update(np.ascontiguousarray(column, "<i8").data)
        self.digest = hasher.hexdigest()

    def __len__(self) -> int:
        """Runs."""
        return len(self.rows)

    @property
    def sample_count(self) -> int:
        return int(self.samples.sum())

    @property
    def run_bytes(self) -> int:
        """Bytes of all runs."""
        return int((self.ends - self.starts).sum())

    def segments(self, parts: int) -> Numbers:
        """The segment that each run belongs to: of an object's runs those that begin in the same so many parts of it.

        A part is what one fetch from the origin brings in: so a segment needs few bytes that are not its own.
        """
        places = self.starts // (parts * PART_SIZE)
        is_first = np.ones(len(self), np.bool_)
        is_first[1:] = (np.diff(self.rows) != 0) | (np.diff(places) != 0)
        return np.cumsum(is_first) - 1

    @classmethod
    def of_runs(cls, rows: Iterable[int], runs: Iterable[Iterable[Extent]], schema: bytes = b"") -> Index:
        """The index of objects whose runs are known; runs without samples are left out."""
        numbers = (  # one by one: as lists they would take several times the room
            number
            for row, extents in zip(rows, runs, strict=True)
            for extent in extents
            if extent.samples
            for number in (row, extent.number, extent.samples, extent.start, extent.end)
        )
        columns = np.fromiter(numbers, np.int64).reshape(-1, len(_FIELDS)).T
        return cls([column.copy() for column in columns], schema)

    @classmethod
    def joined(cls, parts: Sequence[Index], schema: bytes = b"") -> Index:
        """The index of the objects of all `parts`, which are in the order of their objects; at least one."""
        columns = ((part.rows, part.numbers, part.samples, part.starts, part.ends) for part in parts)
        return cls([np.concatenate(column) for column in zip(*columns, strict=True)], schema)

    @classmethod
    def of_objects(cls, snapshot: Snapshot, rows: Numbers) -> Index:
        """The index of objects that are a sample each."""
        sizes = np.fromiter(map(snapshot.size, rows.tolist()), np.int64, len(rows))
        zeros = np.zeros(len(rows), np.int64)
        return cls([rows.astype(np.int64), zeros, np.ones(len(rows), np.int64), zeros.copy(), sizes], b"")

    def to_buffer(self, selection: Selection) -> pa.Buffer:
        """The index as an Arrow IPC file; its metadata says of which selection."""
        metadata = {"shoal.format": FORMAT, "shoal.selection": selection.key, "shoal.digest": self.digest}
        sink = pa.BufferOutputStream()
        columns = [self.rows, self.numbers, self.samples, self.starts, self.ends]
        schema = _SCHEMA.with_metadata({**metadata, "shoal.schema": self.schema})
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch([pa.array(column) for column in columns], schema=schema))
        return sink.getvalue()

    @classmethod
    def from_buffer(cls, buffer: pa.Buffer, selection: Selection) -> Index:
        """Read what `to_buffer` wrote.

        Raises:
            ShardCorrupt: it is no index, a damaged one, or that of another selection.
        """
        try:
            with pa.ipc.open_file(buffer) as reader:
                metadata = reader.schema.metadata or {}
                if metadata.get(b"shoal.format") != FORMAT.encode() or reader.num_record_batches != 1:
                    raise ValueError("another version of Shoal wrote it")
                batch = reader.get_batch(0)
                columns = [batch[name].to_numpy(zero_copy_only=True).astype(np.int64) for name in _FIELDS]
                index = cls(columns, metadata[b"shoal.schema"])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise ShardCorrupt(f"this is no index of samples ({error}): ask another node") from error
        if metadata.get(b"shoal.digest") != index.digest.encode():
            raise ShardCorrupt("an index of samples does not match its digest: ask another node")
        if metadata.get(b"shoal.selection") != selection.key.encode():
            raise ShardCorrupt("an index of samples is that of another selection: ask another node")
        return index


def check_schema(first: str, schema: pa.Schema, name: str, other: pa.Schema) -> None:
    """Refuse an object whose columns are not those of the first one.

    Args:
        first, name: the objects, for the message.

    Raises:
        InvalidRequest: they differ.
    """
    if schema.equals(other):
        return
    ours, theirs = ({f"{field.name}: {field.type}" for field in each} for each in (schema, other))
    difference = ", ".join(sorted(ours ^ theirs)[:6]) or "the order of their columns"
    raise InvalidRequest(
        f"{first} and {name} have different columns ({difference}): stream them apart, or give them one schema"
    )
