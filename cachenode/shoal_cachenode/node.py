"""A cache node's parts, put together, and the decisions that need several of them: who fills, from where, into what.

The rule: the node answers every read it can answer. A full or sick drive, a missing controller or a map that names
nobody changes where the bytes come from, never whether they come.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from shoal import shard_client
from shoal.cluster_map import Node as MapNode
from shoal.cluster_map import NodeState
from shoal.errors import ClusterUnavailable, ShoalError
from shoal.shards import PART_SIZE, Key
from shoal.transport import Transport
from shoal_cachenode.fill import Fill, Fills, Urgency
from shoal_cachenode.holdings import Holdings
from shoal_cachenode.inventory import Inventory
from shoal_cachenode.library import Knowledge, Library, ShardSpec
from shoal_cachenode.source import Counter, FirstThatHasIt, OriginSource, PeerSource, Source
from shoal_cachenode.store import Store, StoreFull

log = logging.getLogger(__name__)

#: Nodes that are asked for a shard they do not own before the origin is: after a map change they are its last owners.
FORMER_OWNERS_ASKED = 2
#: The longest silence of a peer that answers probes: it may be waiting for a slow origin.
PEER_TIMEOUT_S = 20.0
#: Reads that pass through at a time. Each has a thread as long as its reader takes, so they are not the default ones,
#: which short work waits for: opening a file, sending from a cold one.
THROUGH_THREADS = 64


@dataclass(frozen=True, slots=True)
class Config:
    """What a cache node is started with.

    Attributes:
        advertise: ``host:port`` of the data plane, as others reach it.
        fetches: part fetches at a time; with the part size this bounds the memory of fills.
    """

    data_dir: Path
    capacity_bytes: int
    topology: Mapping[str, str] = field(default_factory=dict)
    fetches: int = 16
    part_size: int = PART_SIZE


@dataclass(frozen=True, slots=True)
class Counters:
    """Bytes by where they came from, since the start."""

    origin_bytes: Counter = field(default_factory=Counter)
    peer_bytes: Counter = field(default_factory=Counter)
    served_sealed_bytes: Counter = field(default_factory=Counter)
    served_filling_bytes: Counter = field(default_factory=Counter)
    served_through_bytes: Counter = field(default_factory=Counter)
    descriptors: Counter = field(default_factory=Counter)
    fills_failed: Counter = field(default_factory=Counter)
    shards_corrupt: Counter = field(default_factory=Counter)


class CacheNode:
    """The state of one cache node. Made on a running event loop."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.counters = Counters()
        self.store = Store(config.data_dir, config.capacity_bytes, part_size=config.part_size)
        self.transport = Transport(read_timeout_s=PEER_TIMEOUT_S)
        self.library = Library(config.data_dir, self.transport)
        self.inventory = Inventory(self.store)
        self.fills = Fills(self.store, config.fetches, on_sealed=self._on_sealed)
        self.id = self.store.node_id
        self.address = ""
        self.disk_fault = ""
        self._room = asyncio.Lock()  # one search for room at a time: two would drop twice what is needed
        self._checks: dict[Key, asyncio.Task[None]] = {}
        self._on_knowledge: list[Callable[[], None]] = []
        self.through_threads = ThreadPoolExecutor(THROUGH_THREADS, thread_name_prefix="through")
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32, thread_name_prefix="io"))

    @property
    def condition(self) -> str:
        """``ok``, or why reads pass through."""
        if self.disk_fault:
            return f"passing reads through: {self.disk_fault}"
        return "ok" if self.store.free_bytes > 0 else "full"

    def describe(self) -> MapNode:
        """This node as it wants to stand in the map."""
        return MapNode(self.id, self.address, self.config.capacity_bytes, dict(self.config.topology), NodeState.UP)

    def on_knowledge(self, callback: Callable[[], None]) -> None:
        """Call `callback` on the loop after new orders were applied."""
        self._on_knowledge.append(callback)

    async def apply(self, knowledge: Knowledge) -> None:
        """Take new orders: keep them, fetch new snapshots, drop what no dataset names any more."""
        before = self.library.knowledge
        if knowledge == before:
            return
        for digest in knowledge.newest() - before.newest():
            # Before the dataset is told of: who sees it here can then read it here, whatever becomes of the controller.
            try:
                await self.library.snapshot_path(digest, knowledge)
            except ShoalError as error:
                log.warning("snapshot %s is not to be had yet: %s", digest, error)
        await asyncio.to_thread(self.library.apply, knowledge)
        served = knowledge.snapshots()
        self.inventory.forget(served)
        if knowledge.cluster_id == before.cluster_id and before.snapshots() - served:
            # Only a controller that once told of a dataset may take it away: one that lost its disk knows of none.
            for digest in served:
                await self.holdings_of(digest)
            freed = await asyncio.to_thread(self.inventory.drop_unserved, served)
            log.info("dropped %d bytes of datasets and snapshots that are gone", freed)
        for callback in self._on_knowledge:
            callback()

    async def holdings_of(self, digest: str) -> Holdings | None:
        """What is held of a snapshot; None where nobody has the snapshot now."""
        try:
            opened = await self.library.snapshot(digest)
        except ShoalError as error:
            log.warning("snapshot %s is not to be had: %s", digest, error)
            return None
        return await asyncio.to_thread(self.inventory.of, opened)

    def order(self, spec: ShardSpec) -> tuple[MapNode, ...]:
        """Owners of a shard, then everybody else; empty while the map names nobody."""
        try:
            placement = self.library.placement(spec.snapshot, spec.dataset.record.replicas)
            return placement.order(spec.ordinal, spec.key)
        except ClusterUnavailable:
            return ()

    def rank(self, order: tuple[MapNode, ...]) -> int | None:
        """This node's place in an order; None where it is not in it."""
        return next((rank for rank, node in enumerate(order) if node.id == self.id), None)

    def source(
        self, spec: ShardSpec, order: tuple[MapNode, ...], avoid: frozenset[str] = shard_client.NOBODY
    ) -> Source:
        """Where a fill of `spec` here reads: owners before this one, then whoever may still hold it, then the origin.

        Args:
            avoid: nodes that did not answer whoever asks.

        May block while the origin is opened.
        """
        replicas = min(spec.dataset.record.replicas, len(order))
        rank = self.rank(order)
        peers: list[Source] = []
        if rank is not None:
            before = [node for node in order[: min(rank, replicas)] if not self.is_avoided(node, avoid)]
            peers += [self.peer(node, spec, cached_only=False, avoid=avoid) for node in before]
        former = [node for node in order[min(rank or 0, replicas) :] if node.id != self.id][
            : replicas - 1 + FORMER_OWNERS_ASKED
        ]
        former += [n for n in self.library.knowledge.cluster_map.nodes if n.state is NodeState.DRAINING]
        former = [node for node in former if node.id != self.id and not self.is_avoided(node, avoid)]
        peers += [self.peer(node, spec, cached_only=True) for node in former]
        return FirstThatHasIt(peers, self.origin_source(spec))

    def is_avoided(self, node: MapNode, avoid: frozenset[str]) -> bool:
        """Whether a node is not to be waited for: it did not answer whoever asks, or does not answer this one."""
        return node.id in avoid or self.transport.health.is_open(node.address)

    def peer(
        self,
        node: MapNode,
        spec: ShardSpec,
        *,
        cached_only: bool,
        avoid: frozenset[str] = shard_client.NOBODY,
        until: float = math.inf,
    ) -> PeerSource:
        counter = self.counters.peer_bytes
        return PeerSource(self.transport, node.address, spec.at, self.id, cached_only, counter, avoid, until)

    def origin_source(self, spec: ShardSpec) -> Source:
        opened = self.library.origin(spec.dataset)
        row = spec.row
        return OriginSource(
            opened, spec.snapshot.path(row), spec.snapshot.version(row), spec.offset, self.counters.origin_bytes
        )

    async def fill(
        self,
        spec: ShardSpec,
        order: tuple[MapNode, ...],
        urgency: Urgency,
        start: int = 0,
        avoid: frozenset[str] = shard_client.NOBODY,
    ) -> Fill:
        """The one fill of a shard, with room made for it; a new one begins with the part that byte `start` is in.

        Raises:
            AlreadySealed: another fill was faster.
            StoreFull: there is no room, and none can be made.
            DiskFailed: the drive is sick.
            ShoalError: the origin's options are wrong.
        """
        running = self.fills.running(spec.key)
        if running is not None:
            return running
        if self.library.has_opened_origin(spec.dataset):
            source = self.source(spec, order, avoid)
        else:
            source = await asyncio.to_thread(self.source, spec, order, avoid)
        first = start // self.config.part_size
        try:
            return await self.fills.join(spec.key, spec.size_bytes, source, urgency, first)
        except StoreFull:
            if not await self.make_room(spec.size_bytes):
                raise
        return await self.fills.join(spec.key, spec.size_bytes, source, urgency, first)

    async def check(self, key: Key) -> None:
        """Verify a sealed shard, and drop it where it is bad: it is fetched anew by whoever asks next.

        Once for all who ask at a time: readers of one bad shard find it together.
        """
        task = self._checks.get(key)
        if task is None:
            task = self._checks[key] = asyncio.create_task(self._check(key))
            task.add_done_callback(lambda _: self._checks.pop(key))
        await asyncio.shield(task)

    async def _check(self, key: Key) -> None:
        if not await asyncio.to_thread(self.store.verify, key):
            log.error("shard %s is damaged on the drive: dropped", key.hex())
            self.counters.shards_corrupt.add(1)
            await asyncio.to_thread(self.inventory.drop, key)

    async def make_room(self, size_bytes: int) -> bool:
        """Drop what may be dropped until `size_bytes` are free; whether they are."""
        knowledge = self.library.knowledge
        served = knowledge.snapshots()
        async with self._room:
            for digest in served:
                if await self.holdings_of(digest) is None:
                    return False  # without its listing nobody can say which files a dataset still needs
            return await asyncio.to_thread(
                self.inventory.make_room, size_bytes, served=served, newest=knowledge.newest()
            )

    def _on_sealed(self, key: Key) -> None:
        self.disk_fault = ""
        self.inventory.sealed(key)

    async def close(self) -> None:
        await self.fills.close()
        self.through_threads.shutdown(wait=False)
        self.transport.close()
        await asyncio.to_thread(self.store.close)
