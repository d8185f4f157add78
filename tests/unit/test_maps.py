"""Maps of local shards and the memory that reads end in: how many, how long, and the same bytes whatever their size."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal import maps, memory, shards
from shoal.connection import Answer
from shoal.filesystem import ShoalFileSystem
from shoal.maps import Maps, ShardId
from tests.support.minicluster import MiniCluster

SMALL, LARGE = 64 << 10, 8 << 20
SIZES = sorted({0, 1, *(edge + d for edge in (SMALL, LARGE) for d in (-1, 0, 1)), LARGE + 4096 + 7})


def content(size_bytes: int) -> bytes:
    return (np.arange(size_bytes) * 37 % 251).astype(np.uint8).tobytes()


def shard(number: int) -> ShardId:
    return "d" * 32, number, 0


@pytest.fixture
def descriptor(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "file").write_bytes(content(10_000))
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield fd
    os.close(fd)


def descriptors() -> int:
    """How many this process has. Another thread may close one meanwhile, so compare with ``<=``."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are all that is wanted


# Maps


def test_map_is_the_file_and_no_descriptor_of_ours_is_used(descriptor: int) -> None:
    cache, before = Maps(), descriptors()
    whole = cache.add(shard(1), descriptor, 10_000)
    assert descriptors() <= before
    assert whole.to_pybytes() == content(10_000) and not whole.is_mutable
    assert cache.get(shard(1)) is whole and cache.get(shard(2)) is None
    os.fstat(descriptor)  # still the caller's


@given(st.integers(1, 4), st.lists(st.tuples(st.booleans(), st.integers(0, 6)), max_size=40))
def test_the_least_recently_used_is_dropped_first(limit: int, steps: list[tuple[bool, int]]) -> None:
    cache, model = Maps(limit), list[int]()
    with open("/proc/self/exe", "rb") as file:  # noqa: PTH123 - any file, whose descriptor is wanted
        for adds, number in steps:
            if adds and number not in model:
                cache.add(shard(number), file.fileno(), 100)
                model = [*model, number][-limit:]
            elif number in model:
                assert cache.get(shard(number)) is not None
                model = [*(n for n in model if n != number), number]
            else:
                assert cache.get(shard(number)) is None
            assert len(cache) == len(model)
        assert [n for n in range(7) if cache.get(shard(n)) is not None] == sorted(model)


def test_adding_again_gives_the_first_map_and_is_a_use(descriptor: int) -> None:
    cache = Maps(2)
    first = cache.add(shard(1), descriptor, 100)
    cache.add(shard(2), descriptor, 100)
    assert cache.add(shard(1), descriptor, 100) is first
    cache.add(shard(3), descriptor, 100)
    assert cache.get(shard(1)) is first and cache.get(shard(2)) is None


def test_threads_that_are_as_fast_share_one_map(descriptor: int) -> None:
    cache, found = Maps(), list[pa.Buffer]()
    start = threading.Barrier(8)

    def add() -> None:
        start.wait()
        found.append(cache.add(shard(1), descriptor, 10_000))

    threads = [threading.Thread(target=add) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len({id(each) for each in found}) == 1 == len(cache)
    assert len(found) == 8


def test_a_dropped_map_stays_good_for_whoever_holds_it(descriptor: int) -> None:
    cache = Maps(1)
    part = cache.add(shard(1), descriptor, 10_000).slice(5_000, 100)
    cache.add(shard(2), descriptor, 10_000)
    gc.collect()
    assert cache.get(shard(1)) is None and part.to_pybytes() == content(10_000)[5_000:5_100]


def test_the_last_holder_of_a_map_unmaps_it(descriptor: int, tmp_path: Path) -> None:
    def is_mapped() -> bool:
        return str(tmp_path / "file") in Path("/proc/self/maps").read_text()

    cache = Maps(1)
    part = cache.add(shard(1), descriptor, 10_000).slice(100, 50)
    table = pa.table({"x": pa.Array.from_buffers(pa.uint8(), 50, [None, part])})
    with (tmp_path / "other").open("wb+") as other:
        other.truncate(100)
        cache.add(shard(2), other.fileno(), 100)
    del part
    gc.collect()
    assert is_mapped() and table.column("x").to_pylist() == list(content(150)[100:])
    del table
    gc.collect()
    assert not is_mapped()


def test_what_cannot_be_mapped_is_not_kept(descriptor: int, tmp_path: Path) -> None:
    cache = Maps()
    with pytest.raises(OSError, match="shorter than what is to be mapped"):
        cache.add(shard(1), descriptor, 10_001)
    unreadable = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError):
        cache.add(shard(1), unreadable, 100)
    os.close(unreadable)
    assert len(cache) == 0


# The local node's shards


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MiniCluster]:
    """Some shards, all of them sealed."""
    objects = {"o": content(3_000), "table": table_file()}
    with MiniCluster(tmp_path / "c", objects, part_size=256, shard_size=1 << 10) as cluster:
        for path in objects:
            cluster.filesystem().cat_file(f"set/{path}")
        cluster.run(cluster.nodes[0].fills.settle())
        yield cluster


TABLE = pa.table({"n": pa.array(np.arange(300)), "s": pa.array([f"text {n}" for n in range(300)])})


def table_file() -> bytes:
    out = pa.BufferOutputStream()
    with pa.ipc.new_file(out, TABLE.schema) as writer:
        writer.write_table(TABLE, max_chunksize=20)
    return out.getvalue().to_pybytes()


def maps_of(fs: ShoalFileSystem) -> Maps:
    assert fs.cluster.local is not None
    return fs.cluster.local.maps


def evict(cluster: MiniCluster) -> None:
    store = cluster.nodes[0].store
    for key in store.sealed_sizes():
        assert store.evict(key)
    assert store.used_bytes == 0


def test_second_read_asks_nobody_and_costs_no_descriptor(cluster: MiniCluster) -> None:
    fs = cluster.filesystem(local=True)
    first = fs.open_buffers("set/o")
    given_out, before = cluster.nodes[0].counters.descriptors.value, descriptors()
    assert given_out == len(first) == len(maps_of(fs)) == 3
    assert [b.address for b in fs.open_buffers("set/o")] == [b.address for b in first]
    assert fs.cat_file("set/o", 100, 2_900) == content(3_000)[100:2_900]
    assert cluster.nodes[0].counters.descriptors.value == given_out
    assert descriptors() <= before


def test_bound_holds_for_reads_and_what_is_held_stays(cluster: MiniCluster) -> None:
    fs = cluster.filesystem(local=True)
    assert fs.cluster.local is not None
    fs.cluster.local.maps = Maps(2)
    held = fs.open_buffers("set/o")
    assert len(maps_of(fs)) == 2
    for _ in range(3):
        assert fs.cat_file("set/o") == content(3_000)
        assert fs.read_arrow("set/table").equals(TABLE)
        assert len(maps_of(fs)) == 2
    assert b"".join(b.to_pybytes() for b in held) == content(3_000)


def test_maps_and_tables_outlive_eviction_and_the_node(tmp_path: Path) -> None:
    plain, raw = content(3_000), table_file()
    with MiniCluster(tmp_path, {"o": plain, "table": raw}, part_size=256, shard_size=1 << 10) as cluster:
        for path in ("o", "table"):
            cluster.filesystem().cat_file(f"set/{path}")
        cluster.run(cluster.nodes[0].fills.settle())
        fs = cluster.filesystem(local=True)
        held, table = fs.open_buffers("set/o"), fs.read_arrow("set/table")
        evict(cluster)
        assert not [p for p in (tmp_path / "node0" / "shards").rglob("*") if p.is_file()]

        def all_is_right() -> bool:
            return b"".join(b.to_pybytes() for b in held) == plain and table.equals(TABLE)

        assert all_is_right()
        # The key names the content, so a map of what the node has dropped is as good as one of what it has.
        before = cluster.origin.bytes_read
        assert fs.cat_file("set/o") == plain and cluster.origin.bytes_read == before
        # And a shard that is filled anew gets a new file: the old map is not written.
        assert cluster.filesystem().cat_file("set/o") == plain and cluster.origin.bytes_read == before + len(plain)
        assert all_is_right()
    assert all_is_right()
    assert fs.open_buffers("set/o")[1].to_pybytes() == plain[1 << 10 : 2 << 10]
    del fs, held[1:]
    gc.collect()
    assert held[0].to_pybytes() == plain[: 1 << 10]


@pytest.mark.parametrize(
    "places",
    [None, "", "1/0", "1/0/x", "1/0/10001", "2/0/100"],
    ids=["none", "empty", "two-words", "no-number", "longer-than-the-file", "another-shard"],
)
def test_descriptor_that_is_not_what_was_asked_for(cluster: MiniCluster, tmp_path: Path, places: str | None) -> None:
    """It is read instead; the descriptor is closed whatever becomes of it."""
    local = cluster.filesystem(local=True).cluster.local
    assert local is not None
    (tmp_path / "file").write_bytes(content(10_000))
    read = os.open(tmp_path / "file", os.O_RDONLY)
    headers = {} if places is None else {"shoal-descriptors": places}
    assert local.adopt(shard(1), Answer(200, headers, descriptors=(read,))) is None
    with pytest.raises(OSError):
        os.fstat(read)


def test_process_near_its_limit_of_open_files_maps_those_that_came(cluster: MiniCluster, tmp_path: Path) -> None:
    local = cluster.filesystem(local=True).cluster.local
    assert local is not None
    (tmp_path / "file").write_bytes(content(100))
    read = os.open(tmp_path / "file", os.O_RDONLY)
    whole = local.adopt(shard(1), Answer(200, {"shoal-descriptors": "1/0/100,2/0/100"}, descriptors=(read,)))
    assert whole is not None and whole.to_pybytes() == content(100)
    assert local.maps.get(shard(2)) is None


def test_descriptors_that_came_along_are_maps_of_their_own(cluster: MiniCluster, tmp_path: Path) -> None:
    local = cluster.filesystem(local=True).cluster.local
    assert local is not None
    for number in (1, 2):
        (tmp_path / str(number)).write_bytes(content(100 * number))
    opened = tuple(os.open(tmp_path / str(number), os.O_RDONLY) for number in (1, 2))
    whole = local.adopt(shard(1), Answer(200, {"shoal-descriptors": "1/0/100,2/0/200"}, descriptors=opened))
    assert whole is not None and whole.to_pybytes() == content(100) and local.maps.get(shard(1)) is whole
    other = local.maps.get(shard(2))
    assert other is not None and other.to_pybytes() == content(200)
    for descriptor in opened:
        with pytest.raises(OSError):
            os.fstat(descriptor)


def test_a_read_of_what_cannot_be_mapped_comes_over_the_socket(
    cluster: MiniCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = cluster.filesystem(local=True)

    def fails(self: Maps, *_: object) -> pa.Buffer:
        raise OSError("no more maps")

    monkeypatch.setattr(Maps, "add", fails)
    assert fs.cat_file("set/o") == content(3_000)
    assert fs.open_buffer("set/o").to_pybytes() == content(3_000)
    assert cluster.nodes[0].counters.descriptors.value >= 3
    assert len(maps_of(fs)) == 0


def test_names_of_maps_are_shards(cluster: MiniCluster) -> None:
    fs = cluster.filesystem(local=True)
    fs.cat_file("set/o", 1_500, 1_600)
    row = cluster.snapshot.find("o")
    assert row is not None
    whole = maps_of(fs).get((cluster.snapshot.digest, row, 1))
    assert whole is not None and whole.to_pybytes() == content(3_000)[1 << 10 : 2 << 10]
    assert len(maps_of(fs)) == 1 and shards.shard_length(3_000, 1 << 10, 1) == whole.size
    assert maps.MAX_MAPS == 1024


# Memory


@pytest.mark.parametrize("size_bytes", SIZES)
def test_make_bytes_is_what_was_filled_in(size_bytes: int) -> None:
    plain = content(size_bytes)
    seen: list[memoryview] = []

    def fill(view: memoryview) -> None:
        assert (view.nbytes, view.readonly) == (size_bytes, False)
        view[:] = plain
        seen.append(view)

    made = memory.make_bytes(size_bytes, fill)
    assert type(made) is bytes and made == plain and hash(made) == hash(plain)
    if size_bytes >= SMALL:
        with pytest.raises(ValueError, match="released"):
            seen[0].nbytes  # noqa: B018 - a `bytes` that somebody could write would not be one
    assert made == plain


@pytest.mark.parametrize("size_bytes", SIZES)
def test_to_bytes_and_copy_are_the_buffer(size_bytes: int) -> None:
    plain = content(size_bytes + 3)
    buffer = pa.py_buffer(plain).slice(3)
    assert memory.to_bytes(buffer) == plain[3:]
    target = bytearray(size_bytes)
    memory.copy(buffer, memoryview(target))
    assert target == plain[3:]


@pytest.mark.parametrize("size_bytes", [0, 1, SMALL, LARGE])
def test_allocate_and_view(size_bytes: int) -> None:
    buffer = memory.allocate(size_bytes)
    view = memory.view(buffer)
    assert (len(view), view.readonly, view.format, buffer.size) == (size_bytes, False, "B", size_bytes)
    view[:] = content(size_bytes)
    assert buffer.to_pybytes() == content(size_bytes)


@pytest.mark.parametrize("size_bytes", [SMALL, LARGE])
def test_a_fill_that_fails_leaves_nothing(size_bytes: int) -> None:
    views: list[memoryview] = []

    def fill(view: memoryview) -> None:
        views.append(view)
        raise OSError("the node died")

    with pytest.raises(OSError, match="the node died"):
        memory.make_bytes(size_bytes, fill)
    with pytest.raises(ValueError, match="released"):
        views[0].nbytes  # noqa: B018 - as above


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MiniCluster]:
    """Objects of one shard, and one of two, which is never mapped whole."""
    objects = {str(size): content(size) for size in SIZES}
    with MiniCluster(tmp_path_factory.mktemp("l"), objects, part_size=1 << 20, shard_size=LARGE + 4096) as cluster:

        def stream(path: str, version: str, start: int, end: int, sink) -> None:  # type: ignore[no-untyped-def]
            sink(memoryview(cluster.origin.read(path, version, start, end)))  # in one go: these are large

        cluster.origin.stream = stream  # type: ignore[method-assign]
        yield cluster


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("size_bytes", SIZES)
def test_read_of_any_size(large: MiniCluster, size_bytes: int, local: bool) -> None:
    fs, path, plain = large.filesystem(local=local), f"set/{size_bytes}", content(size_bytes)
    for _ in "filling", "sealed":
        assert fs.cat_file(path) == plain
        assert fs.cat_file(path, 1) == plain[1:]
        with fs.open(path) as file:
            assert file.read() == plain
        large.run(large.nodes[0].fills.settle())
    assert fs.open_buffer(path).to_pybytes() == plain
