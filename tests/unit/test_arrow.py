"""Arrow tables from cached bytes: the right values, and views wherever the bytes are mapped."""

from __future__ import annotations

import gc
import io
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import arrow
from shoal.arrow import ArrowCopyWarning
from shoal.errors import InvalidRequest, NotFound
from shoal.filesystem import ShoalFileSystem
from tests.support.minicluster import MiniCluster

ROWS, BATCH = 4_000, 100
SHARD_SIZE = 16 << 10


def make_table() -> pa.Table:
    random = np.random.default_rng(5)
    text = [f"row {i} of the table" if i % 7 else None for i in range(ROWS)]
    return pa.table(
        {
            "id": pa.array(np.arange(ROWS)),
            "x": pa.array(random.random(ROWS)),
            "text": pa.array(text),
            "kind": pa.array([f"kind {i % 5}" for i in range(ROWS)]).dictionary_encode(),
            "nothing": pa.nulls(ROWS),
            "unknown": pa.array([None] * ROWS, pa.float64()),
            "flag": pa.array(random.random(ROWS) < 0.5),
            "list": pa.array([[i, None, i + 1][: i % 4] for i in range(ROWS)]),
            "nested": pa.array([{"a": i, "b": str(i)} if i % 3 else None for i in range(ROWS)]),
        }
    )


TABLE = make_table()
KINDS = ("file", "stream")


def ipc(table: pa.Table, kind: str, *, batch_rows: int = BATCH, compression: str | None = None) -> bytes:
    out = io.BytesIO()
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return out.getvalue()


def parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pa.parquet.write_table(table, out, row_group_size=1_000)
    return out.getvalue()


NUMBERS = pa.table({"n": pa.array(np.arange(6_000))})  # 48 kB, which compress
OBJECTS = {
    **{f"table.{kind}": ipc(TABLE, kind) for kind in KINDS},
    **{f"{c}.{kind}": ipc(TABLE, kind, compression=c) for kind in KINDS for c in ("lz4", "zstd")},
    **{f"no-batch.{kind}": ipc(TABLE.slice(0, 0), kind) for kind in KINDS},
    **{f"one-batch.{kind}": ipc(NUMBERS, kind, batch_rows=ROWS * 2) for kind in KINDS},
    **{f"one-batch-lz4.{kind}": ipc(NUMBERS, kind, batch_rows=ROWS * 2, compression="lz4") for kind in KINDS},
    "no-columns.file": ipc(pa.table({}), "file"),
    "part/0.arrow": ipc(TABLE.slice(0, 1_500).select(["id", "x", "text"]), "file"),
    "part/1.arrow": ipc(TABLE.slice(1_500).select(["id", "x", "text"]), "file"),
    "parquet/0.parquet": parquet(TABLE.slice(0, 1_500).select(["id", "x", "text"])),
    "parquet/1.parquet": parquet(TABLE.slice(1_500).select(["id", "x", "text"])),
    "bad/text": b"hello world, this is no table\n" * 100,
    "bad/empty": b"",
    "bad/jpeg": b"\xff\xd8\xff\xe0" + bytes(500),
    "bad/magic": b"ARROW1",
    "bad/parquet": parquet(NUMBERS),
    "bad/cut.file": ipc(TABLE, "file")[:-100],
    "bad/cut.stream": ipc(TABLE, "stream")[:-2_000],
}


class WholeReads:
    """`MiniCluster`'s origin hands out crumbs; tables are larger than what that is good for."""

    @staticmethod
    def stream(cluster: MiniCluster) -> Callable[..., None]:
        def stream(path: str, version: str, start: int, end: int, sink: Callable[[memoryview], None]) -> None:
            sink(memoryview(cluster.origin.read(path, version, start, end)))

        return stream


@pytest.fixture(scope="module", params=[1 << 20, SHARD_SIZE], ids=["one-shard", "many-shards"])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    """A node that holds everything, sealed."""
    directory = tmp_path_factory.mktemp("c")
    with MiniCluster(directory, OBJECTS, part_size=4096, shard_size=request.param) as cluster:
        cluster.origin.stream = WholeReads.stream(cluster)  # type: ignore[method-assign]
        reader = cluster.filesystem()
        for path in OBJECTS:
            reader.cat_file(f"set/{path}")
        cluster.run(cluster.nodes[0].fills.settle())
        yield cluster


@pytest.fixture
def is_one_shard(cluster: MiniCluster) -> bool:
    return cluster.snapshot.shard_size > SHARD_SIZE


@pytest.fixture(params=[True, False], ids=["local", "network"])
def fs(cluster: MiniCluster, request: pytest.FixtureRequest) -> ShoalFileSystem:
    return cluster.filesystem(local=request.param)


@pytest.fixture
def local(cluster: MiniCluster) -> ShoalFileSystem:
    return cluster.filesystem(local=True)


@pytest.fixture(autouse=True)
def no_silent_warning() -> Iterator[None]:
    """A warning that a test does not expect is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArrowCopyWarning)
        yield


def bodies(column: pa.ChunkedArray) -> list[pa.Buffer]:
    """The buffers behind a column, its dictionaries aside."""
    return [buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None and buffer.size]


def is_view(body: pa.Buffer, maps: list[pa.Buffer]) -> bool:
    return any(m.address <= body.address and body.address + body.size <= m.address + m.size for m in maps)


# Values


@pytest.mark.parametrize("kind", KINDS)
def test_table_is_the_original(fs: ShoalFileSystem, kind: str) -> None:
    found = fs.read_arrow(f"set/table.{kind}")
    found.validate(full=True)
    assert found.equals(TABLE, check_metadata=True)
    assert found.column("id").num_chunks == ROWS // BATCH


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_those_asked_for_in_that_order(fs: ShoalFileSystem, kind: str) -> None:
    for columns in (["x"], ["text", "id"], ["kind"], ["nothing", "nested"], ["x", "x"], TABLE.column_names[::-1]):
        assert fs.read_arrow(f"set/table.{kind}", columns=columns).equals(TABLE.select(columns))
    nothing = fs.read_arrow(f"set/table.{kind}", columns=[])
    assert (nothing.num_columns, nothing.num_rows) == (0, ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_column_is_named(fs: ShoalFileSystem, kind: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"set/table\.{kind} has no column 'y': it has id, x, text"):
        fs.read_arrow(f"set/table.{kind}", columns=["x", "y"])


@pytest.mark.parametrize("kind", KINDS)
def test_empty_tables(fs: ShoalFileSystem, kind: str) -> None:
    found = fs.read_arrow(f"set/no-batch.{kind}")
    assert found.num_rows == 0 and found.schema.equals(TABLE.schema)
    assert fs.read_arrow(f"set/no-batch.{kind}", columns=["text"]).schema.names == ["text"]
    assert fs.read_arrow("set/no-columns.file").num_columns == 0


@pytest.mark.parametrize("path", sorted(path for path in OBJECTS if path.startswith("bad/")))
def test_what_is_no_arrow_is_named(fs: ShoalFileSystem, path: str) -> None:
    for columns in (None, ["x"]):
        with pytest.raises(InvalidRequest, match=f"set/{path} is no Arrow IPC file or stream"):
            fs.read_arrow(f"set/{path}", columns)


def test_an_object_that_is_not_there(fs: ShoalFileSystem) -> None:
    with pytest.raises(NotFound, match="set/nope"):
        fs.read_arrow("set/nope")


# Views


@pytest.mark.parametrize("kind", KINDS)
def test_table_of_one_shard_is_views_of_the_map(local: ShoalFileSystem, kind: str, is_one_shard: bool) -> None:
    whole = local.open_buffer(f"set/table.{kind}")
    before = pa.total_allocated_bytes()
    for columns in (None, ["text", "id"]):
        found = local.read_arrow(f"set/table.{kind}", columns)
        seen = [is_view(body, [whole]) for column in found.columns for body in bodies(column)]
        assert len(seen) > found.num_columns
        if is_one_shard:
            assert all(seen)
            assert pa.total_allocated_bytes() - before < 4_096
        else:
            assert not any(seen)  # the buffer is gathered anew, and was not what the table is made of


@pytest.mark.parametrize("kind", KINDS)
def test_batches_inside_one_shard_are_views(local: ShoalFileSystem, kind: str) -> None:
    """And one that crosses a border is gathered, which is all the memory that the table takes."""
    maps = local.open_buffers(f"set/table.{kind}")
    batch_bytes = sum(body.size for column in TABLE.slice(0, BATCH).columns for body in bodies(column))
    before = pa.total_allocated_bytes()
    found = local.read_arrow(f"set/table.{kind}")
    grown = pa.total_allocated_bytes() - before
    gathered = {i for c in found.columns for i, chunk in enumerate(c.chunks) for b in chunk.buffers()
                if b is not None and b.size and not is_view(b, maps)}  # fmt: skip
    assert len(gathered) <= len(maps) - 1
    assert grown < (len(gathered) + 1) * 2 * batch_bytes
    if len(maps) == 1:
        assert not gathered
    else:
        assert 0 < len(gathered) < ROWS // BATCH


def test_table_outlives_everything_it_came_from(cluster: MiniCluster) -> None:
    found = cluster.filesystem(local=True).read_arrow("set/table.file")
    local = cluster.filesystem(local=True).cluster.local
    assert local is not None
    local.maps.__init__()  # type: ignore[misc] # every map is dropped but for those in use
    assert found.equals(TABLE)


def test_over_the_network_a_table_is_received_once(cluster: MiniCluster, is_one_shard: bool) -> None:
    fs = cluster.filesystem()
    size_bytes = len(OBJECTS["table.file"])
    fs.info("set/table.file")
    gc.collect()  # what an earlier test left behind is not to go meanwhile
    before = pa.total_allocated_bytes()
    found = fs.read_arrow("set/table.file")
    grown = pa.total_allocated_bytes() - before
    # Of several shards those go again in which no batch lies wholly.
    assert size_bytes * (1 if is_one_shard else 0.5) <= grown < size_bytes * (1.1 if is_one_shard else 2)
    assert found.equals(TABLE)


@pytest.mark.parametrize("path", ["table.file", "part/0.arrow"])
def test_arrows_own_reader_over_a_file_object_copies_nothing(
    local: ShoalFileSystem, path: str, is_one_shard: bool
) -> None:
    whole = local.open_buffer(f"set/{path}")
    expected = pa.ipc.open_file(OBJECTS[path]).read_all()
    with local.open(f"set/{path}") as file:
        found = pa.ipc.open_file(file).read_all()
    assert found.equals(expected)
    if is_one_shard:
        assert all(is_view(body, [whole]) for column in found.columns for body in bodies(column))


# Copies


@pytest.mark.parametrize("compression", ["lz4", "zstd"])
@pytest.mark.parametrize("kind", KINDS)
def test_compressed_table_is_right_and_says_that_it_is_a_copy(
    cluster: MiniCluster, fs: ShoalFileSystem, compression: str, kind: str
) -> None:
    path = f"set/{compression}.{kind}"
    assert len(fs.open_buffers(path)) <= ROWS // BATCH  # as few shards as batches, or nobody could tell
    for columns in (None, ["x", "text"]):
        with pytest.warns(ArrowCopyWarning, match=f"{path}: .* without compression") as caught:
            found = fs.read_arrow(path, columns)
        assert found.equals(TABLE.select(columns or TABLE.column_names))
        assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_table_of_fewer_batches_than_shards_says_so_too(fs: ShoalFileSystem, kind: str) -> None:
    with pytest.warns(ArrowCopyWarning, match="without compression"):
        assert fs.read_arrow(f"set/one-batch-lz4.{kind}").equals(NUMBERS)


@pytest.mark.parametrize("kind", KINDS)
def test_one_batch_over_all_shards_is_gathered_without_a_warning(fs: ShoalFileSystem, kind: str) -> None:
    assert fs.read_arrow(f"set/one-batch.{kind}").equals(NUMBERS)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_any_cut_gives_the_table_and_only_the_right_warning(data: st.DataObject) -> None:
    """Whatever the shards are, and however few rows a batch has."""
    kind = data.draw(st.sampled_from(KINDS))
    rows = data.draw(st.integers(0, 60))
    table = TABLE.slice(data.draw(st.integers(0, 100)), rows)
    raw = ipc(table, kind, batch_rows=data.draw(st.integers(1, 70)))
    shard_size = 8 * data.draw(st.integers(16, len(raw) // 8 + 1))
    buffers = [pa.py_buffer(raw[at : at + shard_size]) for at in range(0, len(raw), shard_size)]
    names = data.draw(st.none() | st.lists(st.sampled_from(TABLE.column_names), unique=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ArrowCopyWarning)
        found = arrow.read_table("x", buffers, names)
    assert found.equals(table if names is None else table.select(names))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_data_is_an_invalid_request_or_a_table(data: st.DataObject) -> None:
    """Of bytes that are nobody's business here: an origin may hold anything."""
    raw = bytearray(ipc(TABLE.slice(0, 20).select(["id", "text", "kind"]), data.draw(st.sampled_from(KINDS))))
    for place in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=3)):
        raw[place] ^= data.draw(st.integers(1, 255))
    del raw[data.draw(st.integers(1, len(raw))) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ArrowCopyWarning)
        try:
            found: Any = arrow.read_table("x", [pa.py_buffer(bytes(raw))], None)
        except InvalidRequest as error:
            assert str(error).startswith("x is no Arrow IPC file or stream")
        else:
            assert isinstance(found, pa.Table)


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_is_no_text_is_an_invalid_request(kind: str) -> None:
    raw = ipc(TABLE.slice(0, 20).select(["id", "text"]), kind).replace(b"text", b"\xebext")
    with pytest.raises(InvalidRequest, match="x is no Arrow IPC file or stream"):
        arrow.read_table("x", [pa.py_buffer(raw)], None)


# Through Arrow's own readers


@pytest.mark.parametrize(("directory", "format"), [("part", "ipc"), ("parquet", "parquet")])
def test_dataset(fs: ShoalFileSystem, directory: str, format: str) -> None:
    opened = pyarrow.dataset.dataset(f"set/{directory}", filesystem=fs, format=format)
    expected = TABLE.select(["id", "x", "text"])
    assert opened.to_table().sort_by("id").equals(expected.combine_chunks())
    some = opened.to_table(columns=["x"], filter=pyarrow.dataset.field("id") >= 3_990)
    assert sorted(some.column("x").to_pylist()) == sorted(TABLE.column("x")[3_990:].to_pylist())


def test_parquet(fs: ShoalFileSystem) -> None:
    expected = TABLE.slice(0, 1_500).select(["text", "id"])
    assert pyarrow.parquet.read_table("set/parquet/0.parquet", columns=["text", "id"], filesystem=fs).equals(expected)
    with fs.open("set/parquet/0.parquet") as file:
        opened = pyarrow.parquet.ParquetFile(file)
        assert opened.read_row_group(1, columns=["id"]).column("id").to_pylist() == list(range(1_000, 1_500))


def test_view_of_what_is_still_filling_is_received(tmp_path: Path) -> None:
    """The first read of a cold shard streams; the next one maps."""
    with MiniCluster(tmp_path, {"t": OBJECTS["table.file"]}, part_size=4096, shard_size=1 << 20) as cluster:
        fs = cluster.filesystem(local=True)
        assert fs.read_arrow("set/t").equals(TABLE)
        cluster.run(cluster.nodes[0].fills.settle())
        again = fs.read_arrow("set/t")
        whole = fs.open_buffer("set/t")
        assert all(is_view(body, [whole]) for column in again.columns for body in bodies(column))
