"""A drive that turns read-only, gives errors or hangs while reads go on: right bytes, `status` says why, and recovery.

The file systems are real: an ext4 over a loop device whose image is cut off or does not take writes, one that is
frozen in the kernel, and a tmpfs that is remounted.
"""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import shards
from shoal.wire import http_connection
from shoal_cachenode import sealed_file
from shoal_cachenode.node import CacheNode
from tests.support import filesystems
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

KIB, MIB = 1 << 10, 1 << 20
OBJECTS = {f"{n}": random.Random(n).randbytes(40 * KIB) for n in range(10)}


def start(directory: Path, **settings: Any) -> MiniCluster:
    return MiniCluster(directory, OBJECTS, part_size=4 * KIB, shard_size=32 * KIB, retry_s=0.2, **settings)


def read_all(cluster: MiniCluster, *, local: bool = False) -> None:
    fs = cluster.filesystem(local=local)
    assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
    some = [f"set/{path}" for path in OBJECTS]
    ranges = fs.cat_ranges(some, [100] * len(some), [9_000] * len(some))
    assert ranges == [plain[100:9_000] for plain in OBJECTS.values()]


def fill(cluster: MiniCluster) -> None:
    read_all(cluster)
    for node in cluster.nodes:
        cluster.run(node.fills.settle())


def sealed_files(node: CacheNode) -> list[Path]:
    return sorted(path for path in (node.config.data_dir / "shards").rglob("*") if path.is_file())


class Readers:
    """Threads that read everything over and over."""

    def __init__(self, cluster: MiniCluster, count: int = 2) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(count)
        self._jobs = [self._pool.submit(self._read, cluster) for _ in range(count)]
        self.rounds = 0

    def _read(self, cluster: MiniCluster) -> None:
        while not self._stop.is_set():
            read_all(cluster)
            self.rounds += 1

    def wait_for_rounds(self, count: int) -> None:
        until = self.rounds + count
        wait_for(lambda: self.rounds >= until or any(job.done() for job in self._jobs))

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for job in self._jobs:
            job.result()


def test_drive_that_turns_read_only(tmp_path: Path) -> None:
    """What is sealed is served from it, what is not passes through, and what is damaged is never served again."""
    with filesystems.memory(tmp_path / "node0", 16 * MIB), start(tmp_path) as cluster:
        (node,) = cluster.nodes
        fs = cluster.filesystem()
        assert fs.cat_file("set/0") == OBJECTS["0"]
        cluster.run(node.fills.settle())
        first = sealed_files(node)[0]
        with Readers(cluster) as readers:
            filesystems.set_read_only(tmp_path / "node0", True)
            node.store.lose(bytes.fromhex(first.name), sealed_file.Damage.CHECKSUM)
            wait_for(lambda: "is read-only: see 'dmesg'" in node.condition)
            readers.wait_for_rounds(2)
            served = node.counters.served_sealed_bytes.value
            readers.wait_for_rounds(2)
            assert node.counters.served_sealed_bytes.value > served
            assert first.exists(), "the drive keeps it"
            held = node.store.used_bytes
            readers.wait_for_rounds(2)
            assert held == node.store.used_bytes == sum(path.stat().st_size for path in sealed_files(node))
            filesystems.set_read_only(tmp_path / "node0", False)
            wait_for(lambda: node.condition == "ok")
            wait_for(lambda: len(node.store.sealed_sizes()) == 20)
        cluster.run(node.fills.settle())
        assert node.store.used_bytes == sum(path.stat().st_size for path in sealed_files(node)) == 400 * KIB
        before = cluster.origin.bytes_read
        read_all(cluster)
        assert cluster.origin.bytes_read == before


@pytest.fixture
def small_image(tmp_path: Path) -> Iterator[Path]:
    """An ext4 for ``node0``."""
    with filesystems.loop(tmp_path / "node0", tmp_path / "image", 32 * MIB):
        yield tmp_path / "image"


def forget_pages(files: list[Path]) -> None:
    """Have the next read of these files go to the drive."""
    subprocess.run(["sync"], check=True)
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def is_readable(path: Path) -> bool:
    try:
        path.read_bytes()
        return True
    except OSError:
        return False


def test_sealed_files_that_give_errors_are_read_from_elsewhere(small_image: Path, tmp_path: Path) -> None:
    with start(tmp_path) as cluster:
        (node,) = cluster.nodes
        fill(cluster)
        files = sealed_files(node)
        forget_pages(files)
        size = small_image.stat().st_size
        good = files
        while len(good) > len(files) // 2:  # cut off its end until half of the files are gone with it
            size -= 128 * KIB
            os.truncate(small_image, size)
            forget_pages(files)
            good = [path for path in files if is_readable(path)]
        lost_bytes = sum(path.stat().st_size for path in files if path not in good)
        before = cluster.origin.bytes_read
        forget_pages(files)
        read_all(cluster)
        cluster.run(node.fills.settle())
        by_cause = node.counters.shards_corrupt.by_cause
        assert by_cause["unreadable"].value >= len(files) - len(good) > 0
        assert cluster.origin.bytes_read >= before + lost_bytes
        read_all(cluster)


def test_drive_that_does_not_take_what_is_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Writes succeed, into memory; the sync before a shard is sealed tells that they did not reach the drive."""
    with (
        filesystems.memory(tmp_path / "small", 2 * MIB) as small,
        filesystems.loop(tmp_path / "node0", small / "image", 32 * MIB),
        start(tmp_path) as cluster,
    ):
        (node,) = cluster.nodes
        filler = filesystems.fill_up(small)
        read_all(cluster)
        wait_for(lambda: node.condition.startswith("passing reads through"))
        read_all(cluster)
        cluster.run(node.fills.settle())
        assert node.store.sealed_sizes() == {}
        # A drive that does not even remove a file keeps it, and the node counts it and says so.
        kept = [key.hex() for key in node.store.reserved_sizes()]
        assert all(f"what is left of {key} stays on the drive" in caplog.text for key in kept)
        filler.unlink()


def test_drive_that_hangs(small_image: Path, tmp_path: Path) -> None:
    """Every thread that writes to it hangs; no reader does, and it is used again when they are back."""
    with start(tmp_path, stall_s=0.5) as cluster:
        (node,) = cluster.nodes
        fs = cluster.filesystem()
        assert fs.cat_file("set/0") == OBJECTS["0"]
        cluster.run(node.fills.settle())
        cached = node.store.sealed_sizes()
        row = cluster.snapshot.find("9")
        assert row is not None
        left_over = node.store.begin(shards.shard_key(cluster.snapshot.key(row), 0), 32 * KIB)
        left_over.write_part(0, OBJECTS["9"][: 4 * KIB])
        node.store.suspend(left_over)
        with filesystems.frozen(tmp_path / "node0"):
            assert fs.cat_file("set/9") == OBJECTS["9"], "what an earlier fill left hangs before anything is read"
            cluster.publish()  # orders wait for nothing
            read_all(cluster)
            assert "does not answer (an operation takes" in node.condition
            assert node.store.operations.count > 0, "what hangs, hangs"
            read_all(cluster)
            read_all(cluster, local=True)
            assert node.store.sealed_sizes() == cached
        wait_for(lambda: node.condition == "ok")
        assert node.store.operations.count == 0
        fill(cluster)
        before = cluster.origin.bytes_read
        read_all(cluster)
        assert cluster.origin.bytes_read == before
        assert node.disk.failures == 1


@pytest.fixture
def hanging_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bool], None]]:
    """Makes reads of sealed files hang, and go on: no file system of ours does that without a driver for it."""
    gate = threading.Event()
    gate.set()
    real = os.preadv

    def preadv(fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            if not gate.is_set():
                raise BlockingIOError  # nothing is in the page cache
        else:
            gate.wait()
        return real(fd, buffers, offset, flags)

    monkeypatch.setattr(sealed_file.os, "preadv", preadv)
    monkeypatch.setattr(http_connection.os, "preadv", preadv)
    yield lambda hang: gate.clear() if hang else gate.set()
    gate.set()


def test_drive_whose_reads_hang(tmp_path: Path, hanging_reads: Callable[[bool], None]) -> None:
    with start(tmp_path, stall_s=0.5) as cluster:
        (node,) = cluster.nodes
        fill(cluster)
        cached = node.store.sealed_sizes()
        hanging_reads(True)
        fs = cluster.filesystem()
        with ThreadPoolExecutor(40) as pool:  # more than the node has threads for the drive
            found = list(pool.map(lambda n: fs.cat_file(f"set/{n % 10}"), range(80)))
        assert found == [OBJECTS[str(n % 10)] for n in range(80)]
        assert "does not answer" in node.condition
        hanging_reads(False)
        wait_for(lambda: node.condition == "ok")
        before = cluster.origin.bytes_read
        assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
        assert (cluster.origin.bytes_read, node.store.sealed_sizes()) == (before, cached)
