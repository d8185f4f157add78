"""A node killed with -9 while it fills and is read: warm at once when it is back, and fetches nothing again."""

from __future__ import annotations

import os
import random
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal_cachenode.shard_file import XATTR, ShardHeader
from tests.cluster.conftest import filesystem
from tests.faults.conftest import add_directory

MIB = 1 << 20
PART = 8 * MIB


def fetched(cluster: DevCluster, node: int = 0) -> int:
    """Bytes that a node has brought in since it started."""
    with urllib.request.urlopen(f"{cluster.node_endpoints[node]}/metrics", timeout=20) as answer:
        text = answer.read().decode()
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return int(sum(s.value for s in samples if s.name == "shoal_node_fetched_bytes_total"))


def sealed_bytes(data: Path) -> int:
    return sum(path.stat().st_size for path in (data / "shards").rglob("*") if path.is_file())


def parts_bytes(data: Path) -> int:
    """Of the parts that partial shards have."""
    total = 0
    for path in (data / "filling").iterdir():
        try:
            header = ShardHeader.decode(os.getxattr(path, XATTR), bytes.fromhex(path.name))
        except OSError:
            continue
        ranges = [header.part_range(part) for part, known in enumerate(header.checksums) if known is not None]
        total += sum(end - start for start, end in ranges)
    return total


def test_killed_node_is_warm_at_once_and_fetches_nothing_again(
    tmp_path: Path, directory_origin: dict[str, bytes]
) -> None:
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        for _ in range(2):
            cluster.nodes[0].kill()
            cluster.nodes[0].start()
            cluster.wait_until_joined()
            fs = filesystem(cluster.endpoint)
            assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        assert fetched(cluster) == 0


@pytest.mark.parametrize("seed", range(2))
def test_killed_in_the_middle_of_fills_and_reads(tmp_path: Path, seed: int) -> None:
    """Sealed shards are not fetched again, nor are the parts of partial ones; a kill comes at a random moment."""
    dice = random.Random(seed)
    (tmp_path / "origin").mkdir()
    objects = {f"{n}": random.Random(100 * seed + n).randbytes(2 * PART + n) for n in range(3)}
    for path, data in objects.items():
        (tmp_path / "origin" / path).write_bytes(data)
    data_dir = tmp_path / "cluster" / "node-0"
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity="400MiB", node_args=["--fetches", "2"]) as cluster:
        add_directory(cluster, tmp_path / "origin")
        node = cluster.nodes[0]

        def read(path: str) -> None:
            try:
                assert filesystem(cluster.endpoint).cat(f"set/{path}") == objects[path]
            except ShoalError:
                pass  # the only node was killed under it

        for _ in range(2):
            readers = [threading.Thread(target=read, args=(path,)) for path in objects]
            for reader in readers:
                reader.start()
            time.sleep(dice.uniform(0.0, 0.15))
            node.kill()
            for reader in readers:
                reader.join()
            kept = sealed_bytes(data_dir) + parts_bytes(data_dir)
            node.start()
            cluster.wait_until_joined()
            fs = filesystem(cluster.endpoint)
            if dice.random() < 0.5:
                assert fs.cat("set/0") == objects["0"]
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in objects} == objects
        assert fetched(cluster) == sum(map(len, objects.values())) - kept, "what it had came from the drive"


def test_machine_that_went_down_uncleanly_serves_nothing_unverified(
    tmp_path: Path, directory_origin: dict[str, bytes]
) -> None:
    """Another boot id, and files whose pages never reached the drive: here, zeros where bytes were."""
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        data = tmp_path / "cluster" / "node-0"
        cluster.nodes[0].kill()
        state = data / "state.json"
        state.write_text(state.read_text().replace('"boot_id": "', '"boot_id": "before-'))
        files = sorted(path for path in (data / "shards").rglob("*") if path.is_file())
        for path in files[::3]:
            times = path.stat()
            path.chmod(0o644)
            with path.open("r+b") as file:
                file.write(bytes(4096))
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        cluster.nodes[0].start()
        cluster.wait_until_joined()
        fs = filesystem(cluster.endpoint, local=False)
        for path, plain in directory_origin.items():
            assert fs.cat_file(f"set/{path}", 5, 50) == plain[5:50], "less than a part, which no reader can compare"
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        assert fetched(cluster) == sum(path.stat().st_size for path in files[::3])
