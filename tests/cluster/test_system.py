"""What the whole promises: right bytes, one fetch from the origin, warm after a crash, no need of the controller."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset, filesystem
from tests.support.proxy import CountingProxy

ODD_NAMES = (
    "a b",
    "ünïcødé/日本 語",
    "per%20cent",
    "hash#1",
    "q?x=1&y",
    "plus+",
    "deep/" * 40 + "x",
    "dots../..x",
    "'\"$!*[]{}",
)


def read_everything(job: tuple[str, str]) -> dict[str, str]:
    """Digest of each object of a dataset. Runs in processes of its own."""
    endpoint, name = job
    fs = filesystem(endpoint)
    return {path: xxhash.xxh3_64_hexdigest(fs.cat_file(path)) for path in fs.find(name)}


def read_by_eight(endpoint: str, name: str) -> list[dict[str, str]]:
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        return pool.map(read_everything, [(endpoint, name)] * 8, chunksize=1)


def content(seed: int, size_bytes: int) -> bytes:
    import random

    return random.Random(seed).randbytes(size_bytes)


def test_odd_names_and_sizes_are_read_as_they_are(cluster: DevCluster, make_dataset: Callable[..., S3Dataset]) -> None:
    dataset = make_dataset()
    objects = {name: content(i, 1000 + i) for i, name in enumerate(ODD_NAMES)}
    objects |= {f"size-{n}": content(n, n) for n in (0, 1, 8191, 8192, 8193, 16384, 20000)}
    dataset.put(objects)
    dataset.add(cluster, shard_size=8192)
    for endpoint in (cluster.endpoint, cluster.node_endpoints[1]):
        fs = filesystem(endpoint)
        assert {p.removeprefix(f"{dataset.name}/"): fs.cat_file(p) for p in fs.find(dataset.name)} == objects


def test_eight_cold_readers_cost_the_origin_one_reading(
    cluster: DevCluster, make_dataset: Callable[..., S3Dataset], counting_s3: CountingProxy
) -> None:
    dataset = make_dataset(counting_s3.endpoint_url)
    objects = {f"{i}.bin": content(i, 9_000_000) for i in range(6)}
    dataset.put(objects)
    dataset.add(cluster)
    total = sum(map(len, objects.values()))
    counting_s3.reset()
    expected = {f"{dataset.name}/{path}": xxhash.xxh3_64_hexdigest(data) for path, data in objects.items()}
    assert read_by_eight(cluster.endpoint, dataset.name) == [expected] * 8
    assert total <= counting_s3.bytes_from_origin <= 1.01 * total
    counting_s3.reset()
    assert read_by_eight(cluster.endpoint, dataset.name) == [expected] * 8
    assert counting_s3.bytes_from_origin == 0


def test_prefetch_is_a_contract(
    cluster: DevCluster, make_dataset: Callable[..., S3Dataset], counting_s3: CountingProxy
) -> None:
    dataset = make_dataset(counting_s3.endpoint_url)
    objects = {f"{d}/{i}.bin": content(i, 300_000) for d in ("a", "b") for i in range(10)}
    dataset.put(objects)
    dataset.add(cluster, replicas=2)
    counting_s3.reset()
    with Control(cluster.controller_grpc) as control:
        job = control.start_prefetch(dataset.name, "a/")
        *_, job = control.watch_prefetch(job.id)
        assert (job.state, job.reason) == ("done", "")
        assert job.bytes_done == job.bytes_total == 2 * 10 * 300_000
        assert control.dataset(dataset.name).cached_bytes == 10 * 300_000
    assert counting_s3.bytes_from_origin <= 1.05 * 10 * 300_000, "the second copy comes from the first"
    counting_s3.reset()
    fs = filesystem(cluster.endpoint)
    assert all(fs.cat_file(f"{dataset.name}/{p}") == data for p, data in objects.items() if p.startswith("a/"))
    assert counting_s3.bytes_from_origin == 0


def test_refresh_makes_a_new_snapshot_and_old_readers_keep_theirs(
    cluster: DevCluster, make_dataset: Callable[..., S3Dataset]
) -> None:
    dataset = make_dataset()
    dataset.put({"same": b"same", "changes": b"old"})
    dataset.add(cluster)
    old = filesystem(cluster.endpoint)
    assert old.cat(f"{dataset.name}/changes") == b"old"
    dataset.put({"changes": b"new one", "more": b"more"})
    dataset.refresh(cluster)
    new = filesystem(cluster.endpoint)
    assert new.cat(f"{dataset.name}/changes") == b"new one"
    assert not old.exists(f"{dataset.name}/more")
    assert old.cat(f"{dataset.name}/changes") == b"old", "it was cached, so the old snapshot is still readable"


def test_removing_a_dataset_frees_its_bytes(cluster: DevCluster, make_dataset: Callable[..., S3Dataset]) -> None:
    dataset = make_dataset()
    dataset.put({"x": content(1, 500_000)})
    dataset.add(cluster)
    filesystem(cluster.endpoint).cat(f"{dataset.name}/x")
    with Control(cluster.controller_grpc) as control:
        wait_for(lambda: control.dataset(dataset.name).cached_bytes == 500_000)  # nodes report once a second
        before = sum(node.used_bytes for node in control.status().nodes)
        control.remove_dataset(dataset.name)
        wait_for(lambda: sum(node.used_bytes for node in control.status().nodes) == before - 500_000)


def wait_for(condition: Callable[[], bool]) -> None:
    import tenacity

    for attempt in tenacity.Retrying(wait=tenacity.wait_fixed(0.1), stop=tenacity.stop_after_delay(20), reraise=True):
        with attempt:
            assert condition()


@pytest.fixture
def directory_origin(tmp_path: Path) -> dict[str, bytes]:
    objects = {f"{i}.bin": content(i, 400_000) for i in range(12)}
    (tmp_path / "origin").mkdir()
    for path, data in objects.items():
        (tmp_path / "origin" / path).write_bytes(data)
    return objects


def add_directory(cluster: DevCluster, path: Path) -> None:
    with Control(cluster.controller_grpc) as control:
        control.add_dataset("set", f"file://{path}", shard_size=0, replicas=1, storage_options="{}")


def test_killed_cluster_is_warm_when_it_is_back(tmp_path: Path, directory_origin: dict[str, bytes]) -> None:
    with DevCluster(nodes=3, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        cluster.kill()
        (tmp_path / "origin").rename(tmp_path / "gone")  # whatever is read from now on is not from the origin
        cluster.start()
        fs = filesystem(cluster.endpoint)
        assert fs.ls("", detail=False) == ["set"]
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin


def test_without_a_controller_a_new_client_lists_and_reads(tmp_path: Path, directory_origin: dict[str, bytes]) -> None:
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        wait_for(lambda: len(filesystem(cluster.node_endpoints[0]).ls("")) == 1)
        cluster.controller.kill()
        fs = filesystem(cluster.node_endpoints[0])
        assert fs.find("set") == sorted(f"set/{p}" for p in directory_origin)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin, "cold shards too"
        for node in cluster.nodes:
            node.kill()
            node.start()
        fs = filesystem(cluster.node_endpoints[1])
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin, "after a restart of the nodes too"
