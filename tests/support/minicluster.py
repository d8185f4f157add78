"""Cache nodes in this process, on real sockets and real files, without a controller.

For tests that need to choose what is cached, how small a part is, or what the origin does; tests of whole processes use
`shoal.devcluster`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from shoal import snapshot
from shoal.cluster_map import ClusterMap, NodeState
from shoal.datasets import DatasetRecord
from shoal.errors import OriginChanged, OriginUnavailable
from shoal.filesystem import ShoalFileSystem
from shoal.origin import ObjectInfo, Sink
from shoal.snapshot import Snapshot
from shoal.wire import batch, routes
from shoal.wire.http_server import HttpServer
from shoal_cachenode import data_routes, metrics
from shoal_cachenode.library import Knowledge, KnownDataset
from shoal_cachenode.node import CacheNode, Config
from shoal_cachenode.view import NodeView

T = TypeVar("T")


class DictOrigin:
    """An origin in memory that counts what is read, and can be told to fail."""

    url = "memory://set"
    endpoint = ""
    identity = "memory://"
    key_prefix = "set/"

    def __init__(self, objects: Mapping[str, bytes], versions: Mapping[str, str] | None = None) -> None:
        self.objects = dict(objects)
        self.versions = dict(versions or dict.fromkeys(objects, "1"))
        self.reads: list[tuple[str, int, int]] = []
        self.is_down = False
        self.reads_left: int | None = None  # then it is down; None: no such end
        self._lock = threading.Lock()  # guards reads, is_down and reads_left

    @property
    def bytes_read(self) -> int:
        return sum(end - start for _, start, end in self.reads)

    def list(self) -> Iterator[list[ObjectInfo]]:
        yield [ObjectInfo(path, len(data), self.versions[path]) for path, data in self.objects.items()]

    def read(self, path: str, version: str, start: int, end: int) -> bytes:
        with self._lock:
            if self.reads_left is not None:
                self.is_down = self.is_down or self.reads_left == 0
                self.reads_left = max(0, self.reads_left - 1)
            if self.is_down:
                raise OriginUnavailable("the origin is down")
        if self.versions.get(path) != version:
            raise OriginChanged(f"{path} has changed: run 'shoal dataset refresh NAME'")
        with self._lock:
            self.reads.append((path, start, end))
        return self.objects[path][start:end]

    def stream(self, path: str, version: str, start: int, end: int, sink: Sink) -> None:
        data = memoryview(self.read(path, version, start, end))
        for offset in range(0, len(data), 24):  # in pieces, as a real one does
            sink(data[offset : offset + 24])

    def close(self) -> None:
        pass


class MiniCluster:
    """`nodes` cache nodes that serve the dataset ``set`` of `objects`, and clients for them.

    Args:
        directory: of the nodes' data; a second cluster over the same one is a restart.
        part_size, shard_size: bytes.
        capacity_bytes: of each node.
        versions: of the objects, and `origin_url`: where a client finds them too, when no node answers and `direct`.
        settings: more of each node's `Config`.
    """

    def __init__(
        self,
        directory: Path,
        objects: Mapping[str, bytes],
        *,
        nodes: int = 1,
        part_size: int = 64,
        shard_size: int = 4096,
        replicas: int = 1,
        capacity_bytes: int = 1 << 30,
        versions: Mapping[str, str] | None = None,
        origin_url: str = DictOrigin.url,
        direct: bool = False,
        **settings: Any,
    ) -> None:
        self.origin = DictOrigin(objects, versions)
        self._origin_url, self._direct = origin_url, direct
        self.directory = directory
        self.replicas = replicas
        self._ended: set[int] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        rows = [(i.path, i.size_bytes, i.version) for batch in self.origin.list() for i in batch]
        directory.mkdir(exist_ok=True)
        path = snapshot.write(
            directory,
            origin=self.origin.url,
            identity=self.origin.identity,
            key_prefix=self.origin.key_prefix,
            shard_size=shard_size,
            rows=rows,
        )
        self.snapshot = Snapshot.open(path)
        self.nodes: list[CacheNode] = []
        self.servers: list[HttpServer] = []
        settings = {"fetches": 4, "part_size": part_size, "scrub_rate": 0} | settings  # no read that no test asked for
        self._configs = [
            Config(directory / f"node{i}", capacity_bytes, {"host": f"h{i}"}, **settings) for i in range(nodes)
        ]
        for index in range(nodes):
            node, server = self.run(self._start(index, 0))
            self.nodes.append(node)
            self.servers.append(server)
        self.epoch = 0
        self.publish()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the nodes' loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(60)

    async def _start(self, index: int, port: int) -> tuple[CacheNode, HttpServer]:
        config = self._configs[index]
        node = CacheNode(config)
        node.library.origin = lambda known: self.origin  # type: ignore[method-assign, assignment, return-value]
        name = f"{self.snapshot.digest}.arrow"
        (config.data_dir / "snapshots" / name).write_bytes((self.directory / name).read_bytes())
        view = NodeView(node, SimpleNamespace(is_connected=True))  # type: ignore[arg-type]
        server = HttpServer(
            routes.make_handler(view, lambda: metrics.exposition(node, server), data_routes.make_handler(node)),
            epoch=view.epoch,
            max_body=batch.MAX_REQUEST_BYTES,
        )
        node.address = f"127.0.0.1:{await server.listen_tcp('127.0.0.1', port)}"
        await server.listen_unix(self._socket(index))
        return node, server

    def _socket(self, index: int) -> Path:
        return self.directory / f"{index}.sock"

    def publish(self, *, absent: tuple[int, ...] = (), states: Mapping[int, NodeState] | None = None) -> None:
        """Give every node a new map, without the nodes `absent`; `states` are those of nodes that are not up."""
        self.epoch += 1
        members = [
            dataclasses.replace(n.describe(), state=(states or {}).get(i, NodeState.UP))
            for i, n in enumerate(self.nodes)
            if i not in absent
        ]
        cluster_map = ClusterMap(self.epoch, tuple(sorted(members, key=lambda n: n.id)))
        for index in range(len(self.nodes)):
            self.deliver(index, cluster_map)

    def deliver(self, index: int, cluster_map: ClusterMap) -> None:
        """Give one node a map."""
        record = DatasetRecord(
            name="set",
            origin=self._origin_url,
            endpoint="",
            direct=self._direct,
            shard_size=self.snapshot.shard_size,
            replicas=self.replicas,
            snapshot=self.snapshot.digest,
            snapshots=(self.snapshot.digest,),
            objects=len(self.snapshot),
            total_bytes=self.snapshot.total_bytes,
        )
        knowledge = Knowledge(cluster_map, (KnownDataset(record, {}),), cluster_id="test")
        self.run(self.nodes[index].apply(knowledge))

    def filesystem(self, *, node: int = 0, local: bool = False, **options: Any) -> ShoalFileSystem:
        """A client of its own, whose endpoint (and local node, with `local`) is one of the nodes."""
        return ShoalFileSystem(
            endpoint=self.nodes[node].address,
            socket=str(self._socket(node)),
            local=local,
            skip_instance_cache=True,
            **options,
        )

    def stop_node(self, index: int) -> None:
        """Stop answering on a node's sockets; the map still names it."""
        self.run(self.servers[index].close())

    def end_node(self, index: int) -> None:
        """End a node within whatever it does: its fills stay as far as they came. `start_node` brings it back."""
        self.run(self.servers[index].close())
        self.run(_end(self.nodes[index]))
        self._ended.add(index)

    def start_node(self, index: int) -> None:
        """Start a node that was ended, over its directory, at its old address, with the orders it had."""
        port = int(self.nodes[index].address.rpartition(":")[2])
        self.nodes[index], self.servers[index] = self.run(self._start(index, port))
        self._ended.discard(index)

    def data_dir(self, index: int) -> Path:
        """Of a node."""
        return self._configs[index].data_dir

    def close(self) -> None:
        """Stop everything and check that nothing is left in flight."""
        for index, (node, server) in enumerate(zip(self.nodes, self.servers, strict=True)):
            if index in self._ended:
                continue
            self.run(server.close())
            self.run(_settle(node))
            assert (node.fills.count, node.fills.fetches_in_flight) == (0, 0), "a fill was left running"
            self.run(node.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> MiniCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


async def _settle(node: CacheNode) -> None:
    """Wait for the fills, the moves among them at full speed: some tests give them a pace that never ends."""
    await node.rebalance.close()  # or it begins a move as soon as the last one is over
    node.fills._scheduler._pace = None
    node.fills.on_room()
    with contextlib.suppress(TimeoutError):  # whoever called says what was left
        async with asyncio.timeout(10):
            while node.fills.count:
                await node.fills.settle()
                await asyncio.sleep(0)  # a fill that only begins has nobody yet who waits for its end


async def _end(node: CacheNode) -> None:
    """Close a node. Unlike those of a process that dies, its threads have to be waited for: they write files."""
    scheduler = node.fills._scheduler
    await node.close()
    for threads in (scheduler._threads, scheduler._movers):
        assert await asyncio.to_thread(threads.join, 60)
    await asyncio.to_thread(scheduler._sealers.shutdown, wait=True)
