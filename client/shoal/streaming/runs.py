"""Runs read: the bytes of one or many from the cluster, as Arrow record batches, a row a sample.

    whole      in one range; its batch is views of what was read: of the mapped shard where that lies on this node
    rows       of a large record batch that mostly other ranks read, only the rows that are wanted, by their ranges
    together   many small runs (whole objects, samples of tars) in one request an owner

The rule: what is read is what is wanted, in as few requests as that takes. Only what the format itself packs (Parquet,
compressed Arrow) is decoded into new memory.
"""

from __future__ import annotations

import contextlib
import itertools
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from shoal.errors import InvalidRequest, ShoalError
from shoal.ranges import Range
from shoal.reader import ObjectReader
from shoal.snapshot import Snapshot
from shoal.streaming.formats import arrow_ipc, arrow_rows, parquet, tar
from shoal.streaming.formats.format import Format
from shoal.streaming.formats.source import Extent, SourceFile
from shoal.streaming.index import Index
from shoal.streaming.plan import Reads
from shoal.streaming.waits import Trace

#: Objects whose footers, or whose batches' layouts, are kept.
OBJECTS_KEPT = 4096
#: Objects whose readers are kept, at some 300 bytes each.
READERS_KEPT = 1 << 16
#: Runs of at least so many bytes are not read whole for a few rows; a smaller one costs hardly more than those.
ROWS_FROM = 1 << 20
#: Columns of a stream of whole objects.
PATH, BYTES = "path", "bytes"


#: Samples, a row each. One record batch where it can be: a slice of it costs half of a table's.
Rows: TypeAlias = pa.Table | pa.RecordBatch


class Want(NamedTuple):
    """What a step needs of one run: all of it, or the rows at `places`, ascending.

    A tuple, because it is the key of what is loaded, and a sample costs several look-ups.
    """

    run: int
    places: tuple[int, ...] | None


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """What was wanted.

    Attributes:
        table: the samples, a row each.
        held_bytes: memory of this process that it takes; 0 where it is a map.
    """

    table: Rows
    held_bytes: int


class Runs:
    """Reads runs. Threads may share it.

    Args:
        read_ranges: many small ranges at once (`ShoalFileSystem.read_ranges`).
        columns: None: all.
    """

    def __init__(
        self,
        format: Format,
        index: Index,
        snapshot: Snapshot,
        open_object: Callable[[int], ObjectReader],
        read_ranges: Callable[[Sequence[Range]], list[bytes | ShoalError]],
        columns: list[str] | None,
    ) -> None:
        self.format = format
        self._index, self._snapshot, self._columns = index, snapshot, columns
        self._open_object, self._read_ranges = open_object, read_ranges
        self._schema = pa.ipc.read_schema(pa.py_buffer(index.schema)) if index.schema else None
        self._has_dictionaries = self._schema is not None and any(map(_is_dictionary, self._schema.types))
        if columns is not None:
            self._check_columns(columns)
        self._objects: OrderedDict[int, ObjectReader] = OrderedDict()
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._layouts: OrderedDict[int, arrow_rows.Rows | None] = OrderedDict()
        self._lock = threading.Lock()  # guards _objects, _footers, _layouts
        self._can_rows = (
            format is Format.ARROW
            and self._schema is not None
            and not self._has_dictionaries
            and arrow_rows.is_supported(self._schema)
        )

    def _check_columns(self, columns: list[str]) -> None:
        if self.format is Format.OBJECTS:
            known = [PATH, BYTES]
        elif self._schema is not None:
            known = self._schema.names
        else:
            return
        missing = [column for column in columns if column not in known]
        if missing:
            raise InvalidRequest(f"there is no column {missing[0]!r}: there are {', '.join(known[:20])}")

    def wants(self, reads: Reads) -> list[Want]:
        """What has to be loaded for a step: whole runs, or the rows of large ones that mostly other ranks read."""
        if not self._can_rows or reads.whole.all():
            return [Want(run, None) for run in dict.fromkeys(reads.runs.tolist())]
        places: dict[int, list[int]] = {}
        whole: set[int] = set()
        for run, place, is_whole in zip(reads.runs.tolist(), reads.places.tolist(), reads.whole.tolist(), strict=True):
            places.setdefault(run, []).append(place)
            if is_whole:
                whole.add(run)
        return [
            Want(run, None if run in whole or not self._has_rows(run) else tuple(sorted(set(wanted))))
            for run, wanted in places.items()
        ]

    def _has_rows(self, run: int) -> bool:
        """Whether rows of a run are better read by themselves, unless it is known that they cannot be."""
        return self._can_rows and self._run_bytes(run) >= ROWS_FROM and self._layouts.get(run, self) is not None

    def bytes_of(self, want: Want) -> int:
        """Bytes that hold it, before it is loaded; of rows an estimate."""
        if want.places is None:
            return self._run_bytes(want.run)
        return self._run_bytes(want.run) * len(want.places) // int(self._index.samples[want.run])

    def is_shared(self, want: Want) -> bool:
        """Whether other steps of the epoch may need it."""
        return want.places is None and int(self._index.samples[want.run]) > 1

    def is_batched(self, want: Want) -> bool:
        """Whether it had better be loaded together with others."""
        return want.places is not None or self.format in (Format.OBJECTS, Format.TAR)

    def load(self, wants: Sequence[Want], trace: Trace) -> list[Loaded]:
        """Load them, in order.

        Raises:
            InvalidRequest: one cannot be decoded.
            ShoalError: as reads do.
        """
        if self.format in (Format.OBJECTS, Format.TAR):
            return self._read_together([want.run for want in wants], trace)
        rows = [want for want in wants if want.places is not None]
        found = iter(self._load_rows(rows, trace) if rows else ())
        return [self._load(want.run, trace) if want.places is None else next(found) for want in wants]

    def _run_bytes(self, run: int) -> int:
        return int(self._index.ends[run] - self._index.starts[run])

    def _load_rows(self, wants: Sequence[Want], trace: Trace) -> list[Loaded]:
        layouts = self._layouts_of([want.run for want in wants], trace)
        intervals = [_intervals(want.places or ()) for want in wants]
        spans: list[tuple[int, int, int]] = []
        counts = []
        for want, each in zip(wants, intervals, strict=True):
            layout = layouts[want.run]
            found = [span for first, last in each for span in layout.spans(first, last)] if layout is not None else []
            spans += [(want.run, *span) for span in found]
            counts.append(len(found))
        data = iter(self._read_spans(spans))
        loaded = []
        for want, each, count in zip(wants, intervals, counts, strict=True):
            layout = layouts[want.run]
            if layout is None:  # compressed: there are no rows but by way of the whole
                table = self._load(want.run, trace).table.take(pa.array(want.places, pa.int64()))
            else:
                with trace.decoding():
                    table = layout.table(each, list(itertools.islice(data, count)))
                    table = table if self._columns is None else table.select(self._columns)
            loaded.append(Loaded(table, table.nbytes))
        return loaded

    def _layouts_of(self, runs: Sequence[int], trace: Trace) -> dict[int, arrow_rows.Rows | None]:
        """Where the rows of runs lie; None where they cannot be found."""
        known = {run: self._layouts[run] for run in runs if run in self._layouts}
        new = [run for run in dict.fromkeys(runs) if run not in known]
        if not new:
            return known
        starts, ends = self._index.starts, self._index.ends
        first = [(run, int(starts[run]), min(int(ends[run]), int(starts[run]) + arrow_rows.HEAD_BYTES)) for run in new]
        heads = dict(zip(new, self._read_spans(first), strict=True))
        lengths = {run: arrow_rows.head_bytes(head) for run, head in heads.items()}
        longer = [
            (run, int(starts[run]), int(starts[run]) + lengths[run]) for run in new if lengths[run] > len(heads[run])
        ]
        heads.update(zip((run for run, _, _ in longer), self._read_spans(longer), strict=True))
        made: dict[int, arrow_rows.Rows | None] = {}
        for run in new:
            with trace.decoding(), self._naming(run):
                rows = arrow_rows.Rows(self._schema, heads[run][: lengths[run]], int(ends[run]))
            small_bytes = sum(end - start for start, end in rows.small())
            made[run] = None if rows.is_compressed or small_bytes > self._run_bytes(run) // 4 else rows
        small = [(run, *span) for run, layout in made.items() if layout is not None for span in layout.small()]
        data = iter(self._read_spans(small))
        for run, layout in made.items():
            if layout is not None:
                with trace.decoding(), self._naming(run):
                    layout.learn(list(itertools.islice(data, len(layout.small()))))
        with self._lock:
            self._layouts.update(made)
            while len(self._layouts) > OBJECTS_KEPT:
                self._layouts.popitem(last=False)
        return known | made

    def _read_spans(self, spans: Sequence[tuple[int, int, int]]) -> list[bytes]:
        """Bytes [start, end) of the objects of runs."""
        wanted = [
            Range(self._object(int(self._index.rows[run])), start, end) for run, start, end in spans if end > start
        ]
        found = iter(self._read_ranges(wanted) if wanted else ())
        data = [next(found) if end > start else b"" for _, start, end in spans]
        for each in data:
            if isinstance(each, Exception):
                raise each
        return data  # type: ignore[return-value] # no exception is left

    @contextlib.contextmanager
    def _naming(self, run: int) -> Iterator[None]:
        """Damage that a format finds, as an error that names the object."""
        try:
            yield
        except ValueError as error:
            if isinstance(error, InvalidRequest):
                raise
            name = self._snapshot.path(int(self._index.rows[run]))
            raise InvalidRequest(f"batch {int(self._index.numbers[run])} of {name} cannot be read: {error}") from error

    def _load(self, run: int, trace: Trace) -> Loaded:
        row = int(self._index.rows[run])
        reader, name = self._object(row), self._snapshot.path(row)
        extent = self._extent(run)
        if self.format is Format.PARQUET or self._has_dictionaries:
            table = self._from_file(row, reader, name, extent)
            held_bytes = table.nbytes
        else:
            data = reader.read_buffer(extent.start, extent.end)
            with trace.decoding():
                table = self._batch(name, data, extent)
            held_bytes = _held_bytes(table, data, is_mapped=_is_mapped(reader, extent))
        if len(table) != extent.samples:
            raise InvalidRequest(
                f"run {extent.number} of {name} has {len(table)} samples, its index {extent.samples}: it is not what "
                "was indexed"
            )
        return Loaded(table, held_bytes)

    def _batch(self, name: str, data: pa.Buffer, extent: Extent) -> Rows:
        try:
            batch = pa.ipc.read_record_batch(pa.ipc.read_message(data), self._schema)
        except (pa.ArrowException, OSError) as error:
            raise InvalidRequest(f"batch {extent.number} of {name} cannot be read: {error}") from error
        return batch if self._columns is None else batch.select(self._columns)

    def _from_file(self, row: int, reader: ObjectReader, name: str, extent: Extent) -> pa.Table:
        """What its own reader must find in the object: row groups, and batches whose dictionaries lie elsewhere."""
        file = pa.PythonFile(SourceFile(reader), mode="r")
        if self.format is Format.ARROW:
            return arrow_ipc.Reader(name, file, self._columns).table(extent)
        footer = self._footers.get(row)
        if footer is None:
            footer = parquet.footer(name, file)
            with self._lock:
                self._footers[row] = footer
                while len(self._footers) > OBJECTS_KEPT:
                    self._footers.popitem(last=False)
        return parquet.Reader(name, file, self._columns, footer).table(extent)

    def _read_together(self, runs: Sequence[int], trace: Trace) -> list[Loaded]:
        """Runs of many small samples' bytes: whole objects, and stretches of tars."""
        starts, ends = self._index.starts, self._index.ends
        data = self._read_spans([(run, int(starts[run]), int(ends[run])) for run in runs])
        names = [self._snapshot.path(row) for row in self._index.rows[np.asarray(runs)].tolist()]
        with trace.decoding():
            if self.format is Format.OBJECTS:
                table = _objects(names, data)
                table = table if self._columns is None else table.select(self._columns)
                return [Loaded(table.slice(place, 1), len(each)) for place, each in enumerate(data)]
            return [
                Loaded(tar.table(name, pa.py_buffer(each), self._extent(run), self._columns), len(each))
                for name, run, each in zip(names, runs, data, strict=True)
            ]

    def _extent(self, run: int) -> Extent:
        columns = (self._index.numbers, self._index.samples, self._index.starts, self._index.ends)
        return Extent(*(int(column[run]) for column in columns))

    def _object(self, row: int) -> ObjectReader:
        reader = self._objects.get(row)
        if reader is None:
            reader = self._open_object(row)
            with self._lock:
                self._objects[row] = reader
                while len(self._objects) > READERS_KEPT:
                    self._objects.popitem(last=False)
        return reader


def _objects(names: Sequence[str], data: Sequence[bytes]) -> pa.Table:
    """Whole objects, a row each: nothing copied, and each row keeps only its own bytes alive."""
    kind = pa.large_binary()
    chunks = [
        pa.Array.from_buffers(kind, 1, [None, pa.py_buffer(struct.pack("=qq", 0, len(each))), pa.py_buffer(each)])
        for each in data
    ]
    return pa.table({PATH: pa.array(names, pa.string()), BYTES: pa.chunked_array(chunks, kind)})


def _intervals(places: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending places as intervals [first, last) of neighbours."""
    found: list[tuple[int, int]] = []
    for place in places:
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def _is_dictionary(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return True
    return any(_is_dictionary(kind.field(number).type) for number in range(kind.num_fields))


def _is_mapped(reader: ObjectReader, extent: Extent) -> bool:
    pieces = reader.pieces(extent.start, extent.end)
    return len(pieces) == 1 and reader.mapped(pieces[0]) is not None


def _held_bytes(table: Rows, data: pa.Buffer, *, is_mapped: bool) -> int:
    """Memory that a run's table takes: what was read, where its columns are views of that, and what was decoded."""
    batches = table.to_batches() if isinstance(table, pa.Table) else [table]
    bodies = (body for batch in batches for column in batch.columns for body in column.buffers() if body)
    is_view = any(data.address <= body.address < data.address + data.size for body in bodies)
    if is_view:
        return 0 if is_mapped else data.size
    return int(table.nbytes)
