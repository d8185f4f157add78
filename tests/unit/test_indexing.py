"""Builds of an index: the same whatever is held at a time, in bounded memory, and no object takes it all."""

from __future__ import annotations

import gc
import io
import tarfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shoal.cluster import Cluster
from shoal.errors import ClusterUnavailable, InvalidRequest
from shoal.streaming import indexing, skim
from shoal.streaming.formats import arrow_ipc, parquet, tar
from shoal.streaming.formats.format import Format
from shoal.streaming.formats.source import SourceFile
from shoal.streaming.index import Index
from shoal.streaming.selection import Selection
from shoal.streaming.skim import Room, Skim
from tests.cluster import test_streams
from tests.support.minicluster import MiniCluster

PATTERNS = ["train/*.arrow", "parquet/*.parquet", "tars/*.tar"]


class Bytes:
    """An object in memory that notes what is read of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[tuple[int, int]] = []

    @property
    def size_bytes(self) -> int:
        return len(self.data)

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        self.reads.append((start, end))
        return pa.py_buffer(self.data[start:end])


class Watched(Room):
    """A room that notes the most that was held, and by how many."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit_bytes)
        self.most = 0

    def take(self, size_bytes: int, *, waits: bool) -> bool:
        has_room = super().take(size_bytes, waits=waits)
        self.most = max(self.most, self.held_bytes)
        return has_room


def skim_of(data: bytes | Bytes, room: Room | None = None, aside: Bytes | None = None, **options: Any) -> Skim:
    source = data if isinstance(data, Bytes) else Bytes(data)
    settings: dict[str, Any] = {"ahead_bytes": 16, "weight": 1, "check": lambda: None} | options
    return Skim("the-object", source, aside or source, room or Room(1 << 30), **settings)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    directory = tmp_path_factory.mktemp("cluster") / "c"
    with MiniCluster(directory, test_streams.objects(), part_size=1 << 16, shard_size=1 << 18) as cluster:
        yield cluster


def build(cluster: MiniCluster, pattern: str, **options: Any) -> bytes:
    opened = Cluster(cluster.nodes[0].address, use_local=False)
    snapshot = opened.snapshot(cluster.snapshot.digest)
    selection = Selection.of_path(snapshot, pattern)
    index = indexing.build(opened, snapshot, selection, 1, **options)
    data: bytes = index.to_buffer(selection).to_pybytes()
    return data


@pytest.mark.parametrize("pattern", PATTERNS)
def test_it_is_the_same_whatever_is_held_at_a_time(cluster: MiniCluster, pattern: str) -> None:
    whole = build(cluster, pattern)
    for together in (1, 2, 3):
        for limit_bytes in (1, 10_000, 1 << 20):
            room = Watched(limit_bytes)
            assert build(cluster, pattern, room=room, together=together) == whole
            assert room.held_bytes == 0
            assert 0 < room.most <= max(limit_bytes, (256 << 10) * 6), "one read beyond the limit, by itself"


def test_objects_are_taken_some_at_a_time(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    real, taken = indexing.run_parallel, []

    def noting(function: Callable[[int], Index], rows: list[int]) -> list[Index]:
        taken.append(len(rows))
        return real(function, rows)

    monkeypatch.setattr(indexing, "run_parallel", noting)
    build(cluster, PATTERNS[0], together=2)
    assert taken == [2, 2]


def test_columns_are_compared_also_with_a_first_object_that_is_the_last_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = {f"{number}.arrow": wide_arrow(is_file=True) for number in range(3)}
    objects["2.arrow"] = test_streams.objects()["train/0.arrow"]
    others = threading.Semaphore(0)
    real = indexing._arrow

    def late(name: str, it: Skim) -> Any:
        if name == "0.arrow":
            assert others.acquire(timeout=20) and others.acquire(timeout=20)
            return real(name, it)
        schema, extents = real(name, it)
        found = list(extents)
        others.release()
        return schema, found

    monkeypatch.setitem(indexing._READS, Format.ARROW, indexing._Reads(late))
    with (
        MiniCluster(tmp_path, objects, part_size=1 << 16, shard_size=1 << 18) as cluster,
        pytest.raises(InvalidRequest, match=r"0\.arrow and 2\.arrow have different columns"),
    ):
        build(cluster, "*.arrow")


def test_a_build_ends_within_an_object(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Cluster(cluster.nodes[0].address, use_local=False)
    snapshot = opened.snapshot(cluster.snapshot.digest)
    real, read = arrow_ipc.examine, []

    def closing(name: str, source: Skim) -> Any:
        source.read_buffer(0, 1)
        opened.transport.close()
        read.append(name)
        return real(name, source)

    selection = Selection.of_path(snapshot, PATTERNS[0])
    monkeypatch.setattr(skim, "FOOT_BYTES", 512)
    monkeypatch.setitem(indexing._READS, selection.format, indexing._Reads(closing))
    with pytest.raises(ClusterUnavailable, match="this process stops"):
        indexing.build(opened, snapshot, selection, 1, together=1)
    assert read == ["train/0.arrow"]


def test_what_was_read_is_not_read_again() -> None:
    source = Bytes(bytes(range(256)) * 1024)
    size = len(source.data)
    with skim_of(source) as under_test:
        for start, end in (
            (0, 6),
            (6, 16),
            (size - 10, size),
            (size - 900, size - 10),
            (10, 12),
            (300, 301),
            (500, 600),
        ):
            assert under_test.read_buffer(start, end).to_pybytes() == source.data[start:end]
        assert under_test.read_buffer(size - 3, size + 50).to_pybytes() == source.data[-3:]
    assert source.reads == [(0, 16), (size - skim.FOOT_BYTES, size), (300, 316), (500, 600)]


def test_a_small_object_is_one_read() -> None:
    source = Bytes(test_streams.objects()["train/0.arrow"])
    with skim_of(source) as under_test:
        schema, found = arrow_ipc.examine("o", under_test)
        extents = list(found)
    assert source.reads == [(0, len(source.data))]
    assert len(extents) == 3 and schema.names == ["id", "tokens", "text"]


class Zeros(Bytes):
    """An object of any size."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(b"")
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read_buffer(self, start: int, end: int) -> pa.Buffer:
        self.reads.append((start, end))
        return pa.py_buffer(bytes(end - start))


NEAR, HEAD, FOOT = skim.NEAR_BYTES, skim.HEAD_BYTES, skim.FOOT_BYTES


def test_heads_far_apart_are_read_aside_and_those_close_together_through_the_cache() -> None:
    size = 400 * NEAR
    through, aside = Zeros(size), Zeros(size)
    far, near, far_again = range(0, 40 * NEAR, 2 * NEAR), range(50 * NEAR, 52 * NEAR, NEAR // 8), range(60, 90, 3)
    with skim_of(through, aside=aside, ahead_bytes=100) as under_test:
        under_test.read_buffer(size - 10, size)
        for start in far:
            under_test.read_buffer(start, start + 8)
        assert not through.reads
        assert aside.reads == [(size - FOOT, size), *((start, start + HEAD) for start in far)]
        for start in near:
            under_test.read_buffer(start, start + 8)
        first = [start for start, _ in aside.reads if start in near]
        assert first == list(near)[: skim.NEAR_READS], "so many to see it"
        assert through.reads == [(start, start + 100) for start in near if start not in first]
        through.reads.clear()
        for start in far_again:
            under_test.read_buffer(start * NEAR, start * NEAR + 8)
        assert [start for start, _ in through.reads] == []
        under_test.read_buffer(size - 500_000, size)
        assert aside.reads[-1] == (size - 500_000, size), "a long footer"


@pytest.mark.parametrize(("distance", "is_far"), [(NEAR, True), (NEAR - 1, False)])
def test_several_heads_far_apart_are_read_at_once(distance: int, is_far: bool) -> None:
    size, room = 100 * NEAR, Watched(1 << 30)
    together = threading.Barrier(4)  # a read alone would wait for ever

    class Meeting(Zeros):
        def read_buffer(self, start: int, end: int) -> pa.Buffer:
            if end < size:
                together.wait(20)
            return super().read_buffer(start, end)

    through, aside = Zeros(size), Meeting(size)
    spans = [(distance * number, distance * number + 300) for number in range(1, 9)]
    with skim_of(through, room, aside=aside, ahead_bytes=100) as under_test:
        under_test.read_buffer(size - 10, size)
        found = under_test.read_several(spans)
        assert [each.size for each in found] == [300] * 8
        if is_far:
            assert sorted(aside.reads) == [*spans, (size - FOOT, size)] and not through.reads
            assert room.held_bytes == FOOT + 8 * 300
        else:
            assert through.reads == spans and len(aside.reads) == 1
    assert room.held_bytes == 0


@pytest.mark.parametrize(("size", "is_small"), [(NEAR, True), (NEAR + 1, False)])
def test_a_small_object_is_read_through_the_cache(size: int, is_small: bool) -> None:
    through, aside = Zeros(size), Zeros(size)
    with skim_of(through, aside=aside) as under_test:
        under_test.read_buffer(0, 6)
        under_test.read_buffer(size - 10, size)
    assert (len(through.reads), len(aside.reads)) == ((2, 0) if is_small else (0, 2))


def test_who_waits_for_room_holds_nothing() -> None:
    """Each holds its head and wants more than is left: without that rule they would wait for each other for ever."""
    data, room, meeting = bytes(200 << 10), Watched(100), threading.Barrier(4)

    def walk(_: int) -> int:
        with skim_of(data, room) as under_test:
            under_test.read_buffer(0, 16)
            meeting.wait(20)
            return sum(under_test.read_buffer(start, start + 60).size for start in range(1000, 2000, 100))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(walk, range(4))) == [600] * 4
    assert room.held_bytes == 0 and room.most <= 100


def test_a_read_that_fails_gives_its_room_back() -> None:
    def fails() -> None:
        raise ClusterUnavailable("gone")

    room = Room(100)
    with skim_of(b"x" * 100, room, check=fails) as under_test, pytest.raises(ClusterUnavailable):
        under_test.read_buffer(0, 10)
    assert room.held_bytes == 0


def wide_arrow(*, is_file: bool) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({f"column {number}": [1] for number in range(500)})
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def wide_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({f"column {number}": [1] for number in range(500)}), sink)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def long_named_tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("n" * 30_000 + ".txt"))
    return file.getvalue()


EXAMINE: dict[str, tuple[bytes, Callable[[Skim], Any]]] = {
    "arrow file": (wide_arrow(is_file=True), lambda it: arrow_ipc.runs("the-object", it)),
    "arrow stream": (wide_arrow(is_file=False), lambda it: arrow_ipc.runs("the-object", it)),
    "parquet": (wide_parquet(), lambda it: parquet.runs("the-object", pa.PythonFile(SourceFile(it), mode="r"))),
    "tar": (long_named_tar(), lambda it: tar.runs("the-object", SourceFile(it))),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("kind", EXAMINE)
def test_a_footer_that_would_take_the_nodes_memory_is_refused_by_name(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, examine = EXAMINE[kind]
    with skim_of(data) as under_test:
        assert examine(under_test)
    monkeypatch.setattr(skim, "MAX_BYTES", 20_000)
    monkeypatch.setattr(skim, "FOOT_BYTES", 512)
    room = Watched(1 << 30)
    with skim_of(data, room) as under_test, pytest.raises(InvalidRequest, match=r"the-object has .* of footer"):
        examine(under_test)
    assert room.most < 20_000, "it was not read"


def test_a_node_names_the_object_and_goes_on(cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(skim, "MAX_BYTES", 100)
    opened = Cluster(cluster.nodes[0].address, use_local=False)
    snapshot = opened.snapshot(cluster.snapshot.digest)
    with pytest.raises(InvalidRequest, match=r"parquet/0\.parquet has .* of footer .* leave it out"):
        indexing.fetch(opened, snapshot, Selection.of_path(snapshot, PATTERNS[1]), 1)


def test_a_tars_members_are_not_all_held() -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as opened:
        for number in range(200):
            opened.addfile(tarfile.TarInfo(f"{number:04}.txt"))
    del opened  # which holds those that it wrote
    found = 0
    for member in tar.members("t", io.BytesIO(file.getvalue())):
        assert member.name == f"{found:04}.txt"
        found += 1
        if found % 50 == 0:
            assert sum(isinstance(each, tarfile.TarInfo) for each in gc.get_objects()) < 10
    assert found == 200
