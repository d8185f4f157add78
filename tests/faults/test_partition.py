"""A machine cut off: its packets vanish, no connection is refused or reset. Everybody else reads on.

The long version gives the figures of docs/failures.md.
"""

from __future__ import annotations

import random
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.cli.control import Control
from tests.support import netns
from tests.support.netns import SpreadCluster
from tests.support.readers import SANE_S, Readers, Stalls, report, served, warm, within
from tests.support.waiting import wait_for

OBJECTS = {f"{n}.bin": random.Random(n).randbytes((1 << 20) - 1000 * n) for n in range(24)}
READERS, PAUSE_S = 4, 0.005
LEASE_S = 5.0
#: What each node sends before the first harm, so that there are calm reads to compare with.
CALM_BYTES = 32 << 20


@pytest.fixture(scope="module", autouse=True)
def _may_make_namespaces() -> None:
    reason = netns.why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SpreadCluster]:
    """Three nodes, two copies of everything, all sealed."""
    (tmp_path / "origin").mkdir()
    for path, data in OBJECTS.items():
        (tmp_path / "origin" / path).write_bytes(data)
    with SpreadCluster(nodes=3, data_dir=tmp_path / "cluster", capacity="1GiB") as cluster:
        with Control(cluster.controller_grpc) as control:
            origin = f"file://{tmp_path}/origin"
            control.add_dataset("set", origin, shard_size=0, replicas=2, storage_options="{}")
        warm(cluster, OBJECTS, 2)
        yield cluster


def cut_off_node(cluster: SpreadCluster, times: int) -> None:
    """Cut a node off and let it join again, `times` over, each node in turn, under readers."""
    cut_at = []
    with Readers(cluster, OBJECTS, READERS, pause_s=PAUSE_S) as readers:
        sent = [served(cluster, node) for node in range(3)]
        wait_for(lambda: all(served(cluster, node) > sent[node] + CALM_BYTES for node in range(3)))
        for number in range(times):
            cut_at.append(time.monotonic())
            with cluster.network.without(f"node-{number % 3}"):
                wait_for(lambda number=number: state(cluster, number % 3) == "down", 2 * SANE_S)  # type: ignore[misc]
            wait_for(lambda number=number: state(cluster, number % 3) == "up", 2 * SANE_S)  # type: ignore[misc]
            back = served(cluster, number % 3)
            wait_for(lambda number=number, back=back: served(cluster, number % 3) > back, 2 * SANE_S)  # type: ignore[misc]
        heard = readers.stop()
    assert [error for each in heard for error in each.errors] == []
    assert sum(each.wrong for each in heard) == 0
    during = [within(heard, at, at + LEASE_S) for at in cut_at]
    worst = [max(read.seconds for read in reads) for reads in during]
    report(
        "node-cut-off-replicas-2",
        times=times,
        before=Stalls.of(within(heard, 0.0, cut_at[0] - 0.01)),
        during=Stalls.of([read for reads in during for read in reads]),
        worst_ms=sorted(round(1000 * each) for each in worst),
    )
    assert max(worst) < SANE_S


def state(cluster: SpreadCluster, node: int) -> str:
    with Control(cluster.controller_grpc) as control:
        found = (known.node for known in control.status().nodes)
        return next(str(each.state) for each in found if each.id == cluster.node_ids[node])


def reported_at(cluster: SpreadCluster) -> list[float]:
    """When the controller last heard of each node (`time.monotonic`)."""
    with Control(cluster.controller_grpc) as control:
        return [time.monotonic() - node.seconds_since_report for node in control.status().nodes]


def epoch(cluster: SpreadCluster) -> int:
    with Control(cluster.controller_grpc) as control:
        return int(control.status().epoch)


def test_node_cut_off_under_readers(cluster: SpreadCluster) -> None:
    """No error and no wrong byte; the node is given up when its lease ends, and used again when it is back."""
    cut_off_node(cluster, 1)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_node_cut_off_nine_times(cluster: SpreadCluster) -> None:
    cut_off_node(cluster, 9)


def test_controller_cut_off_within_the_lease_moves_nothing(cluster: SpreadCluster) -> None:
    """When all are heard again and the map is the old one, no lease has ended."""
    before = epoch(cluster)
    with Readers(cluster, OBJECTS, READERS, pause_s=PAUSE_S) as readers:
        with cluster.network.without("controller"):
            time.sleep(LEASE_S / 2)  # no wait for anything: so long the harm lasts
        joined_s = time.monotonic()
        wait_for(lambda: all(at > joined_s for at in reported_at(cluster)), SANE_S)
        heard = readers.stop()
    assert epoch(cluster) == before
    assert [error for each in heard for error in each.errors] == []
    assert sum(each.wrong for each in heard) == 0


@pytest.mark.long
def test_controller_cut_off_for_long(cluster: SpreadCluster) -> None:
    """Reads go on for as long as it takes; when it is back, so are all nodes, and nothing was fetched again."""
    fetched = [served_from_origin(cluster, node) for node in range(3)]
    with Readers(cluster, OBJECTS, READERS, pause_s=PAUSE_S) as readers:
        with cluster.network.without("controller"):
            time.sleep(LEASE_S + 3.0)  # no wait for anything: so long the harm lasts
        wait_for(lambda: all(state(cluster, node) == "up" for node in range(3)), 2 * SANE_S)
        heard = readers.stop()
    assert [error for each in heard for error in each.errors] == []
    assert sum(each.wrong for each in heard) == 0
    assert [served_from_origin(cluster, node) for node in range(3)] == fetched


def served_from_origin(cluster: SpreadCluster, node: int) -> float:
    """Bytes that a node has fetched from the origin."""
    with urllib.request.urlopen(f"{cluster.node_endpoints[node]}/metrics", timeout=SANE_S) as answer:
        lines = answer.read().decode().splitlines()
    return float(
        next(line.split()[1] for line in lines if line.startswith('shoal_node_fetched_bytes_total{from="origin"}'))
    )
