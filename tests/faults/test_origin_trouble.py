"""An S3 origin that is slow, throttles, fails and breaks off: readers get the right bytes or a clear error in time.

A real S3 server behind a proxy that answers as one in trouble does, real nodes, real reads. What is cached is served
all the while; what is asked of the origin stays bounded.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from shoal import shard_client
from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.errors import OriginUnavailable
from shoal.filesystem import ShoalFileSystem
from shoal.shard_client import ShardAt
from shoal.transport import Transport
from shoal_cachenode.whereabouts import ANSWER_AGE_S
from tests.support.moves import Fetched, Shards
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.waiting import wait_for
from tests.support.weed import Weed

#: Short, so that a test of giving up is; the defaults are 20 s and 12 attempts.
PATIENCE = {"read_s": 4, "idle_s": 1, "connect_s": 1, "tries": 6}
OBJECTS = {f"{n:02}": random.Random(n).randbytes(700_000 + n) for n in range(40)}


class Place:
    """A dataset ``set`` over a bucket behind a troubled proxy, on one node, and ``well`` over the same without it."""

    def __init__(self, cluster: DevCluster, origin: TroubledOrigin) -> None:
        self.cluster = cluster
        self.origin = origin
        self._unread = iter(sorted(OBJECTS))
        self.fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)

    def fresh(self) -> str:
        """An object that nobody has read yet."""
        return next(self._unread)

    def check(self, name: str, dataset: str = "set") -> None:
        assert self.fs.cat_file(f"{dataset}/{name}") == OBJECTS[name]

    def metric(self, name: str) -> float:
        text = Transport().get(self.cluster.node_endpoints[0][7:], "/metrics").body.decode()
        (line,) = [each for each in text.splitlines() if each.startswith((f'{name}{{dataset="set"}}', f"{name} "))]
        return float(line.split()[-1])


@pytest.fixture(scope="module")
def place(s3: Weed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    directory: Path = tmp_path_factory.mktemp("trouble")
    s3.create_bucket("trouble")
    s3.create_bucket("well")
    filesystem = s3.filesystem()
    for name, data in OBJECTS.items():
        filesystem.pipe_file(f"trouble/{name}", data)
    filesystem.pipe_file("well/w", OBJECTS["00"])
    with TroubledOrigin(s3.endpoint_url) as origin, DevCluster(nodes=1, data_dir=directory, capacity="1GiB") as cluster:
        options = s3.storage_options | {"endpoint_url": origin.endpoint_url, "patience": PATIENCE}
        with Control(cluster.controller_grpc) as control:
            for name, url, given in (("set", "s3://trouble", options), ("well", "s3://well", s3.storage_options)):
                control.add_dataset(name, url, shard_size=0, replicas=1, storage_options=json.dumps(given))
        yield Place(cluster, origin)
        origin.always(Trouble.NONE)
        origin.go_on.set()
        wait_for(
            lambda: Transport().get(cluster.node_endpoints[0][7:], "/metrics").body.count(b"shoal_node_fills 0.0") == 1
        )
        assert not cluster.deaths.qsize()


@pytest.mark.parametrize("trouble", [each for each in Trouble if each is not Trouble.NONE], ids=lambda each: each.name)
def test_a_read_outlives_trouble_that_passes(place: Place, trouble: Trouble) -> None:
    place.origin.go_on.clear()
    name = place.fresh()
    place.origin.first(2, trouble)
    place.check(name)
    ranges = [each.range for each in place.origin.asked]
    assert len(ranges) == 3, "the two that failed and one more"
    if trouble in (Trouble.RESET, Trouble.SHORT, Trouble.STALL):
        starts = [int(each.removeprefix("bytes=").partition("-")[0]) for each in ranges]
        assert starts[1] <= starts[2], "from the byte reached"
        # A reset takes back what was sent and not yet read, on a busy machine all of it.
        assert trouble is Trouble.RESET or starts[1] > 0
    place.origin.go_on.set()


def test_trouble_that_stays_is_a_clear_error_in_time_and_the_cached_is_served(place: Place) -> None:
    cached, unread = place.fresh(), place.fresh()
    place.origin.always(Trouble.NONE)
    place.check(cached)
    place.origin.always(Trouble.SLOW_DOWN)
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        failing = pool.submit(place.fs.cat_file, f"set/{unread}")
        reads = 0
        while not failing.done():
            place.check(cached)
            reads += 1
        with pytest.raises(OriginUnavailable, match=rf"s3://trouble/{unread} \(HTTP 503.*try later; tried \d+ times"):
            failing.result()
    assert reads > 10, "all the while"
    assert time.monotonic() - began < 20, "its patience is 4 s"
    assert len(place.origin.asked) <= PATIENCE["tries"]
    place.origin.always(Trouble.NONE)
    place.check(unread)


def test_many_readers_of_an_origin_that_is_down_cause_no_storm(place: Place) -> None:
    names = [place.fresh() for _ in range(8)]
    place.origin.always(Trouble.REFUSED)

    def read(name: str) -> str:
        try:
            place.fs.cat_file(f"set/{name}")
        except OriginUnavailable as error:
            return str(error)
        return "served"

    began = time.monotonic()
    with ThreadPoolExecutor(32) as pool:
        said = list(pool.map(read, names * 4))
    assert time.monotonic() - began < 40
    assert all("tried" in each and "s3://trouble/" in each for each in said), said
    assert len(place.origin.asked) <= PATIENCE["tries"] * len(names) * 2, "not once a reader"
    place.origin.always(Trouble.NONE)
    for name in names:
        place.check(name)


def test_throttling_narrows_the_window_and_health_widens_it(place: Place) -> None:
    names = [place.fresh() for _ in range(8)]
    throttles = PATIENCE["tries"] - 1  # all of them may hit one read
    place.origin.reset(lambda number: Trouble.SLOW_DOWN if number < throttles else Trouble.NONE)
    throttled = place.metric("shoal_node_origin_throttles_total")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(place.check, names))
    assert place.metric("shoal_node_origin_throttles_total") == throttled + throttles
    assert place.metric("shoal_node_origin_window") < 16
    assert place.metric("shoal_node_origin_reads") == 0


def test_an_origin_that_hangs_keeps_no_other_dataset_waiting(place: Place) -> None:
    place.origin.go_on.clear()
    names = [place.fresh() for _ in range(6)]
    place.origin.always(Trouble.STALL)
    with ThreadPoolExecutor(6) as pool:
        hanging = [pool.submit(place.fs.cat_file, f"set/{name}") for name in names]
        wait_for(lambda: len(place.origin.asked) >= 2)
        assert place.fs.cat_file("well/w") == OBJECTS["00"]
        assert not all(each.done() for each in hanging)
        place.origin.always(Trouble.NONE)
        place.origin.go_on.set()
        assert [each.result() for each in hanging] == [OBJECTS[name] for name in names]


def test_what_another_node_filled_in_the_owners_stead_is_served_while_the_origin_is_gone(tmp_path: Path) -> None:
    origin = tmp_path / "origin"
    origin.mkdir()
    for name, data in OBJECTS.items():
        (origin / name).write_bytes(data)
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="1GiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{origin}", shard_size=0, replicas=1, storage_options="{}")
        fs = ShoalFileSystem(endpoint=cluster.endpoint, local=False, skip_instance_cache=True)
        shards, names = Shards(cluster, 1), sorted(OBJECTS)
        known, late = (int(row) for row in np.flatnonzero(shards.owned(0))[:2])
        assert fs.cat_file(f"set/{names[known]}") == OBJECTS[names[known]]  # the owner has asked who holds what by now
        row = ShardAt(shards.digest, late, 0, len(OBJECTS[names[late]]))
        one, other = (cluster.nodes[n].ready for n in (0, 1))
        Transport().get(str(other["http"]), row.target, shard_client.avoiding([str(one["id"])]))
        wait_for(lambda: bool(shards.held(1)[late]))
        time.sleep(2 * ANSWER_AGE_S)  # the owner, another process, takes what it heard so lately for new
        origin.rename(tmp_path / "away")
        assert fs.cat_file(f"set/{names[late]}") == OBJECTS[names[late]]
        assert Fetched.by(cluster, 0).from_peers == len(OBJECTS[names[late]])
