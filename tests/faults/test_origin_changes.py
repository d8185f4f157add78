"""Objects that change at the origin under a snapshot: never two versions in one read, and a clear error that says what
to do. With a real S3 server and with files; one object is several shards, a shard several parts.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import OriginChanged
from shoal.filesystem import ShoalFileSystem
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.weed import Weed

PART = 8 << 20
SHARD = 2 * PART
SIZE = 2 * SHARD + 1000  # three shards, the first two of two parts
OLD, NEW = random.Random(1).randbytes(SIZE), random.Random(2).randbytes(SIZE)
SMALL = b"an object that stays as it is"
_names = itertools.count()


class Bucket(Protocol):
    """Objects ``a`` and ``b`` below a prefix of their own."""

    url: str
    options: str

    def put(self, name: str, data: bytes) -> None: ...

    def replace(self, name: str, data: bytes) -> None:
        """As `put`, but nobody ever sees a half of it."""
        ...

    def remove(self, name: str) -> None: ...


class Files:
    options = "{}"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir()
        self.url = str(directory)
        self._second = 1_700_000_000

    def put(self, name: str, data: bytes) -> None:
        self._write(self._directory / name, data)  # in place: a reader that has it open sees the new bytes

    def replace(self, name: str, data: bytes) -> None:
        aside = self._directory.with_name("aside")
        self._write(aside, data)
        aside.replace(self._directory / name)

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self._second += 1
        os.utime(path, (self._second, self._second))

    def remove(self, name: str) -> None:
        (self._directory / name).unlink()


class Objects:
    def __init__(self, weed: Weed, endpoint_url: str) -> None:
        bucket = f"changes-{next(_names)}"
        weed.create_bucket(bucket)
        self._filesystem, self._bucket = weed.filesystem(), bucket
        self.url = f"s3://{bucket}"
        self.options = json.dumps(weed.storage_options | {"endpoint_url": endpoint_url})

    def put(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(f"{self._bucket}/{name}", data)

    replace = put

    def remove(self, name: str) -> None:
        self._filesystem.rm_file(f"{self._bucket}/{name}")


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(nodes=2, capacity="1GiB") as cluster:
        yield cluster
        assert not cluster.deaths.qsize()


@pytest.fixture(params=["s3", "file"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    if request.param == "file":
        return Files(tmp_path / "origin")
    weed: Weed = request.getfixturevalue("s3")
    return Objects(weed, weed.endpoint_url)


class Dataset:
    """Registered with ``a`` as `OLD` and ``b`` as `SMALL`."""

    def __init__(self, cluster: DevCluster, bucket: Bucket) -> None:
        self.name = f"set-{next(_names)}"
        self._cluster = cluster
        bucket.put("a", OLD)
        bucket.put("b", SMALL)
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(self.name, bucket.url, shard_size=SHARD, replicas=1, storage_options=bucket.options)

    def reader(self) -> ShoalFileSystem:
        """One that pins the newest snapshot of now."""
        fs = ShoalFileSystem(endpoint=self._cluster.endpoint, local=False, skip_instance_cache=True)
        fs.ls(self.name)
        return fs

    def refresh(self) -> None:
        with Control(self._cluster.controller_grpc) as control:
            control.refresh_dataset(self.name)

    @property
    def a(self) -> str:
        return f"{self.name}/a"

    @property
    def b(self) -> str:
        return f"{self.name}/b"


def refused(fs: ShoalFileSystem, path: str, start: int = 0, end: int = SIZE) -> None:
    with pytest.raises(OriginChanged, match=r"/a (has|was) .* since .*shoal dataset refresh"):
        fs.cat_file(path, start, end)


@pytest.mark.parametrize("change", ["rewritten", "shorter", "removed"])
def test_a_changed_object_is_an_error_and_after_a_refresh_the_new_one(
    cluster: DevCluster, bucket: Bucket, change: str
) -> None:
    dataset = Dataset(cluster, bucket)
    old = dataset.reader()
    if change == "removed":
        bucket.remove("a")
    else:
        bucket.put("a", NEW if change == "rewritten" else NEW[:1000])
    refused(old, dataset.a)
    refused(old, dataset.a, SHARD + 5, SHARD + 10)
    assert old.cat_file(dataset.b) == SMALL, "an object that stays is none of its business"
    dataset.refresh()
    new = dataset.reader()
    if change == "removed":
        assert not new.exists(dataset.a)
    else:
        assert new.cat_file(dataset.a) == (NEW if change == "rewritten" else NEW[:1000])
    refused(old, dataset.a)


def test_what_is_cached_of_the_old_one_is_read_on_and_never_beside_the_new(cluster: DevCluster, bucket: Bucket) -> None:
    """One shard is cached when the object changes: it is served; a read that needs another one too is refused."""
    dataset = Dataset(cluster, bucket)
    old = dataset.reader()
    assert old.cat_file(dataset.a, SHARD, 2 * SHARD) == OLD[SHARD : 2 * SHARD]
    bucket.put("a", NEW)
    assert old.cat_file(dataset.a, SHARD + 7, 2 * SHARD - 7) == OLD[SHARD + 7 : 2 * SHARD - 7]
    refused(old, dataset.a)
    refused(old, dataset.a, SHARD - 1, SHARD + 1)
    dataset.refresh()
    new = dataset.reader()
    assert new.cat_file(dataset.a) == NEW
    assert old.cat_file(dataset.a, SHARD, 2 * SHARD) == OLD[SHARD : 2 * SHARD], "old readers finish on the old one"
    assert new.cat_file(dataset.a, SHARD - 10, SHARD + 10) == NEW[SHARD - 10 : SHARD + 10]


def test_an_object_that_keeps_changing_while_it_is_read(cluster: DevCluster, bucket: Bucket) -> None:
    """Every read gives one version's bytes or says that it changed, whatever the moment."""
    dataset = Dataset(cluster, bucket)
    stop = threading.Event()

    def change() -> None:
        for data in itertools.cycle((NEW, OLD)):
            if stop.is_set():
                return
            bucket.replace("a", data)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(6):
            dataset.refresh()
            fs = dataset.reader()
            try:
                assert fs.cat_file(dataset.a) in (OLD, NEW)
            except OriginChanged as error:
                assert "shoal dataset refresh" in str(error)
    finally:
        stop.set()
        thread.join()
    bucket.put("a", NEW)
    dataset.refresh()
    assert dataset.reader().cat_file(dataset.a) == NEW


def test_a_change_between_two_parts_of_a_running_fill(s3: Weed, cluster: DevCluster) -> None:
    """The origin hangs in one part; meanwhile the object is rewritten. Nothing of the fill is served after that."""
    with TroubledOrigin(s3.endpoint_url) as origin:
        bucket = Objects(s3, origin.endpoint_url)
        dataset = Dataset(cluster, bucket)
        fs = dataset.reader()
        origin.first(1, Trouble.STALL)
        failures: list[Exception] = []

        def read() -> None:
            try:
                fs.cat_file(dataset.a, 0, SHARD)
            except OriginChanged as error:
                failures.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        while not origin.asked:
            thread.join(0.01)
        bucket.put("a", NEW)
        origin.go_on.set()
        thread.join(60)
        assert len(failures) == 1 and "/a has changed since" in str(failures[0])
        refused(fs, dataset.a, 0, 10)
        dataset.refresh()
        assert dataset.reader().cat_file(dataset.a) == NEW
