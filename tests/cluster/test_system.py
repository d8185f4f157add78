"""What the whole promises: right bytes, one fetch from the origin, warm after a crash, no need of the controller."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable

import xxhash

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from tests.cluster.conftest import S3Dataset, filesystem
from tests.support.proxy import CountingProxy
from tests.support.waiting import wait_for

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
    with multiprocessing.get_context("fork").Pool(8) as pool:
        return pool.map(read_everything, [(endpoint, name)] * 8, chunksize=1)


def content(seed: int, size_bytes: int) -> bytes:
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
