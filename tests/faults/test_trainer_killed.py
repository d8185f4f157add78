"""A trainer, or one of its workers, killed with -9 in the middle of reads: nothing of it stays, nobody else notices.

No moment is left to chance: where a death is to meet a request under way, the process is stopped first and looked at.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import psutil
import pyarrow as pa
import pytest

from shoal.cli.control import Control
from shoal.devcluster import DevCluster
from shoal.filesystem import ShoalFileSystem
from tests.cluster.conftest import S3Dataset
from tests.support.processes import (
    DEADLINE_S,
    WAYS,
    Child,
    Footprint,
    Reads,
    Say,
    bytes_under_way,
    cycle,
    files_of,
    is_running,
    source_digest,
)
from tests.support.proxy import CountingProxy
from tests.support.waiting import wait_for
from tests.support.weed import Weed

torch_data = pytest.importorskip("torch.utils.data", reason="PyTorch is not installed")

#: More than all socket buffers on the way take, so that a reader that stops leaves its node in the middle of a body.
SHARD_SIZE = 12 << 20
REMOTE = 1  # the node that is not on the trainer's machine


class World:
    """Two nodes, one of them local, a warm dataset, and a directory of our own for temporary files."""

    def __init__(self, cluster: DevCluster, origin: Path, temporary: Path) -> None:
        self.cluster = cluster
        self.temporary = temporary
        self.expected = {
            (f"set/{path.name}", way): source_digest(path, way)
            for path in sorted(origin.iterdir())
            for way in WAYS
            if path.suffix == ".arrow" or way != "arrow"
        }
        self.jobs = list(self.expected)

    def filesystem(self, *, local: bool = True, endpoint: str = "") -> ShoalFileSystem:
        socket_path = str(self.cluster.sockets[0])
        return ShoalFileSystem(
            endpoint=endpoint or self.cluster.endpoint, socket=socket_path, local=local, skip_instance_cache=True
        )

    def footprint(self) -> Footprint:
        return Footprint.of(self.cluster, self.temporary)

    def wait_for_return(self, before: Footprint) -> None:
        Footprint.wait_for_return(self.cluster, self.temporary, before)

    @property
    def remote_port(self) -> int:
        port = urlsplit(self.cluster.node_endpoints[REMOTE]).port
        assert port
        return port

    def read(self, count: int, say: Say) -> None:
        """What a child does: read `count` objects over and over; say how many so far after each that was right."""
        fs = self.filesystem()
        for number, job in enumerate(itertools.islice(cycle(self.jobs, os.getpid()), count)):
            assert WAYS[job[1]](fs, job[0]) == self.expected[job], f"wrong bytes: {job}"
            say(number)

    def read_for_ever(self, say: Say) -> None:
        """The same without an end; a word only when every object was read once."""
        for path, way in self.jobs:
            if way == "open":
                assert WAYS[way](self.filesystem(), path) == self.expected[path, way]
        say("warm")
        self.read(1 << 60, lambda _: None)

    def read_when_told(self, say: Say) -> None:
        """The same, but after that word it waits for SIGUSR1."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})

        def told(word: str) -> None:
            say(word)
            signal.sigwait({signal.SIGUSR1})

        self.read_for_ever(told)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    origin, temporary = tmp_path_factory.mktemp("origin"), tmp_path_factory.mktemp("temporary")
    random = np.random.default_rng(4)
    for number in range(2):
        (origin / f"{number}.bin").write_bytes(random.bytes(20_000_011))
    with pa.ipc.new_file(origin / "2.arrow", pa.schema({"x": pa.binary()})) as file:
        file.write_batch(pa.record_batch({"x": pa.array([random.bytes(1 << 20) for _ in range(13)])}))
    with DevCluster(nodes=2, capacity="1GiB", data_dir=tmp_path_factory.mktemp("cluster")) as cluster:
        with Control(cluster.controller_grpc) as control:
            control.add_dataset("set", f"file://{origin}", shard_size=SHARD_SIZE, replicas=1, storage_options="{}")
            *_, job = control.watch_prefetch(control.start_prefetch("set", "").id)
            assert job.state == "done", job.reason
        world = World(cluster, origin, temporary)
        with Child(lambda say: world.read(len(world.jobs), lambda _: None)) as child:
            child.heard()  # whatever nodes do at a first read is done
        yield world


@pytest.fixture(autouse=True)
def own_temporary_directory(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """For us and our children: in the machine's own one others come and go."""
    monkeypatch.setattr("tempfile.tempdir", str(world.temporary))


@contextmanager
def somebody_else(world: World) -> Iterator[Callable[[], None]]:
    """Another trainer of the machine that reads all the time. What is given waits until it has read on."""
    with Child(lambda say: world.read(1 << 60, say)) as reader:
        reader.heard()

        def reads_on() -> None:
            while reader.has_said_more:
                reader.heard()
            reader.heard()  # one that was under way when this was called
            reader.heard()

        yield reads_on


def named_memory(pid: int) -> set[str]:
    """Files of a process that would outlive it in memory."""
    return {path for path in files_of(pid) if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}


def stop_within_a_body(world: World, child: Child) -> None:
    """Stop a child that reads, at a moment when bytes for it are under way from the other node."""
    process = psutil.Process(child.pid)

    def is_within() -> bool:
        process.suspend()
        inward, _ = bytes_under_way(child.pid, world.remote_port)
        if inward > 100_000:  # not a head alone
            return True
        process.resume()
        return False

    wait_for(is_within)


def test_killed_within_bodies(world: World) -> None:
    """With shards of the local node mapped and a body from the other one half received; again and again."""
    before = world.footprint()
    with somebody_else(world) as reads_on:
        for _ in range(5):
            with Child(world.read_for_ever) as child:
                assert child.heard() == "warm"
                stop_within_a_body(world, child)
                assert any("/shards/" in path for path in files_of(child.pid)), "no shard is mapped"
                assert not named_memory(child.pid)
                child.kill()
            reads_on()
    world.wait_for_return(before)


def test_killed_before_the_node_has_answered(world: World) -> None:
    """The node finds requests of readers that are dead already."""
    before = world.footprint()
    node = psutil.Process(world.cluster.nodes[REMOTE].pid)
    children = [Child(world.read_when_told) for _ in range(4)]
    try:
        assert [child.heard() for child in children] == ["warm"] * 4
        node.suspend()
        for child in children:
            os.kill(child.pid, signal.SIGUSR1)
            wait_for(lambda pid=child.pid: bytes_under_way(pid, world.remote_port)[1] > 0)  # type: ignore[misc]
            child.kill()
    finally:
        node.resume()
        for child in children:
            child.kill()
    world.wait_for_return(before)
    with Child(partial(world.read, len(world.jobs))) as child:
        child.heard()


class HoldingProxy(CountingProxy):
    """Holds back, but for its beginning, the answer to the first request that contains some bytes, and all after it."""

    BEGINNING = 512

    def __init__(self, target_url: str, request: bytes) -> None:
        self.is_asked, self.has_begun = threading.Event(), threading.Event()
        self._request = request
        self._may_go_on = threading.Event()
        super().__init__(target_url)

    def go_on(self) -> None:
        self._may_go_on.set()

    def __exit__(self, *about: Any) -> None:
        self.go_on()
        super().__exit__(*about)

    def _pump(self, source: socket.socket, sink: Any, inward: bool) -> None:
        super()._pump(source, _Sink(sink, self._hold if inward else self._look), inward)

    def _look(self, data: memoryview, send: Callable[[memoryview], None]) -> None:
        if self._request in bytes(data):
            self.is_asked.set()
        send(data)

    def _hold(self, data: memoryview, send: Callable[[memoryview], None]) -> None:
        if self.is_asked.is_set():
            send(data[: self.BEGINNING])
            self.has_begun.set()
            data = data[self.BEGINNING :]
            self._may_go_on.wait()
        send(data)


class _Sink:
    """A socket whose `sendall` is looked at."""

    def __init__(
        self, sock: socket.socket, on_send: Callable[[memoryview, Callable[[memoryview], None]], None]
    ) -> None:
        self.shutdown = sock.shutdown
        self.sendall = lambda data: on_send(data, sock.sendall)


def test_killed_while_its_shard_fills(world: World, s3: Weed) -> None:
    """The fill goes on without its reader: it is sealed, and the next reader has it without the origin."""
    data = np.random.default_rng(2).bytes(20_000_000)
    with HoldingProxy(s3.endpoint_url, b"GET /sets/killed/data/x") as proxy:
        dataset = S3Dataset("killed", s3, proxy.endpoint_url)
        dataset.put({"x": data})
        dataset.add(world.cluster, shard_size=SHARD_SIZE)
        read_from_s3_by_all_nodes(world, s3)  # the first use starts threads, with descriptors of their own
        before = world.footprint()
        with Child(lambda say: world.filesystem().cat_file("killed/x")) as child:
            wait_for(proxy.is_asked.is_set)
            wait_for(lambda: in_flight(world, "fills") == 2 and in_flight(world, "fetches") > 0)
            child.kill()
        proxy.go_on()
        wait_for(lambda: in_flight(world, "fills") == 0)
        proxy.reset()
        with Child(lambda say: world.filesystem().cat_file("killed/x") == data) as child:
            assert child.heard()
        assert proxy.bytes_from_origin == 0
    world.wait_for_return(before)


def read_from_s3_by_all_nodes(world: World, s3: Weed) -> None:
    dataset = S3Dataset("killed-before", s3, s3.endpoint_url)
    dataset.put({str(number): b"x" for number in range(16)})
    dataset.add(world.cluster)

    def read(say: Say) -> bytes:
        fs = world.filesystem()
        return b"".join(map(fs.cat_file, fs.find("killed-before")))

    with Child(read) as child:
        assert child.heard() == b"x" * 16


def in_flight(world: World, what: str) -> int:
    return sum(count for name, count in world.footprint().counts.items() if name.endswith(f"shoal_node_{what}"))


def test_killed_while_it_fetches_a_snapshot(world: World) -> None:
    """On a machine without a node the snapshot is a file that the user's processes share: whole, or not there."""
    before = world.footprint()
    with HoldingProxy(world.cluster.node_endpoints[0], b"GET /v1/snapshots/") as proxy:
        endpoint = proxy.endpoint_url

        def read(say: Say) -> None:
            world.filesystem(local=False, endpoint=endpoint).cat_file("set/0.bin")

        with Child(read) as child:
            assert proxy.has_begun.wait(DEADLINE_S)
            child.kill()
    world.wait_for_return(before)
    with Child(lambda say: world.filesystem(local=False).info("set/0.bin")["size"]) as child:
        assert child.heard() == 20_000_011


def test_killed_data_loader_worker(world: World) -> None:
    """The trainer is told, its other workers end, and the next epoch with new workers is whole."""
    before = world.footprint()

    def train(say: Say) -> None:
        fs = world.filesystem()
        loader = torch_data.DataLoader(
            Reads(fs, world.jobs * 20),
            num_workers=4,
            multiprocessing_context="fork",
            batch_size=None,
            timeout=DEADLINE_S,
        )
        read = iter(loader)
        _, _, worker = next(read)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"killed by signal: Killed|exited unexpectedly"):
            for _ in read:
                pass
        del read
        say("told")
        loader = torch_data.DataLoader(
            Reads(fs, world.jobs), num_workers=4, multiprocessing_context="fork", batch_size=None, timeout=DEADLINE_S
        )
        for index, found, _ in loader:
            assert found == world.expected[world.jobs[index]]
        say("read")

    with Child(train, has_children=True) as trainer:
        assert trainer.heard() == "told"
        assert trainer.heard() == "read"
    world.wait_for_return(before)


def test_killed_trainer_with_workers(world: World) -> None:
    """Its workers find out and go; what they and it had open goes with them."""
    before = world.footprint()

    def train(say: Say) -> None:
        loader = torch_data.DataLoader(
            Reads(world.filesystem(), world.jobs * 1000), num_workers=4, multiprocessing_context="fork", batch_size=None
        )
        workers = set()
        for _, _, worker in loader:
            workers.add(worker)
            if len(workers) == 4:
                say(workers)

    with Child(train, has_children=True) as trainer:
        workers = trainer.heard()
        trainer.kill()
    wait_for(lambda: not any(map(is_running, workers)))
    world.wait_for_return(before)
