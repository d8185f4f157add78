"""Formats: what indexing finds is what a reader of the whole file finds, from few bytes; damage is named."""

from __future__ import annotations

import io
import itertools
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.streaming.formats import arrow_ipc, parquet, tar


class Bytes:
    """A source over bytes that counts what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.read_bytes = data, 0

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        self.read_bytes += min(end, len(self.data)) - start
        return pa.py_buffer(self.data[start:end])


def batches(lengths: list[int], width: int = 1) -> list[pa.RecordBatch]:
    rng = np.random.default_rng(3)
    return [
        pa.record_batch(
            {f"c{i}": rng.integers(0, 99, n) for i in range(width)}
            | {"s": pa.array([str(k) for k in range(n)], pa.string())}
        )
        for n in lengths
    ]


def ipc(lengths: list[int], *, is_file: bool, width: int = 1, compression: str | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    found = batches(lengths, width) or batches([0], width)
    make = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with make(sink, found[0].schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        for batch in found if lengths else []:
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 3000), max_size=6),
    st.booleans(),
    st.integers(1, 40),
    st.sampled_from([None, "lz4", "zstd"]),
)
def test_arrow_batches_are_found_and_read(
    lengths: list[int], is_file: bool, width: int, compression: str | None
) -> None:
    data = ipc(lengths, is_file=is_file, width=width, compression=compression)
    found = arrow_ipc.runs("o", Bytes(data))
    assert [run.samples for run in found] == lengths
    assert all(a.end <= b.start for a, b in itertools.pairwise(found))
    reader = arrow_ipc.Reader("o", pa.BufferReader(data), None)
    for run, batch in zip(found, batches(lengths, width), strict=True):
        assert reader.table(run).equals(pa.Table.from_batches([batch]))


@pytest.mark.parametrize("is_file", [True, False])
def test_arrow_indexing_reads_no_payload(is_file: bool) -> None:
    source = Bytes(ipc([200_000] * 8, is_file=is_file))
    arrow_ipc.runs("o", source)
    assert source.read_bytes < 64 << 10 < len(source.data) // 100


def test_arrow_dictionaries_are_no_runs() -> None:
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"d": pa.array(["a", "b", "a"]).dictionary_encode()})
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
        writer.write_batch(batch)
    data = sink.getvalue().to_pybytes()
    found = arrow_ipc.runs("o", Bytes(data))
    assert [run.samples for run in found] == [3, 3]
    reader = arrow_ipc.Reader("o", pa.BufferReader(data), ["d"])
    assert reader.table(found[1]).column("d").to_pylist() == ["a", "b", "a"]


@settings(deadline=None)
@given(st.booleans(), st.data())
def test_damaged_arrow_is_refused_or_read_within_its_bytes(is_file: bool, data: st.DataObject) -> None:
    """A changed byte or a cut may name other extents, never any outside; the one error names the file."""
    whole = bytearray(ipc([50, 70], is_file=is_file))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = arrow_ipc.runs("the-file", Bytes(cut))
    except InvalidRequest as error:
        assert "the-file" in str(error)
    else:
        assert all(0 <= run.start < run.end <= len(cut) and run.samples >= 0 for run in found)


def test_parquet_row_groups_are_found_and_read() -> None:
    sink = pa.BufferOutputStream()
    rows = pa.table({"x": range(1000), "y": [str(i % 3) for i in range(1000)]})
    pq.write_table(rows, sink, row_group_size=300)
    data = sink.getvalue()
    found = parquet.runs("o", pa.BufferReader(data))
    assert [run.samples for run in found] == [300, 300, 300, 100]
    assert all(0 < a.start < a.end <= b.start for a, b in itertools.pairwise(found))
    reader = parquet.Reader("o", pa.BufferReader(data), ["y"])
    assert reader.table(found[3]).to_pydict() == rows.slice(900).select(["y"]).to_pydict()
    with pytest.raises(InvalidRequest, match="o is no Parquet file"):
        parquet.runs("o", pa.BufferReader(b"PAR1"))


def archive(samples: dict[str, dict[str, bytes]], kind: int = tarfile.GNU_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as opened:
        opened.addfile(_directory())
        for key, parts in samples.items():
            for suffix, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                opened.addfile(info, io.BytesIO(data))
    return file.getvalue()


def _directory() -> tarfile.TarInfo:
    info = tarfile.TarInfo("a-directory")
    info.type = tarfile.DIRTYPE
    return info


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("run_bytes", [1, 5000, 1 << 20])
def test_tar_samples_are_found_and_read(kind: int, run_bytes: int) -> None:
    long = "deep/" * 30 if kind != tarfile.USTAR_FORMAT else "deep/"
    samples = {
        f"{long}{i:04}": {
            "jpg": bytes([i % 251]) * (i * 37 % 3000),
            "seg.png": b"%d" % i,
            **({"cls": b"7"} if i % 3 else {}),
        }
        for i in range(40)
    }
    data = archive(samples, kind)
    found = tar.runs("o", io.BytesIO(data), run_bytes)
    assert sum(run.samples for run in found) == 40
    rows = []
    for run in found:
        part = pa.py_buffer(data[run.start : run.end])
        rows += tar.table("o", part, run, ["__key__", "jpg", "seg.png", "cls"]).to_pylist()
    assert rows == [{"__key__": key, "cls": None, **parts} for key, parts in samples.items()]


def test_compressed_tar_is_refused_with_the_remedy() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as opened:
        opened.addfile(tarfile.TarInfo("a.txt"))
    with pytest.raises(InvalidRequest, match=r"o cannot be read as a tar .* unpacked"):
        tar.runs("o", io.BytesIO(file.getvalue()))
