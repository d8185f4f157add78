"""A node killed with -9 while it fills and is read: warm at once when it is back, and fetches nothing again."""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import ShoalError
from shoal_cachenode.shard_file import XATTR, ShardHeader
from tests.cluster.conftest import filesystem
from tests.faults.conftest import add_directory
from tests.support.waiting import wait_for

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


def read_all(cluster: DevCluster, paths: Iterable[str]) -> dict[str, bytes]:
    """With a client of its own, which knows nothing of what the node was before."""
    fs = filesystem(cluster.endpoint)
    return {path: fs.cat(f"set/{path}") for path in paths}


def start_again(cluster: DevCluster) -> None:
    cluster.nodes[0].start()
    cluster.wait_until_joined()


@pytest.fixture
def warm_cluster(tmp_path: Path, directory_origin: dict[str, bytes]) -> Iterator[DevCluster]:
    """One node, which has sealed all of ``tmp_path / "origin"``."""
    with DevCluster(nodes=1, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        assert read_all(cluster, directory_origin) == directory_origin
        yield cluster


def test_killed_node_is_warm_at_once_and_fetches_nothing_again(
    warm_cluster: DevCluster, directory_origin: dict[str, bytes]
) -> None:
    for _ in range(2):
        warm_cluster.nodes[0].kill()
        start_again(warm_cluster)
        assert read_all(warm_cluster, directory_origin) == directory_origin
    assert fetched(warm_cluster) == 0


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
            start_again(cluster)
            if dice.random() < 0.5:
                assert read_all(cluster, ["0"])["0"] == objects["0"]
        assert read_all(cluster, objects) == objects
        assert fetched(cluster) == sum(map(len, objects.values())) - kept, "what it had came from the drive"


def test_machine_that_went_down_uncleanly_serves_nothing_unverified(
    warm_cluster: DevCluster, directory_origin: dict[str, bytes]
) -> None:
    """Another boot id, and files whose pages never reached the drive: here, zeros where bytes were."""
    data = warm_cluster.data_dir / "node-0"
    warm_cluster.nodes[0].kill()
    state = data / "state.json"
    state.write_text(state.read_text().replace('"boot_id": "', '"boot_id": "before-'))
    files = sorted(path for path in (data / "shards").rglob("*") if path.is_file())
    for path in files[::3]:
        times = path.stat()
        path.chmod(0o644)
        with path.open("r+b") as file:
            file.write(bytes(4096))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    start_again(warm_cluster)
    fs = filesystem(warm_cluster.endpoint)
    for path, plain in directory_origin.items():
        assert fs.cat_file(f"set/{path}", 5, 50) == plain[5:50], "less than a part, which no reader can compare"
    assert read_all(warm_cluster, directory_origin) == directory_origin
    assert fetched(warm_cluster) == sum(path.stat().st_size for path in files[::3])


def test_a_node_whose_epoch_no_cluster_reaches_takes_the_controllers_and_poisons_nothing(
    tmp_path: Path, directory_origin: dict[str, bytes]
) -> None:
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        (node, _) = cluster.nodes
        node.kill()
        orders = cluster.data_dir / "node-0" / "orders.json"
        known = json.loads(orders.read_text())
        known["map"]["epoch"] = 1 << 62
        orders.write_text(json.dumps(known))
        # Its reports say so until it has heard from the controller, which is stopped meanwhile: the first is read.
        controller = cluster.processes["controller"]
        os.kill(controller.pid, signal.SIGSTOP)
        try:
            node.start()
            time.sleep(1.5)
        finally:
            os.kill(controller.pid, signal.SIGCONT)
        cluster.wait_until_joined()
        with Control(cluster.controller_grpc) as control:
            wait_for(lambda: all(each.node.state == "up" for each in control.status().nodes))
            refusal = f"reports epoch {1 << 62} where this controller is at"
            wait_for(lambda: refusal in node.log_path.read_text())
            assert control.status().epoch < 100
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
