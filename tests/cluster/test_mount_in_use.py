"""A mount whose reads no node sees keeps its dataset in use all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal_cachenode.node import CacheNode
from tests.support.minicluster import MiniCluster
from tests.support.mounted import Mounted
from tests.support.waiting import wait_for

CONTENTS = {"large": bytes(3 << 20), "small": b"small"}


@pytest.mark.parametrize("name", CONTENTS)
def test_an_open_file_and_a_mount_of_small_files_are_a_use(tmp_path: Path, name: str) -> None:
    """The kernel has read it all, and no node is asked for a byte any more."""
    with MiniCluster(tmp_path / "c", {name: CONTENTS[name]}, part_size=1 << 20, shard_size=4 << 20) as cluster:
        environment = {"SHOAL_ENDPOINT": cluster.nodes[0].address, "SHOAL_SOCKET": str(tmp_path / "none")}
        with Mounted("set", environment, ["--renew-every", "0.2"]) as mount, (mount.path / name).open("rb") as file:
            assert file.read() == CONTENTS[name]
            for _ in range(2):
                _wait_for_use(cluster.nodes[0])


def _wait_for_use(node: CacheNode) -> None:
    node.usage._last_used.clear()
    wait_for(lambda: node.usage.last_used_s("set") > 0)
