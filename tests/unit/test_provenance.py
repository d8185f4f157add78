"""Who gave the bytes of a read, and where that node had them from; asked of real nodes over a scripted origin."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal import provenance
from shoal.cluster import Cluster
from shoal.filesystem import ShoalFileSystem
from shoal.provenance import Seen
from shoal.wire.stream_post import Cause
from tests.support.minicluster import MiniCluster

DATA = bytes(range(256)) * 40  # three shards


def what(seen: provenance.Observation) -> set[tuple[Cause, str, int]]:
    assert all(each.seconds >= 0 for each in seen.causes)
    return {(each.cause, each.node_id, each.bytes) for each in seen.causes}


def bytes_of(seen: provenance.Observation) -> int:
    return sum(each.bytes for each in seen.causes)


def test_cold_from_the_origin_then_from_the_nodes_cache(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": DATA[:4000]}) as cluster:
        node = cluster.nodes[0].id
        fs = cluster.filesystem()
        with provenance.observed() as seen:
            assert fs.cat_file("set/o") == DATA[:4000]
        assert what(seen) == {(Cause.ORIGIN, node, 4000)}
        cluster.run(cluster.nodes[0].fills.settle())
        with provenance.observed() as seen:
            assert fs.cat_file("set/o", 10, 60) == DATA[10:60]
        assert what(seen) == {(Cause.PEER, node, 50)}
        before = list(seen.causes)
        fs.cat_file("set/o")
        assert seen.causes == before, "nobody observes any more"


def test_the_local_node(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": DATA[:4000]}) as cluster:
        node = cluster.nodes[0].id
        fs = cluster.filesystem(local=True)
        with provenance.observed() as seen:
            fs.cat_file("set/o")
        assert what(seen) == {(Cause.ORIGIN, node, 4000)}, "the local node had to fetch it"
        cluster.run(cluster.nodes[0].fills.settle())
        for _ in range(2):  # its descriptor, then the map
            with provenance.observed() as seen:
                assert fs.cat_file("set/o") == DATA[:4000]
            assert what(seen) == {(Cause.LOCAL, node, 4000)}


def test_pieces_that_threads_read_are_seen_too(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": DATA}, nodes=3) as cluster:
        fs = cluster.filesystem()
        with provenance.observed() as seen:
            assert fs.cat_file("set/o") == DATA
        assert bytes_of(seen) == len(DATA)
        assert len(seen.causes) == 3
        assert {each.cause for each in seen.causes} == {Cause.ORIGIN}


def test_batches(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {f"{n}": DATA[n : n + 500] for n in range(6)}) as cluster:
        fs = cluster.filesystem()
        paths = [f"set/{n}" for n in range(6)]

        def read() -> provenance.Observation:
            with provenance.observed() as seen:
                found = fs.cat_ranges(paths, [0] * 6, [100] * 6, on_error="raise")
            assert found == [DATA[n : n + 100] for n in range(6)]
            assert bytes_of(seen) == 600
            return seen

        assert {each.cause for each in read().causes} == {Cause.ORIGIN}
        cluster.run(cluster.nodes[0].fills.settle())
        assert {each.cause for each in read().causes} == {Cause.PEER}


def test_a_node_that_reads_from_a_peer_says_so(tmp_path: Path) -> None:
    """Two copies: the second owner has them from the first."""
    with MiniCluster(tmp_path, {"o": DATA[:4000]}, nodes=2, replicas=2, rebalance_rate=0) as cluster:
        opened = Cluster(cluster.nodes[0].address, use_local=False)
        first = opened.placement(cluster.snapshot, 2).first(0).id
        (second,) = (node for node in cluster.nodes if node.id != first)
        target = f"/v1/snapshots/{cluster.snapshot.digest}/rows/0/shards/0"

        def status(address: str, **headers: str) -> str:
            return opened.transport.get(address, target, headers).headers["cache-status"]

        assert status(second.address) == "shoal-cachenode; fwd=miss; detail=peer"
        cluster.run(second.fills.settle())
        assert status(second.address) == "shoal-cachenode; hit"


def test_a_node_that_fails_is_seen_with_what_it_gave(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": DATA[:4000]}, nodes=2) as cluster:
        fs = cluster.filesystem()
        fs.info("set/o")
        opened = Cluster(cluster.nodes[0].address, use_local=False)
        first = opened.placement(cluster.snapshot, 1).first(0).id
        index = [node.id for node in cluster.nodes].index(first)
        reader: ShoalFileSystem = cluster.filesystem(node=1 - index)
        cluster.stop_node(index)
        with provenance.observed() as seen:
            assert reader.cat_file("set/o") == DATA[:4000]
        failed, served = seen.causes
        assert (failed.cause, failed.node_id, failed.bytes) == (Cause.OTHER, first, 0)
        assert (served.node_id, served.bytes) == (cluster.nodes[1 - index].id, 4000)


def test_observing_within_observing_and_after_an_error() -> None:
    with provenance.observed() as outer:
        with pytest.raises(KeyError), provenance.observed() as inner:
            assert provenance.current() is inner
            raise KeyError
        assert provenance.current() is outer
        outer.add(Cause.DECODE, "", 0.0, 0)
    assert provenance.current() is None
    assert isinstance(outer.causes[0], Seen)
