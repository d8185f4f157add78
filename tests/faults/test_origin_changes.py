"""Objects that change at the origin under a snapshot: never two versions in one read, and a clear error that says what
to do. With a real S3 server and with files; one object is several shards, a shard several parts.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import OriginChanged, ShoalError
from shoal.filesystem import ShoalFileSystem
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.waiting import wait_for
from tests.support.weed import Weed

PART = 8 << 20
SHARD = 2 * PART
SIZE = 2 * SHARD + 1000  # three shards, the first two of two parts
OLD, NEW = random.Random(1).randbytes(SIZE), random.Random(2).randbytes(SIZE)
SMALL = b"an object that stays as it is"
CHANGED = r"/a (has|was) .* since .*shoal dataset refresh"
_names = itertools.count()
MIB = 1 << 20
SMALL_SIZE = 5 * MIB + 4321  # six shards of a MiB


def version(number: int) -> bytes:
    """What was written the n-th time; all of one size: only the version tells them apart."""
    return random.Random(number).randbytes(SMALL_SIZE)


WAYS: dict[str, Callable[[ShoalFileSystem, str], bytes]] = {
    "cat_file": lambda fs, path: bytes(fs.cat_file(path)),
    "open": lambda fs, path: bytes(fs.open(path).read()),
    "open_buffer": lambda fs, path: bytes(fs.open_buffer(path).to_pybytes()),
    "open_buffers": lambda fs, path: b"".join(buffer.to_pybytes() for buffer in fs.open_buffers(path)),
    "cat_ranges": lambda fs, path: b"".join(
        fs.cat_ranges([path] * 2, [0, SMALL_SIZE // 2], [SMALL_SIZE // 2, SMALL_SIZE], on_error="raise")
    ),
}


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

    def version(self, name: str) -> str:
        """As a snapshot lists it."""
        return str(self._filesystem.info(f"{self._bucket}/{name}")["ETag"].strip('"'))


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
    """Registered with ``a`` as `data` and ``b`` as `SMALL`."""

    def __init__(self, cluster: DevCluster, bucket: Bucket, data: bytes = OLD, *, shard_size: int = SHARD) -> None:
        self.name = f"set-{next(_names)}"
        self._cluster = cluster
        bucket.put("a", data)
        bucket.put("b", SMALL)
        options = bucket.options
        with Control(cluster.controller_grpc) as control:
            control.add_dataset(self.name, bucket.url, shard_size=shard_size, replicas=1, storage_options=options)

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
    with pytest.raises(OriginChanged, match=CHANGED):
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
        assert new.ls(dataset.name, detail=False) == [dataset.b]
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


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_read_refuses_before_and_after_the_refresh(cluster: DevCluster, s3: Weed, way: str) -> None:
    """One shard of the old version is cached, the others are not."""
    bucket = Objects(s3, s3.endpoint_url)
    dataset = Dataset(cluster, bucket, version(0), shard_size=MIB)
    old = dataset.reader()
    assert old.cat_file(dataset.a, 0, MIB) == version(0)[:MIB]
    bucket.put("a", version(1))
    with pytest.raises(OriginChanged, match=CHANGED):
        WAYS[way](old, dataset.a)
    dataset.refresh()
    with pytest.raises(OriginChanged):
        WAYS[way](old, dataset.a)
    assert WAYS[way](dataset.reader(), dataset.a) == version(1)


def test_whole_old_version_is_read_on_beside_the_new_one(cluster: DevCluster, s3: Weed) -> None:
    bucket = Objects(s3, s3.endpoint_url)
    dataset = Dataset(cluster, bucket, version(0), shard_size=MIB)
    old = dataset.reader()
    assert old.cat_file(dataset.a) == version(0)
    bucket.put("a", version(1))
    dataset.refresh()
    new = dataset.reader()
    for _ in range(2):
        assert new.cat_file(dataset.a) == version(1)
        assert old.cat_file(dataset.a) == version(0)


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


@pytest.mark.long
def test_replaced_over_and_over_under_readers(cluster: DevCluster, s3: Weed) -> None:
    """Whatever is read whole is one version, and the one that the snapshot lists."""
    bucket = Objects(s3, s3.endpoint_url)
    dataset = Dataset(cluster, bucket, version(0), shard_size=MIB)
    numbers = {bucket.version("a"): 0}
    over = threading.Event()
    failures: list[str] = []
    whole: list[int] = []

    def read() -> None:
        draw = random.Random(threading.get_ident())
        while not over.is_set():
            fs = dataset.reader()
            listed = fs.info(dataset.a)["version"]
            way = draw.choice(list(WAYS))
            try:
                found = WAYS[way](fs, dataset.a)
            except OriginChanged:
                continue
            except ShoalError as error:
                failures.append(f"{way}: {error!r}")
                continue
            if found != version(numbers[listed]):
                failures.append(f"{way} gave another version than {numbers[listed]}")
            whole.append(numbers[listed])

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 6):
            bucket.put("a", version(number))
            numbers[bucket.version("a")] = number
            dataset.refresh()
            wait_for(lambda number=number: number in whole or bool(failures))  # type: ignore[misc]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert failures == []
    assert set(range(1, 6)) <= set(whole)
