"""The controller killed: new clients find, list and read, cold shards too, and nodes may restart meanwhile."""

from __future__ import annotations

from pathlib import Path

from shoal.devcluster import DevCluster
from tests.cluster.conftest import filesystem
from tests.faults.conftest import add_directory


def test_without_a_controller_a_new_client_lists_and_reads(tmp_path: Path, directory_origin: dict[str, bytes]) -> None:
    with DevCluster(nodes=2, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        cluster.controller.kill()
        fs = filesystem(cluster.node_endpoints[0])
        assert fs.find("set") == sorted(f"set/{p}" for p in directory_origin)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin, "cold shards too"
        for node in cluster.nodes:
            node.kill()
            node.start()
        fs = filesystem(cluster.node_endpoints[1])
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin, "after a restart of the nodes too"
