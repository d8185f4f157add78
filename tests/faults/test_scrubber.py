"""Bits that flip on the drive and tell nobody: the scrubber finds them and has the shard fetched again."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal_cachenode import scrub, sealed_file
from shoal_cachenode.node import CacheNode
from shoal_cachenode.scrub import Scrubber
from shoal_cachenode.sealed_file import Damage
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

PART, SHARD = 64, 256
OBJECTS = {f"{n}": bytes((i * n * 7 + i // 251) % 251 for i in range(600)) for n in range(1, 9)}
FAST = 1 << 30
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]


@pytest.fixture(autouse=True)
def files_that_tell_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_file, "stamp", lambda fd: (0, 0))


def start(directory: Path, rate: int, nodes: int = 1, replicas: int = 1) -> MiniCluster:
    return MiniCluster(
        directory, OBJECTS, nodes=nodes, replicas=replicas, part_size=PART, shard_size=SHARD, scrub_rate=rate
    )


def fill(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
    for node in cluster.nodes:
        cluster.run(node.fills.settle())


def sealed_files(node: CacheNode) -> list[Path]:
    return sorted(path for path in (node.config.data_dir / "shards").rglob("*") if path.is_file())


def flip(path: Path) -> None:
    times = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        (byte,) = file.read(1)
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    path.chmod(0o444)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_flipped_bits_are_found_and_mended_before_anybody_reads_them(tmp_path: Path) -> None:
    with start(tmp_path, 0) as cluster:
        fill(cluster)
    files = sealed_files(cluster.nodes[0])
    content = {path: path.read_bytes() for path in files}
    for path in files[::3]:
        flip(path)
    with start(tmp_path, FAST) as cluster:
        (node,) = cluster.nodes
        counts = node.counters
        wait_for(lambda: counts.shards_corrupt.by_cause["checksum"].value == len(files[::3]))
        wait_for(lambda: len(node.store.sealed_sizes()) == len(files))
        assert {path: path.read_bytes() for path in files} == content
        assert cluster.origin.bytes_read == sum(len(content[path]) for path in files[::3]), "those and no others"
        assert node.usage.unread_bytes == 0
        scrubbed = counts.scrubbed_bytes.value
        wait_for(lambda: counts.scrubbed_bytes.value >= scrubbed + sum(map(len, content.values())))
        assert counts.shards_corrupt.value == len(files[::3]), "the next round finds nothing"


def test_mended_from_the_other_copy(tmp_path: Path) -> None:
    with start(tmp_path, 0, nodes=2, replicas=2) as cluster:
        fs = [cluster.filesystem(node=n) for n in range(2)]
        for path in OBJECTS:
            for each in fs:
                each.cat_file(f"set/{path}")
        for node in cluster.nodes:
            cluster.run(node.fills.settle())
            for spec_path in OBJECTS:
                row = cluster.snapshot.find(spec_path)
                assert row is not None
                for index in range(3):
                    key = cluster.snapshot.shard_table().keys[cluster.snapshot.first_shard(row) + index]
                    cluster.run(node.refetch(key.astype("<u8").tobytes()))
            cluster.run(node.fills.settle())
    node = cluster.nodes[0]
    files = sealed_files(node)
    assert len(files) == 24, "every shard on both nodes"
    content = {path: path.read_bytes() for path in files}
    for path in files[::5]:
        flip(path)
    with start(tmp_path, FAST, nodes=2, replicas=2) as cluster:
        cluster.origin.is_down = True
        wait_for(lambda: cluster.nodes[0].counters.shards_corrupt.value == len(files[::5]))
        wait_for(lambda: len(cluster.nodes[0].store.sealed_sizes()) == len(files))
        assert {path: path.read_bytes() for path in files} == content


def test_a_round_goes_on_where_it_was_after_a_restart(tmp_path: Path) -> None:
    with start(tmp_path, 0) as cluster:
        fill(cluster)
    keys = [bytes.fromhex(path.name) for path in sealed_files(cluster.nodes[0])]
    read: list[bytes] = []
    seen = [0]

    class Stops(Scrubber):
        async def scrub(self, key: bytes) -> None:
            await super().scrub(key)
            read.append(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shoal_cachenode.node.Scrubber", Stops)
        while len(read) < len(keys):
            with start(tmp_path, 16 * SHARD) as cluster:
                seen.append(len(read))
                wait_for(lambda: len(read) >= min(seen[-1] + 3, len(keys)))
    assert len(seen) > 3, "several restarts"
    assert [key for n, key in enumerate(read) if key not in read[:n]] == keys, "none left out"
    assert len(read) <= len(keys) + len(seen), "at most the one in hand again"


@pytest.fixture
def a_file(tmp_path: Path) -> Iterator[tuple[int, sealed_file.ShardHeader]]:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    yield fd, sealed_file.ShardHeader(4 << 20, 4 << 20, 1, [0])
    os.close(fd)


def pages_in_memory(fd: int) -> int:
    """Pages of a file that are in the page cache (mincore(2))."""
    size = os.fstat(fd).st_size
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    pages = (ctypes.c_ubyte * (size // mmap.PAGESIZE))()
    assert _libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages)


def test_scrubbing_leaves_the_page_cache_as_it_was(a_file: tuple[int, sealed_file.ShardHeader]) -> None:
    fd, header = a_file
    if pages_in_memory(fd):
        pytest.skip("this file system does not let go of pages")
    assert sealed_file.check_part(fd, header, 0, keeps_cache=True) is Damage.CHECKSUM, "it was read"
    assert pages_in_memory(fd) < 64, "of 1,024"
    assert sealed_file.check_part(fd, header, 0) is Damage.CHECKSUM
    assert pages_in_memory(fd) == 1024, "the other way of reading does leave them there"


def test_the_scrubbers_thread_has_the_lowest_priority(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(scrub.os, "setpriority", lambda which, who, value: set_to.append((which, value)))
    scrub._lowest_priority()
    assert set_to == [(os.PRIO_PROCESS, 19)]
