"""``Cache-Control: no-store``: bytes from the cache where they are there, else past it, and nothing is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shoal import shard_client
from shoal.connection import Answer
from shoal.errors import NotCached, OriginChanged, OriginUnavailable
from shoal.transport import Transport
from shoal.wire import batch, cache_status
from shoal.wire.batch import ShardRange
from tests.support.minicluster import DictOrigin, MiniCluster
from tests.support.waiting import wait_for

PART, SHARD = 64, 256
PLAIN = bytes(n * 7 % 251 for n in range(1000))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., MiniCluster]:
    def made(nodes: int = 1, **options: Any) -> MiniCluster:
        return MiniCluster(tmp_path / "c", {"o": PLAIN}, nodes=nodes, part_size=PART, shard_size=SHARD, **options)

    return made


def ask(cluster: MiniCluster, node: int, start: int, end: int, *, kept: bool = False, **more: str) -> Answer:
    """Bytes [start, end) of the first shard, from one node."""
    headers = {"Range": f"bytes={start}-{end - 1}", **({} if kept else shard_client.NO_STORE), **more}
    target = f"/v1/snapshots/{cluster.snapshot.digest}/rows/0/shards/0"
    return Transport().get(cluster.nodes[node].address, target, headers)


def is_empty(cluster: MiniCluster) -> bool:
    return all(node.store.used_bytes == 0 and node.fills.count == 0 for node in cluster.nodes)


@pytest.mark.parametrize("nodes", [1, 3])
@pytest.mark.parametrize(("start", "end"), [(0, 6), (100, 101), (60, 200), (0, SHARD)])
def test_just_these_bytes_come_from_the_origin(
    make: Callable[..., MiniCluster], nodes: int, start: int, end: int
) -> None:
    with make(nodes) as cluster:
        for node in range(nodes):  # its owner, and those that relay to it
            answer = ask(cluster, node, start, end)
            assert answer.body == PLAIN[start:end]
            assert answer.headers["cache-status"] in (cache_status.FROM_ORIGIN, cache_status.FROM_PEER)
        assert cluster.origin.bytes_read == nodes * (end - start)
        assert is_empty(cluster)


@pytest.mark.parametrize("nodes", [2, 3])
def test_a_second_owner_keeps_nothing_either_nor_does_the_first(make: Callable[..., MiniCluster], nodes: int) -> None:
    with make(nodes, replicas=2) as cluster:
        for node in range(nodes):
            assert ask(cluster, node, 10, 20).body == PLAIN[10:20]
        assert cluster.origin.bytes_read == nodes * 10
        assert is_empty(cluster)


def test_what_is_sealed_is_sent(make: Callable[..., MiniCluster]) -> None:
    with make(2) as cluster:
        assert cluster.filesystem().cat_file("set/o") == PLAIN
        read = cluster.origin.bytes_read
        for node in range(2):
            assert ask(cluster, node, 10, 20).body == PLAIN[10:20]
        assert cluster.origin.bytes_read == read


class Held(DictOrigin):
    """An origin that gives nothing before `go` is set."""

    def __init__(self) -> None:
        super().__init__({"o": PLAIN})
        self.asked, self.go = threading.Event(), threading.Event()

    def stream(self, path: str, version: str, start: int, end: int, sink: Any) -> None:
        self.asked.set()
        assert self.go.wait(30)
        super().stream(path, version, start, end, sink)


def test_what_fills_is_waited_for_and_not_read_twice(make: Callable[..., MiniCluster]) -> None:
    with make() as cluster, ThreadPoolExecutor(2) as threads:
        cluster.origin = origin = Held()
        reader = threads.submit(ask, cluster, 0, 0, SHARD, kept=True)
        assert origin.asked.wait(20)
        head = threads.submit(ask, cluster, 0, 70, 80)
        origin.go.set()
        assert (reader.result(20).body, head.result(20).body) == (PLAIN[:SHARD], PLAIN[70:80])
        wait_for(lambda: len(cluster.nodes[0].store.sealed_sizes()) == 1)
        assert origin.bytes_read == SHARD


def test_the_origins_failures_are_said(make: Callable[..., MiniCluster]) -> None:
    with make(2) as cluster:
        cluster.origin.is_down = True
        for node in range(2):
            with pytest.raises(OriginUnavailable):
                ask(cluster, node, 0, 6)
        cluster.origin.is_down = False
        cluster.origin.versions["o"] = "2"
        for node in range(2):
            with pytest.raises(OriginChanged, match="refresh"):
                ask(cluster, node, 0, 6)


def test_it_waits_for_the_origins_budget(make: Callable[..., MiniCluster]) -> None:
    with make(fetches=1) as cluster, ThreadPoolExecutor(8) as threads:
        cluster.origin = origin = Held()
        budget = cluster.nodes[0].budget_of("set")
        found = [threads.submit(ask, cluster, 0, start, start + 4) for start in range(0, 160, 20)]
        wait_for(lambda: budget._waiting == 7)
        assert budget.in_flight == 1
        origin.go.set()
        assert b"".join(each.result(20).body for each in found) == b"".join(
            PLAIN[start : start + 4] for start in range(0, 160, 20)
        )


def test_it_is_a_use_of_the_dataset_and_no_read_of_the_shard(make: Callable[..., MiniCluster]) -> None:
    with make() as cluster:
        node = cluster.nodes[0]
        ask(cluster, 0, 0, 6, kept=True)
        wait_for(lambda: len(node.store.sealed_sizes()) == 1)
        (key,) = node.store.sealed_sizes()
        node.usage.prefetched(key, SHARD)
        node.usage._last_used.clear()
        ask(cluster, 0, 0, 6)
        assert node.usage.unread_bytes == SHARD and node.usage.last_used_s("set") > 0
        ask(cluster, 0, 0, 6, kept=True)
        assert node.usage.unread_bytes == 0


def test_a_head_is_a_use_of_the_dataset_and_fetches_nothing(make: Callable[..., MiniCluster]) -> None:
    with make() as cluster:
        node = cluster.nodes[0]
        node.usage._last_used.clear()
        fs = cluster.filesystem()
        reader = fs.object_reader(fs.cluster.dataset("set"), cluster.snapshot, 0)
        told: set[str] = set()
        assert (reader.tell_of_use(told), reader.tell_of_use(told)) == (1, 0)
        assert node.usage.last_used_s("set") > 0
        assert cluster.origin.bytes_read == 0 and is_empty(cluster)


def test_a_batch_may_say_it_too(make: Callable[..., MiniCluster]) -> None:
    with make(2) as cluster:
        ranges = [ShardRange(0, index, 5, 10) for index in range(3)]
        body = batch.encode(ranges)
        target = f"/v1/snapshots/{cluster.snapshot.digest}/ranges"
        answer = Transport().get(cluster.nodes[0].address, target, shard_client.NO_STORE, method="POST", content=body)
        assert answer.body[:30] == b"".join(PLAIN[SHARD * n + 5 : SHARD * n + 15] for n in range(3))
        assert cluster.origin.bytes_read == 30 and is_empty(cluster)


def test_with_only_if_cached_nothing_passes(make: Callable[..., MiniCluster]) -> None:
    with make() as cluster:
        with pytest.raises(NotCached):
            ask(cluster, 0, 0, 6, **{"Cache-Control": "only-if-cached, no-store"})
        assert is_empty(cluster) and not cluster.origin.reads


@pytest.mark.parametrize("text", ["no-store", "No-Store", "max-age=0, no-store", " no-store ,x"])
def test_it_is_read_as_the_rfc_has_it(make: Callable[..., MiniCluster], text: str) -> None:
    with make() as cluster:
        assert ask(cluster, 0, 0, 6, kept=True, **{"Cache-Control": text}).body == PLAIN[:6]
        assert is_empty(cluster)
