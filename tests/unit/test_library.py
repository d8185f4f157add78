"""Snapshots that a node fetches: nothing is left of a fetch that failed or was cut short, or is held for no use."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.cluster_map import ClusterMap
from shoal.errors import ShardCorrupt, SnapshotNotFound
from shoal.transport import Transport
from shoal_cachenode.library import Knowledge
from tests.support.minicluster import MiniCluster


def test_left_over_of_a_fetch_goes_with_the_next_orders(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x" * 100}) as cluster:
        left = cluster.data_dir(0) / "snapshots" / f"{cluster.snapshot.digest}.fetching"
        left.write_bytes(b"half")
        cluster.publish()
        assert not left.exists()
        assert left.with_suffix(".arrow").exists()


def test_fetch_of_a_damaged_snapshot_leaves_nothing(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x" * 100}) as cluster:
        path = cluster.data_dir(0) / "snapshots" / f"{'0' * 32}.arrow"
        body = path.with_name(f"{cluster.snapshot.digest}.arrow").read_bytes()
        with pytest.raises(ShardCorrupt):
            cluster.nodes[0].library._put("0" * 32, path, body)
        assert [each.stem for each in path.parent.iterdir()] == [cluster.snapshot.digest]


def test_placements_of_a_snapshot_go_with_it(tmp_path: Path) -> None:
    """They would keep its file mapped."""
    with MiniCluster(tmp_path, {"o": b"x" * 100}, nodes=2) as cluster:
        cluster.filesystem().cat_file("set/o")
        libraries = [node.library for node in cluster.nodes]
        assert any(library._placements for library in libraries)
        for node in cluster.nodes:
            cluster.run(node.apply(Knowledge(ClusterMap(9, node.library.knowledge.cluster_map.nodes), ())))
        assert not any(library._placements for library in libraries)


def test_orders_that_are_kept_late_leave_what_newer_ones_fetched(tmp_path: Path) -> None:
    """A drive that stalls keeps the old orders' clearing up waiting until the next ones have come."""
    with MiniCluster(tmp_path, {"o": b"x" * 100}, nodes=2) as cluster:
        first, second = (node.library for node in cluster.nodes)
        orders, digest = first.knowledge, cluster.snapshot.digest
        first.apply(Knowledge(ClusterMap(9, orders.cluster_map.nodes), ()))
        first.keep()
        path = cluster.data_dir(0) / "snapshots" / f"{digest}.arrow"
        assert not path.exists()
        assert cluster.run(first.snapshot_path(digest, orders)) == path, "fetched from the other node"
        first.keep()
        assert path.exists()
        first.apply(orders)
        assert cluster.run(first.snapshot(digest)).digest == digest
        assert second.knowledge == orders


def test_snapshot_whose_file_somebody_removed_is_fetched_anew(tmp_path: Path) -> None:
    with MiniCluster(tmp_path, {"o": b"x" * 100}, nodes=2) as cluster:
        library, digest = cluster.nodes[0].library, cluster.snapshot.digest
        cluster.run(library.snapshot_path(digest)).unlink()
        library._snapshots.clear()
        url = f"/v1/snapshots/{digest}"
        with pytest.raises(SnapshotNotFound, match="ask another node"):
            Transport().get(cluster.nodes[0].address, url)
        assert cluster.run(library.snapshot(digest)).digest == digest
        assert Transport().get(cluster.nodes[0].address, url).body
