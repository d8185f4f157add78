"""What streams need is fetched from a real origin in the order of its next use, once, and behind who waits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from shoal.cluster import Cluster
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from shoal.streaming.announce import Announcer
from shoal.wire.stream_post import Cause
from tests.cluster.conftest import S3Dataset, filesystem
from tests.support.origin_faults import Trouble, TroubledOrigin
from tests.support.waiting import wait_for
from tests.support.weed import Weed

COUNT, SIZE = 12, 50_000


class Gate:
    """An origin that answers one range at a time, and only when it is let."""

    def __init__(self, origin: TroubledOrigin) -> None:
        self._origin = origin
        self._may_answer = threading.Semaphore(0)
        self._is_open = threading.Event()
        origin.reset(self._decide)

    def _decide(self, number: int) -> Trouble:
        while not self._is_open.is_set() and not self._may_answer.acquire(timeout=0.02):
            pass
        return Trouble.NONE

    def open(self) -> None:
        self._is_open.set()

    @property
    def answered(self) -> list[int]:
        """Numbers of the objects, in the order in which they were answered."""
        return [int(asked.path.rpartition("/")[2]) for asked in self._origin.asked]


@pytest.fixture(scope="module")
def slow_node() -> Iterator[DevCluster]:
    """One node that fetches one part at a time, so that the order is exact."""
    with DevCluster(nodes=1, capacity="100MiB", node_args=["--fetches", "1"]) as cluster:
        yield cluster


@pytest.fixture
def gated(s3: Weed, slow_node: DevCluster, request: pytest.FixtureRequest) -> Iterator[tuple[S3Dataset, Gate]]:
    with TroubledOrigin(s3.endpoint_url) as origin:
        name = request.node.name.replace("_", "-")[:40].strip("-")
        dataset = S3Dataset(name, s3, origin.endpoint_url)
        dataset.put({f"{n:02}": bytes([n]) * SIZE for n in range(COUNT)})
        dataset.add(slow_node)
        # An origin is opened at its first use, in a thread, and what begins meanwhile is fetched as it comes.
        filesystem(slow_node.endpoint).cat_file(f"{name}/{COUNT - 1}")
        gate = Gate(origin)
        try:
            yield dataset, gate
        finally:
            gate.open()


class Reader:
    """A process's view of the dataset, and announcers for it."""

    def __init__(self, cluster: DevCluster, dataset: S3Dataset) -> None:
        self.name = dataset.name
        self.fs: ShoalFileSystem = filesystem(cluster.endpoint)
        self.cluster = Cluster(cluster.endpoint, use_local=False)
        record = self.cluster.dataset(dataset.name)
        self.snapshot = self.cluster.snapshot(record.snapshot)

    def announcer(self, *needs: tuple[int, float]) -> Announcer:
        found = Announcer(self.cluster, self.snapshot, replicas=1)
        found.update(*zip(*needs, strict=True))
        return found

    def cat(self, number: int) -> bytes:
        data = self.fs.cat_file(f"{self.name}/{number:02}")
        assert isinstance(data, bytes)
        return data

    def metric(self, name: str) -> float:
        (address,) = (node.address for node in self.cluster.map.nodes)
        lines = self.cluster.transport.get(address, "/metrics").body.decode().splitlines()
        (value,) = (line.split()[1] for line in lines if line.startswith(f"{name} "))
        return float(value)

    def waits_for(self, name: str, value: float) -> Callable[[], bool]:
        return lambda: self.metric(name) == value


def test_two_streams_are_filled_in_the_order_of_the_next_use(
    slow_node: DevCluster, gated: tuple[S3Dataset, Gate]
) -> None:
    dataset, gate = gated
    reader = Reader(slow_node, dataset)
    first = reader.announcer((0, 0.0), (1, 100.0), (2, 200.0), (3, 300.0), (4, 400.0))
    wait_for(reader.waits_for("shoal_node_fetches", 1))
    second = reader.announcer((5, 150.0), (3, 50.0), (6, 350.0), (1, 380.0))
    wait_for(reader.waits_for("shoal_node_needed_bytes", 7 * SIZE))
    assert reader.metric("shoal_node_streams") == 2
    gate.open()
    wait_for(reader.waits_for("shoal_node_needed_bytes", 0))
    assert gate.answered == [0, 3, 1, 5, 2, 6, 4], "each once, and in this order"
    assert [reader.cat(n) for n in range(7)] == [bytes([n]) * SIZE for n in range(7)]
    assert len(gate.answered) == 7, "they were all here"
    first.close()
    second.close()
    wait_for(reader.waits_for("shoal_node_streams", 0))


def test_a_newer_post_puts_what_is_not_begun_into_another_order(
    slow_node: DevCluster, gated: tuple[S3Dataset, Gate]
) -> None:
    dataset, gate = gated
    reader = Reader(slow_node, dataset)
    announcer = reader.announcer(*((n, 100.0 * n) for n in range(10)))
    wait_for(reader.waits_for("shoal_node_fetches", 1))
    announcer.update([9, 8, 7], [1.0, 2.0, 3.0])
    wait_for(reader.waits_for("shoal_node_needed_bytes", 3 * SIZE))
    gate.open()
    wait_for(reader.waits_for("shoal_node_needed_bytes", 0))
    wait_for(reader.waits_for("shoal_node_fills", 0))
    assert [n for n in gate.answered if n > 1] == [9, 8, 7], "0 was under way, 1 had been begun"
    announcer.close()


def test_a_reader_goes_before_what_is_needed(slow_node: DevCluster, gated: tuple[S3Dataset, Gate]) -> None:
    dataset, gate = gated
    reader = Reader(slow_node, dataset)
    announcer = reader.announcer(*((n, 0.001 * n) for n in range(8)))
    wait_for(reader.waits_for("shoal_node_needed_bytes", 8 * SIZE))
    wait_for(reader.waits_for("shoal_node_fetches", 1))
    begun = reader.metric("shoal_node_fills")
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(reader.cat(10)))
    thread.start()
    wait_for(reader.waits_for("shoal_node_fills", begun + 1))
    gate.open()
    thread.join(20)
    wait_for(reader.waits_for("shoal_node_needed_bytes", 0))
    assert found == [bytes([10]) * SIZE]
    assert gate.answered == [0, 10, *range(1, 8)]
    announcer.close()


def test_waits_are_counted_at_one_node(slow_node: DevCluster, gated: tuple[S3Dataset, Gate]) -> None:
    dataset, gate = gated
    gate.open()
    reader = Reader(slow_node, dataset)
    (node,) = reader.cluster.map.nodes
    name = f'shoal_node_stream_wait_seconds_total{{cause="origin",node="{node.id}"}}'
    announcer = reader.announcer((0, 0.0))
    for _ in range(3):
        announcer.waited(Cause.ORIGIN, node.id, 0.5)
    announcer.waited(Cause.ORIGIN, "nobody", 7.0)
    announcer.close()
    wait_for(reader.waits_for(name, 1.5))
    wait_for(reader.waits_for('shoal_node_stream_wait_seconds_total{cause="origin",node=""}', 7.0))


def test_an_announcer_is_never_the_trainers_trouble() -> None:
    """Nobody answers, the numbers are nonsense: calls return, and the end comes soon."""
    with DevCluster(nodes=1, capacity="10MiB") as cluster:
        opened = Cluster(cluster.node_endpoints[0], use_local=False)
    announcer = Announcer(opened, np.zeros(0), 1)  # type: ignore[arg-type] # no snapshot at all
    announcer.update([1, 2], [0.0, float("nan")])
    announcer.waited(Cause.OTHER, "x", -1.0)
    since = time.monotonic()
    announcer.close()
    assert time.monotonic() - since < 20
