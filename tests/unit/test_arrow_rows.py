"""Single rows of record batches, from their byte ranges alone: what Arrow itself gives of the same rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.streaming.formats import arrow_ipc, arrow_rows

ROWS = 50


class Data:
    """An object that is in memory."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size_bytes = data, len(data)

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        return pa.py_buffer(self.data[start:end])


def every_kind() -> pa.Table:
    n = range(ROWS)
    return pa.table(
        {
            "int": pa.array([None if i % 7 == 0 else i for i in n], pa.int32()),
            "bool": pa.array([i % 3 == 0 for i in n]),
            "string": [None if i % 5 == 0 else "x" * i for i in n],
            "large binary": pa.array([b"y" * (i * 2) for i in n], pa.large_binary()),
            "list": [[None if j == 2 else j for j in range(i % 5)] if i % 6 else None for i in n],
            "fixed list": pa.FixedSizeListArray.from_arrays(pa.array(np.arange(ROWS * 12, dtype=np.uint16)), 12),
            "struct": [{"bytes": b"q" * i, "path": str(i)} if i % 4 else None for i in n],
            "lists": [[["a"] * (i % 3)] * (i % 2) for i in n],
            "decimal": pa.array([None if i % 9 == 0 else i for i in n], pa.decimal128(20, 2)),
            "time": pa.array(n, pa.timestamp("us")),
            "binary of 3": pa.array([bytes([i]) * 3 for i in n], pa.binary(3)),
        }
    )


def file_of(table: pa.Table, rows: int, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@given(
    rows=st.integers(1, ROWS),
    edges=st.lists(st.integers(0, ROWS), min_size=2, max_size=8),
    names=st.sets(st.sampled_from(every_kind().schema.names), min_size=1),
)
def test_rows_are_what_arrow_gives(rows: int, edges: list[int], names: set[str]) -> None:
    table = every_kind().select(sorted(names))
    assert arrow_rows.is_supported(table.schema)
    data, first = file_of(table, rows), 0
    for extent in arrow_ipc.runs("file", Data(data)):  # type: ignore[arg-type]
        head = data[extent.start : extent.start + arrow_rows.HEAD_BYTES]
        found = arrow_rows.Rows(table.schema, head[: arrow_rows.head_bytes(head)], extent.end)
        found.learn([data[start:end] for start, end in found.small()])
        ends = sorted(min(edge, extent.samples) for edge in edges)
        wanted = list(zip(ends[::2], ends[1::2], strict=False))
        spans = [span for interval in wanted for span in found.spans(*interval)]
        assert all(extent.start <= start <= end <= extent.end for start, end in spans)
        got = found.table(wanted, [data[start:end] for start, end in spans])
        got.validate(full=True)
        assert got.equals(pa.concat_tables([table.slice(first + a, b - a) for a, b in wanted]))
        first += extent.samples
    assert first == ROWS


def test_compressed_batches_have_no_rows() -> None:
    table = pa.table({"tokens": np.zeros(10_000, np.int64)})
    data = file_of(table, 10_000, compression="lz4")
    (extent,) = arrow_ipc.runs("file", Data(data))  # type: ignore[arg-type]
    head = data[extent.start : extent.start + arrow_rows.HEAD_BYTES]
    assert arrow_rows.Rows(table.schema, head[: arrow_rows.head_bytes(head)], extent.end).is_compressed


@pytest.mark.parametrize(
    "kind", [pa.dictionary(pa.int32(), pa.string()), pa.map_(pa.string(), pa.int32()), pa.string_view()]
)
def test_kinds_that_are_not_supported_are_known(kind: pa.DataType) -> None:
    assert not arrow_rows.is_supported(pa.schema([("column", kind)]))
