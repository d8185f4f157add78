"""Every process killed with -9 and started again: the dataset is there and warm; nothing is fetched again."""

from __future__ import annotations

from pathlib import Path

from shoal.devcluster import DevCluster
from tests.cluster.conftest import filesystem
from tests.faults.conftest import add_directory


def test_killed_cluster_is_warm_when_it_is_back(tmp_path: Path, directory_origin: dict[str, bytes]) -> None:
    with DevCluster(nodes=3, data_dir=tmp_path / "cluster", capacity="100MiB") as cluster:
        add_directory(cluster, tmp_path / "origin")
        fs = filesystem(cluster.endpoint)
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
        cluster.kill()
        (tmp_path / "origin").rename(tmp_path / "gone")  # whatever is read from now on is not from the origin
        cluster.start()
        fs = filesystem(cluster.endpoint)
        assert fs.ls("", detail=False) == ["set"]
        assert {p: fs.cat(f"set/{p}") for p in directory_origin} == directory_origin
