"""A cache node stopped with SIGSTOP under eight readers: its kernel accepts connections, and nothing answers.

No error, no wrong byte, and how long the longest read took; when it goes on it is used again. The long version gives
the figures of docs/failures.md.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from shoal.devcluster import DevCluster
from tests.support.readers import harm_under_readers


def stop(cluster: DevCluster, node: int) -> None:
    os.kill(cluster.nodes[node].pid, signal.SIGSTOP)


def go_on(cluster: DevCluster, node: int) -> None:
    os.kill(cluster.nodes[node].pid, signal.SIGCONT)
    cluster.wait_until_joined()


@pytest.mark.parametrize("replicas", [2, 1])
def test_stopped_under_eight_readers(tmp_path: Path, replicas: int) -> None:
    """With a replica the bytes come from it; without, through another node from the origin."""
    harm_under_readers(tmp_path, "stopped", stop, go_on, replicas=replicas, is_used_again=True)


def test_stopped_local_node(tmp_path: Path) -> None:
    """The readers' own node, asked at its Unix socket: what they have not mapped comes over the network."""
    harm_under_readers(tmp_path, "stopped-local", stop, go_on, replicas=2, local_node=0)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("replicas", [2, 1])
def test_stopped_twenty_times(tmp_path: Path, replicas: int) -> None:
    harm_under_readers(tmp_path, "stopped", stop, go_on, replicas=replicas, times=21)
