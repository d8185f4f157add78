"""Shards move to their owners: what is planned, and what four nodes do of it without an origin."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal import shard_client
from shoal.cluster_map import NodeState
from shoal.errors import NodeUnavailable, OriginUnavailable
from shoal_cachenode import rebalance, whereabouts
from shoal_cachenode.fill import Fill
from shoal_cachenode.library import ShardSpec
from shoal_cachenode.node import CacheNode
from shoal_cachenode.rebalance import left_to_hand_over, plan
from tests.support.minicluster import MiniCluster

OBJECTS = {f"o{n}": bytes((n * 7 + i) % 251 for i in range(300)) for n in range(40)}


def masks(count: int) -> st.SearchStrategy[np.ndarray]:
    return st.lists(st.booleans(), min_size=count, max_size=count).map(lambda bits: np.array(bits, np.bool_))


@settings(deadline=None)
@given(st.integers(0, 50).flatmap(lambda n: st.tuples(masks(n), masks(n), st.lists(masks(n), max_size=4))))
def test_plan_is_what_is_owned_and_lacked_and_held_by_somebody(
    found: tuple[np.ndarray, np.ndarray, list[np.ndarray]],
) -> None:
    owned, held, others = found
    planned = plan(owned, held, {str(i): mask for i, mask in enumerate(others)}).tolist()
    assert planned == [i for i in range(len(owned)) if owned[i] and not held[i] and any(mask[i] for mask in others)]


@settings(deadline=None)
@given(
    st.integers(0, 30).flatmap(lambda n: st.tuples(masks(n), st.lists(st.tuples(masks(n), masks(n)), max_size=4))),
    st.integers(1, 3),
)
def test_a_shard_is_handed_over_when_its_owners_hold_it(
    found: tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]], copies: int
) -> None:
    held, peers = found
    owned_by = {str(i): owned for i, (owned, _) in enumerate(peers)}
    elsewhere = {str(i): mask for i, (_, mask) in enumerate(peers)}
    left = left_to_hand_over(held, owned_by, elsewhere, copies).tolist()
    wanted = min(copies, len(peers))
    assert left == [i for i in range(len(held)) if held[i] and sum(o[i] and m[i] for o, m in peers) < wanted]


def test_a_peer_that_did_not_answer_holds_nothing() -> None:
    held = np.array([True, True])
    owned_by = {"a": np.array([True, False]), "b": np.array([False, True])}
    assert left_to_hand_over(held, owned_by, {"a": np.array([True, True])}, 1).tolist() == [1]


@settings(deadline=None)
@given(masks(37))
def test_bits_survive_the_wire(held: np.ndarray) -> None:
    assert whereabouts.unpack(whereabouts.pack(held), 37).tolist() == held.tolist()
    for count in (30, 32, 41):
        if -(-count // 8) != -(-37 // 8):
            with pytest.raises(ValueError, match="do not hold"):
                whereabouts.unpack(whereabouts.pack(held), count)


def eventually(what: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until `what()` holds."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


def read_all(cluster: MiniCluster, node: int = 0) -> None:
    fs = cluster.filesystem(node=node)
    assert {path: fs.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
    for each in cluster.nodes:
        cluster.run(each.fills.settle())


def keys(cluster: MiniCluster, node: CacheNode, *, owned: bool) -> set[bytes]:
    """The shards that a node owns under its map, or those that it has sealed."""
    if not owned:
        return set(node.store.sealed_sizes())
    placement = node.library.placement(cluster.snapshot, cluster.replicas)
    table = cluster.snapshot.shard_table()
    return {table.keys[i].astype("<u8").tobytes() for i in np.flatnonzero(placement.owned_by(node.id))}


def has_all_it_owns(cluster: MiniCluster, node: CacheNode) -> bool:
    return keys(cluster, node, owned=True) <= keys(cluster, node, owned=False)


def test_a_cluster_that_grows_by_three_moves_their_shares_and_asks_the_origin_for_nothing(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=4) as cluster:
        cluster.publish(absent=(1, 2, 3))
        read_all(cluster)
        cluster.origin.is_down = True
        read_before = cluster.origin.bytes_read
        cluster.publish()
        read_all(cluster, node=2)  # at once: nothing has moved yet, or little
        for node in cluster.nodes:
            eventually(lambda node=node: has_all_it_owns(cluster, node))
        assert cluster.origin.bytes_read == read_before
        share = sum(300 * len(keys(cluster, node, owned=True)) for node in cluster.nodes[1:])
        assert sum(node.counters.peer_bytes.value for node in cluster.nodes) == share, "each shard once"


def test_a_second_copy_is_made_from_the_first(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=3, replicas=2) as cluster:
        read_all(cluster)
        assert cluster.origin.bytes_read == 300 * len(OBJECTS)
        cluster.origin.is_down = True
        for node in cluster.nodes:
            cluster.run(wake(node))
        for node in cluster.nodes:
            eventually(lambda node=node: has_all_it_owns(cluster, node))


def test_a_lost_replica_is_made_again_from_the_other(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=4, replicas=2) as cluster:
        read_all(cluster)
        for node in cluster.nodes:
            cluster.run(wake(node))
        for node in cluster.nodes:
            eventually(lambda node=node: has_all_it_owns(cluster, node))
        cluster.origin.is_down = True
        cluster.stop_node(3)
        cluster.publish(absent=(3,))
        for node in cluster.nodes[:3]:
            eventually(lambda node=node: has_all_it_owns(cluster, node))
        cluster.stop_node(2)
        read_all(cluster)


@pytest.mark.parametrize("rate", [1, 0])
@pytest.mark.parametrize("takes_holder", [True, False])
def test_a_reader_of_a_few_bytes_has_them_from_the_peer_while_a_shard_moves(
    tmp_path: Path, rate: int, takes_holder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a byte a second nothing arrives in time; and where nothing is moved readers bring it in, as ever.

    A reader of an older version, which does not say that it takes a name for an answer, gets the bytes through the new
    owner.
    """
    if not takes_holder:
        monkeypatch.setattr(shard_client, "TAKES_HOLDER", {})
    with MiniCluster(tmp_path, OBJECTS, nodes=2, rebalance_rate=rate) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        cluster.origin.is_down = True
        cluster.publish()
        old, new = cluster.nodes
        fs = cluster.filesystem(node=0)
        assert {path: fs.cat_file(f"set/{path}", 70, 100) for path in OBJECTS} == {
            path: data[70:100] for path, data in OBJECTS.items()
        }
        moving = keys(cluster, new, owned=True)
        assert moving
        if not rate:
            cluster.run(new.fills.settle())
            assert (new.counters.relayed_bytes.value, keys(cluster, new, owned=False)) == (0, moving)
            return
        served_through = new.counters.relayed_bytes.value, new.counters.served_through_bytes.value
        if takes_holder:
            assert (new.counters.referrals.value, served_through) == (len(moving), (0, 0))
        else:
            assert (new.counters.referrals.value, served_through) == (0, (30 * len(moving), 30 * len(moving)))
        assert not keys(cluster, new, owned=False)
        assert new.counters.peer_bytes.value <= 64, "one part may be moved at once; the next one waits for a minute"
        read_all(cluster)  # whole parts: these readers bring the shards in
        assert keys(cluster, new, owned=False) == moving
        assert new.counters.peer_bytes.value == 300 * len(moving), "each part once"
        assert old.counters.relayed_bytes.value == 0


def test_a_holder_that_is_gone_is_no_error_of_the_reader(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=2, rebalance_rate=1) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        cluster.publish()
        fs = cluster.filesystem(node=1)
        assert fs.cat_file("set/o0", 70, 100) == OBJECTS["o0"][70:100]
        cluster.stop_node(0)
        assert {path: fs.cat_file(f"set/{path}", 70, 100) for path in OBJECTS} == {
            path: data[70:100] for path, data in OBJECTS.items()
        }


def test_a_holder_that_has_dropped_a_shard_is_no_error_of_the_reader(tmp_path: Path) -> None:
    """The new owner names it all the same; asked again it must see to the bytes by itself."""
    with MiniCluster(tmp_path, OBJECTS, nodes=2, rebalance_rate=1) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        cluster.publish()
        old, new = cluster.nodes
        cluster.run(new.whereabouts.ask(cluster.snapshot.digest))
        path = owned_path(cluster, new)
        for key in keys(cluster, new, owned=True):
            old.store.evict(key)
        assert cluster.filesystem().cat_file(f"set/{path}", 70, 100) == OBJECTS[path][70:100]
        assert new.counters.referrals.value == 1
        assert new.counters.relayed_bytes.value == 0


def test_of_several_holders_each_is_named_for_some_shards(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=4, replicas=3, rebalance_rate=1) as cluster:
        cluster.publish(absent=(3,))
        for node in range(3):  # each owns everything, and fills what it is asked for
            local = cluster.filesystem(node=node, local=True)
            assert {path: local.cat_file(f"set/{path}") for path in OBJECTS} == OBJECTS
            cluster.run(cluster.nodes[node].fills.settle())
        cluster.publish()
        new = cluster.nodes[3]
        served = [node.counters.served_sealed_bytes.value for node in cluster.nodes[:3]]
        fs = cluster.filesystem(node=3, local=True)  # which asks the local owner first
        assert {path: fs.cat_file(f"set/{path}", 70, 100) for path in OBJECTS} == {
            path: data[70:100] for path, data in OBJECTS.items()
        }
        assert new.counters.referrals.value == len(keys(cluster, new, owned=True)) > 10
        assert all(
            node.counters.served_sealed_bytes.value > before
            for node, before in zip(cluster.nodes[:3], served, strict=True)
        )


async def wake(node: CacheNode) -> None:
    node.rebalance.wake(is_due=True)


def test_a_shard_that_its_holder_lost_is_not_fetched_from_the_origin_but_by_who_reads_it(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=2, rebalance_rate=0) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        cluster.publish()
        old, new = cluster.nodes
        digest = cluster.snapshot.digest
        cluster.run(new.whereabouts.ask(digest))
        for key in keys(cluster, new, owned=True):
            old.store.evict(key)
        cluster.origin.is_down = True
        with pytest.raises(OriginUnavailable):  # the holder has it no more, and the origin is all that is left
            cluster.filesystem().cat_file(f"set/{owned_path(cluster, new)}")
        cluster.origin.is_down = False
        read_all(cluster)


def owned_path(cluster: MiniCluster, node: CacheNode) -> str:
    mine = keys(cluster, node, owned=True)
    return next(cluster.snapshot.path(row) for row in range(len(cluster.snapshot)) if cluster.snapshot.key(row) in mine)


def test_without_room_the_rest_stays_where_it_is(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=2, capacity_bytes=300 * 40) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        new = cluster.nodes[1]
        new.store._ledger.capacity_bytes = 300 * 5
        cluster.origin.is_down = True
        cluster.publish()
        eventually(lambda: new.rebalance.short_bytes)
        assert len(keys(cluster, new, owned=False)) == 5
        assert new.rebalance.short_bytes == 300 * (len(keys(cluster, new, owned=True)) - 5)
        read_all(cluster)


def test_a_draining_node_says_what_is_left(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=3) as cluster:
        read_all(cluster)
        cluster.origin.is_down = True
        leaving = cluster.nodes[0]
        held = [keys(cluster, node, owned=False) for node in cluster.nodes]
        assert held[0], "else this shows nothing"
        assert leaving.rebalance.handover_bytes is None
        cluster.publish(states={0: NodeState.DRAINING})
        eventually(lambda: leaving.rebalance.handover_bytes == 0)
        moved = sum(node.counters.rebalanced_bytes.value for node in cluster.nodes)
        gained = sum(len(keys(cluster, node, owned=True) - held[i]) for i, node in enumerate(cluster.nodes))
        assert 300 * len(held[0]) <= moved <= 300 * gained
        cluster.stop_node(0)
        read_all(cluster, node=1)


def test_the_last_owner_takes_what_the_draining_node_holds(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, OBJECTS, nodes=2) as cluster:
        read_all(cluster)
        cluster.origin.is_down = True
        leaving, last = cluster.nodes
        cluster.publish(states={0: NodeState.DRAINING})
        eventually(lambda: leaving.rebalance.handover_bytes == 0)
        assert len(keys(cluster, last, owned=False)) == len(OBJECTS)
        cluster.publish(states={0: NodeState.DRAINING, 1: NodeState.DRAINING})
        assert leaving.rebalance.handover_bytes is None, "what it said was about other owners"


def test_what_could_not_be_moved_is_tried_again_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rebalance, "REPAIR_INTERVAL_S", 0.2)
    fill, failed = CacheNode.fill, list[ShardSpec]()

    async def fails_at_first(node: CacheNode, spec: ShardSpec, *rest: Any, **more: Any) -> Fill:
        if spec not in failed:
            failed.append(spec)
            raise NodeUnavailable("not now")
        return await fill(node, spec, *rest, **more)

    with MiniCluster(tmp_path, OBJECTS, nodes=2) as cluster:
        cluster.publish(absent=(1,))
        read_all(cluster)
        monkeypatch.setattr(CacheNode, "fill", fails_at_first)
        cluster.publish()
        eventually(lambda: has_all_it_owns(cluster, cluster.nodes[1]))
        assert len(failed) == len(keys(cluster, cluster.nodes[1], owned=True))
