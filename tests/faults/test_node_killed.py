"""A cache node killed with -9 under eight readers: no error, no wrong byte, and how long the longest read took.

The long version gives the figures of docs/failures.md.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.devcluster import DevCluster
from tests.support.readers import harm_under_readers


def kill(cluster: DevCluster, node: int) -> None:
    cluster.nodes[node].kill()


def start_again(cluster: DevCluster, node: int) -> None:
    cluster.nodes[node].start()
    cluster.wait_until_joined()


@pytest.mark.parametrize("replicas", [2, 1])
def test_killed_under_eight_readers(tmp_path: Path, replicas: int) -> None:
    """With a replica the bytes come from it; without, through another node from the origin."""
    harm_under_readers(tmp_path, "killed", kill, start_again, replicas=replicas)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", [2, 1])
def test_killed_twenty_times(tmp_path: Path, replicas: int) -> None:
    harm_under_readers(tmp_path, "killed", kill, start_again, replicas=replicas, times=21)
