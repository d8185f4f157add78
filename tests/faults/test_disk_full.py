"""The drive fills up below what the node may use, because of another program: reads go on, and the node says why."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.devcluster import DevCluster
from shoal_cachenode import prefetch
from shoal_cachenode.prefetch import Order, Prefetches
from tests.cluster.conftest import filesystem
from tests.faults.conftest import add_directory
from tests.support import filesystems
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

KIB = 1 << 10
OBJECTS = {f"{n}": random.Random(n).randbytes(30 * KIB) for n in range(12)}


@pytest.fixture
def on_small_drive(tmp_path: Path) -> Iterator[MiniCluster]:
    """A node that may use 1 GiB, on a drive of 1 MiB."""
    with (
        filesystems.memory(tmp_path / "node0", 1 << 20),
        MiniCluster(tmp_path, OBJECTS, part_size=4 * KIB, shard_size=16 * KIB, retry_s=0.2, recent_bytes=0) as cluster,
    ):
        yield cluster


def read_all(cluster: MiniCluster) -> None:
    fs = cluster.filesystem()
    assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS


def test_full_drive_passes_through_says_so_and_recovers(on_small_drive: MiniCluster, tmp_path: Path) -> None:
    cluster, (node,) = on_small_drive, on_small_drive.nodes
    fs = cluster.filesystem()
    assert fs.cat_file("set/0") == OBJECTS["0"]
    cluster.run(node.fills.settle())
    cached = node.store.sealed_sizes()
    filler = filesystems.fill_up(tmp_path / "node0")
    read_all(cluster)
    assert "is full although this node may use 1 GiB of it: free space there" in node.condition
    assert node.condition.startswith("passing reads through: ")
    before = cluster.origin.bytes_read
    read_all(cluster)
    assert cluster.origin.bytes_read == before + 11 * 30 * KIB, "what is cached is served, the rest passes through"
    assert node.store.sealed_sizes() == cached
    cluster.run(node.fills.settle())
    assert (node.store.reserved_bytes, list((tmp_path / "node0" / "filling").iterdir())) == (0, [])
    filler.unlink()
    wait_for(lambda: node.condition == "ok")
    read_all(cluster)
    cluster.run(node.fills.settle())
    before = cluster.origin.bytes_read
    read_all(cluster)
    assert cluster.origin.bytes_read == before, "cached, now that there is room"
    assert node.disk.failures == 1


def test_drive_that_fills_up_in_the_middle_of_a_shard(on_small_drive: MiniCluster, tmp_path: Path) -> None:
    """Room for some parts of an object and not for all: the reader notices nothing."""
    filler = filesystems.fill_up(tmp_path / "node0")
    with filler.open("rb+") as file:
        file.truncate(file.seek(0, 2) - 20 * KIB)
    read_all(on_small_drive)
    assert "is full" in on_small_drive.nodes[0].condition


def test_nothing_that_a_full_drive_keeps_from_being_cached_leaves_a_traceback(
    on_small_drive: MiniCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Reads of objects and of batches, in several threads, and a prefetch, all at once."""
    cluster, (node,) = on_small_drive, on_small_drive.nodes
    filesystems.fill_up(tmp_path / "node0")
    monkeypatch.setattr(prefetch, "PAUSES_S", (0.1,))
    order = Order("job", "set", cluster.snapshot.digest, "", run=True)

    async def begin() -> Prefetches:
        prefetches = Prefetches(node)
        prefetches.apply([order])
        return prefetches

    def read(seed: int) -> bool:
        fs, draw = cluster.filesystem(local=seed % 2 == 0), random.Random(seed)
        paths = draw.choices(sorted(OBJECTS), k=10)
        starts = [draw.randrange(28 * KIB) for _ in paths]
        ends = [start + 2 * KIB for start in starts]
        found = fs.cat_ranges([f"set/{path}" for path in paths], starts, ends, on_error="raise")
        assert found == [OBJECTS[path][start:end] for path, start, end in zip(paths, starts, ends, strict=True)]
        return {path: fs.cat_file(f"set/{path}") for path in paths} == {path: OBJECTS[path] for path in paths}

    prefetches = cluster.run(begin())
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))
    wait_for(lambda: any(report.failure for report in cluster.run(prefetches.reports())))
    cluster.run(prefetches.close())
    cluster.run(node.fills.settle())
    gc.collect()  # an error that nobody fetched is told when its task goes
    assert [each.getMessage() for each in caplog.records if each.exc_info] == []
    (told,) = (each.getMessage() for each in caplog.records if each.name == prefetch.__name__)
    assert told.startswith("prefetch job stopped: ") and "is full although this node may use 1 GiB" in told


def test_new_orders_and_snapshots_do_not_need_the_drive(on_small_drive: MiniCluster, tmp_path: Path) -> None:
    cluster, (node,) = on_small_drive, on_small_drive.nodes
    filler = filesystems.fill_up(tmp_path / "node0")
    cluster.publish()
    assert node.library.knowledge.cluster_map.epoch == cluster.epoch
    read_all(cluster)
    filler.unlink()
    wait_for(lambda: node.condition == "ok")
    assert f'"epoch": {cluster.epoch}' in (tmp_path / "node0" / "orders.json").read_text(), "written down at last"


def test_status_tells_of_the_full_drive_of_a_real_node(tmp_path: Path, directory_origin: dict[str, bytes]) -> None:
    data = tmp_path / "cluster"
    with (
        filesystems.memory(data / "node-0", 3 << 20),
        DevCluster(nodes=1, data_dir=data, capacity="100MiB") as cluster,
    ):
        filler = filesystems.fill_up(data / "node-0")
        add_directory(cluster, tmp_path / "origin")  # its snapshot finds no room on the node either
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        wait_for(lambda: "is full although this node may use 100 MiB" in _status(cluster))
        filler.unlink()
        wait_for(lambda: "passing reads through" not in _status(cluster))


def _status(cluster: DevCluster) -> str:
    command = [sys.executable, "-m", "shoal.cli", "status", "--endpoint", cluster.endpoint]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
