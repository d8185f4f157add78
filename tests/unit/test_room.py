"""Who gets room on a real node's drive: idle and live datasets, pins, quotas, and the allowance of prefetches."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shoal import snapshot
from shoal.cluster_map import ClusterMap
from shoal.datasets import DatasetRecord
from shoal.shards import Key
from shoal.snapshot import Snapshot
from shoal.wire.stream_post import StreamPost
from shoal_cachenode import room, whereabouts
from shoal_cachenode.library import Knowledge, KnownDataset, find_shard
from shoal_cachenode.node import CacheNode
from shoal_cachenode.partial_file import PartialFile
from shoal_cachenode.scheduler import Urgency
from shoal_cachenode.store import StoreFull
from tests.support.minicluster import MiniCluster
from tests.support.waiting import wait_for

SIZE, COUNT = 1000, 8
NAMES = ("a", "b")
OBJECTS = {f"{name}/{n}": bytes([65 + n]) * SIZE for name in NAMES for n in range(COUNT)}


class Unpublished(MiniCluster):
    """Without the dataset of its own."""

    def publish(self, *, absent: tuple[int, ...] = ()) -> None:
        pass


class Node:
    """One node with room for `COUNT` objects, and two datasets of as many."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.start()

    def start(self, **settings: Any) -> None:
        settings.setdefault("recent_bytes", 0)  # what passed through comes from the origin again
        self.cluster = Unpublished(self.directory, OBJECTS, capacity_bytes=COUNT * SIZE, **settings)
        self.node = self.cluster.nodes[0]
        self.snapshots: dict[str, Snapshot] = {}
        for name in NAMES:
            rows = [(path, SIZE, "1") for path in OBJECTS if path.startswith(name)]
            path = snapshot.write(
                self.directory / "node0" / "snapshots",
                origin=f"memory://{name}",
                identity=name,
                key_prefix="",
                shard_size=4096,
                rows=rows,
            )
            self.snapshots[name] = Snapshot.open(path)
        self.set()

    def set(self, **policies: dict[str, Any]) -> None:
        """Publish both datasets, with policies by name."""
        known = []
        for name, opened in self.snapshots.items():
            digest = opened.digest
            record = DatasetRecord(
                name, f"memory://{name}", "", 4096, 1, digest, (digest,), COUNT, COUNT * SIZE, **policies.get(name, {})
            )
            known.append(KnownDataset(record, {}))
        epoch = self.node.library.knowledge.cluster_map.epoch + 1
        cluster_map = ClusterMap(epoch, (self.node.describe(),))
        self.cluster.run(self.node.apply(Knowledge(cluster_map, tuple(known), cluster_id="test")))

    def read(self, name: str, count: int = COUNT) -> None:
        fs = self.cluster.filesystem()
        for n in range(count):
            assert fs.cat_file(f"{name}/{name}/{n}") == OBJECTS[f"{name}/{n}"]
        self.cluster.run(self.node.fills.settle())

    def hear_from(self, peer: str, holds_all: bool) -> None:
        """As if a peer had just said what it holds."""
        epoch = self.node.library.knowledge.cluster_map.epoch
        for opened in self.snapshots.values():
            bits = whereabouts.pack(np.full(opened.shard_count(), holds_all))
            known = whereabouts.Known(epoch, time.monotonic(), {peer: bits})
            self.node.whereabouts._known[opened.digest] = known

    def make_room_for_move(self, name: str, row: int) -> bool:
        known = self.node.library.knowledge.dataset_of(self.snapshots[name].digest)
        spec = find_shard(known, self.snapshots[name], row, 0)
        return self.cluster.run(self.node.room.make(spec, Urgency.REBALANCE))

    def prefetch(self, name: str, index: int) -> None:
        self.cluster.run(self._prefetch(name, index))

    async def _prefetch(self, name: str, index: int) -> None:
        opened = self.snapshots[name]
        row = opened.find(f"{name}/{index}")
        assert row is not None
        spec = find_shard(self.node.library.knowledge.dataset_of(opened.digest), opened, row, 0)
        fill = await self.node.fill(spec, self.node.order(spec), Urgency.PREFETCH)
        await fill.sealed

    def rest(self, name: str, hours: float = 2.0) -> None:
        """Nobody used a dataset for so long."""
        self.node.usage._last_used[name] = time.time() - 3600 * hours

    def held(self, name: str) -> int:
        holdings = self.node.inventory.known()[self.snapshots[name].digest]
        assert self.node.store.used_bytes == SIZE * len(self.node.store.sealed_sizes()) <= COUNT * SIZE
        return int(holdings.held.sum())

    def dropped(self) -> dict[str, int]:
        counts = self.node.counters.dropped_bytes.by_cause
        return {step: count.value for step, count in counts.items() if count.value}


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    yield node
    node.cluster.close()


def test_live_dataset_stays_and_the_other_passes_through(node: Node) -> None:
    node.read("a")
    node.read("b")
    node.read("b")
    assert (node.held("a"), node.held("b"), node.dropped()) == (COUNT, 0, {})
    assert node.cluster.origin.bytes_read == 3 * COUNT * SIZE


def test_idle_dataset_gives_way_as_far_as_is_needed(node: Node) -> None:
    node.read("a")
    node.rest("a")
    node.read("b", 3)
    assert (node.held("a"), node.held("b"), node.dropped()) == (COUNT - 3, 3, {"idle": 3 * SIZE})


def test_reads_in_every_way_keep_a_dataset_alive(node: Node) -> None:
    node.read("a")
    for reads in (
        lambda: node.cluster.filesystem().cat_file("a/a/0"),
        lambda: node.cluster.filesystem().cat_ranges(["a/a/1", "a/a/2"], [0, 0], [9, 9]),
        lambda: node.cluster.filesystem(local=True).open_buffer("a/a/3"),
    ):
        node.rest("a")
        reads()
        node.read("b", 1)
        assert node.held("a") == COUNT


def test_last_use_outlives_a_restart(node: Node) -> None:
    node.read("a")
    node.rest("a")
    node.cluster.close()
    node.start()
    node.read("b", 2)
    assert (node.held("a"), node.held("b")) == (COUNT - 2, 2), "still idle"
    node.cluster.close()
    node.start(idle_after_s=3600)
    node.read("a", 3)
    assert node.held("b") == 2, "still live"


def test_what_a_running_stream_will_read_stays_and_its_dataset_is_live(node: Node) -> None:
    node.read("a")
    node.rest("a")
    rows = np.array([0, 5], np.uint32)
    post = StreamPost(rows, rows * 0, rows * 0, np.array([0, 9000], np.uint32))
    digest, streams = node.snapshots["a"].digest, node.node.streams
    assert node.cluster.run(streams.hear(digest, "0" * 32, post)) == b"\xc0", "both are here"
    node.read("b", 2)
    assert (node.held("a"), node.held("b")) == (COUNT, 0), "it is in use"
    wait_for(lambda: digest in node.node.inventory.needed)
    node.rest("a")
    node.read("b")
    holdings = node.node.inventory.known()[digest]
    assert np.flatnonzero(holdings.held).tolist() == [0, 5], "even of a dataset that is idle"
    node.cluster.run(
        streams.hear(digest, "0" * 32, StreamPost(rows[:0], rows[:0], rows[:0], rows[:0], is_leaving=True))
    )
    wait_for(lambda: not node.node.inventory.needed)
    node.rest("a")
    node.read("b")
    assert node.held("b") == COUNT


def test_what_a_stream_needs_takes_the_room_of_idle_datasets(node: Node) -> None:
    node.read("a")
    node.rest("a")
    rows = np.arange(3, dtype=np.uint32)
    post = StreamPost(rows, rows * 0, rows * 0, rows * 100)
    assert node.cluster.run(node.node.streams.hear(node.snapshots["b"].digest, "0" * 32, post)) == b"\x00"
    wait_for(lambda: node.held("b") == 3)
    node.node.inventory.of(node.snapshots["a"])
    assert (node.held("a"), node.held("b"), node.dropped()) == (COUNT - 3, 3, {"idle": 3 * SIZE})


def test_needs_of_a_dataset_that_finds_no_room_pause(node: Node) -> None:
    node.read("a")
    rows = np.arange(3, dtype=np.uint32)
    post = StreamPost(rows, rows * 0, rows * 0, rows * 100)
    node.cluster.run(node.node.streams.hear(node.snapshots["b"].digest, "0" * 32, post))
    wait_for(lambda: "b" in node.node.streams._paused_until)
    wait_for(lambda: node.node.fills.count == 0)
    assert (node.held("a"), node.held("b")) == (COUNT, 0), "a is in use"
    assert node.node.streams.missing_bytes == 3 * SIZE


def test_pinned_dataset_keeps_everything(node: Node) -> None:
    node.set(a={"pinned": True})
    node.read("a")
    node.rest("a")
    node.read("b")
    assert (node.held("a"), node.held("b")) == (COUNT, 0)


def test_quota_is_kept_while_idle_and_claimed_while_live(node: Node) -> None:
    node.set(a={"quota_bytes": 5 * SIZE}, b={"quota_bytes": 2 * SIZE})
    node.read("a")
    node.read("b")
    assert (node.held("a"), node.held("b")) == (6, 2), "a gave way to b's quota, and no further"
    node.rest("a")
    node.read("b")
    assert (node.held("a"), node.held("b")) == (5, 3), "idle, it keeps what it is guaranteed"
    assert node.dropped() == {"over_quota": 2 * SIZE, "idle": SIZE}


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_surplus_copies_go_first_once_their_owner_has_them(node: Node, is_elsewhere: bool) -> None:
    node.read("a")
    before = node.node.library.knowledge
    other = dataclasses.replace(before.cluster_map.nodes[0], id="other", address="127.0.0.1:1")
    joined = dataclasses.replace(
        before.cluster_map, epoch=before.cluster_map.epoch + 1, nodes=(*before.cluster_map.nodes, other)
    )
    node.cluster.run(node.node.apply(dataclasses.replace(before, cluster_map=joined)))
    node.hear_from("other", is_elsewhere)
    opened = node.snapshots["b"]
    placement = node.node.library.placement(opened, 1)
    mine = [opened.path(n).split("/")[1] for n in range(COUNT) if placement.first(n).id == node.node.id]
    surplus = COUNT - int(node.node.library.placement(node.snapshots["a"], 1).owned_by(node.node.id).sum())
    assert 0 < len(mine) <= surplus, "there is room for them, if the surplus goes"
    for index in mine:
        if is_elsewhere:
            node.prefetch("b", int(index))
        else:
            with pytest.raises(StoreFull):
                node.prefetch("b", int(index))
    gone = len(mine) if is_elsewhere else 0
    assert (node.held("a"), node.dropped()) == (COUNT - gone, {"surplus": SIZE * gone} if gone else {})


def test_a_move_pushes_an_idle_dataset_out_for_a_live_one_only(node: Node) -> None:
    node.read("a")
    node.rest("a")
    node.rest("b")
    assert not node.make_room_for_move("b", 0)
    assert node.held("a") == COUNT, "else two idle ones would push each other out for ever"
    node.node.usage.used("b")
    assert node.make_room_for_move("b", 0)
    assert node.held("a") == COUNT - 1


def test_prefetches_that_nobody_reads_push_out_only_their_allowance(node: Node) -> None:
    node.read("a")
    node.rest("a")
    room = node.cluster.run(node.node.room.for_prefetch("b"))
    assert room == COUNT * SIZE // 2
    for index in range(COUNT // 2):
        node.prefetch("b", index)
    assert node.node.usage.unread_bytes == room
    assert node.cluster.run(node.node.room.for_prefetch("b")) == 0
    with pytest.raises(StoreFull, match=r"wait for their first reader, and only .* \(--unread-share\)"):
        node.prefetch("b", COUNT // 2)
    assert (node.held("a"), node.held("b")) == (4, 4)
    node.cluster.close()
    node.start()
    assert node.node.usage.unread_bytes == room, "known after a restart too"
    node.read("b", 3)
    assert node.node.usage.unread_bytes == SIZE
    node.rest("a")
    node.prefetch("b", COUNT // 2)
    assert (node.held("a"), node.held("b")) == (3, 5)
    node.read("b")
    assert (node.held("a"), node.held("b"), node.node.usage.unread_bytes) == (0, COUNT, 0), "a reader has no such bound"


def test_what_nobody_goes_on_with_is_dropped_unless_this_node_owns_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "ABANDONED_AFTER_S", 0.2)
    with MiniCluster(tmp_path, {f"o{n}": bytes(300) for n in range(20)}, nodes=2) as cluster:
        node, opened = cluster.nodes[0], cluster.snapshot
        cluster.run(node.holdings(opened))
        keys = [opened.key(row) for row in range(len(opened))]
        for key in (*keys, NO_SHARD := bytes(16)):
            partial = node.store.begin(key, 300)
            partial.write_part(0, bytes(64))
            if key != keys[0]:
                node.store.suspend(partial)
        cluster.run(node.room.drop_abandoned())
        assert len(node.store.reserved_sizes()) == 21, "somebody may go on with them yet"
        time.sleep(0.25)
        cluster.run(node.room.drop_abandoned())
        placement = node.library.placement(opened, 1)
        mine = {key for key, owned in zip(keys, placement.owned_by(node.id), strict=True) if owned}
        assert 0 < len(mine) < 20
        assert set(node.store.reserved_sizes()) == mine | {keys[0]}, "the fill that runs stays, whoever owns its shard"
        assert NO_SHARD.hex() not in {path.name for path in (cluster.data_dir(0) / "filling").iterdir()}
        node.store.suspend(partial_of(node, keys[0]))
        cluster.publish(absent=(0,))  # this node drains, say: what it has begun is for others to go on with
        time.sleep(0.25)
        cluster.run(node.room.drop_abandoned())
        assert node.store.reserved_bytes == 0


def partial_of(node: CacheNode, key: Key) -> PartialFile:
    partial = node.store._partials[key]
    assert partial is not None
    return partial
