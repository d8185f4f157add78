"""An object replaced or removed at the origin under a snapshot: a clear error or the old version, never both."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator

import pytest

from shoal.devcluster import DevCluster
from shoal.errors import OriginChanged, OriginNotFound, ShoalError
from shoal.filesystem import ShoalFileSystem
from tests.cluster.conftest import S3Dataset, filesystem
from tests.support.waiting import wait_for
from tests.support.weed import Weed

SHARD_SIZE = 1 << 20
SIZE = 5 * SHARD_SIZE + 4321


def version(number: int) -> bytes:
    """The object as it was written the n-th time; all of one size: only the version tells them apart."""
    return random.Random(number).randbytes(SIZE)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    with DevCluster(nodes=2, data_dir=tmp_path_factory.mktemp("cluster"), capacity="1GiB") as cluster:
        yield cluster


def make(name: str, s3: Weed, cluster: DevCluster, objects: dict[str, bytes]) -> S3Dataset:
    dataset = S3Dataset(name, s3, s3.endpoint_url)
    dataset.put(objects)
    dataset.add(cluster, shard_size=SHARD_SIZE)
    return dataset


WAYS: dict[str, Callable[[ShoalFileSystem, str], bytes]] = {
    "cat_file": lambda fs, path: bytes(fs.cat_file(path)),
    "open": lambda fs, path: bytes(fs.open(path).read()),
    "open_buffer": lambda fs, path: bytes(fs.open_buffer(path).to_pybytes()),
    "open_buffers": lambda fs, path: b"".join(buffer.to_pybytes() for buffer in fs.open_buffers(path)),
    "cat_ranges": lambda fs, path: b"".join(
        fs.cat_ranges([path] * 2, [0, SIZE // 2], [SIZE // 2, SIZE], on_error="raise")
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_replaced_object_is_named_and_a_refresh_helps(cluster: DevCluster, s3: Weed, way: str) -> None:
    """One shard of the old version is cached, the others are not."""
    dataset = make(f"replaced-{way.replace('_', '-')}", s3, cluster, {"dir/x": version(0), "other": b"other"})
    path = f"{dataset.name}/dir/x"
    fs = filesystem(cluster.endpoint)
    assert fs.cat_file(path, 0, SHARD_SIZE) == version(0)[:SHARD_SIZE]
    dataset.put({"dir/x": version(1)})
    with pytest.raises(OriginChanged, match=r"dir/x.*\n?.*shoal dataset refresh"):
        WAYS[way](fs, path)
    assert fs.cat_file(path, 100, SHARD_SIZE) == version(0)[100:SHARD_SIZE], "what is cached of it is still read"
    assert fs.cat_file(f"{dataset.name}/other") == b"other", "the others are not harmed"
    dataset.refresh(cluster)
    with pytest.raises(OriginChanged):
        WAYS[way](fs, path)
    assert WAYS[way](filesystem(cluster.endpoint), path) == version(1)


def test_whole_old_version_is_read_on_after_the_refresh(cluster: DevCluster, s3: Weed) -> None:
    dataset = make("kept", s3, cluster, {"x": version(0)})
    old = filesystem(cluster.endpoint)
    assert old.cat_file("kept/x") == version(0)
    dataset.put({"x": version(1)})
    dataset.refresh(cluster)
    new = filesystem(cluster.endpoint)
    for _ in range(2):
        assert new.cat_file("kept/x") == version(1)
        assert old.cat_file("kept/x") == version(0)


def test_removed_object_is_named(cluster: DevCluster, s3: Weed) -> None:
    dataset = make("removed", s3, cluster, {"x": version(0), "y": b"y"})
    fs = filesystem(cluster.endpoint)
    fs.ls("removed")
    dataset.s3.rm_file("removed/data/x")
    with pytest.raises((OriginChanged, OriginNotFound), match="x"):
        fs.cat_file("removed/x")
    dataset.refresh(cluster)
    assert filesystem(cluster.endpoint).ls("removed", detail=False) == ["removed/y"]


@pytest.mark.long
def test_replaced_over_and_over_under_readers(cluster: DevCluster, s3: Weed) -> None:
    """Whatever is read whole is one version, and the one that the snapshot lists."""
    dataset = make("over", s3, cluster, {"x": version(0)})
    e_tags = {filesystem(cluster.endpoint).info("over/x")["version"]: 0}
    over = threading.Event()
    failures: list[str] = []
    whole: list[int] = []

    def read() -> None:
        draw = random.Random(threading.get_ident())
        while not over.is_set():
            fs = filesystem(cluster.endpoint)
            listed = fs.info("over/x")["version"]
            way = draw.choice(list(WAYS))
            try:
                found = WAYS[way](fs, "over/x")
            except OriginChanged:
                continue
            except ShoalError as error:
                failures.append(f"{way}: {error!r}")
                continue
            if found != version(e_tags[listed]):
                failures.append(f"{way} gave another version than {e_tags[listed]}")
            whole.append(e_tags[listed])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 6):
            dataset.put({"x": version(number)})
            e_tags[dataset.s3.info("over/data/x")["ETag"].strip('"')] = number
            dataset.refresh(cluster)
            wait_for(lambda number=number: number in whole or bool(failures))  # type: ignore[misc]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(range(1, 6)) <= set(whole)
